"""A TCP proxy that loses connectivity on command: what a cable, a firewall or a dead host does.

Stands between a client and a server in tests. Owns the ways to be gone: silent (packets are
dropped, nothing is closed), silent on the way back only, and cut (connections end, new ones are
refused).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream, TaskGroup

_CHUNK_BYTES = 65536


class LosingProxy:
    """One listening port in front of one server. Made by ``losing_proxy``."""

    def __init__(self, host: str, port: int, task_group: TaskGroup) -> None:
        self._server = (host, port)
        self._task_group = task_group
        self._listening: anyio.CancelScope | None = None
        self._ended = anyio.Event()
        self._accepted = anyio.Event()
        self._there = _Gate()
        self._back = _Gate()
        #: Where clients connect.
        self.host = "127.0.0.1"
        self.port = 0
        #: Connections accepted so far.
        self.accepted_count = 0

    def lose(self) -> None:
        """Go silent: connections stay open and are accepted, but no byte passes."""
        self._there.shut()
        self._back.shut()

    def lose_replies(self) -> None:
        """Go silent in one direction: the server hears everything, the client nothing."""
        self._back.shut()

    async def cut(self) -> None:
        """End all connections and refuse new ones."""
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None
            await self._ended.wait()

    async def restore(self) -> None:
        """Be a proxy again; what was held back while silent is delivered now."""
        self._there.open()
        self._back.open()
        if self._listening is None:
            await self._task_group.start(self._listen)

    async def wait_accepted(self, count: int) -> None:
        """Return when so many connections were accepted in all."""
        while self.accepted_count < count:
            await self._accepted.wait()

    async def _listen(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self._ended = anyio.Event()
        with anyio.CancelScope() as self._listening:
            async with await anyio.create_tcp_listener(
                local_host=self.host, local_port=self.port, reuse_port=False
            ) as listener:
                self.port = listener.extra(SocketAttribute.local_port)
                async with anyio.create_task_group() as connections:
                    task_status.started()
                    await listener.serve(self._connect, connections)
        self._ended.set()

    async def _connect(self, client: SocketStream) -> None:
        self.accepted_count += 1
        accepted, self._accepted = self._accepted, anyio.Event()
        accepted.set()
        async with client:
            await self._there.wait()
            try:
                server = await anyio.connect_tcp(*self._server)
            except OSError:
                return  # the client sees its connection end, as it would without us
            async with server, anyio.create_task_group() as ways:
                ways.start_soon(_pass, client, server, self._there)
                await _pass(server, client, self._back)
                ways.cancel_scope.cancel()


class _Gate:
    def __init__(self) -> None:
        self._open = anyio.Event()
        self._open.set()

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        if self._open.is_set():
            self._open = anyio.Event()

    async def wait(self) -> None:
        await self._open.wait()


async def _pass(source: ByteStream, sink: ByteStream, gate: _Gate) -> None:
    try:
        while True:
            data = await source.receive(_CHUNK_BYTES)
            await gate.wait()
            await sink.send(data)
    except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
        await gate.wait()
        await sink.aclose()


@asynccontextmanager
async def losing_proxy(host: str, port: int) -> AsyncIterator[LosingProxy]:
    """Run a proxy in front of ``host``:``port`` until the block ends."""
    async with anyio.create_task_group() as task_group:
        proxy = LosingProxy(host, port, task_group)
        await proxy.restore()
        try:
            yield proxy
        finally:
            task_group.cancel_scope.cancel()

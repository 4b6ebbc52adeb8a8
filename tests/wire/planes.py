"""Both data planes, each before a runtime of the test's own, for what must be the same in them."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from mm.edge.h2 import SERVING_LIMITS
from mm.wire.addresses import Target, unix_sockaddr
from tests.edge.raw_h2 import PeerClosedError, RawPeer
from tests.edge.upstream import FakeRouter, serve_proxy
from tests.wire.stand import WireStand, serve_wire

PLANES = ("wire", "python")
Serve = Callable[[RawPeer], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Plane:
    """A data plane that serves."""

    port: int
    #: That of tier 2, which is all there is of the other plane.
    router: FakeRouter
    #: None: the Python data plane.
    wire: WireStand | None


@contextmanager
def no_file_descriptor_left() -> Iterator[None]:
    """No connection can be taken meanwhile, nor anything else be opened by this process."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


@asynccontextmanager
async def serve_plane(
    kind: str,
    *,
    runtime_port: int | None = None,
    runtime_path: str | None = None,
    quiet_s: float = 60.0,
    quiet_answer_s: float = 240.0,
) -> AsyncIterator[Plane]:
    """A data plane; model "m" is ready here. What failed at the runtime is not tried again."""
    if kind == "python":
        address = f"unix:{runtime_path}" if runtime_path else None
        if runtime_port is not None:
            address = f"127.0.0.1:{runtime_port}"
        limits = replace(SERVING_LIMITS, quiet_s=quiet_s, quiet_answer_s=quiet_answer_s)
        async with serve_proxy(runtime_address=address, runtime_limits=limits) as stand:
            yield Plane(stand.port, stand.router, None)
        return
    async with serve_wire(runtime_port=runtime_port) as stand:
        stand.configure(quiet_ms=int(1000 * quiet_s), quiet_answer_ms=int(1000 * quiet_answer_s))
        if runtime_path is not None:
            stand.wire.set_runtime(Target("localhost", unix_sockaddr(runtime_path)))
        yield Plane(stand.port, stand.router, stand)


@asynccontextmanager
async def serve_at(path: str, serve: Serve) -> AsyncIterator[list[RawPeer]]:
    """A runtime of raw frames at a Unix socket, in place of whoever was there."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(16)
    async with serve_on(sock, serve) as peers:
        yield peers


@asynccontextmanager
async def serve_on(sock: socket.socket, serve: Serve) -> AsyncIterator[list[RawPeer]]:
    """A runtime of raw frames on a Unix socket that listens."""
    peers: list[RawPeer] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        peers.append(RawPeer(reader, writer, client_side=False))
        try:
            with suppress(PeerClosedError, asyncio.CancelledError):
                await serve(peers[-1])
        finally:
            writer.close()

    server = await asyncio.start_unix_server(accept, sock=sock)
    try:
        yield peers
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

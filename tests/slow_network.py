"""A network that is slow: a proxy that holds every byte back for a while, and lets through so many.

What gets lost for good is ``mm.testing.losing_proxy``'s. Kernels of small machines have no netem.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

_READ_BYTES = 16_384


@asynccontextmanager
async def slow_network(port: int, *, delay_s: float, bytes_per_s: float) -> AsyncIterator[int]:
    """Stand before a port of this machine; yields the port to call instead."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def carry(
        reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        data = b"-"
        while data:
            data = await reader.read(_READ_BYTES)
            await queue.put((loop.time() + delay_s, data))

    async def deliver(
        queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        free_s = 0.0
        while True:
            due_s, data = await queue.get()
            free_s = max(due_s, free_s) + len(data) / bytes_per_s
            on_its_way: asyncio.Future[None] = loop.create_future()
            loop.call_at(free_s, _arrive, on_its_way)
            await on_its_way
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, there_writer))
        there: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        back: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        for work in (
            carry(reader, there),
            deliver(there, there_writer),
            carry(there_reader, back),
            deliver(back, writer),
        ):
            tasks.add(loop.create_task(_until_lost(work)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def _until_lost(work: Coroutine[Any, Any, None]) -> None:
    with suppress(ConnectionError):
        await work


def _arrive(on_its_way: asyncio.Future[None]) -> None:
    if not on_its_way.done():
        on_its_way.set_result(None)

"""Calls of our client end to raw servers, and the shortest server there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from mm.core.headers import HeaderList
from mm.edge.h2 import RUNTIME_LIMITS, Channel
from mm.edge.h2.messages import frame_message
from mm.edge.unary import Answer, exchange, request_headers
from tests.edge.raw_h2 import PATIENCE_S, RawPeer

OK: HeaderList = [(b":status", b"200"), (b"content-type", b"application/grpc")]


@asynccontextmanager
async def open_channel(address: str, **limits: float) -> AsyncIterator[Channel]:
    channel = Channel(address, replace(RUNTIME_LIMITS, **limits))  # type: ignore[arg-type]
    try:
        yield channel
    finally:
        await channel.close()


def start_call(channel: Channel) -> asyncio.Task[Answer]:
    headers = request_headers(channel, "/t.S/M", None)
    return asyncio.ensure_future(exchange(channel, headers, frame_message(b"q")))


async def finish(task: asyncio.Task[Answer]) -> Answer:
    return await asyncio.wait_for(task, PATIENCE_S)


def send_answer(peer: RawPeer, stream_id: int, body: bytes = b"a") -> None:
    peer.h2.send_headers(stream_id, OK)
    peer.h2.send_data(stream_id, frame_message(body))
    peer.h2.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
    peer.flush()


async def serve_all(peer: RawPeer) -> None:
    peer.start()
    while True:
        send_answer(peer, await peer.wait_ended())


async def wait_links(channel: Channel, count: int) -> None:
    while len(channel.links) != count:
        waiter = asyncio.get_running_loop().create_future()
        channel._waiters[waiter] = None
        done, _ = await asyncio.wait((waiter,), timeout=PATIENCE_S)
        assert done

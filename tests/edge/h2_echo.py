"""A server whose calls can be held, counted and seen to end, for raw clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer, IncomingCall, TransportLimits
from mm.edge.h2.messages import frame_message
from mm.edge.unary import read_request, send_reply
from tests.edge.raw_h2 import RawPeer


class Echo:
    """A handler whose calls can be held, counted and seen to be cancelled."""

    def __init__(self) -> None:
        self.reply: bytes | None = None
        self.gate: asyncio.Event | None = None
        self.running = 0
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self, call: IncomingCall) -> None:
        self.running += 1
        self.started.set()
        try:
            message = await read_request(call)
            if self.gate is not None:
                await self.gate.wait()
            send_reply(call, message if self.reply is None else self.reply)
        finally:
            self.running -= 1
            self.ended.set()


@asynccontextmanager
async def serve_echo(
    limits: TransportLimits = EXTERNAL_LIMITS,
) -> AsyncIterator[tuple[GrpcServer, int, Echo]]:
    echo = Echo()
    server = GrpcServer(echo, limits=limits, external=True)
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port, echo
    finally:
        await server.stop(0)


async def assert_serves(peer: RawPeer, text: bytes = b"still here") -> None:
    stream_id = peer.begin()
    peer.send(stream_id, frame_message(text), end=True)
    headers, body = await peer.wait_answer(stream_id)
    assert headers[b"grpc-status"] == b"0"
    assert body == frame_message(text)


async def wait_started(echo: Echo, peer: RawPeer) -> None:
    await peer.writer.drain()
    await echo.started.wait()

"""The time that a call has left: tier 2 hears of it; before that the wire holds the call to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest
from h2.events import RequestReceived

from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from mm.table import Table
from mm.wire import Method, Role, Wire, WireSettings
from tests.edge.raw_h2 import RawPeer, connect
from tests.wire.frames import request
from tests.wire.stand import until

pytestmark = pytest.mark.anyio
HOUR = (b"grpc-timeout", b"1H")
UNNAMED: HeaderList = [each for each in request() if each[0] != b"mm-model-id"]


@asynccontextmanager
async def before_tier2() -> AsyncIterator[tuple[Wire, int, RawPeer]]:
    """A wire that reads ids from messages, and tier 2, which has not said anything yet."""
    ends: list[socket.socket] = []

    def new_tier2(_role: Role, _own: bool) -> socket.socket:
        ours, theirs = socket.socketpair()
        ends.append(ours)
        return theirs

    wire = Wire(1, new_tier2)
    wire.start(WireSettings(table=Table(10), others=Method(extraction_path=(1,))))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    wire.listen(listener, Role.EXTERNAL)
    for_models, for_us = ends
    reader, writer = await asyncio.open_connection(sock=for_models)
    try:
        with closing(for_us):
            yield wire, port, RawPeer(reader, writer, client_side=False)
    finally:
        await asyncio.to_thread(wire.close)
        writer.close()


@pytest.mark.parametrize("waits_for", ["message", "connection"])
async def test_tier_2_hears_how_much_time_is_left_of_a_call_that_has_waited(waits_for: str) -> None:
    async with before_tier2() as (wire, port, tier2), connect(port) as client:
        if waits_for == "message":
            stream_id = client.begin([*UNNAMED, HOUR])
            await until(lambda: wire.statistics().calls == 1)
            client.send(stream_id, frame_message(b"\x0a\x01x"), end=True)
        else:
            client.begin([*request(), HOUR], end=True)
            await until(lambda: wire.statistics().connect_waiting == 1)
        tier2.start()
        asked = await tier2.wait_for(RequestReceived)
        left = dict(asked.headers)[b"grpc-timeout"]  # type: ignore[arg-type]
        assert left.endswith(b"m")
        assert 3_500_000 < int(left[:-1]) < 3_600_000


async def test_a_call_that_waits_for_tier_2_ends_when_its_time_is_up() -> None:
    async with before_tier2() as (wire, port, _), connect(port) as client:
        stream_id = client.begin([*request(), (b"grpc-timeout", b"20m")], end=True)
        headers, _ = await client.wait_answer(stream_id)
        assert headers[b"grpc-status"] == b"4"
        assert (wire.statistics().deadlines, wire.statistics().connect_waiting) == (1, 0)

"""Large bodies through the wire: every byte in its place, however it was read and written."""

from __future__ import annotations

import asyncio
import random

import grpc.aio
import pytest
from h2.events import DataReceived, StreamEnded

from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import OK, begin
from tests.wire.stand import serve_wire

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)
#: About what is copied, what is pointed at, what a frame, a read and a window hold.
SIZES = (0, 1, 100, 2043, 2044, 5_000, 16_379, 16_384, 40_000, 65_531, 131_072, 300_000)


async def test_streams_of_all_sizes_side_by_side() -> None:
    async def converse(client: grpc.aio.Channel, number: int) -> None:
        rng = random.Random(number)
        both = client.stream_stream("/t.S/Both")(metadata=ID)
        for _ in range(6):
            bodies = [rng.randbytes(rng.choice(SIZES)) for _ in range(rng.randint(1, 3))]
            for body in bodies:
                await both.write(body)
            for body in bodies:
                assert await both.read() == b"re:" + body
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF

    async def ask(client: grpc.aio.Channel, number: int) -> None:
        body = random.Random(-number).randbytes(SIZES[number % len(SIZES)])
        assert await client.unary_unary("/t.S/Unary")(body, metadata=ID) == b"echo:" + body

    async with serve_wire() as stand:
        own = [("grpc.use_local_subchannel_pool", 1)]
        async with stand.client(options=own) as one, stand.client(options=own) as other:
            async with asyncio.TaskGroup() as group:
                for number in range(12):
                    group.create_task(converse((one, other)[number % 2], number))
                    group.create_task(ask((one, other)[number % 2], number))
        await stand.settle(calls=24, calls_here=24, calls_open=0)
        assert stand.counts.calls_open == 0


async def test_answers_for_clients_that_take_them_by_and_by() -> None:
    """A window of 65,535 bytes for all, so most of what is read is for later turns."""
    answers = [random.Random(number).randbytes(200_000 + number) for number in range(4)]

    async def serve(peer: RawPeer) -> None:
        peer.start()
        for number in range(len(answers)):
            await peer.wait_for(StreamEnded)
            peer.h2.send_headers(2 * number + 1, OK)
        left = {2 * number + 1: frame_message(each) for number, each in enumerate(answers)}
        while left:
            for stream_id, body in list(left.items()):
                size = min(9_000, peer.h2.local_flow_control_window(stream_id), len(body))
                peer.h2.send_data(stream_id, body[:size])
                left[stream_id] = body[size:]
                if not left[stream_id]:
                    peer.h2.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
                    del left[stream_id]
            peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _):
        port = int(address.rpartition(":")[2])
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            streams = [begin(client) for _ in answers]
            got = dict.fromkeys(streams, b"")
            while any(len(got[s]) < len(a) + 5 for s, a in zip(streams, answers, strict=True)):
                event = await client.wait_for(DataReceived)
                assert event.stream_id is not None
                got[event.stream_id] += event.data or b""
                client.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                client.flush()
            for stream_id, expected in zip(streams, answers, strict=True):
                assert got[stream_id] == frame_message(expected)

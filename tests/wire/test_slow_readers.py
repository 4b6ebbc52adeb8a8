"""Clients that do not read: what waits for them is bounded, and the others do not wait."""

from __future__ import annotations

import struct

import pytest
from h2.errors import ErrorCodes
from h2.events import StreamEnded, StreamReset

from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import OK, answer, begin
from tests.wire.stand import serve_wire, until

pytestmark = pytest.mark.anyio
WINDOW_BYTES = 262_144
FRAME_BYTES = 16_384
LIMITS = {"message_bytes_max": 2**31 - 1}


def pour(peer: RawPeer, stream_id: int) -> None:
    """Begin an answer and fill its stream's window, past h2, which takes long for much."""
    peer.h2.send_headers(stream_id, OK)
    peer.flush()
    assert peer.h2.local_flow_control_window(stream_id) >= WINDOW_BYTES, "others take the room"
    head = struct.pack(">HBBBI", FRAME_BYTES >> 8, FRAME_BYTES & 0xFF, 0, 0, stream_id)
    message = b"\0" + (2**30).to_bytes(4, "big") + bytes(FRAME_BYTES - 5)
    peer.writer.write(head + message + (WINDOW_BYTES // FRAME_BYTES - 1) * (head + message))
    peer.h2.outbound_flow_control_window -= WINDOW_BYTES
    peer.h2.streams[stream_id].outbound_flow_control_window -= WINDOW_BYTES


async def serve(peer: RawPeer, slow: list[int], slow_count: int) -> None:
    """Pour to so many, and answer the next."""
    peer.start(streams_max=1000)
    while True:
        event = await peer.wait_for(StreamEnded)
        assert event.stream_id is not None
        if len(slow) < slow_count:
            pour(peer, event.stream_id)
            slow.append(event.stream_id)
            await peer.writer.drain()
        else:
            answer(peer, event.stream_id)


async def test_however_many_do_not_read_the_others_get_their_answers() -> None:
    """On one connection to the runtime, and more than 64 MiB of them."""
    slow: list[int] = []
    count = 300
    async with listen(lambda peer: serve(peer, slow, count)) as (address, peers):
        port = int(address.rpartition(":")[2])
        async with serve_wire(runtime_port=port, **LIMITS) as stand:
            async with connect(stand.port) as client, connect(stand.port) as other:
                for _ in range(count):
                    begin(client)
                await until(lambda: len(slow) == count)
                assert (await other.wait_answer(begin(other)))[1] == frame_message(b"a")
                assert (len(peers), stand.counts.slow_given_up) == (1, 0)


async def test_beyond_the_bound_who_has_taken_nothing_for_the_longest_is_given_up() -> None:
    slow: list[int] = []
    count = 6
    async with listen(lambda peer: serve(peer, slow, count)) as (address, peers):
        port = int(address.rpartition(":")[2])
        async with serve_wire(runtime_port=port, **LIMITS) as stand:
            stand.configure(answer_bytes_max=4 * WINDOW_BYTES)
            async with connect(stand.port) as client, connect(stand.port) as other:
                streams: list[int] = []
                while len(streams) < count:
                    # One by one, so that it is known who is first.
                    streams.append(begin(client))
                    await until(lambda: len(slow) == len(streams))
                # The first got what the connection's window took, so there is room for four others.
                for stream_id in streams[:2]:
                    reset = await client.wait_on(StreamReset, stream_id)
                    assert reset.error_code == ErrorCodes.ENHANCE_YOUR_CALM
                assert (await other.wait_answer(begin(other)))[1] == frame_message(b"a")
                await stand.settle(slow_given_up=2, calls_open=4, hits_open=4)
                (runtime,) = peers
                resets = [event for event in runtime.events if isinstance(event, StreamReset)]
                assert [each.stream_id for each in resets] == slow[:2]

"""Clients that do not read: what waits for them is bounded, and the others do not wait."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from pathlib import Path

import pytest
from h2.errors import ErrorCodes
from h2.events import StreamReset

from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import OK, answer, begin
from tests.wire.hostile import ask_large
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
        stream_id = await peer.wait_ended()
        if len(slow) < slow_count:
            pour(peer, stream_id)
            slow.append(stream_id)
            await peer.writer.drain()
        else:
            answer(peer, stream_id)


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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_memory_stays_within_the_bound_however_much_is_poured() -> None:
    """What is counted is what is taken: of 75 MiB no more stays than the bound allows."""
    slow: list[int] = []
    count, bound_bytes, slack_bytes = 300, 8 * 2**20, 32 * 2**20
    async with listen(lambda peer: serve(peer, slow, count)) as (address, _):
        port = int(address.rpartition(":")[2])
        async with serve_wire(runtime_port=port, **LIMITS) as stand:
            stand.configure(answer_bytes_max=bound_bytes)
            async with connect(stand.port) as client:
                before = resident_bytes()
                for _ in range(count):
                    begin(client)
                await stand.settle(slow_given_up=count - bound_bytes // WINDOW_BYTES)
                assert resident_bytes() - before < bound_bytes + slack_bytes


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


async def test_what_is_packed_for_full_sockets_has_its_bound_with_the_answers() -> None:
    """Windows without end, and sockets that take nothing: it is no stream's any more."""
    bound, packed_bytes = 2**20, 2**18
    count = 8
    sockets: list[socket.socket] = []
    async with serve_wire(**LIMITS) as stand:
        stand.configure(answer_bytes_max=bound)
        try:
            for _ in range(count):
                sockets.append(await asyncio.to_thread(ask_large, stand))
            # Each has a quarter of the bound packed or less, and a window waits besides.
            await until(
                lambda: (
                    stand.counts.slow_given_up >= count - bound // packed_bytes
                    and stand.counts.connections_open < stand.counts.connections == count
                    and 0 < stand.counts.unwritten_bytes <= bound
                )
            )
            async with connect(stand.port) as other:
                assert (await other.wait_answer(begin(other)))[1] == frame_message(b"echo:q")
        finally:
            for each in sockets:
                each.close()
        await stand.settle(connections_open=0, unwritten_bytes=0, calls_open=0, hits_open=0)

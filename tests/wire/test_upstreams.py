"""Connections that the wire makes: how many streams they bear, how often it tries, what is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, SettingsAcknowledged
from h2.exceptions import StreamClosedError
from h2.settings import SettingCodes

from tests.edge.raw_h2 import PATIENCE_S, RawPeer, connect, listen
from tests.wire.frames import answer, begin, request
from tests.wire.stand import serve_wire, until

pytestmark = pytest.mark.anyio
#: Connections to a runtime, each of which is made when those before it are full.
CONNECTIONS_MAX = 16
#: After a connection that failed.
CONNECT_PAUSE_S = 0.05


async def test_no_more_streams_are_begun_than_an_upstream_takes() -> None:
    """It takes one at first, then three: no connection ever has more, and all calls are served."""
    most: dict[RawPeer, int] = {}
    open_streams: dict[RawPeer, list[int]] = {}
    limit = 1

    async def serve(peer: RawPeer) -> None:
        peer.start(limit)
        open_streams[peer] = []
        while True:
            asked = await peer.wait_for(RequestReceived)
            assert asked.stream_id is not None
            open_streams[peer].append(asked.stream_id)
            most[peer] = max(most.get(peer, 0), len(open_streams[peer]))

    def answer_all() -> None:
        for peer, streams in open_streams.items():
            while streams:
                answer(peer, streams.pop())

    def acknowledged(peer: RawPeer) -> int:
        return sum(isinstance(event, SettingsAcknowledged) for event in peer.events)

    def begun() -> int:
        return sum(map(len, open_streams.values()))

    async with (
        listen(serve) as (address, peers),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
        connect(stand.port) as client,
    ):
        calls = [begin(client) for _ in range(CONNECTIONS_MAX)]
        await until(lambda: begun() == len(calls))
        assert set(most.values()) == {1}
        assert len(peers) == CONNECTIONS_MAX
        answer_all()
        for call in calls:
            assert (await client.wait_answer(call))[0][b"grpc-status"] == b"0"
        limit = 3
        for peer in peers:
            peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: limit})
            peer.flush()
        await until(lambda: all(acknowledged(peer) == 2 for peer in peers))
        calls = [begin(client) for _ in range(3 * CONNECTIONS_MAX)]
        await until(lambda: begun() == len(calls))
        assert set(most.values()) == {3}
        assert len(peers) == CONNECTIONS_MAX
        answer_all()
        for call in calls:
            assert (await client.wait_answer(call))[0][b"grpc-status"] == b"0"


async def test_a_runtime_that_hangs_up_is_not_tried_by_each_call() -> None:
    """After one failure a while passes before the next; calls are tier 2's meanwhile."""
    accepted = 0

    async def serve(_peer: RawPeer) -> None:
        nonlocal accepted
        accepted += 1

    async with (
        listen(serve) as (address, _),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
        connect(stand.port) as client,
    ):
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        for _ in range(100):
            headers, _ = await client.wait_answer(begin(client))
            assert headers[b"grpc-status"] == b"0"
        # However slow the machine is, both are measured by its clock.
        assert 1 <= accepted <= (now_s() - began_s) / CONNECT_PAUSE_S + 2
        assert f"{address} closed the connection before it spoke HTTP/2" in {
            text for _, _, text in stand.router.tried_routes
        }


async def test_who_cannot_be_reached_is_dialled_more_and_more_seldom() -> None:
    """Each pause is twice the last; a connection that was there ends that."""
    is_there = False

    async def serve(peer: RawPeer) -> None:
        if not is_there:
            return
        peer.start()
        while True:
            answer(peer, await peer.wait_ended())

    async with (
        listen(serve) as (address, peers),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
        connect(stand.port) as client,
    ):
        now_s = asyncio.get_running_loop().time

        async def call_until(holds: Callable[[], bool]) -> tuple[float, float]:
            """Answer when the call began that made it hold, and when the one before did."""
            began_s = before_s = now_s()
            async with asyncio.timeout(PATIENCE_S):
                while not holds():
                    await asyncio.wait((asyncio.get_running_loop().create_future(),), timeout=0.005)
                    before_s, began_s = began_s, now_s()
                    headers, _ = await client.wait_answer(begin(client))
                    assert headers[b"grpc-status"] == b"0"
            return began_s, before_s

        async def next_failure() -> tuple[float, float]:
            failures = stand.counts.connect_failures
            return await call_until(lambda: stand.counts.connect_failures > failures)

        before_s, _ = await next_failure()
        for pauses in (1, 2, 4):
            began_s, _ = await next_failure()
            # It was tried in the call, by a clock of milliseconds.
            assert now_s() - before_s >= pauses * CONNECT_PAUSE_S - 0.001
            before_s = began_s
        is_there = True
        await call_until(lambda: stand.counts.upstreams_open_runtime == 1)
        is_there = False
        peers[-1].writer.close()
        await stand.settle(upstreams_open_runtime=0)
        await next_failure()
        known_s = now_s()
        _, idle_s = await next_failure()
        assert idle_s - known_s < CONNECT_PAUSE_S + 0.001


async def test_no_more_than_so_many_calls_wait_for_a_connection() -> None:
    """Those beyond are tier 2's, and counted."""

    async def serve(_peer: RawPeer) -> None:
        await asyncio.Event().wait()

    async with (
        listen(serve) as (address, _),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
        connect(stand.port) as client,
    ):
        stand.configure(waiting_max=3)
        calls = [begin(client) for _ in range(5)]
        for call in calls[3:]:
            assert (await client.wait_answer(call))[0][b"grpc-status"] == b"0"
        counts = stand.counts
        assert (counts.connect_waiting, counts.connect_waiting_refused) == (3, 2)
        assert (counts.left_busy, counts.calls_open) == (2, 3)
        for call in calls[:3]:
            client.h2.reset_stream(call, ErrorCodes.CANCEL)
        client.flush()
        await stand.settle(connect_waiting=0, calls_open=0)


async def test_all_that_calls_took_is_given_back() -> None:
    """Whole calls, and ones that are cancelled at any point, served here and by tier 2."""
    chance = random.Random(5)

    def begin_some(client: RawPeer) -> int:
        model_id = chance.choice((b"m", b"m", b"m", b"cold"))
        body = bytes(chance.choice((0, 10, 1500)))
        return begin(client, request(model_id=model_id), body)

    async def call_many(client: RawPeer) -> None:
        for _ in range(20):
            for stream_id in [begin_some(client) for _ in range(25)]:
                if chance.random() < 0.5:
                    await client.wait_answer(stream_id)
                else:
                    with suppress(StreamClosedError):  # it was quicker
                        client.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
                    client.flush()
            for event in client.events:
                if isinstance(event, DataReceived) and event.flow_controlled_length:
                    size = event.flow_controlled_length
                    client.h2.acknowledge_received_data(size, event.stream_id)
            client.flush()
            client.events.clear()

    async with serve_wire(threads=2) as stand:
        for turn in (1, 2):
            async with connect(stand.port) as client:
                await call_many(client)
            await stand.settle(
                calls=500 * turn, calls_open=0, hits_open=0, connections_open=0, buffer_bytes=0
            )
            assert stand.table.in_flight("m") == 0
        assert stand.counts.cancelled > 100
        assert stand.counts.upstreams_open_tier2 == 4, "two threads, two connections each"


async def test_calls_that_find_all_connections_full_are_counted_by_tier_2_alone() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start(streams_max=1)
        await peer.wait_closed()

    beyond = 5
    async with (
        listen(serve) as (address, peers),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
        connect(stand.port) as client,
    ):
        for _ in range(CONNECTIONS_MAX + beyond):
            begin(client)
        await stand.settle(
            calls=CONNECTIONS_MAX + beyond,
            calls_here=CONNECTIONS_MAX,
            spliced_model=beyond,
            left_busy=beyond,
        )
        assert len(peers) == CONNECTIONS_MAX


async def test_a_call_that_was_refused_and_finds_no_other_room_is_counted_once() -> None:
    async def serve(peer: RawPeer) -> None:
        if len(peers) > 1:
            return
        peer.start(streams_max=1)
        stream_id = await peer.wait_ended()
        peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 0})
        peer.reset(stream_id, ErrorCodes.REFUSED_STREAM)
        await peer.wait_closed()

    async with (
        listen(serve) as (address, peers),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
        connect(stand.port) as client,
    ):
        headers, _ = await client.wait_answer(begin(client))
        assert headers[b"grpc-status"] == b"0"
        await stand.settle(calls=1, calls_here=1, replayed=1, again_fault=1, spliced_model=0)
        assert stand.router.tried_routes == []


async def test_one_more_connection_that_cannot_be_had_is_no_fault_of_the_others() -> None:
    """The first one is full, the second hangs up: the call waits in tier 2's line, blaming none."""

    async def serve(peer: RawPeer) -> None:
        if len(peers) == 1:
            peer.start(streams_max=1)
            await peer.wait_closed()

    async with (
        listen(serve) as (address, peers),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
        connect(stand.port) as client,
    ):
        begin(client)
        await stand.settle(calls_here=1, upstreams_open_runtime=1)
        begin(client)
        await until(lambda: stand.counts.connect_failures >= 1)
        await stand.settle(left_busy=1, replayed=0, calls_here=1)
        assert stand.router.tried_routes == []


async def test_headers_as_long_as_any_setting_allows_are_sent_on() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        while True:
            answer(peer, await peer.wait_ended())

    more = [(b"x-%d" % number, b"v" * 6000) for number in range(10)]
    async with (
        listen(serve) as (address, _),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
    ):
        stand.configure(header_bytes_max=65_536)
        async with connect(stand.port) as client:
            headers, _ = await client.wait_answer(begin(client, [*request(), *more]))
        assert headers[b"grpc-status"] == b"0"
        await stand.settle(calls_here=1, replayed=0, floods_refused=0)

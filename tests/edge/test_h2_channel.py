"""Channels: full connections, callers that wait, slow readers, pools."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from h2.events import (
    StreamEnded,
)

from mm.edge.h2 import RUNTIME_LIMITS, ChannelFullError, ChannelPool, UnreachableError
from mm.edge.unary import Answer, request_headers
from mm.errors import StatusCode
from tests.edge.h2_calls import (
    OK,
    finish,
    open_channel,
    send_answer,
    serve_all,
    start_call,
    wait_links,
)
from tests.edge.h2_echo import serve_echo
from tests.edge.raw_h2 import PATIENCE_S, RawPeer, listen

pytestmark = pytest.mark.anyio


async def test_a_full_connection_opens_another_and_no_more_than_allowed() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start(streams_max=2)
        arrived: list[int] = []
        for _ in range(2):
            stream_id = await peer.wait_ended()
            arrived.append(stream_id)
        full.release()
        await go_on.wait()
        for stream_id in arrived:
            send_answer(peer, stream_id)
        while True:
            send_answer(peer, await peer.wait_ended())

    full, go_on = asyncio.Semaphore(0), asyncio.Event()
    async with listen(serve) as (address, peers):
        async with open_channel(address, channel_connections_max=2) as channel:
            calls = [start_call(channel) for _ in range(7)]
            for _ in range(2):
                await asyncio.wait_for(full.acquire(), PATIENCE_S)
            assert len(peers) == 2
            assert channel.open_count == 4
            go_on.set()
            for call in calls:
                assert (await finish(call)).messages == [(False, b"a")]
            assert len(peers) == 2


async def test_a_caller_that_gives_up_waiting_passes_its_turn_on() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start(streams_max=1)
        await peer.wait_for(StreamEnded)
        arrived.set()
        await go_on.wait()
        send_answer(peer, 1)
        await _serve_rest(peer)

    async def _serve_rest(peer: RawPeer) -> None:
        while True:
            send_answer(peer, await peer.wait_ended())

    arrived, go_on = asyncio.Event(), asyncio.Event()
    async with listen(serve) as (address, _):
        async with open_channel(address, channel_connections_max=1) as channel:
            first = start_call(channel)
            await asyncio.wait_for(arrived.wait(), PATIENCE_S)
            gives_up, waits = start_call(channel), start_call(channel)
            while len(channel._waiters) < 2:
                await asyncio.wait({gives_up, waits}, timeout=0.01)
            make_room = channel.room_made

            def make_room_and_leave() -> None:
                # Woken and cancelled in the same turn: the room is there, but not for this one.
                make_room()
                gives_up.cancel()

            channel.room_made = make_room_and_leave  # type: ignore[method-assign]
            go_on.set()
            await finish(first)
            assert (await finish(waits)).messages == [(False, b"a")]
            assert gives_up.cancelled()


async def test_too_many_that_wait_for_room_are_refused_at_once() -> None:
    async with listen(serve_when_told(go_on := asyncio.Event())) as (address, _):
        limits = {"channel_connections_max": 1, "room_waiters_max": 2}
        async with open_channel(address, **limits) as channel:
            calls = [start_call(channel)]
            while not channel.open_count:
                await asyncio.wait(calls, timeout=0.01)
            calls += [start_call(channel) for _ in range(2)]
            while len(channel._waiters) < 2:
                await asyncio.wait(calls, timeout=0.01)
            with pytest.raises(
                ChannelFullError, match=r"2 calls .* \(room_waiters_max\)"
            ) as caught:
                await finish(start_call(channel))
            assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
            # Whoever gives up makes place in the line.
            calls.pop().cancel()
            while len(channel._waiters) == 2:
                await asyncio.wait(calls, timeout=0.01)
            calls.append(start_call(channel))
            go_on.set()
            for call in calls:
                assert (await finish(call)).messages == [(False, b"a")]


async def test_too_many_that_wait_for_a_connection_are_refused_at_once() -> None:
    go_on = asyncio.Event()

    async def serve(peer: RawPeer) -> None:
        await go_on.wait()
        peer.start()
        while True:
            send_answer(peer, await peer.wait_ended())

    async with listen(serve) as (address, _):
        async with open_channel(address, room_waiters_max=2) as channel:
            calls = [start_call(channel) for _ in range(2)]
            while channel._connect_waiters_count < 2:
                await asyncio.wait(calls, timeout=0.01)
            with pytest.raises(
                ChannelFullError, match=r"is being made, .* 2 calls .* \(room_waiters_max\)"
            ) as caught:
                await finish(start_call(channel))
            assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
            go_on.set()
            for call in calls:
                assert (await finish(call)).messages == [(False, b"a")]
            assert channel._connect_waiters_count == 0


async def test_nobody_waits_for_room_for_ever() -> None:
    async with listen(serve_when_told(go_on := asyncio.Event())) as (address, _):
        async with open_channel(address, channel_connections_max=1, room_wait_s=0.05) as channel:
            first = start_call(channel)
            while not channel.open_count:
                await asyncio.wait({first}, timeout=0.01)
            with pytest.raises(ChannelFullError, match=r"no room .* in 0\.05 s") as caught:
                await finish(start_call(channel))
            assert caught.value.code == StatusCode.UNAVAILABLE
            assert not channel._waiters
            go_on.set()
            assert (await finish(first)).messages == [(False, b"a")]


def serve_when_told(go_on: asyncio.Event) -> Callable[[RawPeer], Awaitable[None]]:
    """A server that takes one call at a time, and answers when told."""

    async def serve(peer: RawPeer) -> None:
        peer.start(streams_max=1)
        while True:
            stream_id = await peer.wait_ended()
            await go_on.wait()
            send_answer(peer, stream_id)

    return serve


async def test_callers_share_a_connection_in_the_making() -> None:
    async def serve(peer: RawPeer) -> None:
        accepted.set()
        await speak.wait()
        await serve_all(peer)

    accepted, speak = asyncio.Event(), asyncio.Event()
    async with listen(serve) as (address, peers), open_channel(address) as channel:
        calls = [start_call(channel) for _ in range(20)]
        await asyncio.wait_for(accepted.wait(), PATIENCE_S)
        # The one that asked first leaves; the connection is for the others as well.
        calls[0].cancel()
        await asyncio.wait({calls[0]})
        speak.set()
        for call in calls[1:]:
            assert (await finish(call)).messages == [(False, b"a")]
        assert len(peers) == 1


async def test_a_pool_keeps_waiting_calls_apart_and_closes_what_is_idle() -> None:
    async with listen(serve_all) as (address, peers):
        pool = ChannelPool(RUNTIME_LIMITS)
        hits, waits = pool.get(address), pool.get(address, may_wait=True)
        assert hits is not waits
        for channel in (hits, waits):
            await finish(start_call(channel))
        assert len(peers) == 2
        # As if the last calls had been long ago; the next use of the pool finds out.
        for channel in (hits, waits):
            channel.used_s -= 2 * pool.idle_s
        pool._swept_s -= 2 * pool.idle_s
        pool.get("127.0.0.1:1")
        await wait_links(hits, 0)
        await wait_links(waits, 0)
        with pytest.raises(UnreachableError, match="closed"):
            await start_call(hits)
        assert pool.get(address) is not hits
        await pool.close()


async def test_slow_consumers_hold_their_stream_alone() -> None:
    """What is not acknowledged stays within the stream's window; other streams go on."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_on(StreamEnded, 1)
        peer.h2.send_headers(1, OK)
        sent = 0
        while room := min(peer.h2.local_flow_control_window(1), 16_000):
            peer.h2.send_data(1, bytes(room))
            peer.flush()
            sent += room
            await peer.writer.drain()
        assert sent == RUNTIME_LIMITS.stream_window_bytes
        await peer.wait_on(StreamEnded, 3)
        send_answer(peer, 3)
        await peer.wait_closed()

    class Lazy(Answer):
        def data_received(self, data: bytes, size: int, ended: bool) -> None:
            received.append(len(data))

    received: list[int] = []
    async with listen(serve) as (address, _), open_channel(address) as channel:
        headers = request_headers(channel, "/t.S/M", None)
        lazy = Lazy(2**30)
        stream = await channel.open(headers, lazy, end=True)
        assert (await finish(start_call(channel))).messages == [(False, b"a")]
        assert sum(received) == RUNTIME_LIMITS.stream_window_bytes
        stream.reset()


async def test_a_connection_full_of_slow_readers_gets_no_more_calls() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        if len(peers) > 1:
            await _serve_rest(peer)
        await peer.wait_on(StreamEnded, 1)
        peer.h2.send_headers(1, OK)
        for _ in range(12):
            peer.h2.send_data(1, bytes(16_000))
            peer.flush()
        await peer.wait_closed()

    async def _serve_rest(peer: RawPeer) -> None:
        send_answer(peer, await peer.wait_ended())
        await peer.wait_closed()

    class Lazy(Answer):
        def data_received(self, data: bytes, size: int, ended: bool) -> None:
            received.append(len(data))
            if sum(received) == 192_000:
                full.set()

    received: list[int] = []
    full = asyncio.Event()
    windows = {"stream_window_bytes": 240_000, "connection_window_bytes": 250_000}
    async with listen(serve) as (address, peers), open_channel(address, **windows) as channel:
        headers = request_headers(channel, "/t.S/M", None)
        stream = await channel.open(headers, Lazy(2**30), end=True)
        await asyncio.wait_for(full.wait(), PATIENCE_S)
        assert (await finish(start_call(channel))).messages == [(False, b"a")]
        assert len(peers) == 2
        stream.reset()


async def test_connections_keep_nothing_of_calls_that_ended() -> None:
    async with serve_echo() as (server, port, _), open_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(3):
            assert (await finish(start_call(channel))).messages == [(False, b"q")]
        for link in (*channel.links, *server.links):
            assert not link.streams
            assert not link.engine.streams
            # h2's own table, of as many as 65,536 streams; nothing of ours reads it.
            assert not link.engine._closed_streams

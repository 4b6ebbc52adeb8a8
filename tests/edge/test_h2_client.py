"""The client end, frame by frame: GOAWAY, full connections, servers that are gone or odd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from hyperframe.frame import GoAwayFrame

from mm.core.headers import HeaderList
from mm.edge.h2 import RUNTIME_LIMITS, Channel, ChannelPool, FaultKind, UnreachableError
from mm.edge.h2.messages import frame_message
from mm.edge.unary import Answer, CallError, call_raw, exchange, request_headers
from mm.errors import StatusCode
from tests.edge.raw_h2 import PATIENCE_S, RawPeer, listen

pytestmark = pytest.mark.anyio
OK: HeaderList = [(b":status", b"200"), (b"content-type", b"application/grpc")]


@asynccontextmanager
async def _channel(address: str, **limits: float) -> AsyncIterator[Channel]:
    channel = Channel(address, replace(RUNTIME_LIMITS, **limits))  # type: ignore[arg-type]
    try:
        yield channel
    finally:
        await channel.close()


def _start_call(channel: Channel) -> asyncio.Task[Answer]:
    headers = request_headers(channel, "/t.S/M", None)
    return asyncio.ensure_future(exchange(channel, headers, frame_message(b"q")))


async def _finish(task: asyncio.Task[Answer]) -> Answer:
    return await asyncio.wait_for(task, PATIENCE_S)


def _answer(peer: RawPeer, stream_id: int, body: bytes = b"a") -> None:
    peer.h2.send_headers(stream_id, OK)
    peer.h2.send_data(stream_id, frame_message(body))
    peer.h2.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
    peer.flush()


async def _serve_all(peer: RawPeer) -> None:
    peer.start()
    while True:
        ended = await peer.wait_for(StreamEnded)
        assert ended.stream_id is not None
        _answer(peer, ended.stream_id)


async def test_goaway_lets_streams_finish_and_sends_later_ones_elsewhere() -> None:
    async def serve(peer: RawPeer) -> None:
        if len(peers) > 1:
            await _serve_all(peer)
        peer.start()
        first = await peer.wait_for(StreamEnded)
        second = await peer.wait_for(StreamEnded)
        assert first.stream_id == 1
        assert second.stream_id == 3
        # Not by h2, which would take the connection for dead.
        peer.send_frame(GoAwayFrame(0, last_stream_id=1))
        await finish.wait()
        _answer(peer, 1, b"first")
        await peer.wait_closed()

    finish = asyncio.Event()
    async with listen(serve) as (address, peers), _channel(address) as channel:
        first, second = _start_call(channel), _start_call(channel)
        refused = await _finish(second)
        assert refused.fault is not None
        assert refused.fault.kind is FaultKind.REFUSED
        assert not first.done()
        # A new call goes to a new connection while the old one is still in use.
        assert (await _finish(_start_call(channel))).messages == [(False, b"a")]
        assert len(peers) == 2
        finish.set()
        assert (await _finish(first)).messages == [(False, b"first")]
        # The old connection closes when it is done.
        await _wait_links(channel, 1)


async def _wait_links(channel: Channel, count: int) -> None:
    while len(channel.links) != count:
        waiter = asyncio.get_running_loop().create_future()
        channel._waiters.append(waiter)
        done, _ = await asyncio.wait((waiter,), timeout=PATIENCE_S)
        assert done


async def test_a_graceful_goaway_in_two_steps() -> None:
    async def serve(peer: RawPeer) -> None:
        if len(peers) > 1:
            await _serve_all(peer)
        peer.start()
        await peer.wait_for(StreamEnded)
        peer.send_frame(GoAwayFrame(0, last_stream_id=2**31 - 1))
        peer.send_frame(GoAwayFrame(0, last_stream_id=1))
        _answer(peer, 1, b"old")
        await peer.wait_closed()

    async with listen(serve) as (address, peers), _channel(address) as channel:
        assert (await _finish(_start_call(channel))).messages == [(False, b"old")]
        assert (await _finish(_start_call(channel))).messages == [(False, b"a")]


async def test_a_full_connection_opens_another_and_no_more_than_allowed() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start(streams_max=2)
        arrived: list[int] = []
        for _ in range(2):
            ended = await peer.wait_for(StreamEnded)
            assert ended.stream_id is not None
            arrived.append(ended.stream_id)
        full.release()
        await go_on.wait()
        for stream_id in arrived:
            _answer(peer, stream_id)
        while True:
            ended = await peer.wait_for(StreamEnded)
            assert ended.stream_id is not None
            _answer(peer, ended.stream_id)

    full, go_on = asyncio.Semaphore(0), asyncio.Event()
    async with listen(serve) as (address, peers):
        async with _channel(address, channel_connections_max=2) as channel:
            calls = [_start_call(channel) for _ in range(7)]
            for _ in range(2):
                await asyncio.wait_for(full.acquire(), PATIENCE_S)
            assert len(peers) == 2
            assert channel.open_count == 4
            go_on.set()
            for call in calls:
                assert (await _finish(call)).messages == [(False, b"a")]
            assert len(peers) == 2


async def test_a_caller_that_gives_up_waiting_passes_its_turn_on() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start(streams_max=1)
        await peer.wait_for(StreamEnded)
        arrived.set()
        await go_on.wait()
        _answer(peer, 1)
        await _serve_rest(peer)

    async def _serve_rest(peer: RawPeer) -> None:
        while True:
            ended = await peer.wait_for(StreamEnded)
            assert ended.stream_id is not None
            _answer(peer, ended.stream_id)

    arrived, go_on = asyncio.Event(), asyncio.Event()
    async with listen(serve) as (address, _):
        async with _channel(address, channel_connections_max=1) as channel:
            first = _start_call(channel)
            await asyncio.wait_for(arrived.wait(), PATIENCE_S)
            gives_up, waits = _start_call(channel), _start_call(channel)
            while len(channel._waiters) < 2:
                await asyncio.wait({gives_up, waits}, timeout=0.01)
            make_room = channel.room_made

            def make_room_and_leave() -> None:
                # Woken and cancelled in the same turn: the room is there, but not for this one.
                make_room()
                gives_up.cancel()

            channel.room_made = make_room_and_leave  # type: ignore[method-assign]
            go_on.set()
            await _finish(first)
            assert (await _finish(waits)).messages == [(False, b"a")]
            assert gives_up.cancelled()


async def test_a_lost_connection_is_replaced() -> None:
    async def serve(peer: RawPeer) -> None:
        if len(peers) > 1:
            await _serve_all(peer)
        peer.start()
        await peer.wait_for(RequestReceived)
        peer.writer.transport.abort()

    async with listen(serve) as (address, peers), _channel(address) as channel:
        lost = await _finish(_start_call(channel))
        assert lost.fault is not None
        assert lost.fault.kind is FaultKind.LOST
        assert (await _finish(_start_call(channel))).messages == [(False, b"a")]


async def test_resets_are_told_with_their_code() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        for code in (ErrorCodes.REFUSED_STREAM, ErrorCodes.INTERNAL_ERROR):
            request = await peer.wait_for(RequestReceived)
            assert request.stream_id is not None
            peer.h2.reset_stream(request.stream_id, code)
            peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _), _channel(address) as channel:
        for kind, code in (
            (FaultKind.REFUSED, ErrorCodes.REFUSED_STREAM),
            (FaultKind.RESET, ErrorCodes.INTERNAL_ERROR),
        ):
            answer = await _finish(_start_call(channel))
            assert answer.fault is not None
            assert (answer.fault.kind, answer.fault.code) == (kind, code)
        with pytest.raises(UnreachableError):
            await call_raw(Channel("127.0.0.1:1", RUNTIME_LIMITS), "/t.S/M", b"", timeout_s=5)


async def test_an_early_answer_ends_the_request() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(RequestReceived)
        peer.h2.send_headers(1, [*OK, (b"grpc-status", b"3")], end_stream=True)
        peer.flush()
        reset = await peer.wait_on(StreamReset, 1)
        assert reset.error_code == ErrorCodes.CANCEL
        done.set()

    done = asyncio.Event()
    async with listen(serve) as (address, _), _channel(address) as channel:
        headers = request_headers(channel, "/t.S/M", None)
        # Larger than the window, so the request cannot have ended.
        answer = await asyncio.wait_for(exchange(channel, headers, bytes(100_000)), PATIENCE_S)
        assert answer.trailers is not None
        assert (b"grpc-status", b"3") in answer.trailers
        await asyncio.wait_for(done.wait(), PATIENCE_S)


async def test_informational_responses_are_stepped_over() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(StreamEnded)
        peer.h2.send_headers(1, [(b":status", b"103"), (b"link", b"x")])
        _answer(peer, 1)
        await peer.wait_closed()

    async with listen(serve) as (address, _), _channel(address) as channel:
        assert (await _finish(_start_call(channel))).messages == [(False, b"a")]


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_what_does_not_speak_http2_is_unreachable(greeting: bytes) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.writer.write(greeting)
        await peer.reader.read()

    async with listen(serve) as (address, _):
        async with _channel(address, connect_timeout_s=0.3) as channel:
            with pytest.raises(UnreachableError):
                await asyncio.wait_for(_start_call(channel), PATIENCE_S)
            assert not channel.links


async def test_callers_share_a_connection_in_the_making() -> None:
    async def serve(peer: RawPeer) -> None:
        accepted.set()
        await speak.wait()
        await _serve_all(peer)

    accepted, speak = asyncio.Event(), asyncio.Event()
    async with listen(serve) as (address, peers), _channel(address) as channel:
        calls = [_start_call(channel) for _ in range(20)]
        await asyncio.wait_for(accepted.wait(), PATIENCE_S)
        # The one that asked first leaves; the connection is for the others as well.
        calls[0].cancel()
        await asyncio.wait({calls[0]})
        speak.set()
        for call in calls[1:]:
            assert (await _finish(call)).messages == [(False, b"a")]
        assert len(peers) == 1


async def test_a_dead_connection_is_found_by_its_silence() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(RequestReceived)
        await silent.wait()  # The process hangs: it reads nothing and answers no ping.

    silent = asyncio.Event()
    async with listen(serve) as (address, _):
        async with _channel(address, ping_interval_s=0.05, ping_timeout_s=0.05) as channel:
            answer = await _finish(_start_call(channel))
            assert answer.fault is not None
            assert answer.fault.kind is FaultKind.LOST
        silent.set()


async def test_the_answer_is_bounded_and_the_limit_named() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(StreamEnded)
        peer.h2.send_headers(1, OK)
        peer.h2.send_data(1, b"\0\x7f\xff\xff\xff")
        peer.flush()
        reset = await peer.wait_on(StreamReset, 1)
        assert reset.error_code == ErrorCodes.CANCEL
        done.set()

    done = asyncio.Event()
    async with listen(serve) as (address, _):
        async with _channel(address, message_bytes_max=1000) as channel:
            answer = await _finish(_start_call(channel))
            assert answer.error is not None
            assert "limit of 1000 bytes" in answer.error.message
            await asyncio.wait_for(done.wait(), PATIENCE_S)


async def test_an_answer_without_a_status() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(StreamEnded)
        peer.h2.send_headers(1, [(b":status", b"503")], end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _), _channel(address) as channel:
        with pytest.raises(CallError, match="without a grpc-status") as caught:
            await call_raw(channel, "/t.S/M", b"", timeout_s=5)
        assert caught.value.code == StatusCode.UNKNOWN


async def test_a_pool_keeps_waiting_calls_apart_and_closes_what_is_idle() -> None:
    async with listen(_serve_all) as (address, peers):
        pool = ChannelPool(RUNTIME_LIMITS)
        hits, waits = pool.get(address), pool.get(address, may_wait=True)
        assert hits is not waits
        for channel in (hits, waits):
            await _finish(_start_call(channel))
        assert len(peers) == 2
        # As if the last calls had been long ago; the next use of the pool finds out.
        for channel in (hits, waits):
            channel.used_s -= 2 * pool.idle_s
        pool._swept_s -= 2 * pool.idle_s
        pool.get("127.0.0.1:1")
        await _wait_links(hits, 0)
        await _wait_links(waits, 0)
        with pytest.raises(UnreachableError, match="closed"):
            await _start_call(hits)
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
        _answer(peer, 3)
        await peer.wait_closed()

    class Lazy(Answer):
        def data_received(self, data: bytes, size: int, ended: bool) -> None:
            received.append(len(data))

    received: list[int] = []
    async with listen(serve) as (address, _), _channel(address) as channel:
        headers = request_headers(channel, "/t.S/M", None)
        lazy = Lazy(2**30)
        stream = await channel.open(headers, lazy, end=True)
        assert (await _finish(_start_call(channel))).messages == [(False, b"a")]
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
        ended = await peer.wait_for(StreamEnded)
        assert ended.stream_id is not None
        _answer(peer, ended.stream_id)
        await peer.wait_closed()

    class Lazy(Answer):
        def data_received(self, data: bytes, size: int, ended: bool) -> None:
            received.append(len(data))
            if sum(received) == 192_000:
                full.set()

    received: list[int] = []
    full = asyncio.Event()
    windows = {"stream_window_bytes": 240_000, "connection_window_bytes": 250_000}
    async with listen(serve) as (address, peers), _channel(address, **windows) as channel:
        headers = request_headers(channel, "/t.S/M", None)
        stream = await channel.open(headers, Lazy(2**30), end=True)
        await asyncio.wait_for(full.wait(), PATIENCE_S)
        assert (await _finish(_start_call(channel))).messages == [(False, b"a")]
        assert len(peers) == 2
        stream.reset()


async def test_settings_of_the_client_forbid_pushes() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(RequestReceived)
        assert peer.h2.remote_settings.enable_push == 0
        assert peer.h2.remote_settings.max_header_list_size == 64 * 1024
        checked.set()
        await peer.wait_closed()

    checked = asyncio.Event()
    async with listen(serve) as (address, _), _channel(address) as channel:
        call = _start_call(channel)
        await asyncio.wait_for(checked.wait(), PATIENCE_S)
        call.cancel()
        await asyncio.wait({call})


async def test_cancelling_a_call_resets_its_stream() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(DataReceived)
        arrived.set()
        reset = await peer.wait_on(StreamReset, 1)
        assert reset.error_code == ErrorCodes.CANCEL
        await _serve_one(peer)

    async def _serve_one(peer: RawPeer) -> None:
        await peer.wait_on(StreamEnded, 3)
        assert not [event for event in peer.events if isinstance(event, ConnectionTerminated)]
        _answer(peer, 3)
        await peer.wait_closed()

    arrived = asyncio.Event()
    async with listen(serve) as (address, _), _channel(address) as channel:
        call = _start_call(channel)
        await asyncio.wait_for(arrived.wait(), PATIENCE_S)
        call.cancel()
        await asyncio.wait({call})
        assert (await _finish(_start_call(channel))).messages == [(False, b"a")]

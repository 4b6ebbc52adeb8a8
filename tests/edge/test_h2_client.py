"""The client end, frame by frame: GOAWAY, resets, servers that are gone or odd."""

from __future__ import annotations

import asyncio

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

from mm.edge.h2 import RUNTIME_LIMITS, Channel, FaultKind, UnreachableError
from mm.edge.unary import CallError, call_raw, exchange, request_headers
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
from tests.edge.raw_h2 import PATIENCE_S, RawPeer, listen

pytestmark = pytest.mark.anyio


async def test_goaway_lets_streams_finish_and_sends_later_ones_elsewhere() -> None:
    async def serve(peer: RawPeer) -> None:
        if len(peers) > 1:
            await serve_all(peer)
        peer.start()
        first = await peer.wait_for(StreamEnded)
        second = await peer.wait_for(StreamEnded)
        assert first.stream_id == 1
        assert second.stream_id == 3
        # Not by h2, which would take the connection for dead.
        peer.send_frame(GoAwayFrame(0, last_stream_id=1))
        await go_on.wait()
        send_answer(peer, 1, b"first")
        await peer.wait_closed()

    go_on = asyncio.Event()
    async with listen(serve) as (address, peers), open_channel(address) as channel:
        first, second = start_call(channel), start_call(channel)
        refused = await finish(second)
        assert refused.fault is not None
        assert refused.fault.kind is FaultKind.REFUSED
        assert not first.done()
        # A new call goes to a new connection while the old one is still in use.
        assert (await finish(start_call(channel))).messages == [(False, b"a")]
        assert len(peers) == 2
        go_on.set()
        assert (await finish(first)).messages == [(False, b"first")]
        # The old connection closes when it is done.
        await wait_links(channel, 1)


async def test_a_graceful_goaway_in_two_steps() -> None:
    async def serve(peer: RawPeer) -> None:
        if len(peers) > 1:
            await serve_all(peer)
        peer.start()
        await peer.wait_for(StreamEnded)
        peer.send_frame(GoAwayFrame(0, last_stream_id=2**31 - 1))
        peer.send_frame(GoAwayFrame(0, last_stream_id=1))
        send_answer(peer, 1, b"old")
        await peer.wait_closed()

    async with listen(serve) as (address, peers), open_channel(address) as channel:
        assert (await finish(start_call(channel))).messages == [(False, b"old")]
        assert (await finish(start_call(channel))).messages == [(False, b"a")]


async def test_a_lost_connection_is_replaced() -> None:
    async def serve(peer: RawPeer) -> None:
        if len(peers) > 1:
            await serve_all(peer)
        peer.start()
        await peer.wait_for(RequestReceived)
        peer.writer.transport.abort()

    async with listen(serve) as (address, peers), open_channel(address) as channel:
        lost = await finish(start_call(channel))
        assert lost.fault is not None
        assert lost.fault.kind is FaultKind.LOST
        assert (await finish(start_call(channel))).messages == [(False, b"a")]


async def test_resets_are_told_with_their_code() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        for code in (ErrorCodes.REFUSED_STREAM, ErrorCodes.INTERNAL_ERROR):
            request = await peer.wait_for(RequestReceived)
            assert request.stream_id is not None
            peer.reset(request.stream_id, code)
        await peer.wait_closed()

    async with listen(serve) as (address, _), open_channel(address) as channel:
        for kind, code in (
            (FaultKind.REFUSED, ErrorCodes.REFUSED_STREAM),
            (FaultKind.RESET, ErrorCodes.INTERNAL_ERROR),
        ):
            answer = await finish(start_call(channel))
            assert answer.fault is not None
            assert (answer.fault.kind, answer.fault.code) == (kind, code)
        with pytest.raises(UnreachableError):
            await call_raw(Channel("127.0.0.1:1", RUNTIME_LIMITS), "/t.S/M", b"", timeout_s=60)


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
    async with listen(serve) as (address, _), open_channel(address) as channel:
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
        send_answer(peer, 1)
        await peer.wait_closed()

    async with listen(serve) as (address, _), open_channel(address) as channel:
        assert (await finish(start_call(channel))).messages == [(False, b"a")]


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_what_does_not_speak_http2_is_unreachable(greeting: bytes) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.writer.write(greeting)
        await peer.reader.read()

    async with listen(serve) as (address, _):
        async with open_channel(address, connect_timeout_s=0.3) as channel:
            with pytest.raises(UnreachableError):
                await asyncio.wait_for(start_call(channel), PATIENCE_S)
            assert not channel.links


async def test_a_dead_connection_is_found_by_its_silence() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(RequestReceived)
        await silent.wait()  # The process hangs: it reads nothing and answers no ping.

    silent = asyncio.Event()
    async with listen(serve) as (address, _):
        async with open_channel(address, ping_interval_s=0.05, ping_timeout_s=0.05) as channel:
            answer = await finish(start_call(channel))
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
        async with open_channel(address, message_bytes_max=1000) as channel:
            answer = await finish(start_call(channel))
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

    async with listen(serve) as (address, _), open_channel(address) as channel:
        with pytest.raises(CallError, match="without a grpc-status") as caught:
            await call_raw(channel, "/t.S/M", b"", timeout_s=60)
        assert caught.value.code == StatusCode.UNKNOWN


async def test_settings_of_the_client_forbid_pushes() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(RequestReceived)
        assert peer.h2.remote_settings.enable_push == 0
        assert peer.h2.remote_settings.max_header_list_size == 64 * 1024
        checked.set()
        await peer.wait_closed()

    checked = asyncio.Event()
    async with listen(serve) as (address, _), open_channel(address) as channel:
        call = start_call(channel)
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
        send_answer(peer, 3)
        await peer.wait_closed()

    arrived = asyncio.Event()
    async with listen(serve) as (address, _), open_channel(address) as channel:
        call = start_call(channel)
        await asyncio.wait_for(arrived.wait(), PATIENCE_S)
        call.cancel()
        await asyncio.wait({call})
        assert (await finish(start_call(channel))).messages == [(False, b"a")]

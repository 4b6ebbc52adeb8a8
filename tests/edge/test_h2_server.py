"""The server end, frame by frame: what a hostile or odd client does stays on its own stream."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from h2.errors import ErrorCodes
from h2.events import (
    PingAckReceived,
    StreamReset,
)
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    WindowUpdateFrame,
)

import mm.edge.h2.link as link_module
from mm.edge.h2 import EXTERNAL_LIMITS
from mm.edge.h2.messages import frame_message
from tests.edge.h2_echo import assert_serves, serve_echo, wait_started
from tests.edge.raw_h2 import PATIENCE_S, REQUEST, RawPeer, connect

pytestmark = pytest.mark.anyio


# --- headers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ((b"Upper-Case", b"x"), b"400"),
        ((b"bad name", b"x"), b"400"),
        ((b"x", b"line\nbreak"), b"400"),
        ((b"connection", b"close"), b"400"),
        ((b":late", b"x"), b"400"),
        ((b"grpc-timeout", b"soon"), b"400"),
    ],
)
async def test_a_malformed_header_answers_its_stream(
    extra: tuple[bytes, bytes], status: bytes
) -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        other = peer.begin()
        bad = peer.begin([*REQUEST, extra])
        headers, _ = await peer.wait_answer(bad)
        assert headers[b":status"] == status
        assert headers[b"grpc-status"] == b"3"
        # The client is told to send no more, and the call before it goes on.
        assert (await peer.wait_on(StreamReset, bad)).error_code == ErrorCodes.NO_ERROR
        peer.send(other, frame_message(b"x"), end=True)
        assert (await peer.wait_answer(other))[1] == frame_message(b"x")


@pytest.mark.parametrize(
    "extra",
    [
        (b"x-empty", b""),
        (b"x-latin", b"\xe9\xff"),
        (b"x-bin", b"!!! no base64"),
    ],
)
async def test_odd_but_harmless_headers(extra: tuple[bytes, bytes]) -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        stream_id = peer.begin([*REQUEST, extra, extra])
        peer.send(stream_id, frame_message(b"x"), end=True)
        assert (await peer.wait_answer(stream_id))[0][b"grpc-status"] == b"0"


@pytest.mark.parametrize("headers", [REQUEST[1:], [(b":method", b"GET"), *REQUEST[1:]]])
async def test_what_is_no_grpc_call(headers: list[tuple[bytes, bytes]]) -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        answer, _ = await peer.wait_answer(peer.begin(headers, end=True))
        assert answer[b":status"] in (b"400", b"405")
        await assert_serves(peer)


async def test_headers_above_the_limit_are_answered_on_their_stream() -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        big = [(b"x-%d" % number, b"v" * 1000) for number in range(20)]
        answer, _ = await peer.wait_answer(peer.begin([*REQUEST, *big], end=True))
        assert answer[b"grpc-status"] == b"8"
        assert b"limit of 8192 bytes" in answer[b"grpc-message"]
        # Compression is in step still: the same headers are now read from the table.
        answer, _ = await peer.wait_answer(peer.begin([*REQUEST, *big], end=True))
        assert answer[b"grpc-status"] == b"8"
        await assert_serves(peer)


async def test_headers_far_above_the_limit_end_the_connection() -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        peer.begin([*REQUEST, *[(b"x-%d" % n, b"v" * 4000) for n in range(20)]])
        end = await peer.wait_closed()
        assert end is not None
        assert end.error_code == ErrorCodes.ENHANCE_YOUR_CALM


async def test_headers_that_never_end_are_not_kept_for_ever() -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        await peer.read()
        peer.send_frame(HeadersFrame(1, data=b"\0" * 16_000))
        for _ in range(5):
            peer.send_frame(ContinuationFrame(1, data=b"\0" * 16_000))
        end = await peer.wait_closed()
        assert end is None or end.error_code == ErrorCodes.ENHANCE_YOUR_CALM


async def test_a_client_cannot_make_us_keep_a_large_compression_table() -> None:
    async with serve_echo() as (server, port, _), connect(port) as peer:
        peer.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: 2**31})
        peer.flush()
        for _ in range(3):
            await assert_serves(peer)
        (link,) = server.links
        assert link.engine.remote_settings.header_table_size == 2**31
        assert link.engine.encoder.header_table_size == 4096


async def test_unreadable_compression_ends_the_connection() -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        peer.send_frame(HeadersFrame(1, data=b"\xff\xff\xff\xff", flags=["END_HEADERS"]))
        end = await peer.wait_closed()
        assert end is not None
        assert end.error_code != ErrorCodes.NO_ERROR


async def test_trailers_of_a_request_end_it() -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b"x"))
        peer.h2.send_headers(stream_id, [(b"x-trailer", b"1")], end_stream=True)
        peer.flush()
        assert (await peer.wait_answer(stream_id))[1] == frame_message(b"x")


async def test_second_headers_without_an_end_reset_their_stream() -> None:
    async with serve_echo() as (_, port, echo), connect(port) as peer:
        stream_id = peer.begin()
        await asyncio.wait_for(wait_started(echo, peer), PATIENCE_S)
        block = peer.h2.encoder.encode([(b"x", b"y")])
        peer.send_frame(HeadersFrame(stream_id, data=block, flags=["END_HEADERS"]))
        reset = await peer.wait_on(StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.PROTOCOL_ERROR
        await asyncio.wait_for(echo.ended.wait(), PATIENCE_S)
        await assert_serves(peer)


# --- frames ----------------------------------------------------------------------------------


async def test_data_after_the_end_resets_the_stream_and_costs_no_window() -> None:
    limits = replace(EXTERNAL_LIMITS, stream_window_bytes=70_000, connection_window_bytes=140_000)
    async with serve_echo(limits) as (server, port, echo), connect(port) as peer:
        echo.gate = asyncio.Event()
        await peer.read()
        for _ in range(20):
            stream_id = peer.begin()
            peer.send(stream_id, frame_message(b"x"), end=True)
            peer.send_frame(DataFrame(stream_id, data=b"y" * 16_000))
            reset = await peer.wait_on(StreamReset, stream_id)
            assert reset.error_code == ErrorCodes.STREAM_CLOSED
        (link,) = server.links
        assert link.engine.inbound_flow_control_window > 70_000
        echo.gate = None
        await assert_serves(peer)


async def test_data_of_a_stream_that_is_answered_already_costs_no_window() -> None:
    limits = replace(EXTERNAL_LIMITS, stream_window_bytes=70_000, connection_window_bytes=140_000)
    async with serve_echo(limits) as (server, port, _), connect(port) as peer:
        await peer.read()
        for _ in range(20):
            # The first piece comes together with the headers that are refused, the second later.
            stream_id = peer.begin([*REQUEST, (b"connection", b"close")])
            peer.send(stream_id, bytes(16_000))
            await peer.wait_answer(stream_id)
            peer.send_frame(DataFrame(stream_id, data=bytes(16_000)))
        await assert_serves(peer)
        (link,) = server.links
        assert link.engine.inbound_flow_control_window > 70_000


async def test_padded_data_is_given_back_whole() -> None:
    limits = replace(EXTERNAL_LIMITS, stream_window_bytes=70_000, connection_window_bytes=140_000)
    async with serve_echo(limits) as (_, port, _), connect(port) as peer:
        await peer.read()
        for _ in range(30):
            stream_id = peer.begin()
            peer.h2.send_data(stream_id, frame_message(b"x" * 9000), pad_length=255)
            peer.h2.send_data(stream_id, b"", end_stream=True, pad_length=255)
            peer.flush()
            assert (await peer.wait_answer(stream_id))[0][b"grpc-status"] == b"0"


async def test_unread_bodies_of_reset_streams_are_given_back() -> None:
    limits = replace(EXTERNAL_LIMITS, stream_window_bytes=70_000, connection_window_bytes=140_000)
    async with serve_echo(limits) as (_, port, _), connect(port) as peer:
        await peer.read()
        for _ in range(30):
            # Half a message: the handler waits for the rest with these bytes in its hands.
            stream_id = peer.begin()
            await _send_all(peer, stream_id, frame_message(b"x" * 20_000)[:-1])
            peer.reset(stream_id, ErrorCodes.CANCEL)
        await assert_serves(peer)


async def _send_all(peer: RawPeer, stream_id: int, data: bytes, *, end: bool = False) -> None:
    while data:
        room = min(peer.h2.local_flow_control_window(stream_id), peer.h2.max_outbound_frame_size)
        if room:
            piece, data = data[:room], data[room:]
            peer.h2.send_data(stream_id, piece, end_stream=end and not data)
            peer.flush()
        else:
            assert await peer.read()


async def test_frames_of_other_times_are_stepped_over() -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        peer.send_frame(PriorityFrame(1, depends_on=1, stream_weight=3))
        peer.writer.write(b"\0\0\6\xbe\0\0\0\0\0grease")
        await assert_serves(peer)
        # A window for a stream that is gone, and one too large for a stream that is not.
        peer.send_frame(WindowUpdateFrame(1, window_increment=5))
        stream_id = peer.begin()
        peer.send_frame(WindowUpdateFrame(stream_id, window_increment=2**31 - 1))
        reset = await peer.wait_on(StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.FLOW_CONTROL_ERROR
        await assert_serves(peer)


@pytest.mark.parametrize(
    "frame",
    [
        DataFrame(99, data=b"x"),
        HeadersFrame(2, data=b"\x83", flags=["END_HEADERS"]),
        WindowUpdateFrame(0, window_increment=2**31 - 1),
    ],
)
async def test_what_breaks_the_connection_ends_it_with_goaway(frame: DataFrame) -> None:
    async with serve_echo() as (server, port, _), connect(port) as peer:
        await peer.read()
        peer.send_frame(frame)
        assert await peer.wait_closed() is not None
        async with connect(port) as other:
            await assert_serves(other)
        assert all(link.peer_address for link in server.links)


async def test_garbage_instead_of_a_preface() -> None:
    async with serve_echo() as (_, port, _), connect(port, start=False) as peer:
        peer.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await peer.wait_closed()


async def test_a_silent_connection_is_closed() -> None:
    limits = replace(EXTERNAL_LIMITS, greeting_s=0.05)
    async with serve_echo(limits) as (_, port, _), connect(port, start=False) as peer:
        peer.writer.write(b"PRI * HTTP/2.0\r\n")
        await peer.wait_closed()


async def test_more_connections_than_allowed() -> None:
    async with serve_echo(replace(EXTERNAL_LIMITS, connections_max=1)) as (_, port, _):
        async with connect(port) as first:
            await assert_serves(first)
            async with connect(port) as second:
                await second.wait_closed()
            await assert_serves(first)


# --- numbers and rates -----------------------------------------------------------------------


async def test_a_stream_too_many_is_refused_and_the_others_go_on() -> None:
    async with serve_echo(replace(EXTERNAL_LIMITS, streams_max=3)) as (_, port, echo):
        echo.gate = asyncio.Event()
        async with connect(port) as peer:
            # Before the settings are read, so that this end knows of no limit.
            *streams, fourth = [peer.begin() for _ in range(4)]
            reset = await peer.wait_on(StreamReset, fourth)
            assert reset.error_code == ErrorCodes.REFUSED_STREAM
            assert peer.h2.remote_settings.max_concurrent_streams == 3
            echo.gate.set()
            for stream_id in streams:
                peer.send(stream_id, frame_message(b"x"), end=True)
                assert (await peer.wait_answer(stream_id))[1] == frame_message(b"x")


async def test_hundreds_of_streams_on_one_connection() -> None:
    async with serve_echo() as (_, port, echo), connect(port) as peer:
        echo.gate = asyncio.Event()
        await peer.read()
        assert peer.h2.remote_settings.max_concurrent_streams == 1000
        streams = []
        for _ in range(250):
            stream_id = peer.begin()
            peer.h2.send_data(stream_id, frame_message(b""), end_stream=True)
            streams.append(stream_id)
        peer.flush()
        while echo.running < len(streams):
            echo.started.clear()
            await asyncio.wait_for(echo.started.wait(), PATIENCE_S)
        echo.gate.set()
        for stream_id in streams:
            assert (await peer.wait_answer(stream_id))[0][b"grpc-status"] == b"0"


async def test_a_client_that_resets_what_it_asks_for_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = replace(EXTERNAL_LIMITS, resets_burst=20, resets_per_s=1.0)
    async with serve_echo(limits) as (_, port, _), connect(port) as peer:
        for _ in range(40):
            stream_id = peer.begin()
            peer.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
        peer.flush()
        end = await peer.wait_closed()
        # The GOAWAY may be lost: what the client still sends makes TCP drop the connection.
        assert end is None or end.error_code == ErrorCodes.ENHANCE_YOUR_CALM
        assert "it resets streams too fast" in caplog.text


async def test_a_client_that_was_dropped_hears_no_other_last_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = replace(EXTERNAL_LIMITS, resets_burst=2, resets_per_s=1.0)
    async with serve_echo(limits) as (server, port, _), connect(port) as peer:
        await assert_serves(peer)
        (link,) = server.links
        told: list[tuple[int, int | None]] = []

        def submit_goaway(code: int = 0, last_id: int | None = None) -> None:
            told.append((code, last_id))

        monkeypatch.setattr(link.engine, "submit_goaway", submit_goaway)
        for _ in range(4):
            link.reset_received()
        link.drain()
        assert told == [(ErrorCodes.ENHANCE_YOUR_CALM, None)]


async def test_a_client_that_makes_us_reset_what_it_asks_for_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = replace(EXTERNAL_LIMITS, resets_burst=20, resets_per_s=1.0)
    async with serve_echo(limits) as (_, port, _), connect(port) as peer:
        for _ in range(40):
            # More window than there may be: an error of the stream alone.
            peer.send_frame(WindowUpdateFrame(peer.begin(), window_increment=2**31 - 1))
        await peer.wait_closed()
        assert "it resets streams too fast" in caplog.text


async def test_a_flood_of_small_frames_lets_others_run() -> None:
    async with serve_echo() as (server, port, _), connect(port) as peer:
        await assert_serves(peer)
        (link,) = server.links
        link.data_received(PingFrame(0, opaque_data=b"12345678").serialize() * 4000)
        # Whoever reads a socket until it is empty has to be told to stop.
        assert not link.transport.is_reading()
        turns = 0
        while link.is_behind:
            turns += 1
            turn = asyncio.Event()
            link.loop.call_soon(turn.set)
            await turn.wait()
        assert turns > 50, "others had a turn again and again"
        assert link.transport.is_reading()
        await assert_serves(peer)


async def test_half_a_connection_that_nobody_reads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_LINGER_S", 0.05)
    async with serve_echo() as (server, port, echo), connect(port) as peer:
        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
        peer.h2.increment_flow_control_window(2**30)
        await assert_serves(peer)
        echo.reply = bytes(16 * 2**20)
        echo.ended.clear()
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b"x"), end=True)
        await asyncio.wait_for(echo.ended.wait(), PATIENCE_S)
        peer.writer.write_eof()
        await server._wait_while(lambda: bool(server.links), PATIENCE_S)
        assert not server.links


async def test_a_client_that_does_not_read_its_ping_answers_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve_echo() as (server, port, _), connect(port) as peer:
        await assert_serves(peer)
        (link,) = server.links
        # The kernel alone would take megabytes of answers before anything piles up here.
        unread = EXTERNAL_LIMITS.unread_control_bytes_max
        monkeypatch.setattr(link.transport, "get_write_buffer_size", lambda: unread)
        peer.send_frame(PingFrame(0, opaque_data=b"12345678"))
        await peer.wait_for(PingAckReceived)
        monkeypatch.setattr(link.transport, "get_write_buffer_size", lambda: unread + 1)
        peer.send_frame(PingFrame(0, opaque_data=b"12345678"))
        await peer.wait_closed()

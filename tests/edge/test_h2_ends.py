"""The server end, frame by frame: slow readers, deadlines, clients that leave, a graceful stop."""

from __future__ import annotations

import asyncio
import logging
import struct
from dataclasses import replace

import pytest
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingAckReceived,
    ResponseReceived,
    StreamReset,
)
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, GoAwayFrame

import mm.edge.h2.link as link_module
import mm.edge.h2.server as server_module
from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer
from mm.edge.h2.messages import frame_message
from mm.edge.h2.stream import RawStream
from tests.edge.h2_echo import Echo, assert_serves, serve_echo, wait_started
from tests.edge.raw_h2 import PATIENCE_S, REQUEST, RawPeer, connect

pytestmark = pytest.mark.anyio


# --- flow control ----------------------------------------------------------------------------


async def test_a_slow_reader_gets_its_window_and_no_more() -> None:
    async with serve_echo() as (_, port, echo), connect(port) as peer:
        echo.reply = bytes(300_000)
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b""), end=True)
        received = 0
        unacknowledged: list[int] = []
        while received < 65_535:
            event = await peer.wait_on(DataReceived, stream_id)
            received += len(event.data)
            unacknowledged.append(event.flow_controlled_length)
        # A second call is answered meanwhile only if the connection has room: it has none.
        assert received == 65_535
        peer.h2.ping(b"are you?")
        peer.flush()
        await peer.wait_for(PingAckReceived, lambda event: event.ping_data == b"are you?")
        assert not [event for event in peer.events if isinstance(event, DataReceived)]
        for size in unacknowledged:
            peer.h2.acknowledge_received_data(size, stream_id)
        peer.flush()
        headers, body = await peer.wait_answer(stream_id)
        assert received + len(body) == 300_005
        assert headers[b"grpc-status"] == b"0"


async def test_room_for_all_is_given_to_those_that_can_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each frame of nine bytes costs a look at every answer that somebody does not take."""
    looks = 0
    pump = RawStream.pump

    def counted(stream: RawStream) -> None:
        nonlocal looks
        looks += 1
        pump(stream)

    async with serve_echo() as (_, port, echo), connect(port) as peer:
        echo.reply = bytes(995)

        async def ask(count: int, sent_bytes: int) -> None:
            for _ in range(count):
                peer.send(peer.begin(), frame_message(b""), end=True)
            left = sent_bytes
            while left:
                left -= len((await peer.wait_for(DataReceived)).data)

        async def give(increment: int, count: int = 1) -> None:
            for _ in range(count):
                peer.h2.increment_flow_control_window(increment)
            peer.h2.ping(b"all seen")
            peer.flush()
            await peer.wait_for(PingAckReceived)

        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        await ask(50, 500)
        monkeypatch.setattr(RawStream, "pump", counted)
        await give(1, 500)
        assert looks == 0  # of streams whose own windows are shut
        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 65_535})
        await ask(50, 65_535)
        looks = 0
        await give(1, 500)
        assert 0 < looks <= 500
        await give(2**20)
        left = 100 * 1000 - 500 - 65_535
        while left:
            left -= len((await peer.wait_for(DataReceived)).data)


async def test_a_window_made_smaller_and_larger_by_settings() -> None:
    async with serve_echo() as (_, port, echo), connect(port) as peer:
        echo.reply = bytes(50_000)
        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
        peer.flush()
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b""), end=True)
        await peer.wait_on(ResponseReceived, stream_id)
        first = await peer.wait_on(DataReceived, stream_id)
        assert len(first.data) == 10
        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 65_535})
        peer.flush()
        headers, body = await peer.wait_answer(stream_id)
        assert len(body) == 50_005 - 10
        assert headers[b"grpc-status"] == b"0"


async def test_a_reader_of_huge_frames_is_not_taken_for_one_that_does_not_read() -> None:
    """grpc's C core grows its frame size and windows to megabytes when a connection is fast."""
    reply_bytes = 4 * EXTERNAL_LIMITS.unread_control_bytes_max
    async with serve_echo() as (server, port, echo), connect(port) as peer:
        echo.reply = bytes(reply_bytes)
        settings = {
            SettingCodes.INITIAL_WINDOW_SIZE: 2 * reply_bytes,
            SettingCodes.MAX_FRAME_SIZE: 2**24 - 1,
        }
        peer.h2.update_settings(settings)
        peer.h2.increment_flow_control_window(2 * reply_bytes)
        peer.flush()
        # Its parser takes large frames only from the read after the one with the acknowledgement.
        while peer.h2.max_inbound_frame_size < 2**24 - 1:
            await peer.read()
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b""), end=True)
        await asyncio.wait_for(echo.ended.wait(), PATIENCE_S)
        (link,) = server.links
        assert 0 < link.transport.get_write_buffer_size() < 2**20
        peer.h2.ping(b"anybody?")
        peer.flush()
        headers, body = await peer.wait_answer(stream_id)
        assert len(body) == reply_bytes + 5
        assert headers[b"grpc-status"] == b"0"


# --- ends ------------------------------------------------------------------------------------


async def test_goaway_of_the_client_lets_its_calls_finish() -> None:
    async with serve_echo() as (_, port, echo), connect(port) as peer:
        echo.gate = asyncio.Event()
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b"x"), end=True)
        peer.send_frame(GoAwayFrame(0, last_stream_id=0))
        echo.gate.set()
        assert (await peer.wait_answer(stream_id))[1] == frame_message(b"x")


async def test_a_vanishing_client_cancels_its_calls() -> None:
    async with serve_echo() as (server, port, echo):
        async with connect(port) as peer:
            peer.begin()
            await asyncio.wait_for(wait_started(echo, peer), PATIENCE_S)
            peer.writer.transport.abort()
        await asyncio.wait_for(echo.ended.wait(), PATIENCE_S)
        assert not server.calls


async def test_a_reset_cancels_its_call_alone() -> None:
    async with serve_echo() as (_, port, echo), connect(port) as peer:
        other, stream_id = peer.begin(), peer.begin()
        await asyncio.wait_for(wait_started(echo, peer), PATIENCE_S)
        peer.reset(stream_id, ErrorCodes.CANCEL)
        await asyncio.wait_for(echo.ended.wait(), PATIENCE_S)
        peer.send(other, frame_message(b"x"), end=True)
        assert (await peer.wait_answer(other))[1] == frame_message(b"x")


async def test_a_graceful_stop_lets_calls_finish_and_takes_no_more() -> None:
    """Calls that were on their way when the client heard of it are served, too."""
    async with serve_echo() as (server, port, echo), connect(port) as peer:
        echo.gate = asyncio.Event()
        first = peer.begin()
        peer.send(first, frame_message(b"x"), end=True)
        await asyncio.wait_for(wait_started(echo, peer), PATIENCE_S)
        stopping = asyncio.ensure_future(server.stop(PATIENCE_S))
        await asyncio.wait_for(_wait_refused(port), PATIENCE_S)
        on_its_way = peer.begin()
        peer.send(on_its_way, frame_message(b"y"), end=True)
        # What is read from here on is answered at once: the ping, too.
        end = await peer.wait_for(ConnectionTerminated)
        assert (end.error_code, end.last_stream_id) == (ErrorCodes.NO_ERROR, 2**31 - 1)
        end = await peer.wait_for(ConnectionTerminated)
        assert (end.error_code, end.last_stream_id) == (ErrorCodes.NO_ERROR, on_its_way)
        late = peer.begin()
        assert (await peer.wait_on(StreamReset, late)).error_code == ErrorCodes.REFUSED_STREAM
        assert not stopping.done()
        echo.gate.set()
        assert (await peer.wait_answer(first))[1] == frame_message(b"x")
        assert (await peer.wait_answer(on_its_way))[1] == frame_message(b"y")
        await asyncio.wait_for(stopping, PATIENCE_S)


async def _wait_refused(port: int) -> None:
    """Return when nobody listens there any more."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            return
        writer.close()


async def _read_raw(peer: RawPeer) -> bytes:
    """Read to the end, and answer nothing."""
    return await asyncio.wait_for(peer.reader.read(), PATIENCE_S)


async def test_a_stop_ends_what_does_not_end_by_itself() -> None:
    async with serve_echo() as (server, port, echo), connect(port) as peer:
        echo.gate = asyncio.Event()
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b"x"), end=True)
        await asyncio.wait_for(wait_started(echo, peer), PATIENCE_S)
        await asyncio.wait_for(server.stop(0.05), 60)
        assert echo.ended.is_set()
        assert b"shutting down" in await _read_raw(peer)


async def test_a_stop_does_not_wait_for_a_client_that_stays_connected() -> None:
    async with serve_echo() as (server, port, _), connect(port) as peer:
        await assert_serves(peer)
        await asyncio.wait_for(server.stop(60), 60)
        assert await peer.wait_closed() is not None


async def test_a_stop_does_not_wait_for_a_client_that_answers_no_ping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "_GOAWAY_HEARD_S", 0.05)
    async with serve_echo() as (server, port, echo), connect(port) as peer:
        echo.gate = asyncio.Event()
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b"x"), end=True)
        await asyncio.wait_for(wait_started(echo, peer), PATIENCE_S)
        stopping = asyncio.ensure_future(server.stop(2 * PATIENCE_S))
        goaways = b""
        while struct.pack(">LL", stream_id, ErrorCodes.NO_ERROR) not in goaways:
            goaways += await asyncio.wait_for(peer.reader.read(2**16), PATIENCE_S)
        echo.gate.set()
        assert frame_message(b"x") in await _read_raw(peer)
        await asyncio.wait_for(stopping, PATIENCE_S)


async def test_deadlines_are_answered_by_the_server() -> None:
    async with serve_echo() as (_, port, echo), connect(port) as peer:
        echo.gate = asyncio.Event()
        stream_id = peer.begin([*REQUEST, (b"grpc-timeout", b"500m")])
        peer.send(stream_id, frame_message(b"x"), end=True)
        headers, _ = await peer.wait_answer(stream_id)
        assert headers[b"grpc-status"] == b"4"
        await asyncio.wait_for(echo.ended.wait(), PATIENCE_S)


async def test_a_deadline_with_the_answer_stuck_resets_the_stream() -> None:
    async with serve_echo() as (_, port, echo), connect(port) as peer:
        echo.reply = bytes(200_000)
        stream_id = peer.begin([*REQUEST, (b"grpc-timeout", b"1000m")])
        peer.send(stream_id, frame_message(b""), end=True)
        reset = await peer.wait_on(StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.CANCEL


async def test_unix_sockets(tmp_path: object) -> None:
    path = f"{tmp_path}/s"
    server = GrpcServer(Echo(), limits=EXTERNAL_LIMITS, external=True)
    assert await server.start(path=path) == 0
    reader, writer = await asyncio.open_unix_connection(path)
    peer = RawPeer(reader, writer, client_side=True)
    peer.start()
    await assert_serves(peer)
    await server.stop(0)
    await peer.close()
    with pytest.raises(FileNotFoundError):
        await asyncio.open_unix_connection(path)


async def test_a_connection_whose_last_words_do_not_leave_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "_LINGER_S", 0.05)
    limits = replace(EXTERNAL_LIMITS, message_bytes_max=2**30)
    async with serve_echo(limits) as (server, port, echo), connect(port) as peer:
        echo.reply = bytes(64 * 2**20)
        peer.h2.increment_flow_control_window(2**30)
        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
        stream_id = peer.begin()
        peer.send(stream_id, frame_message(b""), end=True)
        await peer.wait_on(ResponseReceived, stream_id)
        # The socket is full of an answer that nobody reads; then the client breaks a rule.
        peer.writer.transport.pause_reading()
        peer.send_frame(DataFrame(99, data=b"x"))
        await server._wait_while(lambda: bool(server.links), PATIENCE_S)
        assert not server.links


async def test_clients_that_break_rules_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serve_echo() as (_, port, _):
        for _ in range(5):
            async with connect(port) as peer:
                peer.send_frame(DataFrame(99, data=b"x"))
                await peer.wait_closed()
    told = [each for each in caplog.records if "closing the connection with" in each.message]
    assert [each.levelno for each in told if each.levelno > logging.DEBUG] == [logging.WARNING]

"""Prefaces, headers and messages that trickle; connections that are old, or that nobody needs."""

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest

from mm.edge.h2.messages import frame_message
from mm.wire import WireTls
from mm.wire.client_limits import ClientLimits
from tests.edge.raw_h2 import PATIENCE_S, connect
from tests.wire.frames import begin, request
from tests.wire.hostile import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOWS,
    Requests,
    attack,
    dial,
    frame,
    good_client,
)
from tests.wire.stand import WireStand, serve_wire

pytestmark = pytest.mark.anyio
SHORT_MS = 50
#: Between two bytes that trickle: a hundred of them take ten times as long as is allowed.
PACE_S = 0.01


def _trickle(caller: socket.socket, data: bytes) -> int:
    """Send a byte each few milliseconds until cut off, and answer how many were sent."""
    sent = 0
    with suppress(ConnectionError):
        while sent < len(data):
            caller.sendall(data[sent : sent + 1])
            sent += 1
            if _ends_within(caller, PACE_S):
                return sent
        assert _ends_within(caller, PATIENCE_S)
    return sent


def _ends_within(caller: socket.socket, seconds: float) -> bool:
    """Hear what is said, and answer whether that was all for good."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        if select.select([caller], [], [], left_s)[0] and not caller.recv(2**16):
            return True
    return False


async def test_a_preface_that_trickles_is_not_waited_for() -> None:
    async with serve_wire() as stand:
        async with good_client(stand):
            stand.configure(tls=WireTls(handshake_ms=SHORT_MS))
            with closing(dial(stand.port)) as caller, closing(dial(stand.port)):
                assert await asyncio.to_thread(_trickle, caller, PREFACE) < len(PREFACE)
                await stand.settle(prefaces_late=2, connections_open=1)


def _call() -> bytes:
    return Requests().next()


#: What is sent at once, and what then trickles: never a whole frame, or list of headers.
TRICKLES: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "headers": lambda: (b"", _call()),
    "headers that stop": lambda: (_call()[:30], b""),
    "the head of a frame": lambda: (_call()[:5], b""),
    "the head of a frame of a body": lambda: (_call(), frame(DATA, b"12345678", stream_id=1)[:8]),
    "more headers": lambda: (
        Requests().next(flags=END_STREAM) + frame(CONTINUATION, stream_id=1),
        frame(CONTINUATION, bytes(100), flags=END_HEADERS, stream_id=1),
    ),
    "trailers": lambda: (
        _call(),
        frame(HEADERS, bytes(100), flags=END_STREAM | END_HEADERS, stream_id=1),
    ),
    "settings": lambda: (frame(SETTINGS, b"\0\4\0\0\1\0")[:12], b""),
    "something unknown": lambda: (frame(0xBE, bytes(16384))[:-100], bytes(100)),
}


@pytest.mark.parametrize("what", TRICKLES)
async def test_frames_that_trickle_are_not_waited_for(what: str) -> None:
    at_once, trickling = TRICKLES[what]()
    async with serve_wire() as stand:
        stand.configure(clients=ClientLimits(headers_ms=SHORT_MS))
        async with good_client(stand):
            with closing(dial(stand.port)) as caller:
                caller.sendall(PREFACE + at_once)
                sent = await asyncio.to_thread(_trickle, caller, trickling)
            assert not trickling or sent < len(trickling) or what.startswith("the head")
            assert stand.wire.take_flood() == ("127.0.0.1", "time for a frame or headers")
            await stand.settle(floods_refused=1, connections_open=1)


async def test_bodies_take_their_time() -> None:
    """Half a frame of one waits for longer than half a frame of headers may."""
    body = frame(DATA, frame_message(b"slow"), flags=END_STREAM, stream_id=1)
    async with serve_wire() as stand:
        stand.configure(clients=ClientLimits(headers_ms=SHORT_MS))
        async with connect(stand.port) as client:
            stream_id = client.begin(request(b"/t.S/Unary"))
            client.flush()
            client.writer.write(body[:12])
            await stand.settle(calls_open=1)
            with closing(dial(stand.port)) as caller:
                caller.sendall(PREFACE + _call()[:30])
                await stand.settle(floods_refused=1)
            client.writer.write(body[12:])
            assert (await client.wait_answer(stream_id))[1] == frame_message(b"echo:slow")


async def test_a_first_message_that_trickles_is_not_waited_for() -> None:
    async with serve_wire() as stand:
        stand.configure(clients=ClientLimits(message_ms=SHORT_MS))
        async with good_client(stand), connect(stand.port) as client:
            streams = [client.begin(request(b"/t.S/Both")) for _ in range(4)]
            # The fourth is whole, and rests from then on.
            whole = frame_message(b"whole")
            for stream_id, part in zip(streams, (0, 3, 8, len(whole)), strict=True):
                client.send(stream_id, whole[:part])
            for stream_id in streams[:3]:
                headers, _ = await client.wait_answer(stream_id)
                assert headers[b"grpc-status"] == b"4"
                assert headers[b"grpc-message"].endswith(b"first message takes too long")
            client.send(streams[3], frame_message(b"more"), end=True)
            assert (await client.wait_answer(streams[3]))[1] == b"".join(
                frame_message(b"re:" + each) for each in (b"whole", b"more")
            )
            assert stand.counts.messages_late == 3


@pytest.mark.parametrize("size", [0, 100, 1500, 10_000])
async def test_an_answer_that_nobody_takes_is_given_up(size: int) -> None:
    """Small ones too, of which nothing more comes."""
    body = frame_message(b"x" * size)

    def pieces() -> Iterator[bytes]:
        requests = Requests()
        yield PREFACE + frame(SETTINGS, b"\0\4\0\0\0\0") + requests.next()
        yield frame(DATA, body, flags=END_STREAM, stream_id=1)

    async with serve_wire() as stand:
        stand.configure(clients=ClientLimits(unread_ms=SHORT_MS, headers_ms=SHORT_MS))
        async with good_client(stand):
            with closing(dial(stand.port)) as caller:
                task = asyncio.create_task(asyncio.to_thread(attack, caller, pieces()))
                await stand.settle(slow_given_up=1, cancelled=1)
                caller.shutdown(socket.SHUT_WR)
                end = await task
        assert (RST_STREAM, 1, bytes((0, 0, 0, ENHANCE_YOUR_CALM))) in list(end.frames())


async def test_what_a_full_socket_does_not_take_is_given_up() -> None:
    """Of calls that have ended something is left, too."""
    body = frame_message(b"x" * 16_000)

    async with serve_wire() as stand:
        stand.configure(clients=ClientLimits(unread_ms=SHORT_MS))
        with closing(dial(stand.port, receives_bytes=4096)) as caller:
            requests = Requests()
            pieces = [
                requests.next() + frame(DATA, body, flags=END_STREAM, stream_id=requests.stream_id)
                for _ in range(900)
            ]
            # It may be cut off before it has sent everything.
            with suppress(ConnectionError):
                await asyncio.to_thread(caller.sendall, PREFACE + WINDOWS + b"".join(pieces))
            await stand.settle(connections_open=0, calls_open=0)
            assert stand.counts.slow_given_up > 0


@pytest.mark.parametrize("flags", [0, END_HEADERS])
async def test_who_was_told_to_go_is_held_to_time_all_the_same(flags: int) -> None:
    limits = ClientLimits(age_ms=SHORT_MS, headers_ms=10 * SHORT_MS, message_ms=10 * SHORT_MS)
    async with serve_wire() as stand:
        stand.configure(clients=limits)
        with closing(dial(stand.port)) as caller:
            caller.sendall(PREFACE + Requests().next(flags=flags))
            cut_off = {"floods_refused": 1, "messages_late": 0}
            late = {"floods_refused": 0, "messages_late": 1}
            await stand.settle(aged=1, connections_open=0, **(late if flags else cut_off))


async def _is_sent_away(stand: WireStand) -> None:
    async with connect(stand.port) as client:
        assert (await client.wait_answer(begin(client)))[1] == frame_message(b"echo:q")
        last = await client.wait_closed()
        assert last is not None
        assert (last.error_code, last.last_stream_id) == (0, 1)


async def test_who_makes_no_call_is_sent_away() -> None:
    async with serve_wire() as stand:
        stand.configure(clients=ClientLimits(idle_ms=SHORT_MS, headers_ms=SHORT_MS))
        async with connect(stand.port) as busy:
            stream_id = busy.begin(request(b"/t.S/Both"))
            await stand.settle(calls_open=1)
            await _is_sent_away(stand)
            busy.send(stream_id, frame_message(b"1"), end=True)
            assert (await busy.wait_answer(stream_id))[1] == frame_message(b"re:1")
            await stand.settle(idle=2, connections_open=0)


async def test_connections_that_are_old_end_and_no_call_is_lost() -> None:
    async with serve_wire() as stand:
        stand.configure(clients=ClientLimits(age_ms=SHORT_MS))
        async with good_client(stand):
            async with asyncio.timeout(60):
                while stand.counts.aged < 4:
                    await asyncio.wait((asyncio.get_running_loop().create_future(),), timeout=0.01)
            await _is_sent_away(stand)


async def test_calls_on_old_connections_have_their_grace() -> None:
    async with serve_wire() as stand:
        stand.configure(clients=ClientLimits(age_ms=SHORT_MS, age_grace_ms=SHORT_MS))
        async with connect(stand.port) as client:
            client.begin(request(b"/t.S/Both"))
            assert await client.wait_closed() is not None
            await stand.settle(aged=1, connections_open=0, calls_open=0)

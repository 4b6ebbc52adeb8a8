"""Floods of frames: whoever sends them is cut off, and who behaves notices nothing."""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mm.core.headers import HeaderList
from mm.edge.tls import Contexts
from mm.wire import Role, WireTls
from mm.wire.client_limits import ClientLimits
from tests.identities import make
from tests.wire.frames import request
from tests.wire.hostile import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Requests,
    ask_large,
    dial,
    frame,
    good_client,
    run_attack,
)
from tests.wire.stand import serve_wire, until
from tests.wire.test_tls import contexts_of

pytestmark = pytest.mark.anyio
CANCEL = b"\0\0\0\x08"
#: So that floods need not be long.
LIMITS = ClientLimits(frames_burst=500, frames_per_s=10, resets_burst=100, resets_per_s=10)
#: The same of instances, or nearly, which may send many times as much.
FEW = ClientLimits(frames_burst=25, frames_per_s=0, resets_burst=1, resets_per_s=0)


def _repeated(piece: bytes, *, before: bytes = b"") -> Iterator[bytes]:
    return itertools.chain((PREFACE + before,), itertools.repeat(piece))


def _open_stream() -> bytes:
    return Requests().next()


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "control frames": lambda: _repeated(frame(PING, b"12345678")),
    "settings": lambda: _repeated(frame(SETTINGS, b"\0\4\0\1\0\0")),
    "empty frames": lambda: _repeated(frame(DATA, stream_id=1), before=_open_stream()),
    "CONTINUATION frames": lambda: _repeated(
        frame(CONTINUATION, stream_id=1), before=Requests().next(flags=END_STREAM)
    ),
}
OTHERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "priority": lambda: _repeated(frame(PRIORITY, b"\0\0\0\0\1", stream_id=3)),
    "window": lambda: _repeated(frame(WINDOW_UPDATE, b"\0\0\0\1")),
    "unknown": lambda: _repeated(frame(0xEE, b"what?")),
    "padding": lambda: _repeated(frame(DATA, b"\1\0", flags=8, stream_id=1), before=_open_stream()),
}


#: On stream 1, which was opened and reset.
STRAYS: dict[str, bytes] = {
    "headers": frame(HEADERS, b"\x82", flags=END_HEADERS, stream_id=1),
    "data": frame(DATA, b"x", stream_id=1),
    "ends": frame(DATA, flags=END_STREAM, stream_id=1),
    # A piece of a body would allow for four of them.
    "data and pings": frame(DATA, b"x", stream_id=1) + 4 * frame(PING, b"12345678"),
}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("what", FLOODS)
async def test_a_flood_of_frames_is_cut_off(what: str, role: Role) -> None:
    """A client's or an instance's; another one loses nothing."""
    await _is_cut_off(FLOODS[what](), what, role)


async def test_padded_bodies_are_no_flood() -> None:
    """A kilobyte of a message in each frame, and padding: as many as windows have room for."""

    def pieces() -> Iterator[bytes]:
        requests = Requests()
        yield PREFACE
        for _ in range(3 * LIMITS.frames_burst // 250):
            yield requests.next()
            at = requests.stream_id
            yield frame(DATA, b"\0" + (2**30).to_bytes(4, "big"), stream_id=at)
            yield 250 * frame(DATA, b"\1" + bytes(1024) + b"\0", flags=8, stream_id=at)

    async with serve_wire(message_bytes_max=2**30) as stand:
        stand.configure(message_bytes_max=2**30, clients=LIMITS)
        with closing(dial(stand.port)) as caller:
            ask = frame(PING, b"12345678")
            await asyncio.to_thread(caller.sendall, b"".join(pieces()) + ask)
            heard = await asyncio.to_thread(caller.recv, 2**16)
            while b"12345678" not in heard:
                more = await asyncio.to_thread(caller.recv, 2**16)
                assert more, "cut off"
                heard += more
        await stand.settle(floods_refused=0, calls=6, connections_open=0)


@pytest.mark.parametrize("name", OTHERS)
async def test_so_is_one_of_other_frames(name: str) -> None:
    what = "empty frames" if name == "padding" else "control frames"
    await _is_cut_off(OTHERS[name](), what)


@pytest.mark.parametrize("name", STRAYS)
async def test_so_is_one_of_streams_that_are_closed(name: str) -> None:
    closed = _open_stream() + frame(RST_STREAM, CANCEL, stream_id=1)
    # Pings are charged one by one, the others when what was read has been looked at.
    what = {"frames of streams without a call", *({"control frames"} if "pings" in name else ())}
    await _is_cut_off(_repeated(STRAYS[name], before=closed), *what)


def _calls() -> Iterator[bytes]:
    requests = Requests()
    yield PREFACE
    while True:
        yield requests.next()


async def test_so_is_one_of_calls_beyond_its_streams() -> None:
    async with serve_wire() as stand:
        stand.configure(external_streams_max=10, clients=LIMITS)
        end = await run_attack(stand, _calls())
        assert end.code == ENHANCE_YOUR_CALM
        assert stand.wire.take_flood() == ("127.0.0.1", "frames of streams without a call")


async def _is_cut_off(pieces: Iterator[bytes], *what: str, role: Role = Role.EXTERNAL) -> None:
    async with serve_wire(role=role) as stand:
        stand.configure(clients=LIMITS if role is Role.EXTERNAL else FEW)
        end = await run_attack(stand, pieces)
        assert end.code == ENHANCE_YOUR_CALM
        assert stand.wire.take_flood() in [("127.0.0.1", each) for each in what]
        await stand.settle(floods_refused=1, connections_open=0, calls_open=0)


def _resets() -> Iterator[bytes]:
    requests = Requests()
    yield PREFACE
    while True:
        yield requests.next()
        yield frame(RST_STREAM, CANCEL, stream_id=requests.stream_id)


def _made_resets() -> Iterator[bytes]:
    """A window that becomes too large is an error of the stream, which we have to reset."""
    requests = Requests()
    yield PREFACE
    while True:
        yield requests.next()
        yield frame(WINDOW_UPDATE, b"\x7f\xff\xff\xff", stream_id=requests.stream_id)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("pieces", [_resets, _made_resets])
async def test_resets_that_are_sent_and_those_that_are_made_are_counted(
    pieces: Callable[[], Iterator[bytes]], role: Role
) -> None:
    async with serve_wire(role=role) as stand:
        few = 100 if role is Role.EXTERNAL else 1
        stand.configure(clients=ClientLimits(resets_burst=few, resets_per_s=0))
        end = await run_attack(stand, pieces())
        assert end.code == ENHANCE_YOUR_CALM
        await stand.settle(resets_refused=1, floods_refused=0, connections_open=0, calls_open=0)


async def test_an_instance_may_give_up_all_its_calls_at_once() -> None:
    """Those of all its clients; and it makes others on the same connection."""
    async with serve_wire(role=Role.PEER) as stand:
        with closing(dial(stand.port)) as caller:
            pieces = itertools.islice(_resets(), 1 + 2 * stand.settings.peer_streams_max)
            ping = frame(PING, b"12345678")
            await asyncio.to_thread(caller.sendall, b"".join(pieces) + ping)
            heard = b""
            while b"12345678" not in heard:
                more = await asyncio.to_thread(caller.recv, 2**16)
                assert more, "cut off"
                heard += more
        await stand.settle(resets_refused=0, floods_refused=0, connections_open=0, calls_open=0)


async def test_an_instance_that_was_cut_off_and_does_not_read_is_closed() -> None:
    async with serve_wire(role=Role.PEER, socket_bytes=4096) as stand:
        stand.configure(clients=replace(FEW, headers_ms=50))
        with closing(ask_large(stand)) as caller:
            await until(lambda: stand.counts.unwritten_bytes > 0)
            requests = Requests()
            requests.stream_id = 1
            pieces = [
                requests.next() + frame(RST_STREAM, CANCEL, stream_id=requests.stream_id)
                for _ in range(1000)
            ]
            caller.sendall(b"".join(pieces))
            await stand.settle(resets_refused=1, connections_open=0)


async def test_headers_that_swell_are_not_kept() -> None:
    """One entry of 4 KiB, named a thousand times in a kilobyte."""

    def bombs() -> Iterator[bytes]:
        requests = Requests()
        yield PREFACE
        while True:
            yield requests.next(bomb)

    bomb: HeaderList = [*request(), *([(b"bomb", b"x" * 3900)] * 1000)]
    async with serve_wire() as stand:
        stand.configure(clients=LIMITS)
        end = await run_attack(stand, bombs())
        assert end.code == ENHANCE_YOUR_CALM
        flood = stand.wire.take_flood()
        assert flood is None or flood[1] == "headers that are too long"
        assert stand.counts.floods_refused + stand.counts.resets_refused == 1
        await stand.settle(connections_open=0, calls_open=0)


async def test_refusals_do_not_pile_up_for_one_who_does_not_read() -> None:
    async with serve_wire() as stand:
        stand.configure(external_streams_max=10, clients=ClientLimits(frames_burst=10**9))
        await run_attack(stand, _calls(), reads=False, receives_bytes=4096)
        assert stand.wire.take_flood() == ("127.0.0.1", "answers that it does not read")
        await stand.settle(floods_refused=1, connections_open=0, calls_open=0)


async def test_what_goes_with_calls_is_no_flood() -> None:
    """Window updates and pings for each of many pieces of an answer, as some clients send them."""
    async with serve_wire() as stand:
        stand.configure(clients=LIMITS)
        async with stand.client() as client:
            call = client.stream_stream("/t.S/Both")(metadata=(("mm-model-id", "m"),))
            for number in range(600):
                await call.write(b"x" * 2000)
                assert (await call.read()) == b"re:" + b"x" * 2000, number
            await call.done_writing()
        assert stand.counts.floods_refused == 0


@pytest.fixture
def contexts(tmp_path: Path) -> Contexts:
    return contexts_of(make("server"), tmp_path)


async def test_a_flood_of_new_keys_is_cut_off(contexts: Contexts) -> None:
    async with serve_wire() as stand:
        stand.configure(clients=LIMITS)
        async with good_client(stand):
            stand.configure(tls=WireTls(contexts.clients, contexts.peers, contexts.to_peers))
            updates = await asyncio.to_thread(_update_keys, dial(stand.port))
            assert updates < 100_000
            assert stand.wire.take_flood() == ("127.0.0.1", "changes of TLS keys")
            await stand.settle(floods_refused=1, connections_open=1)


async def test_answers_to_new_keys_that_nobody_reads_are_bounded_with_all_that_waits(
    contexts: Contexts,
) -> None:
    """They are packed outside the turn's own writing, and who takes none is given up as others."""
    async with serve_wire(socket_bytes=4096) as stand:
        tls = WireTls(contexts.clients, contexts.peers, contexts.to_peers)
        stand.configure(clients=ClientLimits(frames_burst=10**9), answer_bytes_max=2**14, tls=tls)
        updates = await asyncio.to_thread(_update_keys, dial(stand.port, receives_bytes=4096))
        assert updates < 100_000
        await stand.settle(slow_given_up=1, floods_refused=0, connections_open=0, unwritten_bytes=0)


def _update_keys(caller: socket.socket) -> int:
    """Change keys until one is cut off, and answer how often; Python's ssl cannot."""
    lib = ctypes.CDLL(ctypes.util.find_library("ssl"))
    for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
        getattr(lib, name).restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.SSL_CTX_new(ctypes.c_void_p(lib.TLS_client_method())))
    assert lib.SSL_CTX_set_alpn_protos(context, b"\x02h2", 3) == 0
    connection = ctypes.c_void_p(lib.SSL_new(context))
    try:
        with closing(caller):
            caller.setblocking(True)
            assert lib.SSL_set_fd(connection, caller.fileno()) == 1
            assert lib.SSL_connect(connection) == 1
            for count in range(100_000):
                # Asking for the other side's to be changed as well.
                if lib.SSL_key_update(connection, 1) != 1 or lib.SSL_do_handshake(connection) != 1:
                    return count
            return 100_000
    finally:
        lib.SSL_free(connection)
        lib.SSL_CTX_free(context)

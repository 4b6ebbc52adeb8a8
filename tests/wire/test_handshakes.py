"""Clients in their TLS handshakes stand in line: what they cost is not paid by those who call."""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.edge.upstream import PATIENCE_S
from tests.identities import Identity, make
from tests.wire.hostile import PING, PREFACE, SETTINGS, frame
from tests.wire.stand import WireStand, serve_wire
from tests.wire.test_tls import client_context, contexts_of, secure

#: Each of them costs the wire a signature: half a millisecond, and all much longer than a ping.
HELLOS = 200
#: Whoever closes now is gone without waiting for anything (RST).
AT_ONCE = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module")
def server() -> Identity:
    return make("server", key=rsa.generate_private_key(65537, 2048))


def hello_of(context: ssl.SSLContext) -> bytes:
    """What a client says first."""
    says = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), says, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return says.read()


@contextmanager
def good_client(port: int, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """One that is connected, and reads what was said to it so far."""
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as client,
    ):
        client.sendall(PREFACE + frame(SETTINGS))
        ping(client, b"is there")
        yield client


def ping(client: socket.socket, word: bytes) -> None:
    """Return when the wire has answered it."""
    client.sendall(frame(PING, word))
    heard = b""
    while word not in heard:
        heard += client.recv(4096)


@contextmanager
def serving(identity: Identity, directory: Path, **limits: int) -> Iterator[tuple[WireStand, Any]]:
    """A wire that speaks TLS, and how to wait for its counters."""
    with (
        start_blocking_portal("asyncio") as portal,
        portal.wrap_async_context_manager(serve_wire()) as stand,
    ):
        portal.call(lambda: secure(stand, contexts_of(identity, directory), **limits))
        yield stand, lambda **counts: portal.call(lambda: stand.settle(**counts))


def test_a_flood_of_hellos_does_not_hold_up_who_is_connected(
    server: Identity, tmp_path: Path
) -> None:
    """Goal: a turn takes one of them, not all. Method: a ping after many gets its answer before
    most of them.
    """
    context = client_context(server)
    hello = hello_of(context)
    with serving(server, tmp_path / "tls") as (stand, settle):
        with good_client(stand.port, context) as client, ExitStack() as stack:
            crowd = [
                stack.enter_context(closing(socket.create_connection(("127.0.0.1", stand.port))))
                for _ in range(HELLOS)
            ]
            settle(connections_open=1 + HELLOS)
            for each in crowd:
                each.send(hello)
            ping(client, b"in haste")
            answered, _, _ = select.select(crowd, [], [], 0)
            waiting = stand.counts.handshakes_waiting
            assert len(answered) < HELLOS // 2
            assert waiting > HELLOS // 4
            for each in crowd:
                each.settimeout(PATIENCE_S)
                assert each.recv(1) == b"\x16", "a handshake record"
            settle(connections_open=1 + HELLOS, handshakes_waiting=0)
        settle(connections_open=0)


def test_nothing_is_computed_for_who_said_hello_and_left(server: Identity, tmp_path: Path) -> None:
    """Method: all say hello, and reset at once those that came later: what is answered is counted
    by the bytes that were sent.
    """
    context = client_context(server)
    hello = hello_of(context)
    with serving(server, tmp_path / "tls") as (stand, settle):
        crowd = [socket.create_connection(("127.0.0.1", stand.port)) for _ in range(HELLOS)]
        settle(connections_open=HELLOS)
        for each in crowd:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            each.send(hello)
            each.close()
        settle(connections_open=0, handshakes_waiting=0)
        assert stand.counts.bytes_in_client < HELLOS // 2 * len(hello)


def test_those_in_line_may_wait_as_long_as_for_a_handshake(
    server: Identity, tmp_path: Path
) -> None:
    context = client_context(server)
    hello = hello_of(context)
    with serving(server, tmp_path / "tls", handshake_ms=50) as (stand, settle):
        with ExitStack() as stack:
            crowd = [
                stack.enter_context(closing(socket.create_connection(("127.0.0.1", stand.port))))
                for _ in range(HELLOS)
            ]
            for each in crowd:
                with suppress(OSError):  # it may be over already
                    each.send(hello)
            settle(connections_open=0, handshakes_waiting=0)
            assert any(is_unanswered(each) for each in crowd)
        assert stand.counts.handshakes == 0


def is_unanswered(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True

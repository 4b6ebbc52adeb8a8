"""Many frames at once: a turn of the thread looks at some of each client, and none is lost."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from tests.identities import Identity, make
from tests.wire.hostile import DATA, PREFACE, Requests, dial, frame
from tests.wire.stand import WireStand, serve_wire
from tests.wire.test_handshakes import AT_ONCE, ping, serving
from tests.wire.test_tls import client_context

#: Calls of one write, fewer than a connection may have at a time.
CALLS = 900
TRIES = 20
#: DATA on stream 0: against the rules of HTTP/2.
WRONG = frame(DATA, b"x")


def burst() -> bytes:
    """Calls that go on, each a few bytes."""
    requests = Requests()
    return b"".join(requests.next() for _ in range(CALLS))


@contextmanager
def plain() -> Iterator[tuple[WireStand, Any]]:
    """A wire with one thread, and how to wait for its counters."""
    with (
        start_blocking_portal("asyncio") as portal,
        portal.wrap_async_context_manager(serve_wire()) as stand,
    ):
        yield stand, lambda **counts: portal.call(partial(stand.settle, **counts))


def test_others_are_served_before_all_of_a_burst() -> None:
    """Tried some times: whoever pings may be late itself."""
    with plain() as (stand, settle), closing(dial(stand.port)) as good:
        good.sendall(PREFACE)
        ping(good, b"hi there")
        for number in range(TRIES):
            with closing(dial(stand.port)) as greedy:
                greedy.sendall(PREFACE)
                ping(greedy, b"prepared")
                before = stand.counts.calls
                greedy.sendall(burst())
                ping(good, b"%8d" % number)
                counts = stand.counts
                settle(calls=before + CALLS, rests_bytes=0)
            settle(connections_open=1, calls_open=0)
            if counts.calls < before + CALLS:
                assert counts.rests_bytes > 0
                return
    pytest.fail("a ping was never answered before the calls that came just before it")


def test_what_is_left_of_who_breaks_the_rules_is_dropped() -> None:
    with plain() as (stand, settle), closing(dial(stand.port)) as wrong:
        wrong.sendall(PREFACE)
        ping(wrong, b"prepared")
        wrong.sendall(WRONG + burst())
        settle(connections_open=0, calls_open=0, rests_bytes=0)
        assert stand.counts.calls == 0


def test_what_is_left_is_dropped_with_who_resets_the_connection() -> None:
    with plain() as (stand, settle):
        for _ in range(TRIES):
            with closing(dial(stand.port)) as leaving:
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                leaving.sendall(PREFACE + burst())
        settle(connections_open=0, calls_open=0, rests_bytes=0)


def test_what_was_sent_before_the_end_of_tls_is_looked_at(tmp_path: Path) -> None:
    server: Identity = make("server")
    context = client_context(server)
    with serving(server, tmp_path / "tls") as (stand, settle):
        raw = socket.create_connection(("127.0.0.1", stand.port))
        with context.wrap_socket(raw, server_hostname="localhost") as client:
            client.sendall(PREFACE)
            ping(client, b"prepared")
            client.setblocking(False)
            # In one piece with that nothing follows.
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            client.sendall(burst())
            with suppress(ssl.SSLWantReadError):
                client.unwrap()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
            settle(calls=CALLS, rests_bytes=0)
        settle(connections_open=0, calls_open=0)

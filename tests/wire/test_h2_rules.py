"""Every rule of ``h2_rules.py`` and ``grpc_rules.py``, broken at both data planes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
from anyio.from_thread import start_blocking_portal

from tests.edge.upstream import FakeRouter, serve_proxy
from tests.wire.grpc_rules import FIELDS, GRPC
from tests.wire.h2_rules import BLOCKS, FRAMES
from tests.wire.h2_talk import DATA, END_STREAM, PING, PREFACE, SETTINGS, Talk, frame, talk
from tests.wire.h2_words import (
    FLOW_CONTROL_ERROR,
    MESSAGE,
    REQUEST,
    SAID_ON,
    WAIT,
    Answers,
    Ends,
    Resets,
    Row,
    Want,
    begin,
    body,
)
from tests.wire.stand import serve_wire

BESIDE = 1
HELLO = bytes.fromhex("16030100050100000100")


@dataclass(frozen=True)
class Plane:
    """A data plane that serves."""

    name: str
    port: int
    router: FakeRouter


@pytest.fixture(scope="module", params=["wire", "python"])
def plane(request: pytest.FixtureRequest) -> Iterator[Plane]:
    """One data plane; at the end nothing of all that was said is left."""
    with start_blocking_portal("asyncio") as portal:
        if request.param == "wire":
            with portal.wrap_async_context_manager(serve_wire()) as wire:
                yield Plane("wire", wire.port, wire.router)
                portal.call(lambda: wire.settle(calls_open=0, connections_open=0, hits_open=0))
        else:
            with portal.wrap_async_context_manager(serve_proxy()) as proxy:
                yield Plane("python", proxy.port, proxy.router)
            assert not proxy.server.held_bytes


@pytest.mark.parametrize(
    "row", [*FRAMES, *BLOCKS, *FIELDS, *GRPC], ids=lambda row: f"{row.section} {row.name}"
)
def test_a_rule(plane: Plane, row: Row) -> None:
    want = (row.wire if plane.name == "wire" else row.python) or row.want
    conversation = talk(plane.port)
    with closing(conversation.sock):
        conversation.send(begin(stream_id=BESIDE))
        conversation.ping(b"has come")
        for said in row.sent:
            if said is WAIT:
                conversation.wait_end(SAID_ON)
            else:
                assert isinstance(said, bytes)
                conversation.send(said)
        judge(conversation, want)
        if not isinstance(want, Ends):
            conversation.send(frame(DATA, END_STREAM, BESIDE, MESSAGE))
            beside = conversation.wait_end(BESIDE)
            assert (beside.headers[b"grpc-status"], beside.reset) == (b"0", None)
            assert beside.body[5:] == b"echo:q"
            assert conversation.goaway is None


def judge(conversation: Talk, want: Want) -> None:
    """See what came of it."""
    if isinstance(want, Ends):
        conversation.wait_closed()
        if conversation.goaway is None:
            assert conversation.is_broken
            return
        code, last = conversation.goaway
        assert code == want.code
        assert last <= SAID_ON or last == 7
    elif isinstance(want, Resets):
        assert conversation.wait_end(SAID_ON).reset == want.code
    elif isinstance(want, Answers):
        answer = conversation.wait_end(SAID_ON)
        assert answer.headers[b":status"] == want.http.encode()
        assert answer.headers[b"grpc-status"] == want.grpc.encode()
    else:
        conversation.ping(b"goes on!")


@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", id="HTTP/1.1"),
        pytest.param(HELLO + bytes(200), id="TLS"),
        pytest.param(PREFACE[:-1] + b"x" + frame(SETTINGS, 0, 0), id="preface with a wrong end"),
        pytest.param(PREFACE + frame(DATA, 0, 1, b"x"), id="no SETTINGS"),
    ],
)
def test_what_begins_otherwise_is_closed(plane: Plane, greeting: bytes) -> None:
    """RFC 9113, 3.4."""
    conversation = talk(plane.port, greeting)
    with closing(conversation.sock):
        conversation.wait_closed()


def test_settings_and_pings_are_answered(plane: Plane) -> None:
    """RFC 9113, 6.5.3 and 6.7."""
    conversation = talk(plane.port)
    with closing(conversation.sock):
        conversation.send(frame(SETTINGS, 0, 0) * 2)
        conversation.ping(b"\0\xff ping!")
        assert conversation.acknowledged == 3
        assert conversation.pongs == [b"\0\xff ping!"]


def test_more_than_a_window(plane: Plane) -> None:
    """RFC 9113, 6.9.1: either the stream or the connection; what was held of it is given back."""
    plane.router.answers.append(asyncio.Event())  # which never comes
    waits = [*REQUEST[:-1], (b"mm-model-id", b"cold")]
    conversation = talk(plane.port)
    with closing(conversation.sock):
        conversation.send(begin(waits) + body(b"\0\0\x7f\0\0", 0) + 100 * body(bytes(16384), 0))
        conversation.send(frame(PING, 0, 0, b"and then"))
        while b"and then" not in conversation.pongs and conversation.read():
            pass
        reset = conversation.answer(SAID_ON).reset
        said = conversation.goaway[0] if conversation.goaway else reset
        assert said == FLOW_CONTROL_ERROR or (said is None and conversation.is_broken)

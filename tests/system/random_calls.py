"""Calls by chance for the differential test: what a client sends.

Everything follows from the seed. Who sends is ``two_planes.py``, how it is answered
``random_answers.py``.
"""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass

from mm.core.headers import Header, HeaderList
from tests.system.random_answers import (
    OK,
    OK_STATUS,
    Script,
    broken_answer,
    good_answer,
    lost_answer,
    message,
    odd_answer,
)
from tests.system.random_messages import DEEP, PLAIN, compressed, id_message, management

MODEL, OTHER, VMODEL = b"m", b"n", b"v"
#: These are at another instance than the one that is called.
FAR, FAR_VMODEL = b"far", b"far-v"
#: Its type is that of models that no other instance may load.
HELD, HELD_TYPE = b"held", "held"
#: A call that nobody answers has this deadline.
SHORT = b"60m"
_TINY = (SHORT, b"0S")


@dataclass(frozen=True, slots=True)
class RandomCall:
    """What a client sends."""

    headers: HeaderList
    #: DATA frames; of an interactive call each is sent when as much as before it has come back.
    pieces: tuple[bytes, ...]
    script: Script
    interactive: bool = False
    #: "with the last piece", "alone" or "never": then the client resets the stream, or with
    #: ``hangs_up`` closes the connection.
    ends: str = "with the last piece"
    reset_code: int = 8
    has_odd_body: bool = False
    #: The runtime is asked for each of several models, in no order.
    is_for_several: bool = False
    #: The runtime is not there at all.
    is_away: bool = False
    #: A model that no other call is for, to be loaded beforehand: its copies move.
    fresh: bytes = b""
    #: It has answered before.
    is_warm: bool = False
    #: At the other instance.
    is_far: bool = False
    hangs_up: bool = False
    #: Nobody ever has the model, or gives a whole answer. Whether another copy is loaded to see
    #: that once more depends on who has heard by then that one is gone.
    fails_everywhere: bool = False

    @property
    def ends_within_answer(self) -> bool:
        """Answer whether its time is up when some of its answer has come, or none on a slow day."""
        return bool(self.script.steps) and not self.script.ends and self.ends != "never"

    @property
    def is_racy(self) -> bool:
        """Answer whether it may end while its request is under way."""
        script = self.script
        in_order = script.begins_at == "end" and script.ends and self.ends != "never"
        short = any(name == b"grpc-timeout" and value in _TINY for name, value in self.headers)
        return self.has_odd_body or not in_order or short


def make_call(rng: random.Random) -> RandomCall:
    """Answer a call: most are in order but for one thing, so that what they meet is not hidden."""
    kind = rng.choices(
        (
            *("good", "odd head", "odd id", "odd body", "odd answer", "stream", "hang", "cancel"),
            *("message", "several", "management", "lost", "broken", "away", "hang up"),
        ),
        (3, 3, 4, 2, 7, 2, 1, 1, 4, 2, 1, 2, 4, 0.3, 0.5),
    )[0]
    if kind in ("message", "several", "management"):
        return _read_call(rng, kind)
    if kind in ("lost", "broken", "away"):
        return _moving_call(rng, kind)
    headers = _headers(rng, odd=kind == "odd head")
    ids = _odd_ids(rng) if kind == "odd id" else _good_ids(rng)
    place = rng.randint(len(headers) - 1, len(headers))
    headers[place:place] = ids
    messages = [message(rng) for _ in range(rng.choice((1, 1, 1, 0, 2, 3)))]
    pieces = _cut(rng, b"".join(messages))
    script = Script(steps=odd_answer(rng) if kind == "odd answer" else good_answer(rng))
    ends = rng.choice(("with the last piece", "alone"))
    if kind == "odd answer":
        script = Script(rng.choice(("headers", "message", "end", "end")), script.steps)
    if kind == "odd body":
        pieces = _odd_body(rng)
    if kind == "stream":
        pieces = tuple(message(rng) for _ in range(rng.randint(1, 4)))
        steps = (("headers", [(b"grpc-status", b"0")]),)
        return RandomCall(headers, pieces, Script(steps=steps, echoes=True), True, ends)
    if kind == "hang":
        headers = [each for each in headers if each[0] != b"grpc-timeout"]
        headers.append((b"grpc-timeout", SHORT))
        # Before an answer, or within one.
        data = (step for step in script.steps if step[0] == "data")
        steps = (script.steps[0], *data)[: rng.choice((0, 0, 1, 2))]
        script = Script(steps=steps, ends=False)
    if kind in ("cancel", "hang up"):
        steps = script.steps[: rng.randint(0, 1)]
        script = Script("headers", steps, ends=False)
        code = rng.choice((8, 8, 0, 2, 5))
        return RandomCall(headers, pieces, script, False, "never", code, hangs_up=kind == "hang up")
    return RandomCall(headers, pieces, script, False, ends, has_odd_body=kind == "odd body")


def _moving_call(rng: random.Random, kind: str) -> RandomCall:
    """Answer a call that may end elsewhere than where it began."""
    headers = _headers(rng, odd=False)
    fresh, is_far = b"f%d" % rng.getrandbits(40), rng.random() < 0.4
    headers.append((b"mm-model-id", fresh))
    pieces = _cut(rng, b"".join(message(rng) for _ in range(rng.choice((1, 1, 0, 2)))))
    ends = rng.choice(("with the last piece", "alone"))
    steps = rng.choice((good_answer, good_answer, odd_answer))(rng)
    first = lost_answer(rng) if kind == "lost" else broken_answer(rng)
    if fails_everywhere := kind != "away" and rng.random() < 0.3:
        steps = first
    begins_at = rng.choice(("end", "end", "message")) if kind == "broken" else "end"
    script = Script(begins_at, steps, first=None if kind == "away" else first)
    return RandomCall(
        headers,
        pieces,
        script,
        False,
        ends,
        is_away=kind == "away",
        fresh=fresh,
        is_far=is_far,
        is_warm=rng.random() < 0.5,
        fails_everywhere=fails_everywhere,
    )


def _read_call(rng: random.Random, kind: str) -> RandomCall:
    """Answer a call of which the mesh reads the first message, or all of it."""
    headers = _headers(rng, odd=False)
    steps = good_answer(rng)
    ends = rng.choice(("with the last piece", "alone"))
    if kind == "several":
        ids = rng.sample((MODEL, OTHER, MODEL, OTHER, FAR, b"unknown"), rng.randint(2, 4))
        headers += [(b"mm-model-id", each) for each in ids]
        if b"unknown" not in ids and rng.random() < 0.5:
            headers.append((b"mm-required", b"all"))
        one = (("headers", list(OK)), ("data", message(rng)), ("headers", [OK_STATUS]))
        pieces = _cut(rng, message(rng))
        return RandomCall(headers, pieces, Script(steps=one), False, ends, is_for_several=True)
    if kind == "management":
        path, first = management(rng)
        headers = [(name, path if name == b":path" else value) for name, value in headers]
    else:
        path = rng.choice((PLAIN, DEEP))
        headers = [(name, path if name == b":path" else value) for name, value in headers]
        headers += rng.choice(([], [], [(b"mm-model-id", MODEL)], [(b"mm-model-id", b"unknown")]))
        id_ = rng.choice(((MODEL, VMODEL), (FAR, FAR_VMODEL)))
        first = id_message(rng, path, *id_)
    body = b"\0" + len(first).to_bytes(4) + first
    if rng.random() < 0.3:
        encoding, body = compressed(rng, first)
        headers = [each for each in headers if each[0] != b"grpc-encoding"]
        headers.append((b"grpc-encoding", encoding))
    if kind == "message" and rng.random() < 0.2:
        body += message(rng)
    odd = kind == "management"
    return RandomCall(headers, _cut(rng, body), Script(steps=steps), False, ends, has_odd_body=odd)


def _text(rng: random.Random, alphabet: str, longest: int) -> bytes:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, longest))).encode()


def _metadata(rng: random.Random) -> Header:
    name = rng.choice((b"x-", b"a", b"traceparent-", b"mm", b"content-")) + _text(
        rng, "abc-_.09", 9
    )
    if rng.random() < 0.3:
        value = base64.b64encode(rng.randbytes(rng.randint(0, 12)))
        return name + b"-bin", value.rstrip(b"=") if rng.random() < 0.5 else value
    return name, _text(rng, "aZ09 ,;%/~!", 20).strip() or b"v"


def _headers(rng: random.Random, *, odd: bool) -> HeaderList:
    headers: HeaderList = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", rng.choice((b"/t.S/Unary", b"/a.b.C/d", b"/x/y"))),
        (b":authority", b"client"),
        (b"content-type", rng.choice((b"application/grpc", b"application/grpc+proto"))),
        (b"te", b"trailers"),
    ]
    if rng.random() < 0.4:
        headers.append((b"user-agent", b"grpc-differential/1"))
    if rng.random() < 0.3:
        headers.append((b"grpc-timeout", rng.choice((b"50S", b"9H", b"70000m", b"99999999u"))))
    if rng.random() < 0.3:
        headers.append((b"grpc-encoding", b"identity"))
    if rng.random() < 0.3:
        headers.append((b"grpc-accept-encoding", b"identity,gzip"))
    headers += [_metadata(rng) for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.1:
        headers.append((b"x-long", b"y" * rng.choice((200, 3000, 6500))))
    if rng.random() < 0.2:
        headers.append(rng.choice(_RESERVED))
    if odd:
        _spoil(rng, headers)
    return headers


#: Names that are the mesh's own or mean something to it.
_RESERVED: tuple[Header, ...] = (
    (b"mm-hop-kind", b"hit-only"),
    (b"mm-hop-left", b"1"),
    (b"mm-wire-tried", b"here 1"),
    (b"mm-wire-pass-on", b"1"),
    (b"mm-balanced", b"true"),
    (b"mm-secret", b"s"),
    (b"tas-x", b"s"),
    (b"grpc-trace-bin", b"AAA"),
    (b"grpc-previous-rpc-attempts", b"2"),
)

_ODD_HEADERS: tuple[Header, ...] = (
    (b":method", b"GET"),
    (b":method", b"PUT"),
    (b":path", b"/"),
    (b":path", b"/t.S"),
    (b":path", b"/t.S/Unary/more"),
    (b":path", b"/t.S/Unary?x=1"),
    (b":path", b"//"),
    (b":path", b"/mmesh.ModelMesh/nothing"),
    (b":path", b"/mmesh.ModelRuntime/loadModel"),
    (b":path", b"/mm.peer.Peer/statistics"),
    (b":path", b"/grpc.health.v1.Health/Check"),
    (b":path", b"/grpc.health.v1.Health/nothing"),
    (b":path", b"/" + b"p" * 5000 + b"/x"),
    (b":scheme", b"https"),
    (b":authority", b""),
    (b"content-type", b"application/json"),
    (b"content-type", b"application/grpc-web"),
    (b"content-type", b"application/grpc;x=1"),
    (b"content-type", b"Application/Grpc"),
    (b"te", b"gzip"),
    (b"grpc-timeout", b"abc"),
    (b"grpc-timeout", b""),
    (b"grpc-timeout", b"-1S"),
    (b"grpc-timeout", b"123456789S"),
    (b"grpc-timeout", b"5"),
    (b"grpc-timeout", b"5 S"),
    (b"grpc-timeout", b"0S"),
    (b"grpc-encoding", b"gzip"),
    (b"grpc-encoding", b"br"),
    (b"x-large", b"x" * 8300),
)


def _spoil(rng: random.Random, headers: HeaderList) -> None:
    """Put one thing in the place of what should be there, or leave it out."""
    name, value = rng.choice(_ODD_HEADERS)
    there = [at for at, each in enumerate(headers) if each[0] == name]
    if there and rng.random() < 0.2 and not name.startswith(b":"):
        del headers[there[0]]
    elif there:
        headers[there[0]] = (name, value)
    else:
        headers.append((name, value))


def _good_ids(rng: random.Random) -> HeaderList:
    model_id, vmodel_id = rng.choice(((MODEL, VMODEL), (MODEL, VMODEL), (FAR, FAR_VMODEL)))
    return rng.choice(
        (
            [(b"mm-model-id", model_id)],
            [(b"mm-model-id", model_id)],
            [(b"mm-model-id-bin", base64.b64encode(model_id))],
            [(b"mm-model-id-bin", base64.b64encode(model_id).rstrip(b"="))],
            [(b"mm-vmodel-id", vmodel_id)],
            [(b"mm-vmodel-id-bin", base64.b64encode(vmodel_id))],
        )
    )


def _odd_ids(rng: random.Random) -> HeaderList:
    some = (
        [],
        [(b"mm-model-id", b"unknown")],
        [(b"mm-model-id", b"unknown-%d" % rng.randint(0, 9))],
        [(b"mm-model-id", b"")],
        [(b"mm-model-id", b"M")],
        [(b"mm-model-id", b"a b")],
        [(b"mm-model-id", b"m,m")],
        [(b"mm-model-id", b"%6d")],
        [(b"mm-model-id", "modèle".encode())],
        [(b"mm-model-id", b"\xff\xfe")],
        [(b"mm-model-id", b"x" * 4097)],
        [(b"mm-model-id-bin", b"!!!!")],
        [(b"mm-model-id-bin", b"bQ=")],
        [(b"mm-model-id-bin", b"bQ==bQ==")],
        [(b"mm-model-id-bin", b"")],
        [(b"mm-model-id-bin", b"/w")],
        [(b"mm-model-id", MODEL), (b"mm-model-id", MODEL)],
        [(b"mm-model-id", MODEL), (b"mm-model-id", b"unknown")],
        [(b"mm-model-id", b"unknown"), (b"mm-model-id-bin", base64.b64encode(MODEL))],
        [(b"mm-model-id", MODEL), (b"mm-vmodel-id", VMODEL)],
        [(b"mm-vmodel-id", b"unknown")],
        [(b"mm-vmodel-id", VMODEL), (b"mm-vmodel-id", VMODEL)],
        [(b"mm-vmodel-id", MODEL)],
        [(b"tas-model-id", MODEL)],
        [(b"mm-model-id", MODEL), (b"tas-model-id", b"other")],
    )
    return list(rng.choice(some))


def _cut(rng: random.Random, body: bytes) -> tuple[bytes, ...]:
    """Answer a body in frames of at most 16,000 bytes, some of them empty."""
    pieces: list[bytes] = []
    while body:
        size = rng.choice((1, 4, 5, 6, 100, 16_000, 16_000, 16_000, 0))
        if size or not pieces or pieces[-1]:
            pieces.append(body[:size])
        body = body[size:]
    return tuple(pieces)


def _odd_body(rng: random.Random) -> tuple[bytes, ...]:
    bodies = (
        b"\0\0\0",
        b"\0\0\0\0\5abc",
        b"\0\0\0\0\1a\0\0",
        b"\1\0\0\0\3abc",
        b"\2\0\0\0\3abc",
        b"\0\x01\0\0\x01a",
        b"\0\xff\xff\xff\xffa",
        b"",
    )
    return _cut(rng, rng.choice(bodies))

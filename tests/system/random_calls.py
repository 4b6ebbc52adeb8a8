"""Calls by chance for the differential test: what a client sends, and how a runtime answers it.

Everything follows from the seed. Who sends and answers is ``two_planes.py``.
"""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass

from mm.core.headers import Header, HeaderList
from tests.system.random_messages import DEEP, PLAIN, compressed, id_message, management

MODEL, OTHER, VMODEL = b"m", b"n", b"v"
#: A call that nobody answers has this deadline.
SHORT = b"60m"
_TINY = (SHORT, b"0S")


@dataclass(frozen=True, slots=True)
class Script:
    """How the runtime treats a call; it begins when the headers, a message or the end is there."""

    begins_at: str = "end"
    #: ("headers", list), ("data", bytes), ("reset", code); the last one of the first two ends it.
    steps: tuple[tuple[str, object], ...] = ()
    #: Send back what comes, as it comes, then the steps at the end.
    echoes: bool = False
    ends: bool = True


@dataclass(frozen=True, slots=True)
class RandomCall:
    """What a client sends."""

    headers: HeaderList
    #: DATA frames; of an interactive call each is sent when as much as before it has come back.
    pieces: tuple[bytes, ...]
    script: Script
    interactive: bool = False
    #: "with the last piece", "alone" or "never": then the client resets the stream.
    ends: str = "with the last piece"
    reset_code: int = 8
    has_odd_body: bool = False
    #: The runtime is asked for each of several models, in no order.
    is_for_several: bool = False

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
            *("message", "several", "management"),
        ),
        (3, 3, 4, 2, 6, 2, 1, 1, 4, 2, 1),
    )[0]
    if kind in ("message", "several", "management"):
        return _read_call(rng, kind)
    headers = _headers(rng, odd=kind == "odd head")
    ids = _odd_ids(rng) if kind == "odd id" else _good_ids(rng)
    place = rng.randint(len(headers) - 1, len(headers))
    headers[place:place] = ids
    messages = [_message(rng) for _ in range(rng.choice((1, 1, 1, 0, 2, 3)))]
    pieces = _cut(rng, b"".join(messages))
    script = Script(steps=_answer(rng, odd=kind == "odd answer"))
    ends = rng.choice(("with the last piece", "alone"))
    if kind == "odd answer":
        script = Script(rng.choice(("headers", "message", "end", "end")), script.steps)
    if kind == "odd body":
        pieces = _odd_body(rng)
    if kind == "stream":
        pieces = tuple(_message(rng) for _ in range(rng.randint(1, 4)))
        steps = (("headers", [(b"grpc-status", b"0")]),)
        return RandomCall(headers, pieces, Script(steps=steps, echoes=True), True, ends)
    if kind == "hang":
        headers = [each for each in headers if each[0] != b"grpc-timeout"]
        headers.append((b"grpc-timeout", SHORT))
        # Before an answer, or within one.
        data = (step for step in script.steps if step[0] == "data")
        steps = (script.steps[0], *data)[: rng.choice((0, 0, 1, 2))]
        script = Script(steps=steps, ends=False)
    if kind == "cancel":
        steps = script.steps[: rng.randint(0, 1)]
        script = Script("headers", steps, ends=False)
        return RandomCall(headers, pieces, script, False, "never", rng.choice((8, 8, 0, 2, 5)))
    return RandomCall(headers, pieces, script, False, ends, has_odd_body=kind == "odd body")


def _read_call(rng: random.Random, kind: str) -> RandomCall:
    """Answer a call of which the mesh reads the first message, or all of it."""
    headers = _headers(rng, odd=False)
    steps = _answer(rng, odd=False)
    ends = rng.choice(("with the last piece", "alone"))
    if kind == "several":
        ids = rng.sample((MODEL, OTHER, MODEL, OTHER, b"unknown"), rng.randint(2, 4))
        headers += [(b"mm-model-id", each) for each in ids]
        if b"unknown" not in ids and rng.random() < 0.5:
            headers.append((b"mm-required", b"all"))
        one = (("headers", list(_OK)), ("data", _message(rng)), ("headers", [OK_STATUS]))
        pieces = _cut(rng, _message(rng))
        return RandomCall(headers, pieces, Script(steps=one), False, ends, is_for_several=True)
    if kind == "management":
        path, message = management(rng)
        headers = [(name, path if name == b":path" else value) for name, value in headers]
    else:
        path = rng.choice((PLAIN, DEEP))
        headers = [(name, path if name == b":path" else value) for name, value in headers]
        headers += rng.choice(([], [], [(b"mm-model-id", MODEL)], [(b"mm-model-id", b"unknown")]))
        message = id_message(rng, path, MODEL, VMODEL)
    body = b"\0" + len(message).to_bytes(4) + message
    if rng.random() < 0.3:
        encoding, body = compressed(rng, message)
        headers = [each for each in headers if each[0] != b"grpc-encoding"]
        headers.append((b"grpc-encoding", encoding))
    if kind == "message" and rng.random() < 0.2:
        body += _message(rng)
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
    return rng.choice(
        (
            [(b"mm-model-id", MODEL)],
            [(b"mm-model-id", MODEL)],
            [(b"mm-model-id-bin", base64.b64encode(MODEL))],
            [(b"mm-model-id-bin", base64.b64encode(MODEL).rstrip(b"="))],
            [(b"mm-vmodel-id", VMODEL)],
            [(b"mm-vmodel-id-bin", base64.b64encode(VMODEL))],
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


def _message(rng: random.Random) -> bytes:
    size = rng.choice((0, 1, 5, 200, 200, 3000, 20_000, 70_000))
    return b"\0" + size.to_bytes(4) + rng.randbytes(min(size, 50)).ljust(size, b".")


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


# --- answers --------------------------------------------------------------------------------------

_OK: HeaderList = [(b":status", b"200"), (b"content-type", b"application/grpc")]
OK_STATUS: Header = (b"grpc-status", b"0")
_STATUSES = tuple(b"%d" % number for number in range(17) if number not in (5, 14, 8))
_ODD_STATUSES = (b"17", b"99", b"-1", b"", b"abc", b"00", b"1 ")
_MESSAGES = (b"", b"it broke", b"100%25", b"%E2%82%AC %zz", b"a%0Ab", b"x" * 3000)
_TRAILERS: tuple[Header, ...] = (
    (b"x-late", b"1"),
    (b"x-late-bin", b"AP8"),
    (b"grpc-status-details-bin", b"CAU"),
    (b"mm-late", b"3"),
    (b"mm-hop-load", b"7"),
    (b"mm-hop-result", b"not-here"),
    (b"mm-wire-x", b"1"),
    (b"grpc-retry-pushback-ms", b"5"),
    (b"date", b"now"),
)


def _trailers(rng: random.Random, *, odd: bool) -> HeaderList:
    status = b"0"
    if odd:
        status = rng.choice(_STATUSES + _ODD_STATUSES)
    trailers: HeaderList = [(b"grpc-status", status)]
    if odd and rng.random() < 0.1:
        trailers = [(b"x-only", b"1")]
    if rng.random() < 0.5:
        trailers.append((b"grpc-message", rng.choice(_MESSAGES)))
    trailers += rng.sample(_TRAILERS, rng.choice((0, 0, 1, 2)))
    rng.shuffle(trailers)
    return trailers


def _answer(rng: random.Random, *, odd: bool) -> tuple[tuple[str, object], ...]:
    headers = list(_OK)
    if rng.random() < 0.4:
        headers += [rng.choice(((b"x-early", b"1"), (b"mm-early", b"2"), (b"server", b"s")))]
    trailers = _trailers(rng, odd=odd)
    messages = [("data", _message(rng)) for _ in range(rng.choice((1, 1, 1, 0, 2, 3)))]
    if not odd or rng.random() < 0.3:
        return ("headers", headers), *messages, ("headers", trailers)
    what = rng.choice(("only trailers", "reset", "status", "type", "no trailers", "body", "extra"))
    if what == "only trailers":
        return (("headers", headers + trailers),)
    if what == "reset":
        steps = (("headers", headers), *messages)[: rng.randint(0, 3)]
        return *steps, ("reset", rng.choice((0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12, 13, 99)))
    if what == "status":
        headers[0] = (b":status", rng.choice((b"404", b"503", b"401", b"429", b"204", b"500")))
        only = rng.random() < 0.5
        return (("headers", headers),) if only else (("headers", headers), *messages)
    if what == "type":
        headers[1] = (b"content-type", rng.choice((b"text/html", b"application/grpc+x", b"")))
        return ("headers", headers), *messages, ("headers", trailers)
    if what == "no trailers":
        return ("headers", headers), *(messages or [("data", b"")])
    if what == "body":
        body = rng.choice((b"\0\0\0", b"\0\0\0\0\5abc", b"\1\0\0\0\1a", b"\0\x01\0\0\x01a"))
        return ("headers", headers), ("data", body), ("headers", trailers)
    extra = rng.choice(
        ((b"grpc-encoding", b"gzip"), (b"content-length", b"7"), (b"x", b"y" * 9000))
    )
    return ("headers", [*headers, extra]), *messages, ("headers", trailers)

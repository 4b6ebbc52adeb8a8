"""Answers by chance for the differential test: what a runtime says, and how it fails to say it.

Everything follows from the seed. Who sends them is ``scripted_runtime.py``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from mm.core.headers import Header, HeaderList

#: ("headers", list), ("data", bytes), ("reset", code), ("goaway", None), ("close", how), and
#: ("until", bytes): wait until the client has headers, and so much of a body.
Step = tuple[str, Any]
Steps = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """How the runtime treats a call; it begins when the headers, a message or the end is there."""

    begins_at: str = "end"
    #: The last one ends the stream, if it is headers or data.
    steps: Steps = ()
    #: Send back what comes, as it comes, then the steps at the end.
    echoes: bool = False
    ends: bool = True
    #: Instead of these, to whoever asks first.
    first: Steps | None = None

    @property
    def breaks(self) -> bool:
        """Answer whether a stream or a connection may end as if nobody had answered."""
        steps = (*self.steps, *(self.first or ()))
        return any(step in ("reset", "goaway", "close") for step, _ in steps)


OK: HeaderList = [(b":status", b"200"), (b"content-type", b"application/grpc")]
OK_STATUS: Header = (b"grpc-status", b"0")
_STATUSES = tuple(b"%d" % number for number in range(17) if number != 5)
_ODD_STATUSES = (b"17", b"99", b"-1", b"", b"abc", b"00", b"013", b"1 ", b"9" * 12)
_MESSAGES = (b"", b"it broke", b"100%25", b"%E2%82%AC %zz", b"a%0Ab", b"%", b"x" * 3000)
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
    (b"grpc-status", b"13"),
    (b"grpc-message", b"twice"),
)
#: What makes a list of headers malformed, or nearly.
_MALFORMED: tuple[Header, ...] = (
    (b"X-Upper", b"1"),
    (b"connection", b"close"),
    (b"keep-alive", b"1"),
    (b"transfer-encoding", b"chunked"),
    (b"x-line", b"a\rb"),
    (b"x-null", b"a\0b"),
    (b"x-long-of-nothing-" + b"n" * 80, b"a\nb"),
    (b"a b", b"1"),
    (b"", b"1"),
    (b":path", b"/"),
    (b":status", b"200"),
    (b"x-bytes", b"\xff\xfe"),
    (b"content-type", b"text/html"),
    (b"te", b"trailers"),
)


def message(rng: random.Random) -> bytes:
    """Answer a message with its prefix; one of megabytes now and then."""
    size = rng.choice((0, 1, 5, 200, 200, 3000, 20_000, 70_000))
    if rng.random() < 0.02:
        size = rng.choice((300_000, 1_048_576, 1_300_000, 5 * 2**20))
    return b"\0" + size.to_bytes(4) + rng.randbytes(min(size, 50)).ljust(size, b".")


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


def _headers(rng: random.Random) -> HeaderList:
    headers = list(OK)
    if rng.random() < 0.4:
        headers += [rng.choice(((b"x-early", b"1"), (b"mm-early", b"2"), (b"server", b"s")))]
    return headers


def _messages(rng: random.Random) -> list[Step]:
    return [("data", message(rng)) for _ in range(rng.choice((1, 1, 1, 0, 2, 3)))]


def good_answer(rng: random.Random) -> Steps:
    """Answer what is in order, and OK."""
    trailers = _trailers(rng, odd=False)
    return ("headers", _headers(rng)), *_messages(rng), ("headers", trailers)


def odd_answer(rng: random.Random) -> Steps:
    """Answer what is in order but for one thing, or all in order and an error."""
    headers, messages, trailers = _headers(rng), _messages(rng), _trailers(rng, odd=True)
    if rng.random() < 0.3:
        return ("headers", headers), *messages, ("headers", trailers)
    what = rng.choice(
        (
            *("only trailers", "only trailers", "reset", "status", "type", "no trailers", "body"),
            *("extra", "malformed", "malformed", "order"),
        )
    )
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
    if what == "malformed":
        return _malformed(rng, headers, messages, trailers)
    if what == "order":
        return _out_of_order(rng, headers, messages, trailers)
    extra = rng.choice(
        ((b"grpc-encoding", b"gzip"), (b"content-length", b"7"), (b"x", b"y" * 9000))
    )
    return ("headers", [*headers, extra]), *messages, ("headers", trailers)


def _malformed(
    rng: random.Random, headers: HeaderList, messages: list[Step], trailers: HeaderList
) -> Steps:
    """One header that may not be, at the beginning or at the end; or one too few."""
    where = rng.choice((headers, headers, trailers, headers + trailers))
    if rng.random() < 0.1:
        del headers[rng.randint(0, 1)]
    else:
        where.insert(rng.randint(0, len(where)), rng.choice(_MALFORMED))
    if where is not headers and where is not trailers:
        return (("headers", where),)
    return ("headers", headers), *messages, ("headers", trailers)


def _out_of_order(
    rng: random.Random, headers: HeaderList, messages: list[Step], trailers: HeaderList
) -> Steps:
    """Frames where none should be."""
    first, last = ("headers", headers), ("headers", trailers)
    announced = ("headers", [(b":status", rng.choice((b"100", b"103"))), (b"link", b"x")])
    some: Step = ("data", message(rng))
    return rng.choice(
        (
            (announced, first, *messages, last),
            (announced, announced, last),
            (first, first, last),
            (first, some, first, last),
            (some, last),
            (some, first, last),
            (some,),
        )
    )


def lost_answer(rng: random.Random) -> Steps:
    """Answer what says that the runtime does not have the model, in one of four ways."""
    text, status = rng.choice(
        (
            (b"", b"5"),
            (b"no such model", b"5"),
            (b"Request for unknown model: 'm' is not found", b"14"),
            (b"Request for unknown model: 'm' has no available versions", b"14"),
            (b"Model m not found", b"3"),
            (b"the tensor was not found", b"3"),
        )
    )
    trailers = [(b"grpc-status", status)]
    if text:
        trailers.append((b"grpc-message", text))
    trailers += rng.sample(_TRAILERS[:-2], rng.choice((0, 0, 1)))
    headers = _headers(rng)
    if rng.random() < 0.5:
        return (("headers", headers + trailers),)
    messages = _messages(rng) if rng.random() < 0.3 else []
    return ("headers", headers), *messages, ("headers", trailers)


def broken_answer(rng: random.Random) -> Steps:
    """Answer nothing, or a part of something, and end the connection; or send the call back."""
    end: Step = ("close", rng.choice(("gently", "gently", "at once")))
    if rng.random() < 0.2:
        return (("goaway", None),)
    if rng.random() < 0.1:
        return (("reset", 7),)
    whole = b"\0\0\0\0\x14" + b"a" * 20
    there: Steps = (("headers", _headers(rng)), ("data", whole), ("data", whole[:9]))
    count = rng.randint(0, 3)
    if count == 0:
        return (end,)
    # Else how much of it is seen would depend on how it is read.
    return *there[:count], ("until", sum(len(each) for _, each in there[1:count])), end

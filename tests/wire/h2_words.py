"""The words of ``h2_rules.py`` and ``grpc_rules.py``: what a rule is, and what is said to break it.

Every rule is broken on stream 3, beside a call on stream 1 that has begun before and goes on after:
it ends with the connection, and only then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mm.edge.h2.messages import frame_message
from tests.wire.h2_talk import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    RST_STREAM,
    SETTINGS,
    Headers,
    block,
    frame,
)

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = range(4)
STREAM_CLOSED, FRAME_SIZE_ERROR, CANCEL, COMPRESSION_ERROR = 5, 6, 8, 9
SAID_ON: Final = 3


@dataclass(frozen=True)
class Ends:
    """The connection, with GOAWAY and a code."""

    code: int


@dataclass(frozen=True)
class Resets:
    """The stream, with a code."""

    code: int


@dataclass(frozen=True)
class Answers:
    """The call, with statuses of gRPC and HTTP."""

    grpc: str
    http: str = "200"


@dataclass(frozen=True)
class Goes:
    """On as if nothing had been said."""


GOES: Final = Goes()
Want = Ends | Resets | Answers | Goes


@dataclass(frozen=True)
class Wait:
    """For the end of stream 3, before the row goes on."""


WAIT: Final = Wait()


@dataclass(frozen=True)
class Row:
    """One rule, and what the standard wants. ``wire`` and ``python``: what a data plane does where
    its library, libnghttp2 or h2, knows better: nearly always it ends the connection for the fault
    of a stream, as it may (5.4.1).
    """

    section: str
    name: str
    sent: tuple[bytes | Wait, ...]
    want: Want
    wire: Want | None = None
    python: Want | None = None


REQUEST: Final[Headers] = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/t.S/Unary"),
    (b":authority", b"a"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
    (b"mm-model-id", b"m"),
]
MESSAGE: Final = frame_message(b"q")
HANG: Final = tuple((n, b"/t.S/Hang" if n == b":path" else v) for n, v in REQUEST)


def begin(headers: Headers = REQUEST, flags: int = END_HEADERS, stream_id: int = SAID_ON) -> bytes:
    return frame(HEADERS, flags, stream_id, block(headers))


def body(message: bytes = MESSAGE, flags: int = END_STREAM) -> bytes:
    return frame(DATA, flags, SAID_ON, message)


def altered(**values: bytes | None) -> Headers:
    """The request with other pseudo-headers, or without."""
    changed = {b":" + name.encode(): value for name, value in values.items()}
    fields = ((name, changed.get(name, value)) for name, value in REQUEST)
    return [(name, value) for name, value in fields if value is not None]


def regular(name: bytes, value: bytes | None) -> Headers:
    """The request with another header of a name it has, or without."""
    rest = [each for each in REQUEST if each[0] != name]
    return rest if value is None else [*rest, (name, value)]


def whole(headers: Headers, message: bytes = MESSAGE) -> tuple[bytes]:
    """A call with such headers."""
    return (begin(headers) + body(message),)


def more(*headers: tuple[bytes, bytes]) -> tuple[bytes]:
    """A call with more headers."""
    return whole([*REQUEST, *headers])


def setting(key: int, value: int) -> bytes:
    return frame(SETTINGS, 0, 0, key.to_bytes(2, "big") + value.to_bytes(4, "big"))


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


CALL: Final = begin() + body()
#: Half-closed by the client, and not answered.
ASKED: Final = begin(HANG) + body()
RESET: Final = frame(RST_STREAM, 0, SAID_ON, number(CANCEL))
SERVED: Final = Answers("0")
MALFORMED: Final = Answers("3", "400")
WRONG: Final = Ends(PROTOCOL_ERROR)
WRONG_SIZE: Final = Ends(FRAME_SIZE_ERROR)

"""Valid conversations of HTTP/2, and how they are spoilt: the same seed, the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

from hpack import Encoder

from mm.edge.h2.messages import frame_message
from tests.wire.h2_talk import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Headers,
    block,
    frame,
)

#: What numbers are replaced by: the edges of fields, and streams that conversations have.
_NUMBERS: Final = (0, 1, 2, 3, 5, 7, 16384, 16385, 65535, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)
_CHANGES_MAX: Final = 4
#: A path whose messages have the id in their first field, and get it put into the second.
NAMED: Final = b"/t.S/Up"


def request(path: bytes, *more: tuple[bytes, bytes]) -> Headers:
    """The headers of a call, most of which a connection keeps in its table."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"a"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *more,
    ]


def conversations() -> list[list[bytes]]:
    """What clients say from first to last, frame by frame."""
    begun = [PREFACE, frame(SETTINGS, 0, 0)]
    plain = block(request(b"/t.S/Unary", (b"mm-model-id", b"m")))
    encoder = Encoder()
    indexed = [
        encoder.encode(request(b"/t.S/Unary", (b"mm-model-id-bin", b"bQ=="), (b"x-%d" % n, b"y")))
        for n in range(4)
    ]
    message = frame_message(b"q" * 20)
    named = frame_message(b"\n\1m\x12\3old\x1a\5after")
    ended = END_HEADERS | END_STREAM
    return [
        [*begun, frame(HEADERS, END_HEADERS, 1, plain), frame(DATA, END_STREAM, 1, message)],
        [
            *begun,
            frame(HEADERS, PADDED | PRIORITIZED, 1, b"\7\0\0\0\0\5" + plain[:40] + bytes(7)),
            frame(CONTINUATION, END_HEADERS, 1, plain[40:]),
            frame(DATA, PADDED, 1, b"\3" + message[:9] + bytes(3)),
            frame(DATA, 0, 1, message[9:]),
            frame(HEADERS, ended, 1, block([(b"x-trailer", b"1")])),
        ],
        [
            *begun,
            *(frame(HEADERS, END_HEADERS, 2 * n + 1, part) for n, part in enumerate(indexed)),
            *(frame(DATA, END_STREAM, 2 * n + 1, message) for n in reversed(range(4))),
        ],
        [
            *begun,
            frame(HEADERS, END_HEADERS, 1, block(request(NAMED))),
            frame(DATA, 0, 1, named[:7]),
            frame(DATA, 0, 1, named[7:] + named + b"\0"),
            frame(DATA, END_STREAM, 1, named[1:]),
        ],
        [
            *begun,
            frame(SETTINGS, 0, 0, b"\0\4\0\0\0\x10\0\1\0\0\0\0\0\5\0\xff\xff\xff"),
            frame(WINDOW_UPDATE, 0, 0, b"\0\1\0\0"),
            frame(HEADERS, END_HEADERS, 1, plain + block([(b"content-length", b"60000")])),
            *(frame(DATA, 0, 1, bytes(1 if n else 0) + bytes(10_000)) for n in range(6)),
            frame(PING, 0, 0, b"12345678"),
            frame(WINDOW_UPDATE, 0, 1, b"\0\0\1\0"),
            frame(PRIORITY, 0, 3, bytes(5)),
            frame(HEADERS, ended, 3, plain + block([(b"grpc-timeout", b"1m")])),
            frame(RST_STREAM, 0, 1, b"\0\0\0\x08"),
        ],
    ]


def answer(body: bytes) -> list[bytes]:
    """What a runtime answers to the call on stream 0, which is to be replaced."""
    head = block([(b":status", b"200"), (b"content-type", b"application/grpc"), (b"x", b"y")])
    tail = block([(b"grpc-status", b"0"), (b"grpc-message", b""), (b"mm-hop-load", b"3")])
    return [
        frame(HEADERS, END_HEADERS, 0, head),
        frame(DATA, 0, 0, frame_message(body)),
        frame(HEADERS, END_HEADERS | END_STREAM, 0, tail),
    ]


def on_stream(pieces: Sequence[bytes], stream_id: int) -> list[bytes]:
    """Answer the same frames on a stream."""
    return [piece[:5] + stream_id.to_bytes(4, "big") + piece[9:] for piece in pieces]


def mutated(pieces: Sequence[bytes], others: Sequence[bytes], chance: random.Random) -> list[bytes]:
    """Answer a conversation with a few changes, some of them by frames of another one."""
    spoilt = list(pieces)
    for _ in range(chance.randint(1, _CHANGES_MAX)):
        if not spoilt:
            break
        change = chance.choice(_CHANGES)
        change(spoilt, others, chance)
    return spoilt


def _flip(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(pieces))
    piece = bytearray(pieces[at])
    for _ in range(chance.randint(1, 4)):
        if piece:
            place = chance.randrange(len(piece))
            piece[place] = chance.choice((piece[place] ^ 1 << chance.randrange(8), 0, 255, 128))
    pieces[at] = bytes(piece)


def _renumber(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    """Put an edge into the head of a frame, or anywhere in its body."""
    at = chance.randrange(len(pieces))
    piece = pieces[at]
    width, places = chance.choice(((3, (0,)), (1, (3,)), (1, (4,)), (4, (5, 9, 10, 14))))
    place = chance.choice(places)
    number = chance.choice(_NUMBERS) % (1 << 8 * width)
    pieces[at] = piece[:place] + number.to_bytes(width, "big") + piece[place + width :]


def _resize(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    """Cut a frame's body, or make it longer; its length says so."""
    at = chance.randrange(len(pieces))
    kind, flags, stream = pieces[at][3:4], pieces[at][4:5], pieces[at][5:9]
    if len(stream) == 4:
        body = pieces[at][9:]
        body = body[: chance.randint(0, len(body))] + chance.randbytes(
            chance.choice((0, 1, 9, 300))
        )
        pieces[at] = len(body).to_bytes(3, "big") + kind + flags + stream + body


def _drop(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    del pieces[chance.randrange(len(pieces))]


def _repeat(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(pieces))
    pieces[at:at] = [pieces[at]] * chance.choice((1, 1, 2, 50))


def _swap(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    one, two = chance.randrange(len(pieces)), chance.randrange(len(pieces))
    pieces[one], pieces[two] = pieces[two], pieces[one]


def _cut(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    """End in the midst of a frame."""
    at = chance.randrange(len(pieces))
    pieces[at:] = [pieces[at][: chance.randint(0, len(pieces[at]))]]


def _splice(pieces: list[bytes], others: Sequence[bytes], chance: random.Random) -> None:
    if others:
        pieces.insert(chance.randint(0, len(pieces)), chance.choice(others))


def _invent(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    body = chance.randbytes(chance.choice((0, 4, 5, 8, 9, 64)))
    made = frame(chance.randrange(12), chance.randrange(256), chance.choice((0, 1, 2, 3, 9)), body)
    pieces.insert(chance.randint(0, len(pieces)), made)


def _garble_fields(pieces: list[bytes], _others: Sequence[bytes], chance: random.Random) -> None:
    """Put a field that is wrong in some way behind a header block."""
    blocks = [at for at, piece in enumerate(pieces) if piece[3:4] == b"\1"]
    if blocks:
        at = chance.choice(blocks)
        wrong = chance.choice(_FIELDS)
        body = pieces[at][9:] + wrong
        pieces[at] = len(body).to_bytes(3, "big") + pieces[at][3:9] + body


_FIELDS: Final = [
    *(
        block([field])
        for field in (
            (b":path", b"/x"),
            (b"X", b""),
            (b"mm-model-id", b"h" * 3000),
            (b"mm-vmodel-id-bin", b"===="),
            (b"grpc-timeout", b"99999999H"),
            (b"grpc-status", b"-1"),
            (b"grpc-encoding", b"gzip"),
            (b"content-length", b"18446744073709551616"),
            (b"mm-wire-tried", b"here,1"),
            (b"mm-wire-pass-on", b"1"),
            (b"mm-hop-load", b"99999999999"),
            (b"mm-hop-result", b"lost"),
            (b"mm-hop-from", b"%ff" * 99),
            (b"x-bin", bytes(range(256))),
            (b"y", b"z" * 9000),
        )
    ),
    b"\x80",
    b"\xff\xff\xff\xff\xff\xff",
    b"\x3f\xe1\x1f",
    b"\0\1a\x84\xff\xff\xff\xff",
    b"\0\x7f\xff\xff\xff\xff\x07",
]
_Change = Callable[[list[bytes], Sequence[bytes], random.Random], None]
_CHANGES: Final[Sequence[_Change]] = (
    _flip,
    _flip,
    _renumber,
    _renumber,
    _resize,
    _drop,
    _repeat,
    _swap,
    _cut,
    _splice,
    _invent,
    _garble_fields,
)

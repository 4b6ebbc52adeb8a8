"""gRPC messages in a stream of bytes: the 5-byte prefix, its limit, and compression.

A message begins with one byte (1: compressed) and its length in four. The limit is held against
the length as announced, before any byte of the message is kept. Nothing here looks inside one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from mm.core import call_texts
from mm.errors import (
    InvalidRequestError,
    MeshError,
    MethodRefusedError,
    QueueFullError,
    StatusCode,
)

PREFIX = struct.Struct(">BL")
PREFIX_BYTES = 5
#: Encodings that are understood where a message has to be read (extraction, injection).
ENCODINGS_READ = call_texts.ENCODINGS_READ.encode()


class MessageTooLargeError(QueueFullError):
    """A message is longer than the limit; RESOURCE_EXHAUSTED, naming it."""

    def __init__(self, what: str, length: int, length_max: int) -> None:
        super().__init__(
            call_texts.MESSAGE_TOO_LONG % (what, length, length_max),
        )
        self.length = length


class MessageFlagError(MeshError):
    """What stands before a message breaks gRPC; INTERNAL, as gRPC's own servers say."""

    code = StatusCode.INTERNAL

    def __init__(self, what: str) -> None:
        super().__init__(call_texts.MESSAGE_FLAG % what)


class TooMuchHeldError(QueueFullError):
    """Too many large requests are being read at once."""

    def __init__(self) -> None:
        super().__init__("too many large requests at once")


def frame_message(message: bytes, compressed: bool = False) -> bytes:
    """Put the prefix before a message."""
    return PREFIX.pack(compressed, len(message)) + message


class MessageMeter:
    """Follows the messages in a stream without keeping them.

    Invariants: 1. ``at_boundary`` is True exactly when the bytes fed so far end with a whole
    message. 2. ``count`` is the number of messages begun, ``messages_bytes`` what they have without
    their prefixes.
    """

    __slots__ = (
        "_head",
        "_left",
        "_length_max",
        "_what",
        "any_compressed",
        "count",
        "messages_bytes",
    )

    def __init__(self, what: str, length_max: int) -> None:
        self._what = what
        self._length_max = length_max
        self._head = b""
        self._left = 0
        self.count = 0
        self.messages_bytes = 0
        self.any_compressed = False

    @property
    def at_boundary(self) -> bool:
        """Whether the stream may end here."""
        return not self._left and not self._head

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raises ``MessageTooLargeError`` and ``MessageFlagError``."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                step = min(self._left, end - at)
                self._left -= step
                at += step
                continue
            if self._head or end - at < PREFIX_BYTES:
                need = PREFIX_BYTES - len(self._head)
                self._head += data[at : at + need]
                at += need
                if len(self._head) < PREFIX_BYTES:
                    return
                flag, length = PREFIX.unpack(self._head)
                self._head = b""
            else:
                flag, length = PREFIX.unpack_from(data, at)
                at += PREFIX_BYTES
            self.count += 1
            if flag:
                if flag > 1:
                    raise MessageFlagError(self._what)
                self.any_compressed = True
            if length > self._length_max:
                raise MessageTooLargeError(self._what, length, self._length_max)
            self._left = length
            self.messages_bytes += length


class MessageSplitter:
    """Cuts a stream into whole messages, holding one of them at most.

    ``feed`` answers messages as (compressed, bytes), without their prefix.
    """

    __slots__ = ("_buffer", "_length_max", "_what")

    def __init__(self, what: str, length_max: int) -> None:
        self._what = what
        self._length_max = length_max
        self._buffer = bytearray()

    @property
    def at_boundary(self) -> bool:
        """Whether the stream may end here."""
        return not self._buffer

    def feed(self, data: bytes) -> Iterator[tuple[bool, bytes]]:
        """Take the next bytes; raises ``MessageTooLargeError`` as soon as a prefix says so, and
        ``MessageFlagError``.
        """
        buffer = self._buffer
        buffer += data
        while len(buffer) >= PREFIX_BYTES:
            flag, length = PREFIX.unpack_from(buffer)
            if flag > 1:
                raise MessageFlagError(self._what)
            if length > self._length_max:
                raise MessageTooLargeError(self._what, length, self._length_max)
            end = PREFIX_BYTES + length
            if len(buffer) < end:
                return
            message = bytes(memoryview(buffer)[PREFIX_BYTES:end])
            del buffer[:end]
            yield bool(flag), message


_WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


def decompress(message: bytes, encoding: bytes, length_max: int) -> bytes:
    """Undo ``grpc-encoding`` for one message, never producing more than ``length_max`` bytes."""
    window_bits = _WINDOW_BITS.get(encoding)
    if window_bits is None:
        name = encoding.decode("ascii", "replace") or "identity"
        raise MethodRefusedError(call_texts.UNREADABLE_ENCODING % name)
    inflater = zlib.decompressobj(window_bits)
    try:
        content = inflater.decompress(message, length_max + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"compressed message cannot be read: {error}") from None
    if len(content) > length_max:
        raise MessageTooLargeError("decompressed", len(content), length_max)
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequestError("compressed message cannot be read: it is cut off, or too long")
    return content

"""Puts a model id into every message of a request as it streams by (design section 5).

The id is appended, and only the 5-byte prefix changes; a message is not held for it. Exceptions:
a compressed message is held, decompressed and sent uncompressed. What a message's own bytes must
look like for the id to be safe at its end is ``mm.core.protobuf_ids``'s.
"""

from __future__ import annotations

from mm.core import call_texts
from mm.core.protobuf_ids import FieldWalk, MalformedMessageError
from mm.edge.h2.messages import PREFIX, PREFIX_BYTES, decompress, frame_message


class Injector:
    """Rewrites one request's bytes, piece by piece, for one attempt.

    Invariants: 1. What ``feed`` answered so far is a prefix of the rewritten request. 2. The end
    of a message, and with it the appended id, is answered only if the message is well-formed: a
    runtime never gets a whole message in which the id went astray. 3. Limits are not checked
    here; the bytes have passed a ``MessageMeter``.
    """

    __slots__ = ("_encoding", "_head", "_held", "_left", "_length_max", "_suffix", "_walk")

    def __init__(self, suffix: bytes, encoding: bytes, length_max: int) -> None:
        self._suffix = suffix
        self._encoding = encoding
        self._length_max = length_max
        self._head = b""
        self._left = 0
        self._walk: FieldWalk | None = None
        self._held: bytearray | None = None

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the request; answer what to send. Raises ``MeshError``."""
        out: list[bytes] = []
        at, end = 0, len(data)
        while at < end:
            if self._walk is None:
                need = PREFIX_BYTES - len(self._head)
                self._head += data[at : at + need]
                at += min(need, end - at)
                if len(self._head) < PREFIX_BYTES:
                    break
                out.append(self._begin_message())
            piece = data[at : at + self._left]
            at += len(piece)
            out.append(self._continue_message(piece))
        return b"".join(out)

    def _begin_message(self) -> bytes:
        compressed, self._left = PREFIX.unpack(self._head)
        self._head = b""
        self._walk = FieldWalk()
        if compressed:
            self._held = bytearray()
            return b""
        return PREFIX.pack(0, self._left + len(self._suffix))

    def _continue_message(self, piece: bytes) -> bytes:
        assert self._walk is not None
        self._left -= len(piece)
        if self._held is not None:
            self._held += piece
            if self._left:
                return b""
            piece = decompress(bytes(self._held), self._encoding, self._length_max)
            self._held = None
            self._walk.feed(piece)
            return frame_message(piece + self._finish_message())
        self._walk.feed(piece)
        return piece if self._left else piece + self._finish_message()

    def _finish_message(self) -> bytes:
        assert self._walk is not None
        if not self._walk.at_boundary:
            raise MalformedMessageError(call_texts.MESSAGE_CUT_OFF)
        self._walk = None
        return self._suffix

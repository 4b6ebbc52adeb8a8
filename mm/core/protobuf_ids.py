"""Model ids inside encoded protobuf messages: read one, put one in (spec core 2.14, around 7.3).

Works on the wire format alone, without a schema. A path is a list of field numbers: all but the
last name embedded messages, the last a string. Pure: bytes in, bytes out. What a message is
framed or compressed in is none of its business.

Two rules of protobuf shape it: of a repeated occurrence of a string the *last* one counts, and
repeated occurrences of an embedded message are *merged*. So extraction looks at every occurrence
and keeps the last, and injection appends: a complete ``path -> id`` at the end of a message
overrides whatever stood there, at any depth, without parsing it.

Appending is safe only after a message that ends where a field ends. A message whose last field
claims more bytes than follow would swallow the appended id, and the runtime would see the
client's own; ``FieldWalk`` finds that out.
"""

from __future__ import annotations

from collections.abc import Sequence

from mm.core import call_texts
from mm.errors import InvalidRequestError

#: Fields walked in one message. A walk costs about half a microsecond a field; a hostile message
#: of 16 MiB could hold eight million, which would stop the event loop for seconds. Honest
#: requests have a handful at the levels of a path.
FIELDS_MAX = 100_000
#: Nesting of groups, as protobuf's own parsers limit it.
GROUP_DEPTH_MAX = 100

_VARINT, _FIXED64, _BYTES, _GROUP_START, _GROUP_END, _FIXED32 = range(6)
_FIXED_LENGTHS = {_FIXED64: 8, _FIXED32: 4}


class MalformedMessageError(InvalidRequestError):
    """The request message is not valid protobuf where an id is looked for or put in."""


def encode_varint(value: int) -> bytes:
    """Encode a non-negative integer as protobuf does."""
    assert value >= 0
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def injection_suffix(path: Sequence[int], model_id: str) -> bytes:
    """Answer what, appended to a well-formed message, sets the string at ``path``."""
    assert path
    content = model_id.encode()
    for number in reversed(path):
        assert number > 0
        content = encode_varint(number << 3 | _BYTES) + encode_varint(len(content)) + content
    return content


def extract_id(message: bytes, path: Sequence[int]) -> str | None:
    """Answer the string at ``path``, the last one of several; None if the field is absent.

    Raises ``MalformedMessageError`` for bytes that are no message, for a field of the path that
    is not length-delimited, and for a string that is not UTF-8.
    """
    assert path
    budget = [FIELDS_MAX]
    found = _last_occurrence(message, 0, len(message), path, 0, budget)
    if found is None:
        return None
    try:
        return message[found[0] : found[1]].decode()
    except UnicodeDecodeError:
        raise MalformedMessageError("the id in the request message is not valid UTF-8") from None


def _last_occurrence(
    message: bytes, at: int, end: int, path: Sequence[int], depth: int, budget: list[int]
) -> tuple[int, int] | None:
    """Walk the fields in ``message[at:end]``; answer where the last string at the path lies."""
    found: tuple[int, int] | None = None
    groups: list[int] = []
    while at < end:
        budget[0] -= 1
        if budget[0] < 0:
            raise MalformedMessageError(f"the request message has more than {FIELDS_MAX} fields")
        tag, at = _read_varint(message, at, end)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise MalformedMessageError("field number 0 in the request message")
        wanted = number == path[depth] and not groups
        if wanted and wire_type != _BYTES:
            raise MalformedMessageError(f"field {number} of the id path has wire type {wire_type}")
        if wire_type == _VARINT:
            _, at = _read_varint(message, at, end)
        elif wire_type == _BYTES:
            length, at = _read_varint(message, at, end)
            if at + length > end:
                raise MalformedMessageError(f"field {number} reaches beyond the end of its message")
            if wanted and depth + 1 == len(path):
                found = (at, at + length)
            elif wanted:
                inner = _last_occurrence(message, at, at + length, path, depth + 1, budget)
                found = inner or found
            at += length
        else:
            at += _fixed_length(number, wire_type, groups)
    if at > end or groups:
        raise MalformedMessageError(call_texts.MESSAGE_CUT_OFF)
    return found


def _read_varint(message: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise MalformedMessageError("a number in the request message is too long")
    raise MalformedMessageError(call_texts.MESSAGE_CUT_OFF)


def _fixed_length(number: int, wire_type: int, groups: list[int]) -> int:
    """Answer the bytes that follow the tag of a field of fixed length; keep track of groups."""
    if number == 0:
        raise MalformedMessageError("field number 0 in the request message")
    if wire_type in _FIXED_LENGTHS:
        return _FIXED_LENGTHS[wire_type]
    if wire_type == _GROUP_START and len(groups) < GROUP_DEPTH_MAX:
        groups.append(number)
        return 0
    if wire_type == _GROUP_END and groups and groups[-1] == number:
        groups.pop()
        return 0
    raise MalformedMessageError(f"field {number} has wire type {wire_type}, which does not belong")


class FieldWalk:
    """Follows the top-level fields of a message that arrives in pieces, without keeping any of it.

    Invariants: 1. ``at_boundary`` is True exactly when the bytes fed so far end with a complete
    field and no group is open. 2. After an error the walk is of no more use.
    """

    __slots__ = ("_fields_left", "_groups", "_length_follows", "_shift", "_skip", "_tag", "_value")

    def __init__(self) -> None:
        self._fields_left = FIELDS_MAX
        self._groups: list[int] = []
        self._tag = 0
        self._skip = 0
        self._value = 0
        self._shift = 0
        self._length_follows = False

    @property
    def at_boundary(self) -> bool:
        """Whether a message may end here."""
        return not (self._skip or self._shift or self._tag or self._groups)

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the message; raises ``MalformedMessageError``."""
        at, end = 0, len(piece)
        while at < end:
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                at += step
                continue
            byte = piece[at]
            at += 1
            self._value |= (byte & 0x7F) << self._shift
            if byte >= 0x80:
                self._shift += 7
                if self._shift > 63:
                    raise MalformedMessageError("a number in the request message is too long")
                continue
            value, self._value, self._shift = self._value, 0, 0
            self._take_number(value)

    def _take_number(self, value: int) -> None:
        """A varint is complete: a tag, the value of a field, or the length of one."""
        if self._tag:
            self._tag = 0
            if self._length_follows:
                self._skip = value
                self._length_follows = False
            return
        self._fields_left -= 1
        if self._fields_left < 0:
            raise MalformedMessageError(f"the request message has more than {FIELDS_MAX} fields")
        number, wire_type = value >> 3, value & 7
        if number and wire_type in (_VARINT, _BYTES):
            self._tag = value
            self._length_follows = wire_type == _BYTES
        else:
            self._skip = _fixed_length(number, wire_type, self._groups)

"""The bytes of ``mm.peer.LoadReport``, written and read by hand (proto/mm-peer.proto).

Pushes come by the thousand a second; the general encoder takes fifteen times as long for a count.
Reading is that of protobuf: unknown fields are passed over, the last of a repeated number counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from mm.core.ids import InstanceId, ModelId

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_INSTANCE_ID: Final = 1 << 3 | _BYTES
_COPY: Final = 2 << 3 | _BYTES
_MODEL_ID: Final = 1 << 3 | _BYTES
_CALLS: Final = 2 << 3 | _VARINT
#: A varint has at most ten bytes.
_SHIFT_MAX: Final = 63


class MalformedReportError(ValueError):
    """These bytes are no report."""


def encode_report(instance_id: InstanceId, loads: Mapping[ModelId, int]) -> bytes:
    """Answer the message that tells the calls in flight of these copies."""
    name = instance_id.encode()
    parts = [b"%c%b%b" % (_INSTANCE_ID, _varint(len(name)), name)]
    for model_id, count in loads.items():
        name = model_id.encode()
        copy = b"%c%b%b%c%b" % (_MODEL_ID, _varint(len(name)), name, _CALLS, _varint(count))
        parts.append(b"%c%b%b" % (_COPY, _varint(len(copy)), copy))
    return b"".join(parts)


def decode_report(message: bytes) -> tuple[InstanceId, dict[ModelId, int]]:
    """Answer who tells, and what. Raises ``MalformedReportError``."""
    instance_id, loads = "", {}
    try:
        for tag, value in _fields(message):
            if tag == _INSTANCE_ID and isinstance(value, bytes):
                instance_id = value.decode()
            elif tag == _COPY and isinstance(value, bytes):
                model_id, count = "", 0
                for inner_tag, inner in _fields(value):
                    if inner_tag == _MODEL_ID and isinstance(inner, bytes):
                        model_id = inner.decode()
                    elif inner_tag == _CALLS and isinstance(inner, int):
                        count = inner & 0xFFFF_FFFF
                loads[ModelId(model_id)] = count
    except (IndexError, UnicodeDecodeError) as exc:
        raise MalformedReportError(f"not a LoadReport: {exc}") from exc
    return InstanceId(instance_id), loads


def _varint(number: int) -> bytes:
    if number < 0x80:
        return b"%c" % number
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Iterate over tags and values; IndexError at an end in the middle."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _read_varint(message, at)
            yield tag, value
            continue
        if kind == _BYTES:
            length, at = _read_varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise MalformedReportError(f"not a LoadReport: wire type {kind}")
        if at + length > end:
            raise MalformedReportError("not a LoadReport: it ends inside a field")
        yield tag, message[at : at + length]
        at += length


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    byte = message[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = message[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
        if shift > _SHIFT_MAX:
            raise MalformedReportError("not a LoadReport: a number without end")

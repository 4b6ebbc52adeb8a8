"""JSON that people write: read strictly, with errors that say where (around 7.1, 14, 16).

Owns size, syntax and shape, which any such text can have wrong. What it means is its readers'. The
records of the store are ``mm.core.record_json``'s.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

#: What a Kubernetes ConfigMap can hold at most; anything longer was not written by a person.
JSON_BYTES_MAX: Final = 1024 * 1024

_BYTE = re.compile(r" \(byte (\d+)\)")

T = TypeVar("T")


def decode_json(content: str | bytes, form: type[T]) -> T:
    """Answer the text as a value of ``form``; raises ``ValueError`` that says what is wrong where.

    Syntax is placed by line and column, shape by the path to it ("$.allowOtherRpcs").
    """
    encoded = content.encode("utf-8", "replace") if isinstance(content, str) else content
    if len(encoded) > JSON_BYTES_MAX:
        raise ValueError(f"longer than {JSON_BYTES_MAX} bytes")
    if encoded.startswith(codecs.BOM_UTF8):
        raise ValueError("begins with a byte order mark; save it as UTF-8 without one")
    if not encoded.strip():
        raise ValueError("empty; JSON is expected")
    try:
        return msgspec.json.decode(encoded, type=form)
    except UnicodeDecodeError as exc:
        raise ValueError("not UTF-8") from exc
    except (msgspec.DecodeError, RecursionError) as exc:
        told = _BYTE.sub(lambda match: _place(encoded, int(match[1])), str(exc))
        raise ValueError(told + _allowed(told, form)) from exc


def _allowed(told: str, form: type[object]) -> str:
    """Answer what to say after a field that is unknown: those of ``form`` itself."""
    if "unknown field" not in told or " - at " in told:
        return ""
    fields = msgspec.structs.fields(cast("type[msgspec.Struct]", form))  # nothing else has any
    return "; allowed: " + ", ".join(each.encode_name for each in fields)


def decode_entries(entries: Mapping[str, msgspec.Raw], form: type[T]) -> dict[str, T]:
    """Answer the entries of an object, each as a value of ``form``; an error names its entry."""
    decoded = {}
    for name, raw in entries.items():
        try:
            decoded[name] = decode_json(bytes(raw), form)
        except ValueError as exc:
            raise ValueError(f'"{name}": {exc}') from exc
    return decoded


def check_said_once(content: str | bytes) -> None:
    """Raise ``ValueError`` that names what one object of a text says twice; readers take the last,
    silently. For texts that ``decode_json`` has read: nothing else is looked at.
    """
    json.loads(content, object_pairs_hook=_said_once)


def _said_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f'"{name}" is there twice')
        found[name] = value
    return found


def _place(encoded: bytes, at: int) -> str:
    before = encoded[:at]
    line = before.count(b"\n") + 1
    column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
    return f" (line {line}, column {column})"

"""Values as YAML, block by block: what `-o yaml` prints.

Only what JSON can say too: mappings with plain names, lists, text, whole numbers, truth, null. Text
is left plain where every YAML version reads it as itself, else it is in double quotes with escapes
that all of them know. So nothing has to be installed beside each instance for one option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

Value = Mapping[str, "Value"] | Sequence["Value"] | str | int | bool | None

#: Begins with a letter, and has nothing that could be syntax, a number or a time.
_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*", re.ASCII)
#: Those of YAML 1.1 are many.
_WORDS: Final = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def to_yaml(value: Value) -> str:
    """Answer a document without marks, ending in a newline."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Value) -> list[str]:
    if isinstance(value, Mapping) and value:
        lines = []
        for name, inner in value.items():
            lines += _entry(f"{_text(name)}:", inner, indent="  ")
        return lines
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return [line for inner in value for line in _item(inner)]
    return [_scalar(value)]


def _entry(name: str, value: Value, indent: str) -> list[str]:
    inner = _lines(value)
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str) and value:
        return [name, *(indent + line for line in inner)]
    return [f"{name} {inner[0]}"]


def _item(value: Value) -> list[str]:
    first, *rest = _lines(value)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _scalar(value: Value) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _text(value)
    return "{}" if isinstance(value, Mapping) else "[]"


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    number = ord(char)
    # A reader may take U+FEFF for the beginning of a file.
    if char == " " or (char.isprintable() and number != 0xFEFF):
        return char
    return (
        f"\\x{number:02x}"
        if number < 0x100
        else f"\\u{number:04x}"
        if number < 0x10000
        else (f"\\U{number:08x}")
    )

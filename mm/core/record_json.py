"""The JSON of records: attributes are read with their types and written without defaults.

Owns spec core 1.3: a value is a plain object; what is null, false, 0 or empty is not written, and
absence means exactly that. Which attributes a record has is ``mm.core.records``'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from mm.core.ids import InstanceId

#: Whole numbers are int64 for everybody who shares the store.
INT64_MAX: Final = 2**63 - 1


class RecordError(ValueError):
    """A stored value is not a record; the text names the attribute and what was found."""


def _decode(value: bytes) -> dict[str, object]:
    try:
        decoded = msgspec.json.decode(value)
    except (ValueError, RecursionError) as exc:
        # Bad UTF-8, endless nesting and endless numbers raise others than the parser's own.
        raise RecordError(f"not JSON: {exc}") from exc
    if not isinstance(decoded, dict):
        raise RecordError(f"a JSON object expected, found {_kind(decoded)}")
    return decoded


def encode_object(unknown: Mapping[str, object], known: Mapping[str, object]) -> bytes:
    """Write what is unknown as it is, and of the known what differs from absence."""
    return msgspec.json.encode(
        {**unknown, **{name: value for name, value in known.items() if value}}
    )


def _kind(value: object) -> str:
    """Say what was found, but no texts and nothing from inside: it may be a model's key."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return msgspec.json.encode(value).decode()
        case str():
            return "a text"
        case list():
            return "an array"
        case _:
            return "an object"


class Attributes:
    """Takes typed attributes out of a decoded object; what is left over is unknown, and kept."""

    __slots__ = ("_left",)

    def __init__(self, value: bytes) -> None:
        self._left = _decode(value)

    def unknown(self) -> Mapping[str, object]:
        """Answer what nobody has asked for."""
        return self._left

    def ignore(self, name: str) -> None:
        """Take an attribute out that means nothing."""
        self._left.pop(name, None)

    def text(self, name: str) -> str:
        """Answer a text, empty if absent."""
        value = self._left.pop(name, None)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise RecordError(f"{name}: text expected, found {_kind(value)}")
        return value

    def required_text(self, name: str) -> str:
        """Answer a text that must be there and not be empty."""
        value = self.text(name)
        if not value:
            raise RecordError(f"{name}: missing")
        return value

    def integer(self, name: str) -> int:
        """Answer a whole number of 64 bits, 0 if absent."""
        return _checked_integer(name, self._left.pop(name, None))

    def boolean(self, name: str) -> bool:
        """Answer true or false, false if absent."""
        value = self._left.pop(name, None)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise RecordError(f"{name}: true or false expected, found {_kind(value)}")
        return value

    def mapping(self, name: str) -> dict[str, object]:
        """Answer an object, empty if absent."""
        value = self._left.pop(name, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise RecordError(f"{name}: an object expected, found {_kind(value)}")
        return value

    def mapping_if_one(self, name: str) -> dict[str, object]:
        """Of an attribute that only tells more: whatever else it is counts as unknown."""
        value = self._left.get(name)
        return self.mapping(name) if value is None or isinstance(value, dict) else {}

    def times(self, name: str) -> Mapping[InstanceId, int]:
        """Answer an object of whole numbers, empty if absent."""
        entries = self.mapping(name)
        return {
            InstanceId(key): _checked_integer(f"{name}.{key}", value)
            for key, value in entries.items()
        }

    def texts(self, name: str) -> tuple[str, ...]:
        """Answer an array of texts, empty if absent."""
        value = self._left.pop(name, None)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise RecordError(f"{name}: an array of texts expected")
        return tuple(value)


def _checked_integer(name: str, value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecordError(f"{name}: a whole number expected, found {_kind(value)}")
    if not -INT64_MAX - 1 <= value <= INT64_MAX:
        raise RecordError(f"{name}: a whole number of 64 bits expected, found a larger one")
    return value

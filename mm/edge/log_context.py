"""Headers of a call in every line that is logged while it is served (around 18).

Owns which they are, and for how long: what was begun for a call and goes on after it, a load, a
connection, is the call's no longer. How a line shows them is ``mm.cli.logs``'s.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # `mm serve` logs before it has imported anything that takes time
    from mm.core.headers import Header
    from mm.edge.h2.incoming import IncomingCall

#: Of a value a line shows this much.
VALUE_LENGTH_MAX: Final = 256

Handler = Callable[["IncomingCall"], Awaitable[None]]
Fields = Mapping[str, str]


class _Holder:
    """The fields of one call, until it ends. Tasks that it started have the same holder."""

    __slots__ = ("fields",)

    def __init__(self, fields: Fields) -> None:
        self.fields = fields


_NONE: Final[Fields] = {}
_current: ContextVar[_Holder | None] = ContextVar("log_fields", default=None)


def log_fields() -> Fields:
    """Answer what the call that is being served wants to be logged with."""
    holder = _current.get()
    return _NONE if holder is None else holder.fields


class HeaderLogging:
    """A handler before another one. ``names``: headers in lower case to names in the log."""

    def __init__(self, names: tuple[tuple[str, str], ...], handler: Handler) -> None:
        self._names = {header.encode(): key for header, key in names}
        self._handler = handler

    async def __call__(self, incoming: IncomingCall) -> None:
        """Serve a call."""
        holder = _Holder(self._fields(incoming.headers))
        token = _current.set(holder)
        try:
            await self._handler(incoming)
        finally:
            holder.fields = _NONE
            _current.reset(token)

    def _fields(self, headers: list[Header]) -> Fields:
        found = {}
        for name, value in headers:
            key = self._names.get(name)
            if key is not None:
                text = _text_of_binary(value) if name.endswith(b"-bin") else value.decode("latin-1")
                found[key] = text[:VALUE_LENGTH_MAX]
        # In the order in which they are configured.
        return {key: found[key] for key in self._names.values() if key in found}


def _text_of_binary(value: bytes) -> str:
    last = value.rpartition(b",")[2].strip().rstrip(b"=")
    try:
        return base64.b64decode(last + b"=" * (-len(last) % 4), validate=True).decode(
            "utf-8", "replace"
        )
    except binascii.Error:
        return value.decode("latin-1")

"""How a process logs: ``MM_LOG_...`` (around 18).

A part of ``Config``. What a level is, the standard library says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from mm.core.json_input import decode_json
from mm.environment import Environment, wrong

#: Headers of each call that its lines may tell; more is no line any longer.
HEADERS_MAX: Final = 32
_NAME: Final = re.compile(r"[0-9a-z_.-]+")
_GRAMMAR: Final = (
    'a JSON object of headers and the names under which they are logged, {"x-user": "user"}, '
    f"with 1 to {HEADERS_MAX} entries"
)

LogLevel = Literal["debug", "info", "warning", "error"]
_LEVELS: Final[dict[str, LogLevel]] = {
    "debug": "debug",
    "info": "info",
    "warning": "warning",
    "error": "error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """What is logged, and in which form."""

    #: MM_LOG_LEVEL.
    level: LogLevel = "info"
    #: MM_LOG_FORMAT: one JSON object a line, or text.
    is_json: bool = False
    #: MM_LOG_EACH_INVOKE: one INFO line for each call to the runtime.
    each_invoke: bool = False
    #: MM_LOG_REQUEST_HEADERS: headers in lower case, and the names under which they are logged.
    request_headers: tuple[tuple[str, str], ...] = ()


def log_settings(env: Environment) -> LogSettings:
    """Answer the settings; what is wrong ``env`` knows."""
    level = env.choice("MM_LOG_LEVEL", default="info", allowed=tuple(_LEVELS))
    form = env.choice("MM_LOG_FORMAT", default="text", allowed=("text", "json"))
    return LogSettings(
        level=_LEVELS[level],
        is_json=form == "json",
        each_invoke=env.boolean("MM_LOG_EACH_INVOKE", default=False),
        request_headers=_request_headers(env),
    )


def _request_headers(env: Environment) -> tuple[tuple[str, str], ...]:
    name = "MM_LOG_REQUEST_HEADERS"
    text = env.text(name)
    if not text:
        return ()
    try:
        found = decode_json(text, dict[str, str])
    except ValueError as exc:
        env.refuse(wrong(name, text, f"{_GRAMMAR}; {exc}"))
        return ()
    if not 1 <= len(found) <= HEADERS_MAX:
        env.refuse(wrong(name, text, f"{_GRAMMAR}; it has {len(found)}"))
    for header, key in found.items():
        if not _NAME.fullmatch(header.lower()):
            env.refuse(wrong(name, text, f'{_GRAMMAR}; "{header}" is no name of a header'))
        if not key.strip():
            env.refuse(wrong(name, text, f'{_GRAMMAR}; "{header}" has no name to be logged under'))
    return tuple((header.lower(), key) for header, key in found.items())

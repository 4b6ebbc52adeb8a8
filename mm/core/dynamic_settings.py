"""Settings that change while instances run: keys under ``config/`` in the store (spec core 1.8).

Owns which there are and what their values may be. Following them is ``mm.mesh.dynamic_config``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

Value: TypeAlias = int | bool | str

#: Of a value that is wrong, a log shows this much.
SHOWN_MAX: Final = 120
RPM_MIN: Final = 10
RPM_MAX: Final = 2**31 - 1
#: The words of log4j, which deployments of the Java mesh have in their stores, and Python's: its
#: names of levels.
_LEVELS: Final = {
    "off": "CRITICAL",
    "fatal": "CRITICAL",
    "critical": "CRITICAL",
    "error": "ERROR",
    "warn": "WARNING",
    "warning": "WARNING",
    "info": "INFO",
    "debug": "DEBUG",
    "trace": "DEBUG",
    "all": "DEBUG",
}


class SettingError(ValueError):
    """A value is not one that the setting may have; the text names it, and what it may be."""


def _rpm(text: str) -> int:
    if not (text.isascii() and text.isdigit() and RPM_MIN <= int(text[:20]) <= RPM_MAX):
        raise SettingError(f"a number of calls a minute from {RPM_MIN} to {RPM_MAX}")
    return int(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise SettingError("true or false")
    return text.lower() == "true"


def _level(text: str) -> str:
    level = _LEVELS.get(text.lower())
    if level is None:
        raise SettingError("one of debug, info, warn and error")
    return level


def _is_disabled(text: str) -> bool:
    return text.lower() != "false"


RPM_THRESHOLD: Final = "scaleup_rpm_threshold"
LOG_EACH: Final = "log_each_invocation"
LOG_LEVEL: Final = "logger_level"
#: Read at the start only.
DISABLE: Final = "disable"

_READERS: Final[Mapping[str, Callable[[str], Value]]] = {
    RPM_THRESHOLD: _rpm,
    LOG_EACH: _boolean,
    LOG_LEVEL: _level,
    DISABLE: _is_disabled,
}
#: Of the Java mesh; what it sets does not exist here.
MEANINGLESS: Final = frozenset({"send_destination_id"})


def read_setting(name: str, value: bytes) -> Value | None:
    """Answer what a key says, None if the name means nothing; raises ``SettingError``."""
    reader = _READERS.get(name)
    if reader is None:
        return None
    try:
        return reader(value.decode().strip())
    except (SettingError, UnicodeDecodeError) as exc:
        shown = ascii(value[:SHOWN_MAX].decode(errors="replace"))
        allowed = exc if isinstance(exc, SettingError) else "a text"
        raise SettingError(f"{name} is {shown}; allowed: {allowed}") from exc

"""The version of an instance as one number, by which placement knows the newer one (spec core 1.5).

Owns which texts are understood: those that the builds of the Java mesh carry. Where the text comes
from is ``mm.config``'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import mm

#: The day of each release, by ``mm.__version__``. A version without its day here does not start, so
#: that nobody can forget it: instances of the new release would count as the old one.
RELEASE_DAYS: Final[Mapping[str, str]] = {"0.1.0": "20261123"}
#: What an instance is that is told nothing else: this release, known by its day.
RELEASE_VERSION: Final = f"mm-{RELEASE_DAYS[mm.__version__]}-0"

#: ``anything-YYYYMMDD-N``: the day of the build, and which of that day it is.
_BY_DAY: Final = re.compile(r".+-(\d{8})-(\d{1,9})", re.ASCII)
#: ``YYYYMMDD-HHMM[-N]``: the older form, by the minute.
_BY_MINUTE: Final = re.compile(r"(\d{8}-\d{4})(?:-(\d{1,9}))?", re.ASCII)


def version_number(text: str) -> int | None:
    """Answer milliseconds since the epoch plus the number of the build; None for other texts.

    Numbers of different builds, of this mesh or the Java one, are ordered as the builds are.
    """
    by_minute = _BY_MINUTE.fullmatch(text)
    if by_minute is not None:
        return _number(by_minute.group(1), "%Y%m%d-%H%M", by_minute.group(2) or "0")
    by_day = _BY_DAY.fullmatch(text)
    if by_day is not None:
        return _number(by_day.group(1), "%Y%m%d", by_day.group(2))
    return None


def _number(moment: str, pattern: str, build: str) -> int | None:
    try:
        began = datetime.strptime(moment, pattern).replace(tzinfo=UTC)
    except ValueError:
        return None  # no such day
    return int(began.timestamp()) * 1000 + int(build)


RELEASE_NUMBER: Final = version_number(RELEASE_VERSION) or 0

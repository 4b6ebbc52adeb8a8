"""One setting as `mm config` and the reference tell it; all are in ``settings_reference``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mm.config import Config


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. Of its names the first that is set counts; older ones and stand-ins follow."""

    names: tuple[str, ...]
    #: A sentence or more, in Markdown.
    meaning: str
    #: What it came to; None: what is set is all that there is.
    value: Callable[[Config], object] | None
    #: Where the reader does not know it, or says less.
    default: str = ""
    allowed: str = ""


def setting(
    names: str,
    value: Callable[[Config], object] | None,
    meaning: str,
    default: str = "",
    allowed: str = "",
) -> Setting:
    """Answer a setting; its names are separated by spaces."""
    return Setting(tuple(names.split()), meaning, value, default, allowed)

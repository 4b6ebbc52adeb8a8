"""How loud to say what may happen to thousands of models at once: the first aloud, then quietly."""

from __future__ import annotations

import logging
from typing import Final

#: Whoever reads the log learns that it happens; that it still does is told once a minute.
QUIET_S: Final = 60.0


class Seldom:
    """The level for one kind of message: WARNING at most once in ``quiet_s``, DEBUG in between."""

    def __init__(self, quiet_s: float = QUIET_S) -> None:
        self._quiet_s = quiet_s
        self._said_s: float | None = None

    def level(self, now_s: float) -> int:
        """Answer the level for a message now."""
        if self._said_s is not None and now_s - self._said_s < self._quiet_s:
            return logging.DEBUG
        self._said_s = now_s
        return logging.WARNING

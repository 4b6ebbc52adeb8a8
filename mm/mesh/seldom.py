"""How loud to say what may happen to thousands of models at once: the first aloud, then quietly."""

from __future__ import annotations

import logging
from typing import Final

#: Of failures that differ from model to model, so many are told aloud in that time.
FAILURES_LOUD_MAX: Final = 10
#: Whoever reads the log learns that it happens; that it still does is told once a minute.
QUIET_S: Final = 60.0


class Seldom:
    """The level for one kind of message: WARNING ``loud_max`` times in ``quiet_s`` at most, DEBUG
    in between.
    """

    def __init__(self, quiet_s: float = QUIET_S, *, loud_max: int = 1) -> None:
        self._quiet_s = quiet_s
        self._loud_max = loud_max
        self._began_s: float | None = None
        self._said_count = 0

    def level(self, now_s: float) -> int:
        """Answer the level for a message now."""
        if self._began_s is None or now_s - self._began_s >= self._quiet_s:
            self._began_s, self._said_count = now_s, 0
        self._said_count += 1
        return logging.WARNING if self._said_count <= self._loud_max else logging.DEBUG

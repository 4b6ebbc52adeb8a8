"""What a call may still wait, from the time that its caller gave it: an answer with a text reaches
the client only before the client's own time is up.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final, TypeVar

import anyio

from mm.errors import LoadTimeoutError

T = TypeVar("T")

DEADLINE_SHARE: Final = 0.9
DEADLINE_MARGIN_MAX_S: Final = 1.0


def share_left_s(deadline_s: float | None) -> float | None:
    """Answer what others may take of the time until a deadline (``anyio.current_time()``); None if
    there is none.
    """
    if deadline_s is None:
        return None
    left_s = max(0.0, deadline_s - anyio.current_time())
    return max(DEADLINE_SHARE * left_s, left_s - DEADLINE_MARGIN_MAX_S)


class TimeLeft:
    """How long one call may wait: until its deadline nears, ``usual_s`` if it has none."""

    def __init__(self, usual_s: float, deadline_s: float | None) -> None:
        share_s = share_left_s(deadline_s)
        self._left_s = usual_s if share_s is None else share_s

    async def wait(self, awaitable: Awaitable[T], what: str) -> T:
        """Answer what comes; raises ``LoadTimeoutError`` if it does not come in time."""
        with anyio.move_on_after(self._left_s):
            return await awaitable
        raise LoadTimeoutError(f"waited {self._left_s:.3g} s for {what}")

"""Wall time for tests: the event loop's time, set to a date, possibly wrong."""

from __future__ import annotations

from typing import Final

import anyio

#: A day in November 2023.
START_MS: Final = 1_700_000_000_000


class FakeClock:
    """``mm.mesh.ports.Clock`` that jumps with trio's virtual clock.

    All clocks of one test agree, whenever they were made; ``skew_ms`` makes one wrong.
    """

    def __init__(self, skew_ms: int = 0) -> None:
        self.skew_ms = skew_ms

    def now_ms(self) -> int:
        """Answer the event loop's time as one since the epoch."""
        return START_MS + round(1000 * anyio.current_time()) + self.skew_ms

"""How busy an instance is: calls a minute, as others see it in its record (spec core 5.2).

Slow on purpose: it is for choosing where further models go, not for choosing a copy for one call.
"""

from __future__ import annotations

from collections import deque
from typing import Final

#: A count is noted this often, and the figure moves only then.
SAMPLE_MS: Final = 60_000
#: The figure is the mean over at least this long, once there has been so much time.
WINDOW_MS: Final = 6 * SAMPLE_MS


class Busyness:
    """Calls a minute, from a count that only rises."""

    def __init__(self) -> None:
        #: (time, count), oldest first; the first is the newest that is ``WINDOW_MS`` old, or the
        #: oldest that there is.
        self._samples: deque[tuple[int, int]] = deque()
        self._rpm = 0

    def rpm(self, calls_count: int, now_ms: int) -> int:
        """Answer the calls a minute; asked more often than noted."""
        samples = self._samples
        if samples and 0 <= now_ms - samples[-1][0] < SAMPLE_MS:
            return self._rpm
        if samples and now_ms < samples[-1][0]:
            samples.clear()  # the clock was set back: what was noted before it says nothing
        samples.append((now_ms, calls_count))
        while len(samples) > 2 and now_ms - samples[1][0] >= WINDOW_MS:
            samples.popleft()
        first_ms, first_count = samples[0]
        if now_ms > first_ms:
            self._rpm = round(60_000 * (calls_count - first_count) / (now_ms - first_ms))
        return self._rpm

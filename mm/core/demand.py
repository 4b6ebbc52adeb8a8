"""How much one model is in demand over the whole cluster, from what each look at its copies finds.

Owns two figures: the demand that is there without doubt, for adding copies, and the demand that may
be there, for doing without some. How many copies that takes is ``mm.core.scaling``'s. Replaces the
window of six minutes and the counts of single copies of spec core 5.2-5.3 (10.9 item 8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

#: Calls are forgotten by half in 0.7 of these times. Short: a steady load a few per cent above a
#: threshold is seen in seconds. Long: of a load that comes and goes the mean is seen, and its noise
#: is a twentieth with a thousand calls a minute.
SHORT_S: Final = 4.0
LONG_S: Final = 30.0
#: How long a call takes is the mean over this long,
SERVICE_S: Final = 60.0
#: if so many calls or more ended in it: fewer say too little.
SERVICE_CALLS_MIN: Final = 8.0
#: Standard deviations that calls which come by chance must be above a threshold to be believed: of
#: a thousand looks at a model just below it, a few are wrong.
DEVIATIONS: Final = 2.5


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one copy bears: more than either is too much."""

    #: Infinite where the runtime limits the calls at a time: then those alone count.
    calls_per_s: float
    #: Calls in flight, all the time.
    in_flight: float


def at_least(count: float) -> float:
    """Answer what a count of events that come by chance proves of their mean."""
    spread = DEVIATIONS * DEVIATIONS / 2
    return max(0.0, count + spread - DEVIATIONS * math.sqrt(count + spread / 2))


class Demand:
    """Calls and calls in flight of one model, over all its copies, as looked at every so often.

    Three windows tell of calls: the last two looks, of which the quieter one counts, so that one
    burst is no demand; and two that fade. Time in flight, divided by the calls that ended, is how
    long a call takes; calls times that is what the copies have to do, also when they cannot (calls
    wait then, and those in flight are no measure any more).
    """

    __slots__ = ("_busy_s", "_calls", "_ended", "_in_flight", "_long", "_pace_s", "_short")

    def __init__(self) -> None:
        # Of the last two looks.
        self._calls = (0.0, 0.0)
        self._in_flight = (0, 0)
        self._pace_s = 1.0
        # Calls that fade.
        self._short = 0.0
        self._long = 0.0
        # Seconds in flight and calls that ended, which fade.
        self._busy_s = 0.0
        self._ended = 0.0

    def look(self, calls: int, in_flight: int, slots: int, elapsed_s: float) -> None:
        """Take in one look: the calls that came since the last one, and those in flight now.

        ``slots``: calls that all copies together take at a time, 0 for any number. What is beyond
        waits, and waiting is no part of how long a call takes.
        """
        elapsed_s = max(elapsed_s, 1e-3)
        # Of a look that comes late the calls are spread over its time.
        self._calls = (self._calls[1] * elapsed_s / self._pace_s, float(calls))
        self._pace_s = elapsed_s
        ended = max(0, self._in_flight[1] + calls - in_flight)
        self._in_flight = (self._in_flight[1], in_flight)
        self._short = _faded(self._short, calls, elapsed_s / SHORT_S)
        self._long = _faded(self._long, calls, elapsed_s / LONG_S)
        keep = math.exp(-elapsed_s / SERVICE_S)
        served = min(in_flight, slots) if slots else in_flight
        self._busy_s = self._busy_s * keep + served * elapsed_s
        self._ended = self._ended * keep + ended

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it is worth remembering."""
        return self._long < 1.0 and not any(self._in_flight)

    def copies_at_least(self, capacity: Capacity) -> float:
        """Answer how many copies the demand keeps busy without doubt."""
        rate = max(
            at_least(2 * min(self._calls)) / (2 * self._pace_s),
            # What fades with the time T is as sure as a count over two T.
            at_least(2 * self._short) / (2 * SHORT_S),
            at_least(2 * self._long) / (2 * LONG_S),
        )
        service_s = self._service_s()
        if service_s is not None:
            return _copies(rate, rate * service_s, capacity)
        # One call in flight proves nothing, whatever it takes.
        return _copies(rate, at_least(min(self._in_flight)), capacity)

    def copies_likely(self, capacity: Capacity) -> float:
        """Answer how many copies the demand of late kept busy."""
        rate = self._long / LONG_S
        service_s = self._service_s()
        if service_s is None:
            return _copies(rate, max(self._in_flight), capacity)
        return _copies(rate, rate * service_s, capacity)

    def _service_s(self) -> float | None:
        return self._busy_s / self._ended if self._ended >= SERVICE_CALLS_MIN else None


def _faded(kept: float, calls: int, ages: float) -> float:
    """Answer the calls kept after some time in which so many more came, evenly."""
    keep = math.exp(-ages)
    return kept * keep + calls * (1 - keep) / ages


def _copies(calls_per_s: float, in_flight: float, capacity: Capacity) -> float:
    return max(calls_per_s / capacity.calls_per_s, in_flight / capacity.in_flight)

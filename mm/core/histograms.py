"""Histograms: how many values fell between which bounds, and what they came to.

Owns the counting, and the bounds that the Java mesh has (around 19.2). What is measured is said by
``mm.core.call_meter`` and ``mm.mesh.measures``; how it is shown, by ``mm.edge``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

Key = TypeVar("Key")
Bounds = tuple[float, ...]

_SECOND_MS: Final = 1000.0
_MINUTE_MS: Final = 60 * _SECOND_MS
_HOUR_MS: Final = 60 * _MINUTE_MS
_DAY_MS: Final = 24 * _HOUR_MS

#: Times of calls, loads and waits.
TIME_MS: Final[Bounds] = (
    *(0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 75.0, 100.0, 200.0, 500.0),
    *(1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 60_000.0, 120_000.0, 300_000.0),
)
#: Ages of copies.
AGE_MS: Final[Bounds] = (
    *(30 * _SECOND_MS, 5 * _MINUTE_MS, 15 * _MINUTE_MS),
    *(_HOUR_MS, 4 * _HOUR_MS, 12 * _HOUR_MS),
    *(_DAY_MS, 7 * _DAY_MS, 30 * _DAY_MS, 90 * _DAY_MS),
)
MODEL_BYTES: Final[Bounds] = tuple(262_144.0 * 4**power for power in range(8))
MESSAGE_BYTES: Final[Bounds] = tuple(128.0 * 4**power for power in range(8))


class Histogram:
    """Counts and sums by bucket; a value that equals a bound belongs below it.

    Sums are kept by bucket, too: who has to tell of single values (StatsD) tells of means, and what
    they come to stays right. Invariant: ``counts`` and ``sums`` have one more than ``bounds``.
    """

    __slots__ = ("bounds", "counts", "sums")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sums = [0.0] * (len(bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, once or as often as it was met."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += times
        self.sums[bucket] += value * times

    def add(self, other: Histogram) -> None:
        """Count all that another one with the same bounds has counted."""
        assert self.bounds == other.bounds
        for bucket, count in enumerate(other.counts):
            self.counts[bucket] += count
            self.sums[bucket] += other.sums[bucket]

    def copy(self) -> Histogram:
        """Answer one that stays as this is now."""
        same = Histogram(self.bounds)
        same.counts, same.sums = list(self.counts), list(self.sums)
        return same

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    @property
    def total(self) -> float:
        """What they come to."""
        return sum(self.sums)


class HistogramTable(Generic[Key]):
    """Histograms by key, made when they are first asked for.

    ``keys_max``: with one more, that which was not asked for the longest is forgotten; if it comes
    back it begins anew, as after a restart. 0: the caller sees to it that keys are few.
    """

    __slots__ = ("_bounds", "_keys_max", "_known")

    def __init__(self, bounds: Bounds, keys_max: int = 0) -> None:
        self._bounds = bounds
        self._keys_max = keys_max
        self._known: OrderedDict[Key, Histogram] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def at(self, key: Key) -> Histogram:
        """Answer the histogram of a key."""
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Histogram(self._bounds)
            if self._keys_max and len(self._known) > self._keys_max:
                self._known.popitem(last=False)
        elif self._keys_max:
            self._known.move_to_end(key)
        return found

    def items(self) -> Iterator[tuple[Key, Histogram]]:
        """Iterate over all, the one that was not asked for the longest first."""
        return iter(self._known.items())

"""Which instance is better for a load, and which are about as good (spec core 4.2, 4.4).

Owns the key of the order and the width of its bands. ``mm.core.placement`` makes the choice.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Final

from mm.core.cluster_view import ClusterView, InstanceView

#: Among full instances, an oldest model younger by this than the oldest of all is as good a victim;
LRU_BAND_MS: Final = 45_000
#: or one younger by this part of that one's age: if it is a day old, a minute means nothing.
LRU_BAND_AGE_DIVISOR: Final = 10
#: For the sake of preferred labels older victims are spared in wider bands.
PREFERRED_LRU_BAND_MS: Final = 120_000
PREFERRED_LRU_BAND_AGE_DIVISOR: Final = 4
#: Among instances with room, this part of the most spacious one's space is as good. (Java says half
#: in a comment and takes a quarter.)
SPACE_BAND_DIVISOR: Final = 2
#: Below this many models the number of models does not matter.
COUNT_BAND_MIN: Final = 10


class Grade(enum.IntEnum):
    """The cases, best first."""

    ROOM = 0
    OLDEST = 1
    TOO_SMALL = 2


class Ranking:
    """The order of instances for one load. ``tolerance`` widens the bands of space and age by that
    factor; with one, the number of models does not matter.
    """

    __slots__ = ("_min_space_units", "_now_ms", "_saturated_age_ms", "_size_units", "_tolerance")

    def __init__(self, view: ClusterView, size_units: int, *, tolerance: int = 1) -> None:
        self._now_ms = view.now_ms
        self._size_units = size_units
        self._min_space_units = view.min_space_units
        self._saturated_age_ms = view.saturated_age_ms
        self._tolerance = tolerance

    # --- the order ----------------------------------------------------------------------------

    def key(self, instance: InstanceView) -> tuple[object, ...]:
        """Smaller is better. One tuple for all cases keeps the order transitive.

        Version; room; space or age; models; calls; loads in progress; id. Whoever is shutting down
        is no candidate at all.
        """
        grade, record = self.grade(instance), instance.record
        return (
            -self._version(instance, grade),
            grade,
            _quality(instance, grade),
            record.count,
            record.busyness_rpm,
            instance.load_rounds,
            instance.instance_id,
        )

    def grade(self, instance: InstanceView) -> Grade:
        """Answer whether it has room for the model now, or would have to evict, or is too small."""
        record, size_units = instance.record, self._size_units
        if size_units > record.capacity_units:
            return Grade.TOO_SMALL
        min_space_units = record.min_space_units or self._min_space_units
        if instance.remaining_units >= max(min_space_units, size_units):
            return Grade.ROOM
        return Grade.OLDEST

    def is_saturated(self, instance: InstanceView) -> bool:
        """Answer whether a load there would throw out what is in use."""
        return self._is_saturated(instance, self.grade(instance))

    def leaders(
        self, candidates: Sequence[InstanceView]
    ) -> tuple[InstanceView, Grade, Sequence[InstanceView]]:
        """Answer the first by ``key``, its grade, and all of that grade and version.

        As ``min`` by ``key`` would, but with few looks at each: there may be a thousand.
        """
        candidates = self._of_newest_version(candidates)
        size_units, min_space_units = self._size_units, self._min_space_units
        roomy, full, small = [], [], []
        for each in candidates:
            record, remaining_units = each.record, each.remaining_units
            if size_units > record.capacity_units:
                small.append(each)
            elif remaining_units < size_units or remaining_units < (
                record.min_space_units or min_space_units
            ):
                full.append(each)
            else:
                roomy.append(each)
        if roomy:
            grade, alike = Grade.ROOM, roomy
            most = max([each.remaining_units for each in alike])
            equals = [each for each in alike if each.remaining_units == most]
        elif full:
            grade, alike = Grade.OLDEST, full
            oldest_ms = min([each.lru_time_ms for each in alike])
            equals = [each for each in alike if each.lru_time_ms == oldest_ms]
        else:
            grade, alike, equals = Grade.TOO_SMALL, small, small
        best = equals[0] if len(equals) == 1 else min(equals, key=self.key)
        return best, grade, alike

    # --- the bands ----------------------------------------------------------------------------

    def as_good(
        self, alike: Iterable[InstanceView], best: InstanceView, grade: Grade
    ) -> list[InstanceView]:
        """Answer which, of those of the same grade and version, are within the bands of the best
        one.
        """
        match grade:
            case Grade.ROOM:
                space_units = best.remaining_units / (SPACE_BAND_DIVISOR * self._tolerance)
                count_max = max(COUNT_BAND_MIN - 1, 3 * best.record.count // 2)
                return [
                    each
                    for each in alike
                    if each.remaining_units >= space_units
                    and (each.record.count <= count_max or self._tolerance > 1)
                ]
            case Grade.OLDEST:
                return self._as_old(alike, best, LRU_BAND_MS, LRU_BAND_AGE_DIVISOR)
            case Grade.TOO_SMALL:
                units = best.record.capacity_units
                return [each for each in alike if each.record.capacity_units == units]

    def nearly_as_old(
        self, alike: Iterable[InstanceView], best: InstanceView
    ) -> list[InstanceView]:
        """Answer which have an oldest model that is old enough, given that their labels are
        preferred.
        """
        return self._as_old(alike, best, PREFERRED_LRU_BAND_MS, PREFERRED_LRU_BAND_AGE_DIVISOR)

    def weights(self, shortlist: Iterable[InstanceView], grade: Grade) -> list[float]:
        """Answer the chances of those on a shortlist: more where less is lost."""
        match grade:
            case Grade.ROOM:
                return [float(max(1, each.remaining_units)) for each in shortlist]
            case Grade.OLDEST:
                # The band is at least as wide as this, so none is without a chance.
                now_ms = self._now_ms
                return [LRU_BAND_MS + max(0.0, now_ms - each.lru_time_ms) for each in shortlist]
            case Grade.TOO_SMALL:
                return [1.0 for _ in shortlist]

    def _as_old(
        self, alike: Iterable[InstanceView], best: InstanceView, band_ms: int, divisor: int
    ) -> list[InstanceView]:
        age_ms = max(0, self._now_ms - best.lru_time_ms)
        latest_ms = best.lru_time_ms + self._tolerance * max(band_ms, age_ms // divisor)
        return [each for each in alike if each.lru_time_ms <= latest_ms]

    def _of_newest_version(self, candidates: Sequence[InstanceView]) -> Sequence[InstanceView]:
        if not any(each.record.version for each in candidates):
            return candidates
        versions = [self._version(each, self.grade(each)) for each in candidates]
        newest = max(versions)
        both = zip(candidates, versions, strict=True)
        return [each for each, version in both if version == newest]

    def _version(self, instance: InstanceView, grade: Grade) -> int:
        """A new version that thrashes is no better than the old one, which idles beside it."""
        return 0 if self._is_saturated(instance, grade) else instance.record.version

    def _is_saturated(self, instance: InstanceView, grade: Grade) -> bool:
        return grade is not Grade.ROOM and (
            self._now_ms - instance.lru_time_ms < self._saturated_age_ms
        )


def _quality(instance: InstanceView, grade: Grade) -> int:
    match grade:
        case Grade.ROOM:
            return -instance.remaining_units
        case Grade.OLDEST:
            return instance.lru_time_ms
        case Grade.TOO_SMALL:
            return -instance.record.capacity_units

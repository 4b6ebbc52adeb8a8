"""Which instance is better for a load, and which are about as good (spec core 4.2, 4.4).

Owns the key of the order and the width of its bands. ``mm.core.placement`` makes the choice.
"""

from __future__ import annotations

import enum
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

    def key(self, instance: InstanceView) -> tuple[object, ...]:
        """Smaller is better. One tuple for all cases keeps the order transitive.

        Shutting down; version; room; space or age; calls; loads in progress; id.
        """
        grade = self.grade(instance)
        record = instance.record
        if grade is Grade.ROOM:
            quality = -instance.remaining_units
        elif grade is Grade.OLDEST:
            quality = instance.lru_time_ms
        else:
            quality = -record.capacity_units
        return (
            record.shutting_down,
            -self._version(instance, grade),
            grade,
            quality,
            record.count,
            record.busyness_rpm,
            instance.load_rounds,
            instance.instance_id,
        )

    def grade(self, instance: InstanceView) -> Grade:
        """Answer whether it has room for the model now, or would have to evict, or is too small."""
        if self._size_units > instance.record.capacity_units:
            return Grade.TOO_SMALL
        min_space_units = instance.record.min_space_units or self._min_space_units
        if instance.remaining_units >= max(min_space_units, self._size_units):
            return Grade.ROOM
        return Grade.OLDEST

    def is_as_good(self, instance: InstanceView, best: InstanceView) -> bool:
        """Answer whether it is within the bands of the best one."""
        grade = self.grade(best)
        if grade is Grade.ROOM:
            count, limit = instance.record.count, 3 * best.record.count // 2
            divisor = SPACE_BAND_DIVISOR * self._tolerance
            return (
                self.has_room_like(instance, best)
                and instance.remaining_units >= best.remaining_units / divisor
                and (count < COUNT_BAND_MIN or count <= limit or self._tolerance > 1)
            )
        if not self._is_alike(instance, best, grade):
            return False
        if grade is Grade.OLDEST:
            return self._is_old(instance, best, LRU_BAND_MS, LRU_BAND_AGE_DIVISOR)
        return instance.record.capacity_units == best.record.capacity_units

    def has_room_like(self, instance: InstanceView, best: InstanceView) -> bool:
        """Answer whether it has room as the best one, and is of the same version."""
        return self._is_alike(instance, best, Grade.ROOM)

    def is_nearly_as_old(self, instance: InstanceView, best: InstanceView) -> bool:
        """Answer whether its oldest model is old enough, given that its labels are preferred."""
        return self._is_alike(instance, best, Grade.OLDEST) and self._is_old(
            instance, best, PREFERRED_LRU_BAND_MS, PREFERRED_LRU_BAND_AGE_DIVISOR
        )

    def weight(self, instance: InstanceView) -> float:
        """Answer the chance of one on the shortlist: more where less is lost."""
        match self.grade(instance):
            case Grade.ROOM:
                return float(max(1, instance.remaining_units))
            case Grade.OLDEST:
                # The band is at least as wide as this, so none is without a chance.
                return float(LRU_BAND_MS + max(0, self._now_ms - instance.lru_time_ms))
            case Grade.TOO_SMALL:
                return 1.0

    def _is_alike(self, instance: InstanceView, best: InstanceView, grade: Grade) -> bool:
        return self.grade(instance) is grade and (
            self._version(instance, grade) == self._version(best, self.grade(best))
        )

    def _is_old(self, each: InstanceView, best: InstanceView, band_ms: int, divisor: int) -> bool:
        younger_ms = each.lru_time_ms - best.lru_time_ms
        age_ms = max(0, self._now_ms - best.lru_time_ms)
        return younger_ms <= self._tolerance * max(band_ms, age_ms // divisor)

    def _version(self, instance: InstanceView, grade: Grade) -> int:
        """A new version that thrashes is no better than the old one, which idles beside it."""
        is_saturated = grade is not Grade.ROOM and (
            self._now_ms - instance.lru_time_ms < self._saturated_age_ms
        )
        return 0 if is_saturated else instance.record.version

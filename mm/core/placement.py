"""Placement: on which instance a model is loaded (spec core 4, intentions of 10.1).

Owns the choice and the frozen view that it is made from. Does not own the records, nor what is
excluded and why.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from random import Random
from typing import Final

from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.records import InstanceRecord

#: Among full instances, an oldest model younger by this than the oldest of all is as good a victim;
LRU_BAND_MS: Final = 45_000
#: or one younger by this part of that one's age: if it is a day old, a minute means nothing.
LRU_BAND_AGE_DIVISOR: Final = 10
#: Among instances with room, this part of the most spacious one's space is as good. (Java says half
#: in a comment and takes a quarter.)
SPACE_BAND_DIVISOR: Final = 2
#: Below this many models the number of models does not matter.
COUNT_BAND_MIN: Final = 10


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance as this one sees it.

    ``sent_units`` and ``sent_count`` are loads that this instance sent there and that the record,
    which may be seconds old, cannot know of yet: without them a burst of misses all lands on the
    same instance.
    """

    instance_id: InstanceId
    record: InstanceRecord
    #: It has an address, and connections to it do not fail at present. Always True for oneself.
    reachable: bool = True
    sent_units: int = 0
    sent_count: int = 0

    @property
    def remaining_units(self) -> int:
        """Space for another model without evicting."""
        return max(0, self.record.remaining_units - self.sent_units)

    @property
    def lru_time_ms(self) -> int:
        """Last use of its oldest model; one that says nothing is not taken for an ancient one."""
        return self.record.lru_time_ms if self.record.lru_time_ms > 0 else NEVER_MS

    @property
    def load_rounds(self) -> float:
        """How many rounds of its loading threads are taken already."""
        loads_count = self.record.loads_in_progress + self.sent_count
        return loads_count / max(1, self.record.loading_threads)


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All instances at one moment, ourselves among them with a fresh record."""

    instances: tuple[InstanceView, ...]
    self_id: InstanceId
    now_ms: int
    #: Less than this remaining means "full", for whichever instance (spec core 3.1).
    min_space_units: int = 0


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What is to be loaded, and where it may not be."""

    model_id: ModelId
    model_type: str = ""
    #: Instances with a copy, with a failure, or tried already.
    excludes: frozenset[InstanceId] = field(default_factory=frozenset)
    #: 0 when unknown.
    size_units: int = 0
    #: 0 means now.
    last_used_ms: int = 0
    #: Load here if here is as good as anywhere.
    favour_self: bool = False


class PlacementReason(enum.Enum):
    """Why the instance was chosen, or none."""

    ROOM = "has room"
    OLDEST = "its oldest model is the oldest"
    TOO_SMALL = "too small everywhere, the largest tries"
    NOWHERE = "no instance can be chosen"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Placement:
    """The choice. ``shortlist`` holds the instances, by id, that were as good as the best one."""

    instance_id: InstanceId | None
    reason: PlacementReason
    shortlist: tuple[InstanceId, ...] = ()


def choose_instance(view: ClusterView, request: PlacementRequest, rng: Random) -> Placement:
    """Answer where to load; none only if every instance is excluded, unreachable or shutting down.

    1. The best instance is one that can hold the model at all; has room for it now; among those the
       most spacious, else the one whose oldest model is oldest, because the least is lost there.
    2. All that are about as good make a shortlist. Views are seconds old and every instance decides
       by itself: if all took the very best, it would be run over.
    3. Of two taken at random from the shortlist the one with fewer loads in progress gets it:
       nearly as even as taking the least busy of all, without everybody's running to it while its
       record still says that it is idle.
    """
    candidates = [each for each in view.instances if _can_be_chosen(each, request)]
    if not candidates:
        return Placement(None, PlacementReason.NOWHERE)
    rank = _Ranking(view, request)
    best = min(candidates, key=rank.key)
    shortlist = sorted(
        (each for each in candidates if rank.is_as_good(each, best)),
        key=lambda each: each.instance_id,
    )
    ids = tuple(each.instance_id for each in shortlist)
    if request.favour_self and view.self_id in ids:
        return Placement(view.self_id, rank.reason(best), ids)
    pair = rng.sample(shortlist, min(2, len(shortlist)))
    chosen = min(pair, key=lambda each: each.load_rounds)
    return Placement(chosen.instance_id, rank.reason(best), ids)


def _can_be_chosen(instance: InstanceView, request: PlacementRequest) -> bool:
    return (
        instance.reachable
        and not instance.record.shutting_down
        and instance.instance_id not in request.excludes
    )


class _Ranking:
    """Which instance is better for one request, and which are about as good."""

    __slots__ = ("_now_ms", "_size_units", "_space_units")

    def __init__(self, view: ClusterView, request: PlacementRequest) -> None:
        self._now_ms = view.now_ms
        self._size_units = request.size_units
        self._space_units = max(view.min_space_units, request.size_units)

    def key(self, instance: InstanceView) -> tuple[int, int, int, str]:
        """Smaller is better. One tuple for all cases keeps the order transitive."""
        grade = self._grade(instance)
        quality = instance.lru_time_ms
        if grade is PlacementReason.ROOM:
            quality = -instance.remaining_units
        elif grade is PlacementReason.TOO_SMALL:
            quality = -instance.record.capacity_units
        return _GRADES.index(grade), quality, instance.record.count, instance.instance_id

    def reason(self, best: InstanceView) -> PlacementReason:
        return self._grade(best)

    def is_as_good(self, instance: InstanceView, best: InstanceView) -> bool:
        grade = self._grade(best)
        if self._grade(instance) is not grade:
            return False
        if grade is PlacementReason.ROOM:
            count, limit = instance.record.count, 3 * best.record.count // 2
            is_spacious = instance.remaining_units >= best.remaining_units / SPACE_BAND_DIVISOR
            return is_spacious and (count < COUNT_BAND_MIN or count <= limit)
        if grade is PlacementReason.OLDEST:
            younger_ms = instance.lru_time_ms - best.lru_time_ms
            age_ms = max(0, self._now_ms - best.lru_time_ms)
            return younger_ms <= max(LRU_BAND_MS, age_ms // LRU_BAND_AGE_DIVISOR)
        return instance.record.capacity_units == best.record.capacity_units

    def _grade(self, instance: InstanceView) -> PlacementReason:
        if self._size_units > instance.record.capacity_units:
            return PlacementReason.TOO_SMALL
        if instance.remaining_units >= self._space_units:
            return PlacementReason.ROOM
        return PlacementReason.OLDEST


_GRADES: Final = (PlacementReason.ROOM, PlacementReason.OLDEST, PlacementReason.TOO_SMALL)

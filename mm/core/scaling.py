"""How many copies of a model there should be (spec core 5.3, 5.5; the intentions of 10.3, 10.9).

Owns every "one more" and "one less", from figures that others collect: ``mm.core.demand`` the
demand, ``mm.core.cluster_state`` the room. Carrying it out is ``mm.mesh.scaler``'s.

Load and copies are kept in a band. Above one full copy each, copies are added, so many that each
has four fifths of what it bears; when two thirds of that would do with fewer copies for long
enough, they go, one after the other. So what was just added is never at the edge of going.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from mm.core.demand import Capacity

MINUTE_MS: Final = 60_000
HOUR_MS: Final = 60 * MINUTE_MS

#: Copies are added for this part of what one bears, and taken away for that: the upper edge of the
#: band is 1, and both are about as far from the edges of the band as they can be.
AIM: Final = 0.8
LOWER_EDGE: Final = 2 / 3
#: Loads of one model at a time: a third of the instances that may have it, but two at least. (Java
#: says so in a comment and takes the smaller of both: 3 wanted copies among 4 instances became 1.)
LOADING_PART: Final = 3
LOADING_MIN: Final = 2
#: Room for copies that are no necessity: with so much of the capacity free, a second copy of what
#: is in recurring use is made; with so little, copies too many go.
FREE_FOR_SECOND: Final = 0.10
FREE_SCARCE: Final = 0.05
#: Without it, the oldest model must be old: this many times as old as the window of recurring use.
SECOND_CACHE_AGES: Final = 30
SECOND_CACHE_AGE_MIN_MS: Final = 6 * HOUR_MS
#: A copy too many is kept for this part of the age of the oldest model, within these bounds: what
#: memory is scarce for may be seen to be short-lived itself.
HOLD_PART: Final = 0.03
HOLD_MIN_MS: Final = 10 * MINUTE_MS
HOLD_MAX_MS: Final = 5 * HOUR_MS
#: One of two copies goes when it was not used for a tenth of that age, at most ten hours; without
#: that bound if the model was in heavy demand in the last fifth of it.
UNUSED_PART: Final = 10
UNUSED_MAX_MS: Final = 10 * HOUR_MS
HEAVY_PART: Final = 5
#: Above this part of what a copy bears its model is in heavy demand.
HEAVY: Final = 0.75
#: What an instance gives up in six minutes, as a part of its capacity; one copy in any case.
DROPPED_PART: Final = 0.05
DROPPED_PERIOD_MS: Final = 6 * MINUTE_MS
#: Copies that a model is given while instances of the Java mesh are there. Those cannot reach ours,
#: and where five live instances have a model, they take it to be broken: they load it nowhere any
#: more, and refuse its calls (spec core 2.4, g).
BESIDE_JAVA_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """What operators and runtimes say of it."""

    #: MM_SCALEUP_RPM_THRESHOLD.
    rpm_threshold: int = 2000
    #: Calls in flight that a copy bears if its runtime does not say how many it takes.
    in_flight_max: int = 4
    #: ``limitModelConcurrency`` of the runtime: calls in flight count, calls a minute do not.
    limits_concurrency: bool = False
    #: MM_CONC_SCALEUP_BANDWIDTH_PCT: the part of its slots that a copy is to have in use.
    bandwidth: float = 0.9
    #: The window of recurring use.
    second_age_min_ms: int = 7 * MINUTE_MS
    second_age_max_ms: int = 40 * MINUTE_MS
    #: No copy goes sooner after a further one was made,
    settled_ms: int = 30 * MINUTE_MS
    #: nor after another one went.
    drop_gap_ms: int = 80_000

    def capacity(self, concurrency_max: int) -> Capacity:
        """Answer what a copy bears that takes so many calls at a time; 0: it does not say."""
        if concurrency_max:
            in_flight = self.bandwidth * concurrency_max
        else:
            in_flight = float(self.in_flight_max)
        if self.limits_concurrency:
            return Capacity(math.inf, in_flight)
        return Capacity(self.rpm_threshold / 60, in_flight)


@dataclass(frozen=True, slots=True)
class CopyCounts:
    """The copies of a model, and where it may have more."""

    ready_count: int
    #: Loading, queued, or asked for and taken on.
    coming_count: int = 0
    #: Instances without one that may load it and have not failed to.
    hosts_left_count: int = 0
    #: By the model's policy.
    copies_min: int = 0
    #: When the last of them was begun, and when one was given up of late; 0: never.
    newest_ms: int = 0
    dropped_ms: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """What the instances that may have a model have together."""

    #: Of their capacity; 0 if there is none.
    free_part: float
    #: How long ago the oldest model was used that any of them has.
    cache_age_ms: int

    @property
    def is_scarce(self) -> bool:
        """Whether copies too many must go."""
        return self.free_part <= FREE_SCARCE

    @property
    def hold_ms(self) -> int:
        """How long a copy must have been too many."""
        return round(min(max(HOLD_PART * self.cache_age_ms, HOLD_MIN_MS), HOLD_MAX_MS))


def copies_to_add(demand: float, counts: CopyCounts) -> int:
    """Answer how many copies to add now; ``demand``: what ``Demand.copies_at_least`` says.

    Those on their way are copies already. The next ones are asked for when these are loaded, if
    they are not enough, because too many loads of one model are in everybody's way.
    """
    present_count = counts.ready_count + counts.coming_count
    if demand <= present_count:
        return 0
    wanted_count = math.ceil(demand / AIM) - present_count
    hosts_count = present_count + counts.hosts_left_count
    loading_max = max(LOADING_MIN, hosts_count // LOADING_PART)
    return max(0, min(wanted_count, counts.hosts_left_count, loading_max - counts.coming_count))


class Surplus:
    """For how long a model has had more copies than it needs, and how many it needed at most.

    Time counts from the last moment at which all copies were needed; whoever begins to look at a
    model takes that for now.
    """

    __slots__ = ("_needed_count", "_since_ms")

    def __init__(self, now_ms: int) -> None:
        self._since_ms = now_ms
        self._needed_count = 0

    def look(self, demand: float, ready_count: int, now_ms: int) -> None:
        """Take in what ``Demand.copies_likely`` says."""
        needed_count = max(1, math.ceil(demand / LOWER_EDGE))
        self._needed_count = max(self._needed_count, needed_count)
        if self._needed_count >= ready_count:
            self._since_ms = now_ms
            self._needed_count = needed_count if needed_count < ready_count else 0

    def is_one_too_many(
        self, counts: CopyCounts, room: Room, rules: ScalingRules, now_ms: int
    ) -> bool:
        """Answer whether one copy should go (spec core 5.5)."""
        if counts.ready_count < 2 or counts.coming_count or not room.is_scarce:
            return False
        if counts.ready_count <= max(1, counts.copies_min, self._needed_count):
            return False
        if counts.ready_count == 2 and room.cache_age_ms > second_cache_age_ms(rules) // 2:
            return False  # a second copy would be made again
        return (
            now_ms - self._since_ms >= room.hold_ms
            and now_ms - counts.newest_ms >= rules.settled_ms
            and now_ms - counts.dropped_ms >= rules.drop_gap_ms
        )


class CopyUse:
    """When the one copy of a model was used: two moments, to see what is in recurring use.

    ``_last`` is the last use; ``_earlier`` one that lies, or is going to lie, in the window.
    """

    __slots__ = ("_earlier_ms", "_last_ms", "heavy_ms")

    def __init__(self, now_ms: int) -> None:
        self._earlier_ms = self._last_ms = now_ms
        #: When the model was in heavy demand last; 0: never.
        self.heavy_ms = 0

    def used(self, now_ms: int, rules: ScalingRules) -> bool:
        """Note a use; answers whether the model was also used a good while ago (spec core 5.3)."""
        earlier_age_ms, last_age_ms = now_ms - self._earlier_ms, now_ms - self._last_ms
        age_min_ms, age_max_ms = rules.second_age_min_ms, rules.second_age_max_ms
        is_earlier_in = age_min_ms <= earlier_age_ms <= age_max_ms
        is_last_in = age_min_ms <= last_age_ms <= age_max_ms
        if is_last_in or earlier_age_ms > age_max_ms:
            self._earlier_ms = self._last_ms
        self._last_ms = now_ms
        return is_earlier_in or is_last_in


def second_cache_age_ms(rules: ScalingRules) -> int:
    """Answer how old the oldest model must be for a second copy that takes the place of others."""
    return max(SECOND_CACHE_AGES * rules.second_age_max_ms, SECOND_CACHE_AGE_MIN_MS)


def has_room_for_second(room: Room, rules: ScalingRules) -> bool:
    """Answer whether a second copy may be made of a model that nobody needs it for."""
    is_old = room.cache_age_ms > second_cache_age_ms(rules)
    return room.free_part >= FREE_FOR_SECOND or is_old


def is_unused_second(
    unused_ms: int, heavy_ms: int, counts: CopyCounts, room: Room, rules: ScalingRules, now_ms: int
) -> bool:
    """Answer whether one of two copies, unused for so long, may go (spec core 5.5)."""
    if counts.ready_count != 2 or counts.coming_count or counts.copies_min > 1:
        return False
    if not room.is_scarce or now_ms - counts.newest_ms < rules.settled_ms:
        return False
    limit_ms = room.cache_age_ms // UNUSED_PART
    if not heavy_ms or now_ms - heavy_ms > room.cache_age_ms // HEAVY_PART:
        limit_ms = min(limit_ms, UNUSED_MAX_MS)
    return unused_ms > limit_ms


class DropBudget:
    """What one instance may give up: little at a time, because loads take long to come back."""

    __slots__ = ("_since_ms", "_units")

    def __init__(self) -> None:
        self._since_ms = 0
        self._units = 0

    def has(self, units: int, capacity_units: int, now_ms: int) -> bool:
        """Answer whether a copy of that size may go now."""
        if not 0 <= now_ms - self._since_ms < DROPPED_PERIOD_MS:
            return True
        return not self._units or self._units + units <= DROPPED_PART * capacity_units

    def take(self, units: int, now_ms: int) -> None:
        """Count a copy that went."""
        if not 0 <= now_ms - self._since_ms < DROPPED_PERIOD_MS:
            self._since_ms, self._units = now_ms, 0
        self._units += units

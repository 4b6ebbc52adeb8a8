"""Placement: on which instance a model is loaded (spec core 4, intentions of 10.1).

Owns the choice, and the check of a choice at the instance that was chosen. Does not own what is
excluded and why, nor the view that it is made from (``mm.core.cluster_view``).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Final

from mm.core.cluster_view import ClusterView, InstanceView
from mm.core.ids import InstanceId, ModelId
from mm.core.label_groups import TypeRule
from mm.core.placement_bands import Grade, Ranking

#: rpm of an instance (spec core 5.2) below which it is idle, whatever others have.
IDLE_RPM_MAX: Final = 100
#: A model used this recently at most will soon be called, so it should not go where the load is:
#: (age of its last use in ms, how many times the load of the least loaded one is too much).
LOAD_FACTORS: Final = (
    # In the future: a further copy, made because there are many calls.
    (-1_000, 1.1),
    (5_000, 1.5),
    (12 * 60_000, 3.0),
    (24 * 3_600_000, 4.0),
)
#: An instance that was asked to load refuses when it has this many loads in progress and twice as
#: many as the others on average: below, nobody waits longer here than elsewhere.
REFUSE_LOADS_MIN: Final = 3


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What is to be loaded, and where it may not be."""

    model_id: ModelId
    model_type: str = ""
    #: Instances with a copy, with a failure, or tried already.
    excludes: frozenset[InstanceId] = field(default_factory=frozenset)
    #: Those of them that have a copy: a further one is better in another zone, on another machine.
    holders: frozenset[InstanceId] = field(default_factory=frozenset)
    #: 0 when unknown.
    size_units: int = 0
    #: Instances with less than this in all need not try; 0 when nobody knows.
    needed_units: int = 0
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
    SENT_THERE = "an earlier call was sent there to load it"
    NOT_ALLOWED = "no instance has the labels that the type requires"

    def __str__(self) -> str:
        return self.value


_REASONS: Final = {
    Grade.ROOM: PlacementReason.ROOM,
    Grade.OLDEST: PlacementReason.OLDEST,
    Grade.TOO_SMALL: PlacementReason.TOO_SMALL,
}


@dataclass(frozen=True, slots=True)
class Placement:
    """The choice. ``shortlist`` holds the instances, by id, that were as good as the best one."""

    instance_id: InstanceId | None
    reason: PlacementReason
    shortlist: tuple[InstanceId, ...] = ()


def choose_instance(view: ClusterView, request: PlacementRequest, rng: Random) -> Placement:
    """Answer where to load; none only if every instance is excluded, unreachable or shutting down,
    or has not the labels.

    1. The best instance is one of the newest version that is not saturated; that can hold the
       model at all; has room for it now; among those the most spacious, else the one whose oldest
       model is oldest, because the least is lost there.
    2. All that are about as good make a shortlist. Views are seconds old and every instance decides
       by itself: if all took the very best, it would be run over. Preferred labels, calls and
       copies in the same zone or on the same machine make it shorter, never empty.
    3. Two are drawn from it, each with a chance in proportion to its room (or to the age of its
       oldest model), and the one with fewer loads in progress gets it: nearly as even as taking the
       least busy of all, without everybody's running to it while its record still says that it is
       idle.
    """
    rule = view.label_groups.rule(request.model_type)
    allowed = _allowed(view.instances, rule)
    ranking = Ranking(view, request.size_units)
    candidates = _candidates(view, allowed, request, ranking)
    if not candidates:
        is_allowed = rule.allowed is None or allowed
        reason = PlacementReason.NOWHERE if is_allowed else PlacementReason.NOT_ALLOWED
        return Placement(None, reason)
    grade, shortlist = _shortlist(candidates, ranking, rule)
    shortlist = _spread(_calm(shortlist, view, request), view, request.holders)
    shortlist.sort(key=lambda each: each.instance_id)
    ids = tuple([each.instance_id for each in shortlist])
    if request.favour_self and view.self_id in ids:
        return Placement(view.self_id, _REASONS[grade], ids)
    chosen = _draw(shortlist, ranking.weights(shortlist, grade), rng)
    return Placement(chosen.instance_id, _REASONS[grade], ids)


def is_still_right(view: ClusterView, request: PlacementRequest) -> bool:
    """Answer whether this instance, which another one chose, should really load the model.

    The sender saw a record of ours that may be old; here it is fresh. A choice that is merely not
    the best stands: refusing costs a hop, so only what is clearly wrong is refused.
    """
    rule = view.label_groups.rule(request.model_type)
    ranking = Ranking(view, request.size_units, tolerance=2)
    candidates = _candidates(view, _allowed(view.instances, rule), request, ranking)
    ourselves = view.find(view.self_id)
    if ourselves is None or all(each is ourselves for each in candidates):
        return True
    best, grade, alike = ranking.leaders(candidates)
    if not any(each is ourselves for each in ranking.as_good(alike, best, grade)):
        return False
    load_count = sum([each.load_count for each in candidates])
    busy = max(REFUSE_LOADS_MIN, 2 * load_count / len(candidates))
    return ourselves.load_count < busy


def may_host(view: ClusterView, model_type: str) -> bool:
    """Answer whether this instance has the labels that the type requires."""
    ourselves, rule = view.find(view.self_id), view.label_groups.rule(model_type)
    return rule.allowed is None or (ourselves is not None and ourselves.label_group in rule.allowed)


def _allowed(instances: Iterable[InstanceView], rule: TypeRule) -> Iterable[InstanceView]:
    if rule.allowed is None:
        return instances
    return [each for each in instances if each.label_group in rule.allowed]


def _candidates(
    view: ClusterView,
    allowed: Iterable[InstanceView],
    request: PlacementRequest,
    ranking: Ranking,
) -> list[InstanceView]:
    """Who can be chosen. Where first loads failed only if there is nobody else. Of a replica set
    on its way out the same, and if all others would throw out what is in use: a rollout begins with
    one new instance, and that has not the memory of all.
    """
    excludes, needed_units = request.excludes, request.needed_units
    possible = [
        each
        for each in allowed
        if each.reachable
        and each.instance_id not in excludes
        and not each.record.shutting_down
        and each.record.capacity_units >= needed_units
    ]
    candidates = [each for each in possible if not each.record.loads_fail] or possible
    if not view.replaced:
        return candidates
    staying = [
        each for each in candidates if (each.record.labels, each.replica_set) not in view.replaced
    ]
    return candidates if all(map(ranking.is_saturated, staying)) else staying


def _shortlist(
    candidates: list[InstanceView], ranking: Ranking, rule: TypeRule
) -> tuple[Grade, list[InstanceView]]:
    """Answer the best one and those about as good, preferred ones before others (spec core 4.4).

    All have the same grade and version.
    """
    best, grade, alike = ranking.leaders(candidates)
    if rule.preferred is not None:
        fitting = [each for each in alike if each.label_group in rule.preferred]
        if best.label_group in rule.preferred:
            alike = fitting
        elif grade is Grade.ROOM and fitting:
            best, grade, alike = ranking.leaders(fitting)
        elif grade is Grade.OLDEST:
            near = ranking.nearly_as_old(fitting, best)
            if near:
                return grade, near
    return grade, ranking.as_good(alike, best, grade)


def _calm(
    shortlist: list[InstanceView], view: ClusterView, request: PlacementRequest
) -> list[InstanceView]:
    """Leave out those with much more calls than the least busy one (the load filter of core 4.4).

    The older the last use, the less the calls matter that the model brings. It is no reason to wait
    for a round of loads and more at those with few calls while others could begin.
    """
    age_ms = view.now_ms - request.last_used_ms if request.last_used_ms else 0
    factor = next((factor for limit_ms, factor in LOAD_FACTORS if age_ms < limit_ms), None)
    if factor is None or len(shortlist) < 2:
        return shortlist
    rpm = [each.record.busyness_rpm for each in shortlist]
    limit_rpm = factor * max(IDLE_RPM_MAX, min(rpm))
    if max(rpm) <= limit_rpm:
        return shortlist
    calm = [each for each in shortlist if each.record.busyness_rpm <= limit_rpm]
    if min(each.load_rounds for each in calm) > 1 + min(each.load_rounds for each in shortlist):
        return shortlist
    return calm


def _spread(
    shortlist: list[InstanceView], view: ClusterView, holders: frozenset[InstanceId]
) -> list[InstanceView]:
    """Keep those in a zone, and then on a machine, with the fewest copies of the model."""
    if not holders or len(shortlist) < 2:
        return shortlist
    held = [each.record for each in view.instances if each.instance_id in holders]
    zones = [record.zone for record in held if record.zone]
    locations = [record.location for record in held if record.location]

    def crowd(each: InstanceView) -> tuple[int, int]:
        return zones.count(each.record.zone), locations.count(each.record.location)

    least = min(crowd(each) for each in shortlist)
    return [each for each in shortlist if crowd(each) == least]


def _draw(shortlist: list[InstanceView], weights: list[float], rng: Random) -> InstanceView:
    if len(shortlist) == 1:
        return shortlist[0]
    places = range(len(shortlist))
    first = rng.choices(places, weights)[0]
    weights[first] = 0.0
    second = rng.choices(places, weights)[0]
    return min(shortlist[first], shortlist[second], key=lambda each: each.load_rounds)

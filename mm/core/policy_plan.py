"""Which of the copies that policies ask for there are to be, when there is no room for all.

Owns the order: the same models have their copies each time, at whichever instance it is reckoned.
What policies may keep, ``mm.core.model_policy`` says; that copies are there is ``keeper``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from mm.core.ids import ModelId
from mm.core.weights import fits

Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the policy of one model asks for, and what each copy takes."""

    model_id: ModelId
    model_type: str
    copies_count: int
    size_units: int
    is_pinned: bool


def planned(
    wishes: Iterable[Wish],
    groups_of: Mapping[str, frozenset[Group]],
    rooms: Mapping[Group, tuple[int, int]],
) -> dict[ModelId, int]:
    """Answer how many copies each model is to have.

    ``groups_of``: the groups of instances that may hold a type; ``rooms``: how many instances a
    group has, and what policies may keep there. First a copy of each model, then a second one, and
    so on; what is pinned before the rest, then by id.
    """
    kinds = frozenset(groups_of.values())
    hosts_count = {kind: sum(rooms[each][0] for each in kind) for kind in kinds}
    # What may only be in a part of some groups takes room of all of them.
    wider = {kind: [each for each in kinds if kind <= each] for kind in kinds}
    left_units = {kind: sum(rooms[each][1] for each in kind) for kind in kinds}
    counts: Counter[ModelId] = Counter()
    left = sorted(wishes, key=lambda wish: (not wish.is_pinned, wish.model_id))
    while left:
        served: list[Wish] = []
        for wish in left:
            kind = groups_of[wish.model_type]
            if counts[wish.model_id] >= min(wish.copies_count, hosts_count[kind]):
                continue
            if all(fits(wish.size_units, left_units[each]) for each in wider[kind]):
                for each in wider[kind]:
                    left_units[each] -= wish.size_units
                counts[wish.model_id] += 1
                served.append(wish)
        left = served
    return dict(counts)

"""When a vmodel goes over to its target (spec core 6.5; the intention of 10.4).

Owns the rule: the target must bear what the active model bears now. Carrying it out is
``mm.mesh.transitions``'s.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from mm.core.ids import ModelId
from mm.core.records import VModelRecord


class Pair(NamedTuple):
    """What one transition is about; with another pair it is another transition."""

    active_id: ModelId
    target_id: ModelId

    @classmethod
    def of(cls, vmodel: VModelRecord | None) -> Pair | None:
        """Answer the transition that a vmodel is in; None if there is none."""
        if vmodel is None or vmodel.active_model_id == vmodel.target_model_id:
            return None
        return cls(vmodel.active_model_id, vmodel.target_model_id)


@dataclass(frozen=True, slots=True)
class CopiesSeen:
    """The copies of both models."""

    #: Registered, whatever their state; 0 also if there is no such model.
    active_count: int
    active_ready_count: int
    #: None: there is no such model.
    target_ready_count: int | None
    target_coming_count: int = 0
    #: A further copy of the target may find a place.
    has_place: bool = True
    #: It is not so long that the target could have taken over.
    has_time: bool = True

    @property
    def missing_count(self) -> int:
        """Copies of the target to be asked for, besides those that are there or on their way."""
        there_count = (self.target_ready_count or 0) + self.target_coming_count
        return max(0, self.active_ready_count - there_count)


class Step(enum.Enum):
    """What to do next."""

    #: Nobody would notice, or the target bears what the active model does.
    SWITCH = "switch"
    #: There is nothing to go over to.
    TARGET_MISSING = "target missing"
    #: Load the first copy of the target: somebody waits for it.
    LOAD_FIRST = "load first"
    #: Ask for more copies of it.
    ADD = "add"
    #: They are on their way.
    WAIT = "wait"


def next_step(seen: CopiesSeen) -> Step:
    """Answer what brings a transition on.

    The target needs as many ready copies as the active model has, at least one. It never waits for
    room: once no further copy finds a place, or it took too long, those that it has must do, for a
    cluster that is full would never switch.
    """
    if seen.target_ready_count is None:
        return Step.TARGET_MISSING
    if not seen.active_count or seen.target_ready_count >= max(1, seen.active_ready_count):
        return Step.SWITCH
    if not seen.target_ready_count:
        return Step.LOAD_FIRST
    if not seen.has_time:
        return Step.SWITCH
    if seen.missing_count and seen.has_place:
        return Step.ADD
    return Step.WAIT if seen.target_coming_count else Step.SWITCH

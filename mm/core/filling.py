"""Loads that nobody asked for: where there is room for them, and whom to trust with them (spec core
5.7, intentions of 10.3).

Owns the sums and the patience. Which models are loaded, and when, is ``mesh.filler``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from mm.core.cluster_view import InstanceView
from mm.core.ids import InstanceId

#: This part of an instance stays free for models that are called (spec core 5.7).
KEPT_FREE_DIVISOR: Final = 8
#: Of its loading slots they take half at most: what is called must not stand behind what may be.
SLOTS_DIVISOR: Final = 2
#: An instance is filled when it has been there this long. One that goes soon after doubles that,
#: and it is halved again when none did for as long: somebody who comes and goes is filled a few
#: times and no more.
PATIENCE_MIN_S: Final = 2.0
PATIENCE_MAX_S: Final = 600.0


@dataclass(slots=True)
class Opening:
    """What one instance may be asked for now."""

    units: int
    slots: int


def openings(
    instances: Iterable[InstanceView], is_settled: Callable[[InstanceId], bool]
) -> dict[InstanceId, Opening]:
    """Answer where there is room, and a slot free, for models that may be called."""
    found = {}
    for each in instances:
        units = each.remaining_units - each.record.capacity_units // KEPT_FREE_DIVISOR
        slots = free_slots(each)
        if units > 0 and slots > 0 and is_settled(each.instance_id):
            found[each.instance_id] = Opening(units, slots)
    return found


def free_slots(instance: InstanceView) -> int:
    """Answer how many such loads an instance may begin now."""
    if not instance.reachable or instance.record.shutting_down:
        return 0
    slots = max(1, instance.record.loading_threads // SLOTS_DIVISOR)
    return max(0, slots - instance.load_count)


class Patience:
    """How long an instance must have been there before loads are spent on it."""

    def __init__(self) -> None:
        self._wait_s = PATIENCE_MIN_S
        self._since_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """Answer it as of now."""
        while self._wait_s > PATIENCE_MIN_S and now_s - self._since_s >= PATIENCE_MAX_S:
            self._wait_s /= 2
            self._since_s += PATIENCE_MAX_S
        return self._wait_s

    def disappointed(self, now_s: float) -> None:
        """Hear that an instance went soon after it had been filled."""
        self._wait_s = min(2 * self.wait_s(now_s), PATIENCE_MAX_S)
        self._since_s = now_s

"""The loads that wait for space, and which of them may claim it next (spec core 3.6 step 2, 3.7).

Owns their order. Does not own the space (``mm.core.accounting``), the waiting itself or its time
limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mm.core.accounting import UnloadAccounting
from mm.core.ids import ModelId


@dataclass(frozen=True, slots=True)
class _Waiting:
    weight_units: int
    priority: int
    arrival: int


class SpaceQueue:
    """Waiting loads in strict order: higher priority first, then first come.

    Nobody claims before the head of the queue: a large load that waits for several unloads would
    otherwise be overtaken for ever by small ones (in the Java mesh it is, spec core 10.5).
    Strictness costs only waiting, and cannot dead-lock: by invariant 6 of ``UnloadAccounting`` the
    head waits for unloads that are under way, never for a load behind it.

    Call ``claim`` whenever space came free, and whenever an entry was added, discarded or raised.
    """

    __slots__ = ("_arrivals", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[ModelId, _Waiting] = {}
        self._arrivals = 0

    def __repr__(self) -> str:
        entries = ", ".join(f"{key} {self._waiting[key].weight_units}" for key in self)
        return f"<SpaceQueue [{entries}]>"

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._waiting

    def __iter__(self) -> Iterator[ModelId]:
        """Iterate in the order in which they may claim."""
        return iter(sorted(self._waiting, key=self._rank))

    def add(self, model_id: ModelId, weight_units: int, priority: int) -> None:
        """A load begins to wait; each model waits at most once."""
        assert model_id not in self._waiting, model_id
        self._waiting[model_id] = _Waiting(weight_units, priority, self._arrivals)
        self._arrivals += 1

    def discard(self, model_id: ModelId) -> bool:
        """A load gave up or was evicted; answers whether it waited."""
        return self._waiting.pop(model_id, None) is not None

    def raise_priority(self, model_id: ModelId, priority: int) -> None:
        """Somebody more urgent wants it too; never lowers, and keeps the place among equals."""
        waiting = self._waiting.get(model_id)
        if waiting is not None and priority > waiting.priority:
            self._waiting[model_id] = replace(waiting, priority=priority)

    def claim(self, accounting: UnloadAccounting) -> list[ModelId]:
        """Claim space from the head on while it lasts; answers whose loads may start, in order."""
        started = []
        for model_id in self:
            weight_units = self._waiting[model_id].weight_units
            if not accounting.can_claim(weight_units):
                break
            accounting.claimed(weight_units)
            del self._waiting[model_id]
            started.append(model_id)
        return started

    def _rank(self, model_id: ModelId) -> tuple[int, int]:
        waiting = self._waiting[model_id]
        return -waiting.priority, waiting.arrival

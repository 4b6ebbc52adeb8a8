"""The loads that wait for space, and which of them may claim it next (spec core 3.6 step 2, 3.7).

Owns who may claim. Does not own the space (``mm.core.accounting``), the waiting itself or its time
limit.
"""

from __future__ import annotations

from collections.abc import Iterator

from mm.core.accounting import UnloadAccounting
from mm.core.ids import ModelId
from mm.core.waiting_line import WaitingLine
from mm.core.weights import Weight


class SpaceQueue:
    """Waiting loads in strict order: higher priority first, then first come.

    Nobody claims before the head of the queue: a large load that waits for several unloads would
    otherwise be overtaken for ever by small ones (in the Java mesh it is, spec core 10.5).
    Strictness costs only waiting, and cannot dead-lock: by invariant 6 of ``UnloadAccounting`` the
    head waits for unloads that are under way, never for a load behind it.

    Call ``claim`` whenever space came free, and whenever an entry was added, discarded or raised.
    """

    __slots__ = ("_line", "_weights")

    def __init__(self) -> None:
        self._line: WaitingLine[ModelId] = WaitingLine()
        self._weights: dict[ModelId, Weight] = {}

    def __repr__(self) -> str:
        entries = ", ".join(f"{key} {self._weights[key]}" for key in self)
        return f"<SpaceQueue [{entries}]>"

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._line

    def __iter__(self) -> Iterator[ModelId]:
        """Iterate in the order in which they may claim."""
        return iter(self._line)

    def add(self, model_id: ModelId, weight_units: Weight, priority: int) -> None:
        """A load begins to wait; each model waits at most once."""
        self._line.add(model_id, priority)
        self._weights[model_id] = weight_units

    def discard(self, model_id: ModelId) -> bool:
        """A load gave up or was evicted; answers whether it waited."""
        self._weights.pop(model_id, None)
        return self._line.discard(model_id)

    def raise_priority(self, model_id: ModelId, priority: int) -> None:
        """Somebody more urgent wants it too; never lowers, and keeps the place among equals."""
        self._line.raise_priority(model_id, priority)

    def claim(self, accounting: UnloadAccounting) -> list[ModelId]:
        """Claim space from the head on while it lasts; answers whose loads may start, in order."""
        started = []
        while (model_id := self._line.head()) is not None:
            weight_units = self._weights[model_id]
            if not accounting.can_claim(weight_units):
                break
            accounting.claimed(weight_units)
            self.discard(model_id)
            started.append(model_id)
        return started

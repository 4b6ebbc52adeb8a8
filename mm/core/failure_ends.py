"""When the failures of loads that an instance has recorded are over (spec core 3.11).

Owns their order in time, so that a look costs what is due and not what there is. What is recorded
stands in ``core.load_failures``; ``mesh.janitor`` takes it out.
"""

from __future__ import annotations

import heapq
from typing import Final

from mm.core.ids import ModelId

#: Entries of the heap that stand for nothing any more, beside as many as stand for something.
_STALE_MAX: Final = 64


class FailureEnds:
    """One end for each model; each change costs O(log n)."""

    __slots__ = ("_ends_ms", "_heap")

    def __init__(self) -> None:
        self._ends_ms: dict[ModelId, int] = {}
        #: Every end that was noted; those that are no more are met at the top, or cleared away.
        self._heap: list[tuple[int, ModelId]] = []

    def __len__(self) -> int:
        return len(self._ends_ms)

    def note(self, model_id: ModelId, end_ms: int | None) -> None:
        """Take in when a model's failure is over; None: there is none."""
        if end_ms == self._ends_ms.get(model_id):
            return
        if end_ms is None:
            del self._ends_ms[model_id]
        else:
            self._ends_ms[model_id] = end_ms
            heapq.heappush(self._heap, (end_ms, model_id))
        if len(self._heap) > 2 * len(self._ends_ms) + _STALE_MAX:
            self._heap = [(end_ms, each) for each, end_ms in self._ends_ms.items()]
            heapq.heapify(self._heap)

    def over(self, now_ms: int, count_max: int) -> list[ModelId]:
        """Answer models whose failures are over, those that have been for longest. They are
        answered again until it is noted that they are gone.
        """
        found: list[ModelId] = []
        while len(found) < count_max and self._next() <= now_ms:
            found.append(heapq.heappop(self._heap)[1])
        for model_id in found:
            heapq.heappush(self._heap, (self._ends_ms[model_id], model_id))
        return found

    def left_ms(self, now_ms: int) -> float:
        """Answer in how long the next one is over; infinite if there is none."""
        return max(0, self._next() - now_ms)

    def _next(self) -> float:
        heap, ends_ms = self._heap, self._ends_ms
        while heap and ends_ms.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else float("inf")

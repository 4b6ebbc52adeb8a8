"""A line of waiters in which urgency counts first and then the order of arrival (spec core 3.7).

Owns the order, nothing else: who may pass, and waiting itself, are the affair of those who keep a
line. Every operation costs O(log n), however long the line is.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

#: Entries that are void are kept until they are as many as the valid ones, and this many.
_VOID_MIN: Final = 32


class WaitingLine(Generic[K]):
    """Keys that wait, each once; larger priorities first, equals in order of arrival.

    Invariants: 1. a key waits if and only if it is in ``_places``; 2. its place there is an entry
    of the heap; other entries are void, and fewer than the valid ones and ``_VOID_MIN`` together,
    so that a waiter raised or gone costs what it cost to come.
    """

    __slots__ = ("_arrivals", "_heap", "_places")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, K]] = []
        self._places: dict[K, tuple[int, int]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[K]:
        """Iterate from the head on; sorts, so it is for people and tests."""
        return iter(sorted(self._places, key=self._places.__getitem__))

    def add(self, key: K, priority: int) -> None:
        """A key begins to wait; it must not wait yet."""
        assert key not in self._places, key
        self._push(key, -priority, self._arrivals)
        self._arrivals += 1

    def raise_priority(self, key: K, priority: int) -> bool:
        """Move a key forward; it keeps its place among equals. Answers whether anything changed:
        not if it does not wait, or is as urgent already.
        """
        place = self._places.get(key)
        if place is None or -place[0] >= priority:
            return False
        self._push(key, -priority, place[1])
        return True

    def discard(self, key: K) -> bool:
        """Take a key out; answers whether it waited."""
        if self._places.pop(key, None) is None:
            return False
        self._tidy()
        return True

    def head(self) -> K | None:
        """Answer who is next, None if nobody waits."""
        while self._heap:
            rank, arrival, key = self._heap[0]
            if self._places.get(key) == (rank, arrival):
                return key
            heapq.heappop(self._heap)
        return None

    def _push(self, key: K, rank: int, arrival: int) -> None:
        self._places[key] = rank, arrival
        heapq.heappush(self._heap, (rank, arrival, key))
        self._tidy()

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._places) + _VOID_MIN:
            self._heap = [(*place, key) for key, place in self._places.items()]
            heapq.heapify(self._heap)

"""Turns at loading: ``maxLoadingConcurrency`` at a time, most urgent first (spec core 3.7)."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio


@dataclass(order=True, slots=True)
class _Waiting:
    #: Larger priorities first, then the order of arrival.
    sort_key: tuple[int, int]
    copy_key: object = field(compare=False)
    granted: anyio.Event = field(compare=False, default_factory=anyio.Event)
    #: Superseded by a raise, or cancelled: skipped when its place comes up.
    void: bool = field(compare=False, default=False)


class LoadTurns:
    """A counted resource with a priority queue whose entries can be raised while they wait."""

    def __init__(self, concurrency_max: int) -> None:
        assert concurrency_max >= 1
        self._free = concurrency_max
        self._heap: list[_Waiting] = []
        self._waiting: dict[object, _Waiting] = {}
        self._arrivals = 0
        self.concurrency_max = concurrency_max

    @property
    def waiting_count(self) -> int:
        """Loads that wait for their turn."""
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        """Turns held now."""
        return self.concurrency_max - self._free

    @asynccontextmanager
    async def turn(self, key: object, priority: Callable[[], int]) -> AsyncIterator[None]:
        """Wait for a turn and hold it; ``key`` identifies the waiter for ``raise_priority``."""
        await self._acquire(key, priority())
        try:
            yield
        finally:
            self._free += 1
            self._grant()

    def raise_priority(self, key: object, priority: int) -> None:
        """Move a waiter forward; without effect when it is not waiting or already further ahead."""
        waiting = self._waiting.get(key)
        if waiting is None or -waiting.sort_key[0] >= priority:
            return
        waiting.void = True
        moved = _Waiting((-priority, waiting.sort_key[1]), key, waiting.granted)
        self._waiting[key] = moved
        heapq.heappush(self._heap, moved)

    async def _acquire(self, key: object, priority: int) -> None:
        assert key not in self._waiting, key
        self._arrivals += 1
        waiting = _Waiting((-priority, self._arrivals), key)
        self._waiting[key] = waiting
        heapq.heappush(self._heap, waiting)
        self._grant()
        try:
            await waiting.granted.wait()
        except BaseException:
            current = self._waiting.pop(key, None)
            if current is None:  # granted in the same moment: pass the turn on
                self._free += 1
                self._grant()
            else:
                current.void = True
            raise

    def _grant(self) -> None:
        while self._free and self._heap:
            waiting = heapq.heappop(self._heap)
            if waiting.void:
                continue
            del self._waiting[waiting.copy_key]
            self._free -= 1
            waiting.granted.set()

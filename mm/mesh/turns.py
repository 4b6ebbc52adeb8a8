"""Turns at loading: ``maxLoadingConcurrency`` at a time, most urgent first (spec core 3.7)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager

import anyio

from mm.core.waiting_line import WaitingLine


class LoadTurns:
    """A counted resource; those who wait for it stand in a line and can be raised in it."""

    def __init__(self, concurrency_max: int) -> None:
        assert concurrency_max >= 1
        self._free = concurrency_max
        self._line: WaitingLine[Hashable] = WaitingLine()
        self._granted: dict[Hashable, anyio.Event] = {}
        self.concurrency_max = concurrency_max

    @property
    def running_count(self) -> int:
        """Turns held now."""
        return self.concurrency_max - self._free

    @asynccontextmanager
    async def turn(self, key: Hashable, priority: Callable[[], int]) -> AsyncIterator[None]:
        """Wait for a turn and hold it; ``key`` identifies the waiter for ``raise_priority``."""
        await self._acquire(key, priority())
        try:
            yield
        finally:
            self._free += 1
            self._grant()

    def raise_priority(self, key: Hashable, priority: int) -> None:
        """Move a waiter forward; without effect when it is not waiting or already further ahead."""
        self._line.raise_priority(key, priority)

    async def _acquire(self, key: Hashable, priority: int) -> None:
        granted = anyio.Event()
        self._line.add(key, priority)
        self._granted[key] = granted
        self._grant()
        try:
            await granted.wait()
        except BaseException:
            if not self._line.discard(key):  # granted in the same moment: pass the turn on
                self._free += 1
                self._grant()
            else:
                del self._granted[key]
            raise

    def _grant(self) -> None:
        while self._free and (key := self._line.head()) is not None:
            self._line.discard(key)
            self._free -= 1
            self._granted.pop(key).set()

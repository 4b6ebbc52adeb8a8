"""Where loads wait: for their place in the cache, and for memory that is really free.

Owns the two queues of a load besides its turn (``turns``). Who may pass is decided by pure rules:
``core.space_queue`` over the accounting, and here the sum of what is under way.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

import anyio

from mm.core.accounting import UnloadAccounting
from mm.core.ids import ModelId
from mm.core.space_queue import SpaceQueue
from mm.mesh.local_copy import LocalCopy, Phase


class AdmissionGate:
    """Lets loads grow to their size while they leave a part of the cache to what is loaded.

    *Why.* A load that is admitted evicts to make room. With more loads wanted than fit, each would
    evict one that others still wait for: the cache would load and evict without ever answering. So
    those under way are kept (``Copies`` holds them younger than anything else) and evict for one
    half of the cache at most; what goes beyond waits here, most urgent first, then in order of
    arrival. A load that needs no eviction, and one that would be alone, is admitted at once.

    Invariant: the weights of several admitted copies that evict add up to at most the half.
    """

    def __init__(self, capacity_units: Callable[[], int], used_units: Callable[[], int]) -> None:
        self._capacity_units = capacity_units
        self._used_units = used_units
        #: Admitted and not settled: the weight, and how much of it the table does not count yet.
        self._admitted: dict[LocalCopy, tuple[int, int]] = {}
        self._waiting: list[tuple[int, int, LocalCopy, int, anyio.Event]] = []
        self._arrivals = 0

    @property
    def waiting_count(self) -> int:
        """Loads that wait for a place."""
        return len(self._waiting)

    def admitted(self) -> Iterator[LocalCopy]:
        """Iterate over the copies that are admitted and not settled."""
        return iter(self._admitted)

    async def admit(self, copy: LocalCopy, weight_units: int) -> None:
        """Return when the copy may take its weight; ``leave`` must follow, however it ends."""
        granted = anyio.Event()
        self._arrivals += 1
        entry = (-copy.priority, self._arrivals, copy, weight_units, granted)
        bisect.insort(self._waiting, entry, key=lambda each: each[:2])
        self._wake()
        try:
            await granted.wait()
        except BaseException:
            self.leave(copy)
            raise

    def raise_priority(self, copy: LocalCopy) -> None:
        """Move a copy that waits to where its priority belongs now."""
        for index, (_, arrival, each, weight_units, granted) in enumerate(self._waiting):
            if each is copy:
                del self._waiting[index]
                entry = (-copy.priority, arrival, copy, weight_units, granted)
                bisect.insort(self._waiting, entry, key=lambda each: each[:2])
                self._wake()
                return

    def inserted(self, copy: LocalCopy) -> None:
        """The table counts the copy's weight from now on."""
        if copy in self._admitted:
            self._admitted[copy] = (self._admitted[copy][0], 0)

    def leave(self, copy: LocalCopy) -> None:
        """The copy is settled or gone, admitted or not; the next may come."""
        if self._admitted.pop(copy, None) is None:
            self._waiting = [entry for entry in self._waiting if entry[2] is not copy]
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            _, _, copy, weight_units, granted = self._waiting[0]
            if not self._fits(weight_units):
                return
            del self._waiting[0]
            self._admitted[copy] = (weight_units, weight_units)
            granted.set()

    def _fits(self, weight_units: int) -> bool:
        if not self._admitted:
            return True
        under_way_units = sum(units for units, _ in self._admitted.values())
        pending_units = sum(pending for _, pending in self._admitted.values())
        capacity_units = self._capacity_units()
        return (
            under_way_units + weight_units <= capacity_units // 2
            or self._used_units() + pending_units + weight_units <= capacity_units
        )


class SpaceGate:
    """Where loads wait for memory; ``core.space_queue`` says who is next."""

    def __init__(self, accounting: UnloadAccounting) -> None:
        self._accounting = accounting
        self._queue = SpaceQueue()
        self._granted: dict[ModelId, tuple[LocalCopy, anyio.Event]] = {}

    @property
    def waiting_count(self) -> int:
        """Loads that wait for memory."""
        return len(self._queue)

    async def claim(self, copy: LocalCopy) -> None:
        """Return with the copy's weight claimed and its phase LOADING; it must be WAITING."""
        assert copy.phase is Phase.WAITING, copy
        granted = anyio.Event()
        self._granted[copy.model_id] = (copy, granted)
        self._queue.add(copy.model_id, copy.weight_units, copy.priority)
        self.wake()
        try:
            await granted.wait()
        except BaseException:
            if self.discard(copy):
                self.wake()
            raise

    def raise_priority(self, copy: LocalCopy) -> None:
        """Let a copy that waits go ahead by its present priority."""
        if copy.model_id in self._granted and self._granted[copy.model_id][0] is copy:
            self._queue.raise_priority(copy.model_id, copy.priority)
            self.wake()

    def discard(self, copy: LocalCopy) -> bool:
        """Forget a load that ended; answers whether it waited. ``wake`` must follow."""
        waiting = self._granted.get(copy.model_id)
        if waiting is None or waiting[0] is not copy:
            return False
        del self._granted[copy.model_id]
        return self._queue.discard(copy.model_id)

    def wake(self) -> None:
        """Grant as many as fit; called whenever memory came free or a waiter left."""
        for model_id in self._queue.claim(self._accounting):
            copy, granted = self._granted.pop(model_id)
            copy.enter(Phase.LOADING)
            granted.set()

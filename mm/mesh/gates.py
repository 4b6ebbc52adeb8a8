"""Where loads wait: for their place in the cache, and for memory that is really free.

Owns the two queues of a load besides its turn (``turns``). Who may pass is decided by pure rules:
``core.space_queue`` over the accounting, and here the sum of what is under way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import anyio

from mm.core.accounting import UnloadAccounting
from mm.core.ids import ModelId
from mm.core.space_queue import SpaceQueue
from mm.core.waiting_line import WaitingLine
from mm.core.weights import Weight, fits, share
from mm.mesh.local_copy import LocalCopy, Phase


@dataclass(slots=True)
class _Admitted:
    weight_units: Weight
    #: What the table does not count yet.
    pending_units: Weight


class AdmissionGate:
    """Lets loads grow to their size while they leave a part of the cache to what is loaded.

    *Why.* A load that is admitted evicts to make room. With more loads wanted than fit, each would
    evict one that others still wait for: the cache would load and evict without ever answering. So
    those under way are kept (``Copies`` holds them younger than anything else) and evict for one
    half of the cache at most; what goes beyond waits here, most urgent first, then in order of
    arrival. Nobody overtakes the head, however small. A load that needs no eviction, and one that
    would be alone, is admitted at once. A copy stays among them until those who waited for it have
    been let go: else the next load would evict it under their hands, they would wait for it again,
    and the last of a long line would never have their turn.

    Invariants: 1. the weights of several admitted copies that evict add up to at most the half
    (unless their sizes were guessed too small); 2. the two sums are those over ``_admitted``: one
    event costs O(log n), however many wait.
    """

    def __init__(
        self, capacity_units: Callable[[], Weight], used_units: Callable[[], Weight]
    ) -> None:
        self._capacity_units = capacity_units
        self._used_units = used_units
        #: Admitted and not settled, or settled with calls in line for them.
        self._admitted: dict[LocalCopy, _Admitted] = {}
        self._under_way_units = 0
        self._pending_units = 0
        self._line: WaitingLine[LocalCopy] = WaitingLine()
        self._waiting: dict[LocalCopy, tuple[Weight, anyio.Event]] = {}

    async def admit(self, copy: LocalCopy, weight_units: Weight) -> None:
        """Return when the copy may take its weight; ``leave`` must follow, however it ends."""
        granted = anyio.Event()
        self._line.add(copy, copy.priority)
        self._waiting[copy] = (weight_units, granted)
        self._wake()
        try:
            await granted.wait()
        except BaseException:
            self.leave(copy)
            raise

    def raise_priority(self, copy: LocalCopy) -> None:
        """Move a copy that waits to where its priority belongs now."""
        if self._line.raise_priority(copy, copy.priority):
            self._wake()

    def inserted(self, copy: LocalCopy) -> None:
        """The table counts the copy's weight from now on."""
        admitted = self._admitted.get(copy)
        if admitted is not None:
            self._pending_units -= admitted.pending_units
            admitted.pending_units = 0

    def grown(self, copy: LocalCopy, delta_units: Weight) -> None:
        """The guess at an admitted copy's weight was wrong by this; the table counts it already."""
        admitted = self._admitted.get(copy)
        if admitted is not None:
            admitted.weight_units += delta_units
            self._under_way_units += delta_units

    def leave(self, copy: LocalCopy) -> None:
        """Nobody waits for the copy any more, admitted or not; the next may come."""
        admitted = self._admitted.pop(copy, None)
        if admitted is not None:
            self._under_way_units -= admitted.weight_units
            self._pending_units -= admitted.pending_units
        elif self._line.discard(copy):
            del self._waiting[copy]
        self._wake()

    def check_invariants(self) -> None:
        """Assert that the sums are right."""
        admitted = self._admitted.values()
        assert self._under_way_units == sum(each.weight_units for each in admitted), self
        assert self._pending_units == sum(each.pending_units for each in admitted), self
        assert len(self._line) == len(self._waiting), self

    def _wake(self) -> None:
        while (copy := self._line.head()) is not None:
            weight_units, granted = self._waiting[copy]
            if not self._fits(weight_units):
                return
            self._line.discard(copy)
            del self._waiting[copy]
            self._admitted[copy] = _Admitted(weight_units, weight_units)
            self._under_way_units += weight_units
            self._pending_units += weight_units
            granted.set()

    def _fits(self, weight_units: Weight) -> bool:
        if not self._admitted:
            return True
        capacity_units = self._capacity_units()
        return fits(self._under_way_units + weight_units, share(capacity_units, 2)) or fits(
            self._used_units() + self._pending_units + weight_units, capacity_units
        )


class SpaceGate:
    """Where loads wait for memory; ``core.space_queue`` says who is next."""

    def __init__(self, accounting: UnloadAccounting) -> None:
        self._accounting = accounting
        self._queue = SpaceQueue()
        self._granted: dict[ModelId, tuple[LocalCopy, anyio.Event]] = {}

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

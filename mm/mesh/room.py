"""Room for copies: who goes when one needs it, by ``MM_EVICTION``.

Owns the steps at the table that may evict, and tells ``mm.core.eviction`` of what happens to
copies; what becomes of those that had to go is the business of ``copies``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mm.core.eviction import CostEviction
from mm.core.ids import ModelId
from mm.core.load_times import LoadTimes
from mm.core.weights import fits
from mm.mesh.local_copy import LocalCopy
from mm.table import Evicted, Table

if TYPE_CHECKING:
    from mm.mesh.ports import Clock

#: The time that the table has of copies under way. It makes them the last to be evicted, in the
#: order in which they came; their real last use takes its place when they are loaded.
UNDER_WAY_MS: Final = 2**62


class Room:
    """The table's room. Without ``by_cost`` the least recently used copies go."""

    def __init__(
        self, table: Table, load_times: LoadTimes, clock: Clock, by_cost: CostEviction | None
    ) -> None:
        self._table = table
        self._load_times = load_times
        self._clock = clock
        self._by_cost = by_cost

    @property
    def boundary_ms(self) -> int:
        """What was not used since then LRU would have evicted; 0 where LRU is the rule."""
        return 0 if self._by_cost is None else self._by_cost.boundary_ms

    @property
    def gain_s(self) -> tuple[float, float]:
        """Load time that choosing by cost has saved against LRU, and what it has lost."""
        return (
            (0.0, 0.0) if self._by_cost is None else (self._by_cost.saved_s, self._by_cost.lost_s)
        )

    def insert(self, copy: LocalCopy, spared: Sequence[ModelId] = ()) -> list[Evicted]:
        """Put a copy into the table, before its load; answers which ones went for it. ``spared``
        go only if no other is left.
        """
        gone: list[Evicted] = []
        if self._by_cost is not None:
            # A load that nobody waits for displaces nothing younger, whatever that costs.
            if copy.is_awaited:
                gone = self._make(self._by_cost, copy, copy.weight_units)
            self._by_cost.admitted(
                copy.model_id,
                copy.weight_units,
                self._load_times.mean_ms(copy.info.model_type) / 1000,
                used_ms=copy.last_used_ms,
                capacity=self._table.capacity_units - self._table.kept_units,
                now_ms=self._clock.now_ms(),
            )
        with self._sparing(spared):
            return gone + self._table.put(copy.model_id, copy.weight_units, UNDER_WAY_MS)

    def weigh(
        self, copy: LocalCopy, delta_units: int, spared: Sequence[ModelId] = ()
    ) -> list[Evicted]:
        """Tell the table what a copy takes now; answers which ones went for it, maybe itself.
        ``spared`` go only if no other is left.
        """
        gone: list[Evicted] = []
        if self._by_cost is not None:
            if not copy.is_kept:
                self._by_cost.resized(copy.model_id, copy.weight_units)
            if not spared:
                gone = self._make(self._by_cost, copy, delta_units)
        with self._sparing(spared):
            return gone + self._table.set_weight(copy.model_id, copy.weight_units)

    @contextmanager
    def _sparing(self, spared: Sequence[ModelId]) -> Iterator[None]:
        for model_id in spared:
            self._table.keep(model_id, True)
        yield
        for model_id in spared:
            self._table.keep(model_id, False)

    def loaded(self, copy: LocalCopy, load_s: float) -> None:
        """A copy serves; its load took so long."""
        if self._by_cost is not None:
            self._by_cost.loaded(copy.model_id, load_s)

    def keep(self, copy: LocalCopy) -> None:
        """A copy is no victim from now on: it is neither to be chosen nor in the books."""
        self._table.keep(copy.model_id, True)
        if self._by_cost is not None:
            self._by_cost.removed(copy.model_id)

    def release(self, copy: LocalCopy, used_ms: int) -> None:
        """It may go again, in its turn."""
        self._table.keep(copy.model_id, False)
        if self._by_cost is not None:
            load_s = self._load_times.mean_ms(copy.info.model_type) / 1000
            self._by_cost.admitted(
                copy.model_id,
                copy.weight_units,
                load_s,
                used_ms=used_ms,
                capacity=self._table.capacity_units - self._table.kept_units,
                now_ms=self._clock.now_ms(),
            )
            self._by_cost.loaded(copy.model_id, load_s)

    def evicted(self, copy: LocalCopy) -> None:
        """A copy went to make room."""
        if self._by_cost is not None:
            self._by_cost.evicted(copy.model_id)

    def removed(self, copy: LocalCopy) -> None:
        """A copy went for another reason."""
        if self._by_cost is not None and not copy.is_kept:
            self._by_cost.removed(copy.model_id)

    def check_invariants(self) -> None:
        """Assert that the books and the table have the same copies."""
        if self._by_cost is not None:
            self._by_cost.check_invariants()
            kept_count = sum(self._table.is_kept(each[0]) for each in self._table.cached())
            assert len(self._by_cost) == self._table.count - kept_count, self._by_cost

    def _make(self, by_cost: CostEviction, spare: LocalCopy, units: int) -> list[Evicted]:
        """Take copies out by cost until so much more fits; what is left to do is the table's."""
        gone: list[Evicted] = []
        while not fits(self._table.used_units + units, self._table.capacity_units):
            oldest = self._table.oldest()
            if oldest is None:
                break
            victim = by_cost.victim(ModelId(oldest[0]), self._clock.now_ms(), spare=spare.model_id)
            if victim == spare.model_id:
                break
            by_cost.evicted(victim)
            removed = self._table.remove(victim)
            assert removed is not None, victim
            gone.append(removed)
        return gone

"""The unload accounting: what a load may take while evicted models are still on their way out.

Owns the numbers of spec core 3.8-3.9. Does not own the order of entries (the table does), the
waiting loads (``mm.core.space_queue``) nor any task: the mesh tells each event, and acts on the
answers.
"""

from __future__ import annotations

from mm.core.ids import UNIT_BYTES
from mm.core.weights import NOTHING, Weight, common, covering, fits


class UnloadAccounting:
    """Space for loads, with memory that is being unloaded counted until it is really free.

    *Why.* A model that is evicted keeps its memory until the runtime has unloaded it. If evicting
    made room at once, loads would overrun the memory; if room appeared only after the unload, each
    insertion would evict more than it needs. So an entry is inserted on credit: it *borrows* its
    weight from memory that is going to be freed, so that only what is really needed is evicted;
    before its load starts it must *claim* real space, which is there once enough unloads have
    completed. A reserve is kept free for unloads, so that ordinary churn does not make loads wait.

    *Variables*, in units: capacity C; reserve R; occupied O, the weights of all entries of the
    table; unloading U, signed: memory being unloaded, less what is borrowed and what is
    over-committed; deficit D, over-commitment that the next completed unload pays. Two more only
    say what U hides: claimed K, the weights of entries whose load started, and leaving N, the
    weights of unloads under way. B = U clamped to [R, C] is the weight that the Java mesh
    gives to a pseudo entry of its cache.

    *Invariants*

    1. C >= 1, R >= 0, D >= 0, N >= 0 and 0 <= K <= O.
    2. U + O + D = K + N: what is in use and leaving is what was paid for, plus the deficit.
    3. U + O <= C. It holds at every moment, and evictions do not change U + O. With 2, K + N <=
       C + D: memory is never overrun but by models that are larger than predicted.
    4. O <= C - R at rest, that is once everything that the table evicted was reported. Hence the
       table, which knows nothing of unloading, is simply given the capacity C - R: by 3, the Java
       condition for an eviction, O + B > C, is true exactly when O > C - R. (U <= R: B = R. U > R:
       O + U > C contradicts 3, and so does O > C - R with U = U + O - O < C - (C - R) = R.)
    5. A claim of w is possible exactly when U + O + w <= C; the Java condition has a second branch,
       U + w <= R, which at rest implies it by 4. (Unless C < R; but then there is no entry.)
    6. At rest with no unload under way every borrowed weight can be claimed: U + O + w = K - D + w
       <= O <= C - R. So a load waits for unloads only, never for another waiting load: the queue of
       waiting loads may be strictly fair.

    *Protocol.* First tell the event here, then change the table (``put``, ``set_weight``,
    ``set_capacity``, ``remove``), then tell ``left`` for each entry that the table gave back,
    without an ``await`` in between. A copy whose load failed leaves like any other, and is
    unloaded. The Java mesh keeps a placeholder of 1 unit in its cache instead (spec core 3.9).
    """

    __slots__ = (
        "_claimed",
        "_deficit",
        "_leaving",
        "_lost",
        "_occupied",
        "_reserve",
        "_total",
        "_unloading",
    )

    def __init__(self, capacity_units: Weight, reserve_units: Weight) -> None:
        assert capacity_units >= 1, capacity_units
        assert 0 <= reserve_units < capacity_units, (reserve_units, capacity_units)
        self._total = capacity_units
        self._reserve = reserve_units
        #: Memory that unloads failed to free; the runtime may still hold it.
        self._lost = 0
        self._occupied = 0
        self._unloading = 0
        self._deficit = 0
        self._claimed = 0
        self._leaving = 0

    def __repr__(self) -> str:
        return (
            f"<UnloadAccounting [capacity {self.capacity_units}, reserve {self._reserve}"
            f" | occupied {self._occupied}, unloading {self._unloading}, deficit {self._deficit}"
            f" | claimed {self._claimed}, leaving {self._leaving}]>"
        )

    # --- what it says -----------------------------------------------------------------

    @property
    def capacity_units(self) -> Weight:
        """C: the runtime's capacity less what unloads failed to free; never below 1."""
        return covering(1, self._total - self._lost)

    @property
    def table_capacity_units(self) -> Weight:
        """C - R: the capacity to give to the table (invariant 4)."""
        return covering(NOTHING, self.capacity_units - self._reserve)

    @property
    def used_units(self) -> Weight:
        """O: equals the table's ``used_units`` at rest."""
        return self._occupied

    @property
    def published_capacity_units(self) -> Weight:
        """C - B: ``cap`` of the instance record (spec core 1.5)."""
        return self.capacity_units - self._buffer_units

    @property
    def published_used_units(self) -> Weight:
        """(O + B) - B: ``used`` of the instance record (spec core 1.5)."""
        return self._occupied

    @property
    def free_units(self) -> Weight:
        """C - (O + B): what can be added without evicting; for churn limit and early abort."""
        return self.capacity_units - self._occupied - self._buffer_units

    @property
    def unloading_units(self) -> Weight:
        """N: memory of models that left and whose unload is not completed."""
        return self._leaving

    @property
    def deficit_units(self) -> Weight:
        """D: over-commitment, because models turned out larger than predicted."""
        return self._deficit

    @property
    def lost_units(self) -> Weight:
        """Capacity given up because unloads failed for good."""
        return self._lost

    @property
    def _buffer_units(self) -> Weight:
        return common(self.capacity_units, covering(self._unloading, self._reserve))

    def can_ever_fit(self, weight_units: Weight) -> bool:
        """Answer whether a model of this size could be loaded here at all.

        Compared with C - R and not, as in the Java mesh, with C: a model between the two would
        evict everything and then itself (spec core 10.5).
        """
        return fits(weight_units, self.table_capacity_units)

    def too_large_message(self, model_id: str, weight_units: Weight) -> str:
        """Answer why ``can_ever_fit`` was False (text of spec core 3.6)."""
        return (
            f"Predicted size of {_mebibytes(weight_units)} for model {model_id} is larger than"
            f" total effective capacity of {_mebibytes(self.table_capacity_units)}"
        )

    def can_claim(self, weight_units: Weight) -> bool:
        """Answer whether a load of this weight may start now (invariant 5)."""
        return fits(self._unloading + self._occupied + weight_units, self.capacity_units)

    # --- the life of an entry ---------------------------------------------------------

    def inserted(self, weight_units: Weight = 1) -> None:
        """A placeholder enters the table; it borrows its weight."""
        assert weight_units >= 1, weight_units
        self._occupied += weight_units
        self._unloading -= weight_units
        self._check()

    def grown(self, delta_units: Weight) -> None:
        """An entry that has claimed nothing changes its weight: its size was predicted."""
        self._occupied += delta_units
        self._unloading -= delta_units
        self._check()

    def claimed(self, weight_units: Weight) -> None:
        """A load starts, and pays back what its entry borrowed. Allowed only if ``can_claim``."""
        assert self.can_claim(weight_units), (weight_units, self)
        self._unloading += weight_units
        self._claimed += weight_units
        self._check()

    def measured(self, delta_units: Weight) -> bool:
        """A loaded entry turned out larger or smaller; answers whether space came free.

        What exceeds the free space is a deficit: it cannot be undone, only paid from the memory
        released next.
        """
        grown, shrunk = covering(delta_units, NOTHING), covering(-delta_units, NOTHING)
        if grown != NOTHING:
            self._exceed(grown)
        paid = common(shrunk, self._deficit)
        self._deficit -= paid
        self._unloading += paid
        self._occupied += delta_units
        self._claimed += delta_units
        self._check()
        return shrunk != paid

    def left(self, weight_units: Weight, *, claimed: bool) -> None:
        """An entry was evicted or removed.

        If it had claimed its space, its unload is now under way until ``unload_completed`` or
        ``unload_failed``; otherwise it gives its loan back and nothing follows.
        """
        self._occupied -= weight_units
        self._unloading += weight_units
        if claimed:
            self._claimed -= weight_units
            self._leaving += weight_units
        self._check()

    # --- the end of an unload ---------------------------------------------------------

    def unload_completed(self, weight_units: Weight) -> bool:
        """Memory is free again; answers whether some is left after paying the deficit."""
        paid = common(weight_units, self._deficit)
        self._deficit -= paid
        self._unloading -= weight_units - paid
        self._leaving -= weight_units
        self._check()
        return weight_units != paid

    def unload_failed(self, weight_units: Weight) -> None:
        """An unload was given up: its memory is lost, and the table's capacity shrinks by it."""
        self._unloading -= weight_units
        self._leaving -= weight_units
        self._lost += weight_units
        self._check()

    def unload_recovered(self, weight_units: Weight) -> bool:
        """A given-up unload succeeded later: its capacity is back; answers whether any came free.

        The Java mesh gets it back by a restart only (spec core 10.5).
        """
        assert 0 <= weight_units <= self._lost, (weight_units, self._lost)
        before = self.capacity_units
        self._lost -= weight_units
        self._check()
        return self.capacity_units != before

    # --- another runtime --------------------------------------------------------------

    def resized(self, capacity_units: Weight, reserve_units: Weight) -> bool:
        """The runtime has more memory than it had, or less; answers whether any came free.

        What is in use beyond a smaller capacity is a deficit, which the memory of those that are
        evicted for it pays.
        """
        assert capacity_units >= 1, capacity_units
        assert 0 <= reserve_units < capacity_units, (reserve_units, capacity_units)
        self._total, self._reserve = capacity_units, reserve_units
        in_use = self._unloading + self._occupied
        excess = covering(NOTHING, in_use - self.capacity_units)
        room = covering(NOTHING, self.capacity_units - in_use)
        paid = common(room, self._deficit)
        self._unloading += paid - excess
        self._deficit += excess - paid
        self._check()
        return room != paid

    # --- invariants -------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Assert all of them; only at rest, because 4 breaks until evictions are told."""
        self._check()
        assert self._occupied <= self.table_capacity_units, self
        if self._leaving == 0:
            assert self.can_claim(self._occupied - self._claimed), self

    def _exceed(self, delta_units: Weight) -> None:
        """Take ``delta_units`` that nobody asked for: what there is no room for becomes deficit."""
        excess = covering(NOTHING, delta_units - self.free_units)
        self._unloading -= excess
        self._deficit += excess

    def _check(self) -> None:
        assert 0 <= self._claimed <= self._occupied, self
        assert self._leaving >= 0, self
        assert self._deficit >= 0, self
        assert self._unloading + self._occupied + self._deficit == self._claimed + self._leaving, (
            self
        )
        assert self._unloading + self._occupied <= self.capacity_units, self


def _mebibytes(weight_units: Weight) -> str:
    return f"{weight_units * UNIT_BYTES / 2**20:.1f} MiB"

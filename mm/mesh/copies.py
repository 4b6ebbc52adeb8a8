"""The cache of this instance: its copies, their order, and the memory they take (spec core 3).

Owns the map of copies, and keeps the table, the accounting and the phases of the copies in step:
nothing else may change them. Loading itself is ``loader``'s, unloading ``unloader``'s, what the
registry says ``registrar``'s.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup

from mm.core.accounting import UnloadAccounting
from mm.core.eviction import CostEviction
from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.load_times import LoadTimes
from mm.core.records import ModelRecord
from mm.core.weights import fits
from mm.errors import MeshError
from mm.limits import Limits
from mm.mesh.concurrency import CallLimits
from mm.mesh.gates import AdmissionGate, SpaceGate
from mm.mesh.local_copy import ANSWERED_FLAG, LOAD_SHIFT, LocalCopy, Phase
from mm.mesh.measures import Measures
from mm.mesh.promises import Promises
from mm.mesh.registrar import Registrar
from mm.mesh.room import UNDER_WAY_MS, Room
from mm.mesh.seldom import Seldom
from mm.mesh.statistics import Counters
from mm.mesh.unloader import Unloader
from mm.table import CopyState, Evicted, Table

if TYPE_CHECKING:
    from mm.mesh.ports import Clock, Runtime

logger = logging.getLogger(__name__)

#: Models whose losses are remembered, so that a runtime which keeps losing one is told from one
#: that lost everything once.
LOSSES_MAX = 10_000
#: After an aborted or timed-out load the runtime may still be at it; it gets this long before the
#: unload.
UNLOAD_AFTER_ABORT_S = 0.5
#: Calls in flight on a model that the runtime says it does not have: others wait for its reload.
LOST_IN_FLIGHT_WAIT_S = 1.0


class Copies:
    """Every local copy; ``start`` makes one, everything else ends one."""

    def __init__(
        self,
        *,
        table: Table,
        accounting: UnloadAccounting,
        runtime: Runtime,
        registrar: Registrar,
        clock: Clock,
        limits: Limits,
        counters: Counters,
        measures: Measures,
        load_times: LoadTimes,
        by_cost: CostEviction | None = None,
    ) -> None:
        self.table = table
        self.accounting = accounting
        self.registrar = registrar
        self.counters = counters
        self.measures = measures
        self.clock = clock
        self.space = SpaceGate(accounting)
        # What is kept is as if it were not there: loads share what others can be evicted from.
        self.admission = AdmissionGate(
            lambda: max(0, accounting.table_capacity_units - table.kept_units),
            lambda: table.used_units - table.kept_units,
        )
        self.unloader = Unloader(
            table,
            accounting,
            runtime,
            counters,
            measures,
            limits,
            on_freed=self.space.wake,
            on_capacity=self._capacity_changed,
            on_ended=self._tidy,
        )
        self._limits = limits
        self._load_times = load_times
        self._room = Room(table, load_times, clock, by_cost)
        self._copies: dict[ModelId, LocalCopy] = {}
        self._losses: OrderedDict[ModelId, tuple[int, float]] = OrderedDict()
        self._losses_told = Seldom()
        self._load_ids = itertools.count(1)
        self._in_progress_count = 0
        self._group: TaskGroup | None = None
        #: Told of a copy that serves from now on, and of one that is kept and grew.
        self.on_weighed: Callable[[LocalCopy], None] | None = None
        self.promises = Promises(table, self._copies)
        #: Where the runtime wants few calls at a time for one model.
        self.call_limits: CallLimits | None = None
        self.closed: MeshError | None = None
        #: Set, and replaced, at every change that others should hear of.
        self.changed = anyio.Event()

    def open(self, group: TaskGroup) -> None:
        """Name the task group that owns loads and unloads: the node's."""
        self._group = group

    def close(self, reason: MeshError) -> None:
        """Start no more copies; ``start`` raises ``reason`` from now on."""
        self.closed = reason

    def __len__(self) -> int:
        return len(self._copies)

    def __iter__(self) -> Iterator[LocalCopy]:
        return iter(self._copies.values())

    def get(self, model_id: ModelId) -> LocalCopy | None:
        """Answer the copy of a model, whatever its phase; never one that is GONE."""
        return self._copies.get(model_id)

    @property
    def loads_in_progress(self) -> int:
        """Copies between their start and the end of sizing: ``lInProg`` (spec core 1.5)."""
        return self._in_progress_count

    def oldest_use_ms(self) -> int:
        """Answer the last use of the least recently used copy, ``NEVER_MS`` when there is none.

        Copies that LRU would not have any more, were it the rule, do not count: what others ask is
        how long a copy stays here unused, and what is kept for its cost says nothing of that.
        """
        oldest = self.table.oldest()
        if oldest is None:
            return NEVER_MS
        if oldest[1] == UNDER_WAY_MS:
            return self.clock.now_ms()
        return max(oldest[1], self._room.boundary_ms)

    @property
    def eviction_gain_s(self) -> tuple[float, float]:
        """What ``MM_EVICTION`` has saved and lost against LRU, in load seconds."""
        return self._room.gain_s

    def last_used_ms(self, copy: LocalCopy) -> int:
        """Answer the last use of a copy, as the table knows it if it does."""
        used_ms = self.table.last_used(copy.model_id) if copy.serves else None
        return copy.last_used_ms if used_ms is None else used_ms

    def check_invariants(self) -> None:
        """Assert that table, accounting and phases are in step; between any two events."""
        self.accounting.check_invariants()
        self.admission.check_invariants()
        in_progress_count = sum(copy.phase is not Phase.ACTIVE for copy in self)
        assert self._in_progress_count == in_progress_count, in_progress_count
        assert self.table.used_units == self.accounting.used_units, self.accounting
        assert self.table.capacity_units == self.accounting.table_capacity_units, self.accounting
        counted = {model_id: weight for model_id, weight, _ in self.table.cached()}
        assert counted == {c.model_id: c.weight_units for c in self if c.phase is not Phase.NEW}
        self._room.check_invariants()
        for copy in self:
            assert copy.phase is not Phase.GONE, copy
            assert copy.settled.is_set() == copy.serves, copy
            ready = self.table.state(copy.model_id) == CopyState.READY
            assert ready == copy.serves, copy
            assert self.table.is_kept(copy.model_id) == copy.is_kept, copy
            assert copy.serves or not copy.is_kept, copy

    # --- beginning ---

    def start(
        self,
        model_id: ModelId,
        record: ModelRecord,
        *,
        last_used_ms: int,
        priority: int,
        twins: frozenset[InstanceId] = frozenset(),
    ) -> LocalCopy:
        """Begin a copy, which takes no space until it is admitted; the caller sees to its load.

        There must be none yet. Raises the reason given to ``close``.
        """
        if self.closed is not None:
            raise self.closed.another()
        assert model_id not in self._copies, model_id
        now_ms = self.clock.now_ms()
        copy = LocalCopy(
            model_id,
            record.info,
            load_id=next(self._load_ids),
            enqueued_ms=now_ms,
            last_used_ms=last_used_ms or now_ms,
            priority=priority,
            twins=twins,
        )
        self._copies[model_id] = copy
        self._in_progress_count += 1
        self._changed()
        return copy

    def is_too_old(self, copy: LocalCopy, weight_units: int) -> bool:
        """Answer whether everything here was used later than a copy that would need its space."""
        needs_space = not fits(self.table.used_units + weight_units, self.table.capacity_units)
        return needs_space and copy.last_used_ms < self.oldest_use_ms() and not copy.is_awaited

    def insert(self, copy: LocalCopy, weight_units: int) -> None:
        """Give an admitted copy its place, with its predicted weight; may evict others."""
        copy.enter(Phase.QUEUED)
        self.accounting.inserted(weight_units)
        copy.weight_units = weight_units
        self._left(self._room.insert(copy, self.promises.spared(copy, weight_units)))
        self.admission.inserted(copy)
        self._changed()

    def grow(self, copy: LocalCopy, weight_units: int) -> None:
        """Its size was guessed too small, and its load has not begun; may evict, even itself."""
        copy.enter(Phase.QUEUED)
        delta_units = weight_units - copy.weight_units
        self.accounting.grown(delta_units)
        copy.weight_units = weight_units
        self.admission.grown(copy, delta_units)
        self._left(self._room.weigh(copy, delta_units, self.promises.spared(copy, delta_units)))
        self._changed()

    def loaded(self, copy: LocalCopy, now_s: float) -> None:
        """The runtime has it: serve calls from now on."""
        copy.enter(Phase.SIZING)
        copy.ready_s = now_s
        load_s = now_s - (now_s if copy.loading_since_s is None else copy.loading_since_s)
        if copy.loading_since_s is not None:
            self._load_times.add(copy.info.model_type, 1000 * load_s)
        self._room.loaded(copy, load_s)
        if copy.is_awaited:
            copy.last_used_ms = self.clock.now_ms()
        # While under way it was kept young; a load alone is no use (spec core 3.2). It fits where
        # it was, so nothing is evicted for it.
        self.table.remove(copy.model_id)
        self._left(self.table.put(copy.model_id, copy.weight_units, copy.last_used_ms))
        self.table.set_flags(copy.model_id, copy.load_bits << LOAD_SHIFT)
        self.table.set_state(copy.model_id, CopyState.READY)
        self.counters.loads += 1
        self.registrar.progressed(copy)
        copy.settle()
        if not copy.is_letting_go:
            self.admission.leave(copy)
        self._weighed(copy)
        self._changed()

    def measured(self, copy: LocalCopy, weight_units: int) -> None:
        """Its true weight is known, and the copy complete."""
        copy.enter(Phase.ACTIVE)
        self._in_progress_count -= 1
        delta_units = weight_units - copy.weight_units
        if copy.is_kept and not self.promises.may_keep(self.table.kept_units + delta_units):
            self.release(copy)  # else others that are kept went for it
        freed = self.accounting.measured(delta_units)
        copy.weight_units = weight_units
        self.registrar.progressed(copy)
        self._left(self._room.weigh(copy, delta_units, self.promises.spared(copy, delta_units)))
        if freed:
            self.space.wake()
        self._weighed(copy)
        self._changed()

    def _weighed(self, copy: LocalCopy) -> None:
        if self.on_weighed is not None and copy.serves:
            self.on_weighed(copy)

    # --- keeping ---

    def keep(self, copy: LocalCopy) -> None:
        """Let nothing evict a copy that serves; how much that may be is the caller's to know."""
        assert copy.serves, copy
        if not copy.is_kept:
            self._room.keep(copy)
            copy.is_kept = True

    def release(self, copy: LocalCopy) -> None:
        """Let others evict it again."""
        if copy.is_kept:
            copy.is_kept = False
            self._room.release(copy, self.last_used_ms(copy))

    # --- ending ---

    def remove(
        self,
        copy: LocalCopy,
        failure: MeshError | None = None,
        *,
        in_flight_wait_s: float | None = None,
    ) -> None:
        """Take a copy out: unregistered, abandoned or failed. What it had claimed is unloaded.

        Without effect on one that is GONE: an eviction may come first.
        """
        if copy.phase is Phase.GONE:
            return
        if copy.phase is Phase.NEW:
            self._end(copy, failure)
            self._tidy(copy.model_id)
            self._changed()
            return
        removed = self.table.remove(copy.model_id)
        assert removed is not None, copy
        self._room.removed(copy)
        self._note_last_use(copy, removed)
        self.space.discard(copy)
        self._leave(copy, failure, in_flight_wait_s=in_flight_wait_s)
        self.space.wake()
        self._changed()

    def answered(self, model_id: ModelId, load_id: int) -> None:
        """The runtime answered a call to that copy: it has the model."""
        copy = self._copies.get(model_id)
        if copy is not None and copy.load_id == load_id:
            copy.has_answered = True

    def lost(self, model_id: ModelId, load_id: int, now_s: float) -> bool:
        """The runtime says that it does not have the model; answers whether a reload may help.

        Believed ``losses_believed_max`` times in ``lost_again_s``, and the second time only if
        the reloaded copy had answered a call in between: a NOT_FOUND that outlives a reload is
        the model's own word (design section 5, decision 8).
        """
        copy = self._copies.get(model_id)
        if copy is None or copy.load_id != load_id or not copy.serves:
            return True  # an earlier copy lost it; what is here now deserves its own try
        count, since_s = self._losses.pop(model_id, (0, now_s))
        if now_s - since_s >= self._limits.lost_again_s:
            count, since_s = 0, now_s
        has_answered = copy.has_answered or self.table.flags(model_id) & ANSWERED_FLAG
        is_believed = count < self._limits.losses_believed_max and (count == 0 or has_answered)
        self._losses[model_id] = (count + bool(is_believed), since_s)
        if len(self._losses) > LOSSES_MAX:
            self._losses.popitem(last=False)
        if not is_believed:
            return False
        logger.log(
            self._losses_told.level(now_s),
            "the runtime lost model %s; it will be loaded again (others are told at DEBUG)",
            model_id,
        )
        # It may be wrong, and a load of what is loaded a surprise to it: it is unloaded first.
        self.remove(copy, in_flight_wait_s=LOST_IN_FLIGHT_WAIT_S)
        return True

    def runtime_lost(self, failure: MeshError) -> int:
        """The runtime is gone, and all that it had loaded with it; answers how many copies that
        were. What waits for its turn goes on waiting.
        """
        gone = [copy for copy in self if copy.has_claimed]
        for copy in gone:
            self.remove(copy, failure, in_flight_wait_s=LOST_IN_FLIGHT_WAIT_S)
        return len(gone)

    def resize(self, capacity_units: int, reserve_units: int) -> None:
        """Go by another capacity; what does not fit any more is evicted."""
        self.accounting.resized(capacity_units, reserve_units)
        self._capacity_changed()

    def _left(self, evicted: list[Evicted]) -> None:
        # None of them may still claim space while the others are accounted for.
        copies = [self._copies[ModelId(victim.model_id)] for victim in evicted]
        for copy in copies:
            self.space.discard(copy)
            self._room.evicted(copy)
        for copy, victim in zip(copies, evicted, strict=True):
            self.counters.evictions += copy.serves
            self.counters.pins_evicted += copy.is_kept
            logger.debug("model %s evicted, last used at %d ms", copy.model_id, victim.last_used_ms)
            self._note_last_use(copy, victim)
            if copy.serves:
                age_ms = max(0, self.clock.now_ms() - copy.last_used_ms)
                self.measures.eviction_age_ms.observe(age_ms, copy.model_id)
            self._leave(copy, None)
        if copies:
            self.space.wake()

    def _leave(
        self,
        copy: LocalCopy,
        failure: MeshError | None,
        *,
        in_flight_wait_s: float | None = None,
    ) -> None:
        """Account for a copy that the table no longer has, and unload what it had claimed."""
        claimed, was_loading = copy.has_claimed, copy.phase is Phase.LOADING
        self.accounting.left(copy.weight_units, claimed=claimed)
        self._end(copy, failure)
        if claimed:
            assert self._group is not None, "open() first"
            self.unloader.begin(
                self._group,
                copy.model_id,
                copy.weight_units,
                delay_s=UNLOAD_AFTER_ABORT_S if was_loading else 0.0,
                in_flight_wait_s=in_flight_wait_s,
            )
            return
        self._tidy(copy.model_id)

    def _end(self, copy: LocalCopy, failure: MeshError | None) -> None:
        del self._copies[copy.model_id]
        self._in_progress_count -= copy.phase is not Phase.ACTIVE
        copy.phase, copy.is_kept = Phase.GONE, False
        copy.scope.cancel()
        copy.settle(failure)
        self.admission.leave(copy)
        if self.call_limits is not None:
            self.call_limits.copy_left(copy.load_id)
        self.registrar.deregister(copy)

    def _note_last_use(self, copy: LocalCopy, left: Evicted) -> None:
        """What the table knows of a copy's last use goes into its record."""
        if left.last_used_ms != UNDER_WAY_MS:
            copy.last_used_ms = left.last_used_ms
        elif copy.is_awaited:
            copy.last_used_ms = self.clock.now_ms()

    def _tidy(self, model_id: ModelId) -> None:
        """Let the table forget a model that has no copy anywhere."""
        if (
            model_id not in self._copies
            and model_id not in self.unloader
            and not self.table.peers(model_id)
        ):
            self.table.discard(model_id)

    def _capacity_changed(self) -> None:
        self._left(self.table.set_capacity(self.accounting.table_capacity_units))
        self.space.wake()
        self._changed()

    def _changed(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

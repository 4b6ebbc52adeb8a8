"""Loads: from the decision to load here to a copy that serves (spec core 3.5-3.6, 3.10).

Owns the order of steps of one load and their time limits. A load belongs to the node, never to the
call that asked
for it: callers wait on the copy, and one that gives up changes nothing.
"""

from __future__ import annotations

import logging

import anyio
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.churn import churn_pause_ms
from mm.core.ids import UNIT_BYTES, InstanceId, ModelId, units_of
from mm.core.load_errors import failure_message
from mm.core.load_failures import FailureKind, LoadFailure, kind_of
from mm.core.load_sizes import LoadSizes, is_crowded
from mm.core.records import ModelRecord
from mm.core.sizing import CacheSizing
from mm.core.weights import fits
from mm.errors import (
    ChurnError,
    LoadFailedError,
    LoadTimeoutError,
    MeshError,
    NoRoomError,
    QueueFullError,
    RuntimeUnavailableError,
)
from mm.mesh.copies import Copies
from mm.mesh.first_loads import FirstLoads
from mm.mesh.local_copy import AWAITED, CopyGoneError, LocalCopy, Phase
from mm.mesh.measures import Measure
from mm.mesh.ports import Loaded, Runtime, RuntimeCallError, RuntimeParameters
from mm.mesh.registrar import CopyElsewhereError, Registrar
from mm.mesh.seldom import FAILURES_LOUD_MAX, Seldom
from mm.mesh.turns import LoadTurns
from mm.table import CopyState

logger = logging.getLogger(__name__)

#: Refusals of the churn guard come by the thousand: one of them in this time is told aloud.
CHURN_QUIET_S = 1.0
#: A loaded model is measured so long after: asking its size takes the runtime, and this process, as
#: much time as a call does, and the calls that waited for the load go first.
MEASURE_PAUSE_S = 0.005


class Loader:
    """Starts loads and carries them out."""

    def __init__(
        self,
        *,
        copies: Copies,
        registrar: Registrar,
        runtime: Runtime,
        parameters: RuntimeParameters,
        sizing: CacheSizing,
        config: Config,
        first_loads: FirstLoads,
    ) -> None:
        self._copies = copies
        self._measures = copies.measures
        self._registrar = registrar
        self._runtime = runtime
        self._parameters = parameters
        self._sizing = sizing
        self._config = config
        self._failure_rules = config.failure_rules
        self._first_loads = first_loads
        self._turns = LoadTurns(parameters.loading_concurrency_max)
        self._group: TaskGroup | None = None
        self._under_way = 0
        self._sizes = LoadSizes()
        self._churn_told = Seldom(CHURN_QUIET_S)
        self._limits_told = Seldom()
        self._failures_told = Seldom(loud_max=FAILURES_LOUD_MAX)
        self._measures_told = Seldom()

    def resized(self, sizing: CacheSizing) -> None:
        """Go by another capacity of the runtime."""
        self._sizing = sizing

    @property
    def load_timeout_s(self) -> float:
        """The runtime's own limit for one load."""
        return self._parameters.load_timeout_ms / 1000

    @property
    def running_count(self) -> int:
        """Loads in the runtime, or waiting there for memory."""
        return self._turns.running_count

    @property
    def queue_length(self) -> int:
        """Loads that are not running in the runtime yet."""
        return self._under_way - self._turns.running_count

    def open(self, group: TaskGroup) -> None:
        """Name the task group that owns the loads: the node's."""
        self._group = group

    def ensure(
        self,
        model_id: ModelId,
        record: ModelRecord,
        *,
        last_used_ms: int = 0,
        known_size_units: int = 0,
        awaited: bool,
        twins: frozenset[InstanceId] = frozenset(),
    ) -> LocalCopy:
        """Answer the copy of the model here, starting its load if there is none. Never blocks.

        Raises ``QueueFullError``, ``ChurnError``, or ``NoRoomError`` when this instance is shutting
        down.
        """
        now_ms = self._copies.clock.now_ms()
        # A record, or another's clock, may tell of uses to come: the copy would be evicted last.
        last_used_ms = min(last_used_ms, now_ms)
        priority = AWAITED if awaited else (last_used_ms or now_ms)
        copy = self._copies.get(model_id)
        if copy is not None:
            self._raise(copy, priority)
            return copy
        if self.queue_length >= self._config.load_queue_length_max:
            raise QueueFullError(
                f"{self.queue_length} loads wait here already, the limit; retry later"
            )
        self._guard_against_churn(model_id)
        if 0 < last_used_ms < record.last_used_ms:
            last_used_ms = min(record.last_used_ms, now_ms)
        copy = self._copies.start(
            model_id, record, last_used_ms=last_used_ms, priority=priority, twins=twins
        )
        assert self._group is not None, "open() first"
        self._under_way += 1
        known_size_units = known_size_units or record.size_units
        is_guess = not known_size_units and is_crowded(
            self._copies.loads_in_progress, self._turns.concurrency_max
        )
        self._group.start_soon(self._run, copy, record, known_size_units, is_guess)
        return copy

    def _guard_against_churn(self, model_id: ModelId) -> None:
        """Refuse a load that would evict what has just been used, if that is wished."""
        copies = self._copies
        pause_ms = churn_pause_ms(
            free_units=copies.accounting.free_units,
            min_space_units=self._sizing.min_space_units,
            oldest_use_ms=copies.oldest_use_ms(),
            now_ms=copies.clock.now_ms(),
            min_age_ms=self._config.min_churn_age_ms,
        )
        if pause_ms == 0:
            return
        copies.counters.loads_churned += 1
        logger.log(
            self._churn_told.level(anyio.current_time()),
            "model %s is not loaded: it would evict a model used in the last %d ms"
            " (MM_MIN_CHURN_AGE_MS; %d so far)",
            model_id,
            self._config.min_churn_age_ms,
            copies.counters.loads_churned,
        )
        raise ChurnError("Cache churn threshold exceeded", retry_after_ms=pause_ms)

    def ensure_awaited(self, copy: LocalCopy) -> None:
        """Somebody waits for this load: it goes ahead of all that nobody waits for."""
        self._raise(copy, AWAITED)

    def _raise(self, copy: LocalCopy, priority: int) -> None:
        if copy.settled.is_set() or priority <= copy.priority:
            return
        copy.priority = priority
        self._copies.admission.raise_priority(copy)
        self._turns.raise_priority(copy, priority)
        self._copies.space.raise_priority(copy)
        self._copies.unloader.nudge(copy.model_id)

    async def _run(
        self, copy: LocalCopy, basis: ModelRecord, known_size_units: int, is_guess: bool
    ) -> None:
        """One load, start to end; every outcome settles the copy."""
        try:
            with copy.scope:
                try:
                    await self._load(copy, basis, known_size_units, is_guess)
                except CopyGoneError:
                    pass
                except CopyElsewhereError:
                    self._copies.remove(copy)
                except MeshError as exc:
                    # Of the store, the queue or space: nothing that would be the model's fault.
                    self._copies.remove(copy, exc)
                except LoadRefusedError as exc:
                    await self._failed(copy, basis, exc)
        finally:
            self._under_way -= 1

    async def _load(
        self, copy: LocalCopy, basis: ModelRecord, known_size_units: int, is_guess: bool
    ) -> None:
        if is_guess:
            default_units = self._sizing.default_units
            size_units = self._sizes.guess(copy.info.model_type) or default_units
        else:
            size_units = known_size_units or await self._predict(copy)
        self._check_prediction(copy, size_units)
        self._refuse_if_too_old(copy, size_units)
        await self._registrar.register(copy, basis)
        copy.started.set()
        queued_s = anyio.current_time()
        with anyio.move_on_after(self._config.space_wait_s) as waited:
            await self._copies.admission.admit(copy, size_units)
        if waited.cancelled_caught:
            raise NoRoomError(f"no place came free for model {copy.model_id}: loads are too slow")
        # Others may have come meanwhile that were used later.
        self._refuse_if_too_old(copy, size_units)
        self._copies.insert(copy, size_units)
        with anyio.move_on_after(self._config.space_wait_s) as waited:
            await self._copies.unloader.wait_ended(copy.model_id)
        if waited.cancelled_caught:
            raise NoRoomError(f"model {copy.model_id} is still being unloaded here")
        async with self._turns.turn(copy, lambda: copy.priority):
            self._note(self._measures.load_wait_ms, queued_s, copy)
            if is_guess:
                await self._improve(copy)
            await self._claim_space(copy)
            loaded = await self._ask(copy)
        copy.enter(Phase.LOADING)  # it may have left while this task was about to run again
        self._check_size(copy, loaded.size_bytes)
        copy.concurrency_max = self._concurrency_max(loaded)
        if copy.concurrency_max:
            self._copies.table.set_concurrency_max(copy.model_id, copy.concurrency_max)
        self._copies.loaded(copy, anyio.current_time())
        self._first_loads.loaded(copy.model_id)
        size_bytes = loaded.size_bytes or await self._measure(copy)
        self._check_size(copy, size_bytes)
        size_units = units_of(size_bytes) or copy.weight_units
        if size_bytes:
            self._sizes.add(copy.info.model_type, size_units)
        self._copies.measured(copy, size_units)
        told_bytes = size_bytes or copy.weight_units * UNIT_BYTES
        self._measures.loaded_bytes.observe(told_bytes, copy.model_id)

    def _note(self, measure: Measure, began_s: float, copy: LocalCopy) -> None:
        measure.observe(1000 * (anyio.current_time() - began_s), copy.model_id)

    def _refuse_if_too_old(self, copy: LocalCopy, size_units: int) -> None:
        if self._copies.is_too_old(copy, size_units):
            raise NoRoomError(f"Entry too old for cache for model {copy.model_id}")
        if self._copies.promises.would_break(copy, size_units):
            raise NoRoomError(f"no room for model {copy.model_id} beside what policies keep here")

    def _concurrency_max(self, loaded: Loaded) -> int:
        """Answer the calls that a copy takes at a time, 0 for any number."""
        if loaded.concurrency_max > 0 or not self._parameters.limit_model_concurrency:
            return max(0, loaded.concurrency_max)
        logger.log(
            self._limits_told.level(anyio.current_time()),
            "the runtime asks for limitModelConcurrency, but tells no maxConcurrency for a model:"
            " one call at a time is sent",
        )
        return 1

    def _check_prediction(self, copy: LocalCopy, size_units: int) -> None:
        accounting = self._copies.accounting
        if not accounting.can_ever_fit(size_units):
            raise LoadRefusedError(
                accounting.too_large_message(copy.model_id, size_units),
                FailureKind.CAPACITY,
                needed_units=size_units,
            )
        kept_units = self._copies.table.kept_units
        if not fits(size_units, accounting.table_capacity_units - kept_units):
            raise LoadRefusedError(
                f"Model {copy.model_id} of {size_units * UNIT_BYTES} bytes has no room beside the"
                f" {kept_units * UNIT_BYTES} bytes of pinned models at this instance",
                FailureKind.CAPACITY,
                needed_units=size_units,
            )

    async def _improve(self, copy: LocalCopy) -> None:
        """Ask, now that it is this load's turn, what was guessed when it came (spec core 3.6)."""
        size_units = await self._predict(copy)
        if size_units > copy.weight_units:
            self._check_prediction(copy, size_units)
            self._refuse_if_too_old(copy, size_units - copy.weight_units)
            self._copies.grow(copy, size_units)

    async def _predict(self, copy: LocalCopy) -> int:
        """Answer the units to reserve before the load: the runtime's guess, else its default (spec
        core 3.5).
        """
        size_bytes = 0
        try:
            with anyio.move_on_after(self._config.predict_size_timeout_s):
                size_bytes = await self._runtime.predict_size(copy.model_id, copy.info)
        except (RuntimeCallError, RuntimeUnavailableError) as exc:
            logger.debug("size of model %s not predicted: %s", copy.model_id, exc)
        return units_of(size_bytes) or self._sizing.default_units

    async def _claim_space(self, copy: LocalCopy) -> None:
        copy.enter(Phase.WAITING)
        with anyio.move_on_after(self._config.space_wait_s) as waited:
            await self._copies.space.claim(copy)
        if waited.cancelled_caught:
            raise NoRoomError(
                f"no memory came free for model {copy.model_id}"
                f" in {self._config.space_wait_s:.0f} s: unloads are slow or fail"
            )

    async def _ask(self, copy: LocalCopy) -> Loaded:
        copy.enter(Phase.LOADING)  # claimed; but it may have left before this task ran again
        self._copies.table.set_state(copy.model_id, CopyState.LOADING)
        copy.loading_since_s = anyio.current_time()
        self._registrar.progressed(copy)
        try:
            with anyio.fail_after(self.load_timeout_s):
                loaded = await self._runtime.load(copy.model_id, copy.info)
            self._note(self._measures.load_ms, copy.loading_since_s, copy)
            return loaded
        except TimeoutError:
            message = f"Load of model {copy.model_id} timed out after {self.load_timeout_s:g}s"
            raise LoadRefusedError(message, timed_out=True) from None
        except RuntimeCallError as exc:
            raise LoadRefusedError(
                failure_message(exc.code, exc.message), kind_of(exc.code, exc.message)
            ) from exc
        finally:
            self._copies.counters.loading_s += anyio.current_time() - copy.loading_since_s

    async def _measure(self, copy: LocalCopy) -> int:
        """Answer the loaded size in bytes, 0 to keep the prediction. Calls are served meanwhile."""
        if copy.is_awaited:
            await anyio.sleep(MEASURE_PAUSE_S)
        began_s = anyio.current_time()
        try:
            with anyio.fail_after(self._config.model_size_timeout_s):
                size_bytes = await self._runtime.model_size(copy.model_id)
            self._note(self._measures.sizing_ms, began_s, copy)
            return size_bytes
        except (TimeoutError, RuntimeCallError, RuntimeUnavailableError) as exc:
            logger.log(
                self._measures_told.level(anyio.current_time()),
                "size of model %s not measured, the prediction stands (others are told at DEBUG):"
                " %s",
                copy.model_id,
                exc,
            )
            return 0

    def _check_size(self, copy: LocalCopy, size_bytes: int) -> None:
        """A model larger than everything would evict everything, and then itself: it has to go."""
        accounting = self._copies.accounting
        if not accounting.can_ever_fit(units_of(size_bytes)):
            capacity_bytes = accounting.table_capacity_units * UNIT_BYTES
            raise LoadRefusedError(
                f"Size of {size_bytes} bytes of model {copy.model_id} is larger than total"
                f" effective capacity of {capacity_bytes} bytes",
                FailureKind.CAPACITY,
                needed_units=units_of(size_bytes),
            )

    async def _failed(self, copy: LocalCopy, basis: ModelRecord, refused: LoadRefusedError) -> None:
        """Tell the registry, then those who wait: whoever asks after them must find the failure."""
        message, rules, now_ms = str(refused), self._failure_rules, self._copies.clock.now_ms()
        level = self._failures_told.level(anyio.current_time())
        logger.log(level, "load of model %s failed: %s", copy.model_id, message)
        self._copies.counters.load_failures += 1
        kind = refused.kind
        if kind is FailureKind.PERMANENT and self._first_loads.serve_elsewhere(copy.model_id):
            # It cannot be the model. A version that loads nothing must not end the tries of all.
            kind = FailureKind.TRANSIENT
        self._first_loads.failed(copy.model_id, kind)
        failure = LoadFailure(
            self._registrar.instance_id,
            now_ms,
            message,
            kind,
            # Registering this copy has taken out what the record told of this instance.
            rules.count_next(copy.model_id, basis, copy.enqueued_ms),
            refused.needed_units,
        )
        await self._registrar.record_failure(copy, failure, rules)
        error: MeshError = LoadFailedError(message, is_permanent=kind is FailureKind.PERMANENT)
        if refused.timed_out:
            error = LoadTimeoutError(message)
        self._copies.remove(copy, error)


class LoadRefusedError(Exception):
    """The runtime did not load the model; the text is for the failure record."""

    def __init__(
        self,
        message: str,
        kind: FailureKind = FailureKind.TRANSIENT,
        *,
        needed_units: int = 0,
        timed_out: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        #: What the model needs, if that is more than this instance has at all.
        self.needed_units = needed_units
        self.timed_out = timed_out

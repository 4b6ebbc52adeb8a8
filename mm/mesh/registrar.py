"""Keeps this instance's entries in the model records true (spec core 1.6: an instance writes only
its own).

Owns registering a copy before its load, how far it is, taking it out again, and recording failures.
Only registering and failures are waited for, because somebody's next step depends on them. All else
is *owed*: the models whose entry of ours may differ from what is so here are remembered, and what
the entry should be is looked up when the write is made. So writes for one model coalesce by
themselves, and what the store did not take is paid when it is back.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import anyio
from anyio.abc import TaskGroup

from mm.core.copy_record import CopyStage
from mm.core.ids import InstanceId, ModelId
from mm.core.jitter import jittered_s
from mm.core.load_failures import FailureRules, LoadFailure
from mm.core.records import ModelInfo, ModelRecord, RecordError
from mm.errors import ContendedError, ModelNotFoundError, StoreUnavailableError
from mm.mesh.local_copy import LocalCopy, Phase
from mm.mesh.ports import Clock
from mm.mesh.registry import Registry
from mm.mesh.seldom import Seldom

logger = logging.getLogger(__name__)

#: Between tries to pay what is owed while the store is away, on the average.
RETRY_S: Final = 1.0
#: Records changed at a time: a store that groups writes takes them in one go.
WRITES_IN_FLIGHT_MAX: Final = 64
#: A stage that may be over in a moment is told only after this: of a load that is faster, others
#: hear once, that it is ready. They lose nothing: a call sent to a copy that is not ready waits
#: there.
COALESCE_S: Final = 0.2


class CopyElsewhereError(Exception):
    """The record changed since the decision to load here: another instance took the model, or it
    was registered anew.
    """


@dataclass(slots=True)
class _Entry:
    """What a record should say of our copy."""

    enqueued_ms: int
    info: ModelInfo
    stage: CopyStage
    since_ms: int
    size_units: int = 0
    #: It was in the record once: only then may it be put back without asking who else has the
    #: model by now.
    has_been_registered: bool = False


class Registrar:
    """Writes of one instance about its own copies.

    Invariants: 1. what a record says of us is what ``_live`` says, or the model is owed, or an
    event will tell of the difference; 2. at most one write of what is owed is under way for each
    model. What is owed is bounded by the copies that were here when the store went away: without a
    store none is registered anew.
    """

    def __init__(self, registry: Registry, instance_id: InstanceId, clock: Clock) -> None:
        self._registry = registry
        self._me = self.instance_id = instance_id
        self._clock = clock
        #: The present copies that are registered, or about to be.
        self._live: dict[ModelId, _Entry] = {}
        # What is owed: due now, in order; due later, with the time, in order too as the delay is
        # always the same; being written; and being written but owed again.
        self._due: OrderedDict[ModelId, None] = OrderedDict()
        self._later: OrderedDict[ModelId, float] = OrderedDict()
        self._in_flight: set[ModelId] = set()
        self._again: set[ModelId] = set()
        #: Last uses to be told with a deregistration.
        self._last_uses_ms: dict[ModelId, int] = {}
        self._retry_at_s = 0.0
        self._rng = random.Random(instance_id)
        self._failures_told = Seldom()
        self._woken = anyio.Event()

    @property
    def owed_count(self) -> int:
        """Records that the store has still to be told of."""
        return len(self._due) + len(self._later) + len(self._in_flight)

    # --- what happened here ---

    async def register(self, copy: LocalCopy, basis: ModelRecord) -> None:
        """Announce that ``copy`` is about to load, if nobody else took the model since ``basis``.

        Raises ``CopyElsewhereError``, ``ModelNotFoundError``, ``StoreUnavailableError``.
        """

        def change(record: ModelRecord | None) -> ModelRecord:
            if record is None:
                raise ModelNotFoundError
            # Registered anew, or taken by another: whoever waits looks again.
            if record.info != copy.info:
                raise CopyElsewhereError
            expected = copy.twins | {self._me}
            if any(basis.copies.get(k) != t for k, t in record.copies.items() if k not in expected):
                raise CopyElsewhereError
            last_used_ms = max(copy.last_used_ms, self._last_uses_ms.get(copy.model_id, 0))
            return record.with_copy(self._me, copy.enqueued_ms, last_used_ms)

        # From here on the store may have it, whatever becomes of this call.
        copy.registered = True
        entry = _Entry(copy.enqueued_ms, copy.info, CopyStage.QUEUED, copy.enqueued_ms)
        self._live[copy.model_id] = entry
        try:
            await self._registry.update(copy.model_id, change)
        except RecordError as exc:
            logger.error("model %s is not loaded: %s", copy.model_id, exc)
            raise ModelNotFoundError from exc
        entry.has_been_registered = True
        if copy.model_id in self._due:
            # The entry of an earlier copy, still owed, was just replaced.
            del self._due[copy.model_id]
            self._last_uses_ms.pop(copy.model_id, None)

    def progressed(self, copy: LocalCopy) -> None:
        """Tell others how far a copy is: loading, ready, measured. Never blocks.

        Once it is measured nothing is to come, so that is told at once; what comes before is told
        after ``COALESCE_S``, if it is still so.
        """
        entry = self._live.get(copy.model_id)
        if entry is None or not copy.registered or entry.enqueued_ms != copy.enqueued_ms:
            return
        stage = CopyStage.READY if copy.serves else CopyStage.LOADING
        if stage is not entry.stage:
            entry.stage, entry.since_ms = stage, self._clock.now_ms()
        if copy.phase is Phase.ACTIVE:
            entry.size_units = copy.weight_units
            self._owe(copy.model_id)
        else:
            self._owe_later(copy.model_id)

    def restore(self, copy: LocalCopy) -> None:
        """Put a copy back into a record that lost it while we were thought gone. Never blocks."""
        if copy.registered:
            self._owe(copy.model_id)

    def deregister(self, copy: LocalCopy) -> None:
        """Take a copy out of its record, now or as soon as the store takes it. Never blocks."""
        if copy.registered:
            copy.registered = False
            self._live.pop(copy.model_id, None)
            self._owe(copy.model_id, copy.last_used_ms)

    async def withdraw(
        self, copy: LocalCopy, is_spare: Callable[[ModelRecord], bool], last_used_ms: int
    ) -> bool:
        """Take a copy that goes on serving out of its record, if the record as the store has it
        ``is_spare`` without it; answers whether it was.
        """
        model_id, is_out = copy.model_id, False
        entry = self._live.get(model_id)
        if entry is None or not copy.registered or self._owes(model_id):
            return False

        def change(record: ModelRecord | None) -> ModelRecord | None:
            nonlocal is_out
            registered_ms = None if record is None else record.copies.get(self._me)
            is_out = registered_ms == entry.enqueued_ms
            if record is None or not is_out:
                return record
            is_out = is_spare(record)
            if not is_out:
                return record
            return record.without_copy(self._me, self._clock.now_ms(), last_used_ms)

        # Before the write: its event must not look as if somebody else had taken the copy out.
        copy.registered = False
        del self._live[model_id]
        is_known = False
        try:
            await self._registry.update(model_id, change)
            is_known = True
        except (StoreUnavailableError, RecordError) as exc:
            logger.debug("the copy of model %s stays registered: %s", model_id, exc)
        finally:
            is_out = is_out and is_known
            if not is_out and copy.phase is not Phase.GONE:
                copy.registered = True
                self._live[model_id] = entry
            if not is_out:
                self._owe(model_id)
        return is_out

    def _owes(self, model_id: ModelId) -> bool:
        return model_id in self._due or model_id in self._later or model_id in self._in_flight

    def disown(self, model_id: ModelId) -> None:
        """Take out an entry of ours for a model that is not here. Never blocks."""
        record = self._registry.get(model_id)
        if record is not None and self._me in record.copies:
            self._owe(model_id)

    async def record_failure(
        self, copy: LocalCopy, failure: LoadFailure, rules: FailureRules
    ) -> None:
        """Replace the copy by a failure, for status answers and for placement elsewhere (spec core
        3.10). It is counted by the record as the store has it, ``failure.count`` at least.
        """

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or record.info != copy.info:
                return record
            if record.copies.get(self._me, copy.enqueued_ms) != copy.enqueued_ms:
                return record
            now_ms = self._clock.now_ms()
            count = max(failure.count, rules.count_next(copy.model_id, record, now_ms))
            return replace(failure, failed_ms=now_ms, count=count).written_to(record)

        # Before the write: its event must not look as if somebody else had taken the copy out.
        copy.registered = False
        self._live.pop(copy.model_id, None)
        is_recorded = False
        try:
            await self._registry.update(copy.model_id, change)
            is_recorded = True
        except (StoreUnavailableError, RecordError) as exc:
            level = self._failures_told.level(anyio.current_time())
            logger.log(level, "failure of model %s not recorded: %s", copy.model_id, exc)
        finally:
            if not is_recorded:
                self._owe(copy.model_id, copy.last_used_ms)

    async def forget_all(self) -> int:
        """Take this instance out of every record that names it; answers how many those were.

        At start (an earlier process with this id has left them) and at the end of a drain. Raises
        ``StoreUnavailableError`` if some could not be changed; they stay owed.
        """
        models = self._registry.held_by(self._me)
        self._live.clear()
        limiter = anyio.CapacityLimiter(WRITES_IN_FLIGHT_MAX)
        failed: StoreUnavailableError | None = None
        contended: ContendedError | None = None

        async def forget(model_id: ModelId) -> None:
            nonlocal failed, contended
            async with limiter:
                if failed is None:
                    try:
                        await self._bring(model_id)
                    except ContendedError as exc:
                        contended = exc  # the others need not wait for it
                    except StoreUnavailableError as exc:
                        failed = exc
                    else:
                        return
                self._owe(model_id)

        async with anyio.create_task_group() as group:
            for model_id in sorted(models):  # in the same order each time: simulations are repeated
                group.start_soon(forget, model_id)
        failed = failed or contended
        if failed is not None:
            raise failed
        return len(models)

    # --- what the store has still to be told ---

    def _owe(self, model_id: ModelId, last_used_ms: int = 0) -> None:
        if last_used_ms > self._last_uses_ms.get(model_id, 0):
            self._last_uses_ms[model_id] = last_used_ms
        self._later.pop(model_id, None)
        if model_id in self._in_flight:
            self._again.add(model_id)
        else:
            self._due[model_id] = None
        self._woken.set()

    def _owe_later(self, model_id: ModelId) -> None:
        if model_id not in self._due:
            self._later.setdefault(model_id, anyio.current_time() + COALESCE_S)
            self._woken.set()

    async def run(self) -> None:
        """Pay what is owed, until cancelled."""
        async with anyio.create_task_group() as group:
            while True:
                self._woken = anyio.Event()
                wait_s = self._start_writes(group, anyio.current_time())
                with anyio.move_on_after(wait_s):
                    await self._woken.wait()

    def _start_writes(self, group: TaskGroup, now_s: float) -> float | None:
        """Start what is due; answers the seconds until more may be, None if only events tell."""
        while self._later and (oldest := next(iter(self._later.items())))[1] <= now_s:
            self._owe(oldest[0])
        if now_s < self._retry_at_s:
            return self._retry_at_s - now_s
        while self._due and len(self._in_flight) < WRITES_IN_FLIGHT_MAX:
            model_id, _ = self._due.popitem(last=False)
            self._in_flight.add(model_id)
            group.start_soon(self._pay, model_id)
        return next(iter(self._later.values())) - now_s if self._later else None

    async def _pay(self, model_id: ModelId) -> None:
        is_paid = is_contended = False
        try:
            await self._bring(model_id)
            is_paid = True
        except ContendedError as exc:
            logger.info("still to be written: %s", exc)
            is_contended = True
        except StoreUnavailableError as exc:
            logger.debug("record of model %s still to be written: %s", model_id, exc)
            self._retry_at_s = anyio.current_time() + jittered_s(RETRY_S, self._rng)
        finally:
            self._in_flight.discard(model_id)
            if model_id in self._again or not is_paid:
                self._again.discard(model_id)
                if is_contended:
                    self._owe_later(model_id)  # the others need not wait for it
                else:
                    self._owe(model_id)
            self._woken.set()

    async def _bring(self, model_id: ModelId) -> None:
        """Have a record say of us what is so; raises ``StoreUnavailableError``."""
        last_used_ms = self._last_uses_ms.get(model_id, 0)

        def change(record: ModelRecord | None) -> ModelRecord | None:
            return None if record is None else self._true(model_id, record, last_used_ms)

        try:
            await self._registry.update(model_id, change)
        except RecordError as exc:
            logger.warning("record of model %s not written: %s", model_id, exc)
        if self._last_uses_ms.get(model_id) == last_used_ms:
            del self._last_uses_ms[model_id]

    def _true(self, model_id: ModelId, record: ModelRecord, last_used_ms: int) -> ModelRecord:
        """Answer the record as it should be; the very same if it is so already."""
        entry, registered_ms = self._live.get(model_id), record.copies.get(self._me)
        if entry is None or entry.info != record.info:
            if registered_ms is None:
                return record
            return record.without_copy(self._me, self._clock.now_ms(), last_used_ms)
        if registered_ms != entry.enqueued_ms:
            if entry.has_been_registered:
                record = record.with_copy(self._me, entry.enqueued_ms, last_used_ms)
            elif registered_ms is not None:
                return record.without_copy(self._me, self._clock.now_ms(), last_used_ms)
        return record.with_copy_state(self._me, entry.stage, entry.since_ms, entry.size_units)

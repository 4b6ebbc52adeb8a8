"""Keeps this instance's entries in the model records true (spec core 1.6: an instance writes only
its own).

Owns registering a copy before its load, taking it out again, and recording failures. What the store
did not take is
owed, and paid when the store is back; what is owed is bounded by the copies that this process ever
had.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace

import anyio

from mm.core.ids import InstanceId, ModelId
from mm.core.load_failures import FailureRules, LoadFailure
from mm.core.records import ModelRecord, RecordError
from mm.errors import ModelNotFoundError, StoreUnavailableError
from mm.mesh.local_copy import LocalCopy
from mm.mesh.ports import Clock
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)

#: Between tries to pay what is owed while the store is away.
RETRY_S = 1.0
#: Records changed at a time: a store that groups writes takes them in one go.
CONCURRENCY = 32


class CopyElsewhereError(Exception):
    """The record changed since the decision to load here: another instance took the model."""


class Registrar:
    """Writes of one instance about its own copies.

    Invariant: an entry of ours in a record is the one of the copy that ``_live`` tells of, or it
    is in ``_owed``, or an event will tell that it is there.
    """

    def __init__(self, registry: Registry, instance_id: InstanceId, clock: Clock) -> None:
        self._registry = registry
        self._me = self.instance_id = instance_id
        self._clock = clock
        #: The value under which the present copy of a model is registered, or is about to be.
        self._live: dict[ModelId, int] = {}
        #: Models of which an entry other than the live one has to go, and their last use.
        self._owed: dict[ModelId, int] = {}
        self._something_owed = anyio.Event()

    @property
    def owed_count(self) -> int:
        """Registrations that the store has still to forget."""
        return len(self._owed)

    async def register(self, copy: LocalCopy, basis: ModelRecord) -> None:
        """Announce that ``copy`` is about to load, if nobody else took the model since ``basis``.

        Raises ``CopyElsewhereError``, ``ModelNotFoundError``, ``StoreUnavailableError``.
        """

        def change(record: ModelRecord | None) -> ModelRecord:
            if record is None or record.info != copy.info:
                raise ModelNotFoundError
            if any(basis.copies.get(k) != t for k, t in record.copies.items() if k != self._me):
                raise CopyElsewhereError
            return record.with_copy(self._me, copy.enqueued_ms, copy.last_used_ms)

        # From here on the store may have it, whatever becomes of this call.
        copy.registered = True
        self._live[copy.model_id] = copy.enqueued_ms
        try:
            await self._registry.update(copy.model_id, change)
        except RecordError as exc:
            logger.error("model %s is not loaded: %s", copy.model_id, exc)
            raise ModelNotFoundError from exc

    async def restore(self, copy: LocalCopy) -> None:
        """Put a copy back into its record, which lost it while we were thought gone."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or record.info != copy.info or not copy.registered:
                return record
            if record.copies.get(self._me) == copy.enqueued_ms:
                return record
            return record.with_copy(self._me, copy.enqueued_ms, copy.last_used_ms)

        await self._registry.update(copy.model_id, change)

    def deregister(self, copy: LocalCopy) -> None:
        """Take a copy out of its record, now or as soon as the store takes it. Never blocks."""
        if copy.registered:
            copy.registered = False
            self._live.pop(copy.model_id, None)
            self._owe(copy.model_id, copy.last_used_ms)

    def disown(self, model_id: ModelId) -> None:
        """Take out an entry of ours for a model that is not here. Never blocks."""
        record = self._registry.get(model_id)
        if record is not None and self._me in record.copies:
            self._owe(model_id, 0)

    def _owe(self, model_id: ModelId, last_used_ms: int) -> None:
        self._owed[model_id] = max(last_used_ms, self._owed.get(model_id, 0))
        self._something_owed.set()

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
            logger.warning("failure of model %s not recorded: %s", copy.model_id, exc)
        finally:
            if not is_recorded:
                self._owe(copy.model_id, copy.last_used_ms)

    async def forget_all(self) -> int:
        """Take this instance out of every record that names it; answers how many those were.

        At start (an earlier process with this id has left them) and at the end of a drain. Raises
        ``StoreUnavailableError`` if some could not be changed.
        """
        models = self._registry.held_by(self._me)
        self._live.clear()
        for model_id in models:
            self._owed.setdefault(model_id, 0)
        failed = await self._pay(models)
        if failed is not None:
            self._something_owed.set()
            raise failed
        return len(models)

    async def run(self) -> None:
        """Pay what is owed, until cancelled."""
        while True:
            await self._something_owed.wait()
            self._something_owed = anyio.Event()
            while self._owed:
                if await self._pay(list(self._owed)) is not None:
                    await anyio.sleep(RETRY_S)

    async def _pay(self, models: Collection[ModelId]) -> StoreUnavailableError | None:
        """Take out what is owed of these models; answers why some are owed still."""
        limiter = anyio.CapacityLimiter(CONCURRENCY)
        failed: StoreUnavailableError | None = None

        async def pay(model_id: ModelId) -> None:
            nonlocal failed
            async with limiter:
                last_used_ms = self._owed.get(model_id)
                if last_used_ms is None or failed is not None:
                    return
                try:
                    await self._take_out(model_id, last_used_ms)
                except StoreUnavailableError as exc:
                    failed = exc
                else:
                    if self._owed.get(model_id) == last_used_ms:
                        del self._owed[model_id]

        async with anyio.create_task_group() as group:
            for model_id in models:
                group.start_soon(pay, model_id)
        return failed

    async def _take_out(self, model_id: ModelId, last_used_ms: int) -> None:
        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or self._me not in record.copies:
                return record
            if record.copies[self._me] == self._live.get(model_id):
                return record
            return record.without_copy(self._me, self._clock.now_ms(), last_used_ms)

        try:
            await self._registry.update(model_id, change)
        except RecordError as exc:
            logger.warning("copy of model %s not taken out: %s", model_id, exc)

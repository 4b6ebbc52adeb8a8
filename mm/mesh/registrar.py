"""Keeps this instance's entries in the model records true (spec core 1.6: an instance writes only
its own).

Owns registering a copy before its load, taking it out again, and recording failures. What the store
did not take is
owed, and paid when the store is back; what is owed is bounded by the copies that this process ever
had.
"""

from __future__ import annotations

import logging

import anyio

from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord, RecordError
from mm.errors import ModelNotFoundError, StoreUnavailableError
from mm.mesh.local_copy import LocalCopy
from mm.mesh.ports import Clock
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)

#: Between tries to pay what is owed while the store is away.
RETRY_S = 1.0


class CopyElsewhereError(Exception):
    """The record changed since the decision to load here: another instance took the model."""


class Registrar:
    """Writes of one instance about its own copies."""

    def __init__(self, registry: Registry, instance_id: InstanceId, clock: Clock) -> None:
        self._registry = registry
        self._me = instance_id
        self._clock = clock
        #: Copies to take out, by the value under which they were registered.
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
        self._owed.pop(copy.model_id, None)
        try:
            await self._registry.update(copy.model_id, change)
        except (CopyElsewhereError, ModelNotFoundError, RecordError):
            copy.registered = False
            raise

    async def restore(self, copy: LocalCopy) -> None:
        """Put a loaded copy back into its record, which lost it while we were thought gone."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or record.info != copy.info or not copy.serves:
                return record
            if record.copies.get(self._me) == copy.enqueued_ms:
                return record
            return record.with_copy(self._me, copy.enqueued_ms, copy.last_used_ms)

        await self._registry.update(copy.model_id, change)

    def deregister(self, copy: LocalCopy) -> None:
        """Take a copy out of its record, now or as soon as the store takes it. Never blocks."""
        if copy.registered:
            copy.registered = False
            self._owed[copy.model_id] = copy.enqueued_ms
            self._something_owed.set()

    def disown(self, model_id: ModelId) -> None:
        """Take out an entry of ours for a model that is not here. Never blocks."""
        record = self._registry.get(model_id)
        if record is not None and self._me in record.copies:
            self._owed[model_id] = record.copies[self._me]
            self._something_owed.set()

    async def record_failure(self, copy: LocalCopy, message: str) -> None:
        """Replace the copy by a failure, for status answers and for placement elsewhere (spec core
        3.10).
        """

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or record.copies.get(self._me, copy.enqueued_ms) != copy.enqueued_ms:
                return record
            return record.with_failure(self._me, self._clock.now_ms(), message)

        try:
            await self._registry.update(copy.model_id, change)
        except (StoreUnavailableError, RecordError) as exc:
            logger.warning("failure of model %s not recorded: %s", copy.model_id, exc)
            self.deregister(copy)
        else:
            copy.registered = False

    async def forget_all(self) -> int:
        """Take this instance out of every record that names it; answers how many those were.

        At start (an earlier process with this id has left them) and at the end of a drain.
        """
        models = self._registry.held_by(self._me)
        limiter = anyio.CapacityLimiter(64)

        async def forget(model_id: ModelId) -> None:
            async with limiter:
                await self._take_out(model_id, None)

        async with anyio.create_task_group() as group:
            for model_id in models:
                group.start_soon(forget, model_id)
        return len(models)

    async def run(self) -> None:
        """Pay what is owed, until cancelled."""
        while True:
            await self._something_owed.wait()
            self._something_owed = anyio.Event()
            while self._owed:
                model_id, enqueued_ms = next(iter(self._owed.items()))
                try:
                    await self._take_out(model_id, enqueued_ms)
                except StoreUnavailableError:
                    await anyio.sleep(RETRY_S)
                    continue
                if self._owed.get(model_id) == enqueued_ms:
                    del self._owed[model_id]

    async def _take_out(self, model_id: ModelId, enqueued_ms: int | None) -> None:
        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or self._me not in record.copies:
                return record
            if enqueued_ms is not None and record.copies[self._me] != enqueued_ms:
                return record
            return record.without_copy(self._me, self._clock.now_ms())

        try:
            await self._registry.update(model_id, change)
        except RecordError as exc:
            logger.warning("copy of model %s not taken out: %s", model_id, exc)

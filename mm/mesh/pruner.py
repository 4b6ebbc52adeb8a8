"""Cleans the registry: what vanished instances left, and failures that are over (spec core 5.6).

Owns the waiting and the writes; which instances vanished is known to ``members``, what they held to
``registry``.
One instance, that with the lowest id, does it; no election is needed for work that is safe to do
twice.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import anyio

from mm.config import Config
from mm.core.ids import InstanceId, ModelId
from mm.core.load_failures import LoadFailure
from mm.core.records import ModelRecord, RecordError
from mm.errors import StoreUnavailableError
from mm.mesh.members import Members
from mm.mesh.ports import Clock
from mm.mesh.registry import Change, Registry

logger = logging.getLogger(__name__)

#: Writes at a time; a vanished instance may have held thousands of copies.
CONCURRENCY = 16


class Pruner:
    """Remembers since when each absent instance is missing.

    What a vanished instance left (copies and failures) goes after ``gone_after_s``; a failure of
    our own after ``load_failure_expiry_ms`` (spec core 3.11).
    """

    def __init__(
        self, *, registry: Registry, members: Members, me: InstanceId, clock: Clock, config: Config
    ) -> None:
        self._registry = registry
        self._members = members
        self._me = me
        self._clock = clock
        self._config = config
        self._missing_since_s: dict[InstanceId, float] = {}

    async def run(self) -> None:
        """Look whenever an instance vanished, and when a grace ends; until cancelled."""
        while True:
            vanished = self._members.somebody_vanished
            wait_s = await self._look(anyio.current_time())
            with anyio.move_on_after(wait_s):
                await vanished.wait()

    async def _look(self, now_s: float) -> float:
        """Prune what is due; answers the seconds until something else may be."""
        named = self._registry.holders() | self._registry.failed()
        missing = {i for i in named if i not in self._members}
        self._missing_since_s = {i: self._missing_since_s.get(i, now_s) for i in missing}
        due = {
            i
            for i, since_s in self._missing_since_s.items()
            if now_s - since_s >= self._config.gone_after_s
        }
        if due and self._members.first_id() == self._me:
            for instance_id in sorted(due):
                await self._prune(instance_id)
        wait_s = (
            self._config.reaper_interval_s if not missing else self._config.gone_after_s / 4 + 1
        )
        return min(wait_s, await self._drop_expired_failures())

    async def _prune(self, instance_id: InstanceId) -> None:
        copies, failures = (
            self._registry.held_by(instance_id),
            self._registry.failed_at(instance_id),
        )
        logger.info("instance %s is gone: %d copies are taken out", instance_id, len(copies))

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is not None and instance_id in record.copies:
                record = record.without_copy(instance_id, self._clock.now_ms())
            if record is not None and instance_id in record.failures:
                record = record.without_failure(instance_id)
            return record

        await self._update_all(copies | failures, change)

    async def _drop_expired_failures(self) -> float:
        """Forget our own failures that are over; answers the seconds until the next one is."""
        rules, now_ms = self._config.failure_rules, self._clock.now_ms()
        ends_ms = {}
        for model_id in self._registry.failed_at(self._me):
            record = self._registry.get(model_id)
            if record is not None and self._me in record.failures:
                failure = LoadFailure.read(record, self._me)
                ends_ms[model_id] = rules.forgotten_ms(failure)

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or self._me not in record.failures:
                return record
            is_over = rules.forgotten_ms(LoadFailure.read(record, self._me)) <= now_ms
            return record.without_failure(self._me) if is_over else record

        await self._update_all({m for m, end_ms in ends_ms.items() if end_ms <= now_ms}, change)
        left_ms = [end_ms - now_ms for end_ms in ends_ms.values() if end_ms > now_ms]
        return max(1.0, min(left_ms, default=rules.expiry_ms) / 1000)

    async def _update_all(self, models: Collection[ModelId], change: Change) -> None:
        limiter = anyio.CapacityLimiter(CONCURRENCY)

        async def update(model_id: ModelId) -> None:
            async with limiter:
                try:
                    await self._registry.update(model_id, change)
                except (StoreUnavailableError, RecordError) as exc:
                    logger.warning("the record of model %s is not cleaned: %s", model_id, exc)

        async with anyio.create_task_group() as group:
            for model_id in sorted(models):  # in the same order each time: simulations are repeated
                group.start_soon(update, model_id)

"""Takes copies of vanished instances out of the registry after a grace (spec core 5.6).

Owns the waiting and the writes; which instances vanished is known to ``members``, what they held to
``registry``.
One instance, that with the lowest id, does it; no election is needed for work that is safe to do
twice.
"""

from __future__ import annotations

import logging

import anyio

from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord, RecordError
from mm.errors import StoreUnavailableError
from mm.limits import Limits
from mm.mesh.members import Members
from mm.mesh.ports import Clock
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)

#: Writes at a time; a vanished instance may have held thousands of copies.
CONCURRENCY = 16


class Pruner:
    """Remembers since when each absent holder is missing."""

    def __init__(
        self, *, registry: Registry, members: Members, me: InstanceId, clock: Clock, limits: Limits
    ) -> None:
        self._registry = registry
        self._members = members
        self._me = me
        self._clock = clock
        self._limits = limits
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
        missing = {i for i in self._registry.holders() if i not in self._members}
        self._missing_since_s = {i: self._missing_since_s.get(i, now_s) for i in missing}
        due = {
            i
            for i, since_s in self._missing_since_s.items()
            if now_s - since_s >= self._limits.gone_after_s
        }
        if due and self._members.first_id() == self._me:
            for instance_id in sorted(due):
                await self._prune(instance_id)
        return self._limits.reaper_interval_s if not missing else self._limits.gone_after_s / 4 + 1

    async def _prune(self, instance_id: InstanceId) -> None:
        models = self._registry.held_by(instance_id)
        logger.info("instance %s is gone: %d copies are taken out", instance_id, len(models))
        limiter = anyio.CapacityLimiter(CONCURRENCY)

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or instance_id not in record.copies:
                return record
            return record.without_copy(instance_id, self._clock.now_ms())

        async def take_out(model_id: ModelId) -> None:
            async with limiter:
                try:
                    await self._registry.update(model_id, change)
                except (StoreUnavailableError, RecordError) as exc:
                    logger.warning("copy of model %s not taken out: %s", model_id, exc)

        async with anyio.create_task_group() as group:
            for model_id in models:
                group.start_soon(take_out, model_id)

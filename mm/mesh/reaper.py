"""Cleans up after instances that vanished (spec core 5.6).

Owns since when who is missing, and taking out what they left. Where a vanished instance's models
are loaded instead is ``filler``'s. Every instance keeps count, so that a new leader need not begin
anew; the leader writes.
"""

from __future__ import annotations

import logging

import anyio

from mm.config import Config
from mm.core.ids import InstanceId
from mm.core.records import ModelRecord
from mm.mesh.leader import Leader
from mm.mesh.members import Members
from mm.mesh.ports import Clock
from mm.mesh.record_updates import update_all
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)


class Reaper:
    """Remembers since when each absent instance is missing.

    What it left, copies and failures, goes after ``gone_after_s``: it may be back by then, with all
    its copies, as after an outage of the store.
    """

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        members: Members,
        leader: Leader,
        clock: Clock,
    ) -> None:
        self._config = config
        self._registry = registry
        self._members = members
        self._leader = leader
        self._clock = clock
        self._missing_since_s: dict[InstanceId, float] = {}

    async def run(self) -> None:
        """Look whenever an instance vanished, when a grace ends, and now and then; until
        cancelled.
        """
        while True:
            vanished = self._members.somebody_vanished
            wait_s = await self._look(anyio.current_time())
            with anyio.move_on_after(wait_s):
                await vanished.wait()

    async def _look(self, now_s: float) -> float:
        """Prune what is due; answers the seconds until something else may be."""
        grace_s = self._config.gone_after_s
        named = self._registry.holders() | self._registry.failed()
        missing = {i for i in named if i not in self._members}
        self._missing_since_s = {i: self._missing_since_s.get(i, now_s) for i in missing}
        left_s = [since_s + grace_s - now_s for since_s in self._missing_since_s.values()]
        if self._leader.is_leader:
            for instance_id, since_s in sorted(self._missing_since_s.items()):
                if now_s - since_s >= grace_s:
                    await self._prune(instance_id)
        # Who is not the leader now may be when the grace has long ended.
        due_s = min((max(each, grace_s / 4) for each in left_s), default=grace_s)
        return min(self._config.reaper_interval_s, due_s + 1)

    async def _prune(self, instance_id: InstanceId) -> None:
        copies = self._registry.held_by(instance_id)
        failures = self._registry.failed_at(instance_id)
        logger.info("instance %s is gone: %d copies are taken out", instance_id, len(copies))

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is not None and instance_id in record.copies:
                record = record.without_copy(instance_id, self._clock.now_ms())
            if record is not None and instance_id in record.failures:
                record = record.without_failure(instance_id)
            return record

        await update_all(self._registry, copies | failures, change)

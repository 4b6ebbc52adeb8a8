"""Cleans up after instances that vanished (spec core 5.6).

Owns taking out what they left. Where a vanished instance's models are loaded instead is
``filler``'s. Every instance keeps count, so that a new leader need not begin anew; the leader
writes.
"""

from __future__ import annotations

import logging
from typing import Final

import anyio

from mm.config import Config
from mm.core.absences import Absences
from mm.core.ids import InstanceId
from mm.core.records import ModelRecord
from mm.mesh.leader import Leader
from mm.mesh.members import Members
from mm.mesh.ports import Clock
from mm.mesh.record_updates import update_all
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)

#: What the record of a model says "never" of was used so long ago (spec core 5.6).
ASSUMED_USE_AGE_MS: Final = 3 * 3600 * 1000


class Reaper:
    """What an absent instance left, copies and failures, goes after ``gone_after_s``: it may be
    back by then, with all its copies, as after an outage of the store.
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
        self._absences = Absences(config.instance_id, config.gone_after_s, config.gone_after_s)

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
        grace_s, absences = self._config.gone_after_s, self._absences
        named = self._registry.holders() | self._registry.failed()
        absences.look(self._members.present(), named, now_s)
        if self._leader.is_leader:
            for instance_id in sorted(absences.late):
                await self._prune(instance_id)
            await self._repair_uses()
        due_s = grace_s if absences.next_s is None else absences.next_s - now_s
        if absences.late:  # who is not the leader now may be then; and not all writes succeed
            due_s = min(due_s, grace_s / 4)
        return min(self._config.reaper_interval_s, max(due_s, 0.0) + 1)

    async def _repair_uses(self) -> None:
        """Write a last use where one stands that cannot be; such a record reads as without one."""
        used_ms = self._clock.now_ms() - ASSUMED_USE_AGE_MS

        def change(record: ModelRecord | None) -> ModelRecord | None:
            return None if record is None else record.used(used_ms)

        await update_all(self._registry, dict.fromkeys(self._registry.never_used, change))

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

        await update_all(self._registry, dict.fromkeys(copies | failures, change))

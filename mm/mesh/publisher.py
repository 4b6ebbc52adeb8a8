"""Publishes this instance's record, bound to the session lease (spec core 5.1).

Owns when it is written. What it says comes from the node.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import anyio

from mm.core.jitter import jittered_s
from mm.core.records import InstanceRecord
from mm.errors import StoreUnavailableError
from mm.limits import Limits
from mm.mesh.copies import Copies
from mm.mesh.members import Members
from mm.mesh.ports import Session, Store, Write
from mm.mesh.waiting import first_of

logger = logging.getLogger(__name__)

#: Between tries while the store is away, on the average; the session tells of its return only when
#: the lease was lost.
RETRY_S = 1.0
#: A record that somebody deletes or writes over is put back after this at the latest: the Java mesh
#: takes an instance without one for gone. Who does so all the time costs four writes a second.
REPAIR_GAP_S = 0.25
#: The age of the oldest model decides where others load; it moves with every call, so it is written
#: when it moved as much as matters for placement (spec core 5.1).
LRU_CHANGE_MS = 20_000
#: Calls a minute that are news whatever they were; below, a tenth of what they were is.
RPM_CHANGE = 100


class Publisher:
    """Writes the record at once after a new lease, after significant changes at most every
    ``publish_gap_s``.
    """

    def __init__(
        self,
        *,
        store: Store,
        session: Session,
        members: Members,
        copies: Copies,
        limits: Limits,
        own_record: Callable[[], InstanceRecord],
    ) -> None:
        self._store = store
        self._session = session
        self._members = members
        self._copies = copies
        self._limits = limits
        self._own_record = own_record
        # By its own key, so that a simulation is repeated and no two instances are in step.
        self._rng = random.Random(members.key())
        self._written: InstanceRecord | None = None
        self._written_value = b""
        self._lease_id = 0

    async def publish(self, if_revision: int | None = None) -> bool:
        """Write the record now; answers whether it was, with ``if_revision`` None always.

        Raises ``StoreUnavailableError``.
        """
        lease_id = self._session.lease_id or await self._session.wait_change(0)
        record = self._own_record()
        result = await self._store.write(
            Write(self._members.key(), record.encode(), if_revision, lease_id)
        )
        if not result.succeeded:
            return False
        assert result.item is not None, "a put always stores"
        self._lease_id = lease_id
        self._written = record
        self._written_value = result.item.value
        self._members.written(result.item)
        return True

    async def run(self) -> None:
        """Keep the record true until cancelled."""
        is_failing = False
        while True:
            try:
                if self._is_due():
                    await self.publish()
                    is_failing = False
            except StoreUnavailableError as exc:
                # Once an outage: the store itself tells of its return.
                level = logging.DEBUG if is_failing else logging.WARNING
                logger.log(level, "instance record not published, trying again: %s", exc)
                is_failing = True
                await anyio.sleep(jittered_s(RETRY_S, self._rng))
                continue
            await self._rest()
            if not self._is_due():
                await self._wait_for_reason()

    async def _rest(self) -> None:
        """Let changes gather for ``publish_gap_s``, unless the record is not what we wrote."""
        with anyio.move_on_after(self._limits.publish_gap_s):
            await anyio.sleep(REPAIR_GAP_S)
            while not self._is_gone():
                await self._members.own_changed.wait()

    def _is_gone(self) -> bool:
        """Answer whether the store has no record of ours, or another one. A backup that was
        restored may have an older one, and the lease still; a hand that wrote it, no lease.
        """
        own = self._members.own_item()
        return own is None or own.value != self._written_value or own.lease_id != self._lease_id

    def _is_due(self) -> bool:
        # A store that was full shows by the next write that it is no more; nobody else may write.
        return (
            self._is_gone()
            or self._store.out_of_space
            or self._lease_id != self._session.lease_id
            or self._has_changed()
        )

    def _has_changed(self) -> bool:
        written, now = self._written, self._own_record()
        if written is None:
            return True
        if (now.shutting_down, now.loads_fail) != (written.shutting_down, written.loads_fail):
            return True
        return (
            now.count != written.count
            or now.used_units != written.used_units
            or now.capacity_units != written.capacity_units
            or now.loads_in_progress != written.loads_in_progress
            or abs(now.lru_time_ms - written.lru_time_ms) >= LRU_CHANGE_MS
            or _has_moved(written.busyness_rpm, now.busyness_rpm)
        )

    async def _wait_for_reason(self) -> None:
        """Return when copies changed, the lease changed, our record vanished, or
        ``publish_interval_s`` passed.
        """
        await first_of(
            self._copies.changed.wait,
            self._members.own_changed.wait,
            self._wait_lease,
            timeout_s=self._limits.publish_interval_s,
        )

    async def _wait_lease(self) -> None:
        await self._session.wait_change(self._lease_id)


def _has_moved(written_rpm: int, now_rpm: int) -> bool:
    """Answer whether an instance is much busier than it told, or much less (spec core 5.1)."""
    change_rpm = abs(now_rpm - written_rpm)
    return change_rpm >= RPM_CHANGE or 10 * change_rpm > written_rpm

"""Writes back what a store that was emptied, restored or exchanged has lost (spec core 7.6).

Owns who does it, when and how fast; what is known only from the store before is ``Mirror``'s, the
instance's own record ``publisher``'s. Only what is missing is written, and over nothing but an
older text of a backup: else what the new store says of a key wins. What was seen to be deleted is
not known any longer, so it stays deleted; what a backup brings back is deleted again, last.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final

import anyio

from mm.errors import StoreUnavailableError
from mm.limits import Limits
from mm.mesh.members import Members
from mm.mesh.mirror import Mirror
from mm.mesh.statistics import Counters

logger = logging.getLogger(__name__)

#: Whoever waits for somebody else to restore sees that this is going on if so much less is missing
#: than at the last look: single records also come back because somebody changed them.
PROGRESS_SHARE: Final = 0.1
PROGRESS_RECORDS: Final = 240
#: Who comes later in line does not wait longer than the one at this place.
PLACE_MAX: Final = 10


class Restorer:
    """Brings tables back after each loss.

    The instances known stand in line by their ids. The first begins at once. The others look after
    some seconds, each later than the one before, so that no two begin together: as long as what is
    missing becomes less they leave it to whoever is at it.
    """

    def __init__(
        self,
        tables: tuple[Mirror, ...],
        members: Members,
        *,
        limits: Limits,
        counters: Counters,
    ) -> None:
        self._tables = tables
        self._members = members
        self._limits = limits
        self._counters = counters

    async def run(self) -> None:
        """Do so until cancelled."""
        async with anyio.create_task_group() as group:
            for table in self._tables:
                group.start_soon(self._keep, table)
            group.start_soon(self._forget_instances)

    async def _keep(self, table: Mirror) -> None:
        while True:
            replaced = table.store_replaced
            await self._restore(table)
            await replaced.wait()

    async def _restore(self, table: Mirror) -> None:
        missing_count = table.unconfirmed_count
        has_begun = False
        while missing_count:
            place = self._members.place()
            if place or has_begun:
                await anyio.sleep(self._limits.restore_wait_s * min(max(place, 1), PLACE_MAX))
            progress = min(PROGRESS_SHARE * missing_count, PROGRESS_RECORDS)
            if has_begun or not place or missing_count - table.unconfirmed_count < progress:
                has_begun = True
                await self._write(table, table.unconfirmed() + self._to_delete(table))
            missing_count = table.unconfirmed_count

    def _to_delete(self, table: Mirror) -> list[str]:
        """Whoever knows that a model was registered anew since has written it before then."""
        is_early = anyio.current_time() < table.store_replaced_s + self._limits.restore_grace_s
        return [] if is_early else table.outlived()

    async def _write(self, table: Mirror, missing: list[str]) -> None:
        """Write what is missing, as far as the store takes it."""
        if not missing:
            return
        logger.info("%d records under %s are written back", len(missing), table.prefix)
        left: Iterator[str] = iter(missing)
        failure: StoreUnavailableError | None = None

        async def work() -> None:
            nonlocal failure
            for key_id in left:
                if failure is not None:
                    return
                try:
                    is_written = await table.restore(key_id)
                except StoreUnavailableError as exc:
                    failure = exc
                else:
                    self._counters.records_restored += is_written

        async with anyio.create_task_group() as group:
            for _ in range(min(self._limits.restore_writes_max, len(missing))):
                group.start_soon(work)
        if failure is not None:
            logger.warning("records under %s still to be written back: %s", table.prefix, failure)

    async def _forget_instances(self) -> None:
        """Their records are their own to write; who has not by the time of a lease is gone."""
        table = self._members.mirror
        while True:
            replaced = table.store_replaced
            is_replaced_again = True
            while is_replaced_again and table.unconfirmed_count:
                with anyio.move_on_after(self._limits.lease_ttl_s):
                    await replaced.wait()
                is_replaced_again = replaced.is_set()
                replaced = table.store_replaced
            table.forget_unconfirmed()
            await replaced.wait()

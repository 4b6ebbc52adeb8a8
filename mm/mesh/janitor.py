"""Keeps this instance's copies and what the records say of them the same (spec core 5.4, 5.5).

Owns the repairs, each at the event that calls for it and all again in a slow full check; and giving
up a copy of which there are others. What vanished instances left is ``reaper``'s.
"""

from __future__ import annotations

import logging
import random
from functools import partial

import anyio
import anyio.lowlevel

from mm.config import Config
from mm.core.calls import Hop, PeerRoute
from mm.core.failure_ends import FailureEnds
from mm.core.ids import InstanceId, ModelId
from mm.core.load_failures import LoadFailure
from mm.core.records import ModelRecord
from mm.errors import MeshError, ModelNotFoundError
from mm.mesh.copies import Copies
from mm.mesh.local_copy import LocalCopy
from mm.mesh.members import Members
from mm.mesh.ports import PeerCallError, Peers
from mm.mesh.record_updates import update_all
from mm.mesh.registrar import Registrar
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)

#: A record's last use may be this far behind that of a copy here, and by chance up to an hour more,
#: so that instances that started together do not write together (spec core 5.4).
LAST_USE_LAG_MS = 6 * 3600 * 1000
LAST_USE_JITTER_MS = 3600 * 1000
#: Copies looked at between two turns of the event loop, and failures forgotten in one go.
CHUNK = 500


class Janitor:
    """Repairs of one instance's own entries."""

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        registrar: Registrar,
        copies: Copies,
        members: Members,
        peers: Peers,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._me = config.instance_id
        self._registry = registry
        self._registrar = registrar
        self._copies = copies
        self._members = members
        self._peers = peers
        self._clock = copies.clock
        self._last_use_lag_ms = LAST_USE_LAG_MS + rng.randrange(LAST_USE_JITTER_MS)
        #: Of loads here that failed.
        self._failures = FailureEnds()
        registry.listen(self._record_changed)

    async def run(self) -> None:
        """Check everything now and then, and forget our failures as they end; until cancelled."""
        interval_s = self._config.janitor_interval_s
        check_s = anyio.current_time() + interval_s
        while True:
            await self._drop_failures()
            left_s = self._failures.left_ms(self._clock.now_ms()) / 1000
            await anyio.sleep(max(1.0, min(check_s - anyio.current_time(), left_s)))
            if anyio.current_time() >= check_s:
                await self.check()
                check_s = anyio.current_time() + interval_s

    # --- repairs ---

    async def check(self) -> None:
        """Repair all that events did not tell of."""
        for model_id in sorted(self._registry.held_by(self._me)):
            if self._copies.get(model_id) is None:
                self._registrar.disown(model_id)
        late: dict[ModelId, int] = {}
        for number, copy in enumerate(list(self._copies)):
            if number % CHUNK == CHUNK - 1:
                await anyio.lowlevel.checkpoint()
            if self._copies.get(copy.model_id) is not copy:
                continue
            record = self._registry.get(copy.model_id)
            self._repair(copy.model_id, copy, record)
            used_ms = self._copies.last_used_ms(copy)
            if record is not None and used_ms - record.last_used_ms > self._last_use_lag_ms:
                late[copy.model_id] = used_ms

        def use(record: ModelRecord | None, used_ms: int) -> ModelRecord | None:
            return None if record is None else record.used(used_ms)

        await update_all(
            self._registry, {each: partial(use, used_ms=used_ms) for each, used_ms in late.items()}
        )

    def _record_changed(self, model_id: ModelId, record: ModelRecord | None) -> None:
        end_ms = None
        if record is not None and self._me in record.failures:
            failure = LoadFailure.read(record, self._me)
            end_ms = self._config.failure_rules.forgotten_ms(failure)
        self._failures.note(model_id, end_ms)
        self._repair(model_id, self._copies.get(model_id), record)

    def _repair(
        self, model_id: ModelId, copy: LocalCopy | None, record: ModelRecord | None
    ) -> None:
        """Unload what was unregistered; put back what others took out while we were thought to be
        gone.
        """
        if copy is None:
            if record is not None and self._me in record.copies:
                # A write that landed although its load had ended.
                self._registrar.disown(model_id)
        elif record is None:
            self._copies.remove(copy, ModelNotFoundError())
        elif record.info != copy.info:
            self._copies.remove(copy)  # registered anew: whoever waits asks again
        elif copy.registered and copy.started.is_set() and self._me not in record.copies:
            self._registrar.restore(copy)

    async def _drop_failures(self) -> None:
        """Take those of our own failures out of their records that are over (spec core 3.11)."""
        rules, now_ms = self._config.failure_rules, self._clock.now_ms()

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or self._me not in record.failures:
                return record
            is_over = rules.forgotten_ms(LoadFailure.read(record, self._me)) <= now_ms
            return record.without_failure(self._me) if is_over else record

        over = self._failures.over(now_ms, CHUNK)
        await update_all(self._registry, dict.fromkeys(over, change))

    # --- giving up a copy ---

    async def give_up(self, model_id: ModelId) -> bool:
        """Unload our copy of a model if another one is ready for sure; answers whether it was.

        Every copy that is taken away because there are enough goes this way. The other copy's
        instance is asked first; then ours is taken out of the record by compare-and-set on a record
        that has the other one still: of two instances that do this at a time, one is told no.
        """
        copy = self._copies.get(model_id)
        record = self._registry.get(model_id)
        if copy is None or record is None or not copy.serves:
            return False
        others = self._others(record)
        if len(others) < record.policy.copies_needed:
            return False
        for other in others:
            if await self._has_it(model_id, other):
                break
        else:
            return False

        def is_spare(found: ModelRecord) -> bool:
            needed_count = found.policy.copies_needed
            return self._is_ready(found, other) and len(self._others(found)) >= needed_count

        if not await self._registrar.withdraw(copy, is_spare, self._copies.last_used_ms(copy)):
            return False
        logger.debug("model %s: the copy here is given up, %s has one", model_id, other)
        self._copies.remove(copy)
        return True

    def _others(self, record: ModelRecord) -> list[InstanceId]:
        return [each for each in record.copies if self._is_ready(record, each)]

    def _is_ready(self, record: ModelRecord, instance_id: InstanceId) -> bool:
        return instance_id != self._me and self._members.serves(instance_id, record)

    async def _has_it(self, model_id: ModelId, instance_id: InstanceId) -> bool:
        address = self._members.address_or_none(instance_id)
        if address is None:
            return False
        route = PeerRoute(model_id, instance_id, address, Hop.HIT_ONLY, hops_left=0)
        try:
            status = await self._peers.model_status(
                route, timeout_s=self._config.ensure_loaded_timeout_s
            )
        except (PeerCallError, MeshError) as exc:
            logger.debug("model %s: %s does not say that it has it: %s", model_id, instance_id, exc)
            return False
        return status.status == "LOADED"

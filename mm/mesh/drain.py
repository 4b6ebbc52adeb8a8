"""Moves this instance's models elsewhere before it stops (spec core 7.4, as intended).

Owns which models are moved, their order, and the wait for their new copies. The order of a stop is
``node``'s; where a copy goes is ``preloader``'s.
"""

from __future__ import annotations

import logging

import anyio

from mm.config import Config
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.mesh.copies import Copies
from mm.mesh.local_copy import LocalCopy, Phase
from mm.mesh.members import Members
from mm.mesh.policies import Policies
from mm.mesh.ports import Store
from mm.mesh.preloader import Preloader, PreloadReason
from mm.mesh.registrar import Registrar
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)

#: A record tells of a copy milliseconds after its instance took the load; after this it would have,
#: if the copy were still there, also with a store that takes a second or two for everything.
TOLD_S = 5.0
#: Who leaves tells no record: meanwhile we look this often.
LOOK_S = 0.5
#: Loads of one model that are tried. Each failed at another instance.
TRIES_MAX = 3


class Drain:
    """One stop of one instance. Every copy here serves until the process ends.

    A copy is taken out of its record when another one is ready, so that calls go there while ours
    still answers those under way. Which of the others has room is not ours to say: what it would
    have to evict for a model must have been used longer ago.
    """

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        registrar: Registrar,
        copies: Copies,
        members: Members,
        preloader: Preloader,
        store: Store,
        policies: Policies,
    ) -> None:
        self._config = config
        self._me = config.instance_id
        self._registry = registry
        self._registrar = registrar
        self._copies = copies
        self._members = members
        self._preloader = preloader
        self._store = store
        self._policies = policies
        #: Told when the record of a model changes that is waited for.
        self._waits: dict[ModelId, anyio.Event] = {}
        self.moved_count = 0
        self._wanted_count = 0
        registry.listen(self._record_changed)

    @property
    def is_needed(self) -> bool:
        """Whether there is something to move, and somebody to have it."""
        return bool(self._worth_moving() and self._members.staying())

    async def run(self) -> None:
        """Return when every model used of late is ready elsewhere, or has no place there.

        Whoever cannot wait so long cancels it: what has not been moved then is the coldest.
        """
        if not self.is_needed:
            return
        copies = self._worth_moving()
        self._wanted_count = len(copies)
        logger.info("instance %s moves %d models", self._me, len(copies))
        slots = anyio.Semaphore(self._config.drain_moves_at_once_max)

        async def move(copy: LocalCopy) -> None:
            try:
                has_moved = await self._move(copy)
                self.moved_count += has_moved
            finally:
                slots.release()

        try:
            async with anyio.create_task_group() as group:
                for copy in copies:
                    await slots.acquire()
                    group.start_soon(move, copy)
        finally:
            count = self._wanted_count
            logger.info("%d of %d models have moved", self.moved_count, count)

    def _worth_moving(self) -> list[LocalCopy]:
        """Answer the copies that have to be somewhere, then those that somebody may soon call; of
        both those used last first.
        """
        needed = self._registry.policies
        oldest_ms = self._copies.clock.now_ms() - int(1000 * self._config.drain_used_within_s)
        used_ms = {copy: self._copies.last_used_ms(copy) for copy in self._copies if copy.serves}
        copies = [
            copy
            for copy, each_ms in used_ms.items()
            if each_ms >= oldest_ms or copy.model_id in needed
        ]
        return sorted(
            copies, key=lambda copy: (copy.model_id not in needed, -used_ms[copy], copy.model_id)
        )

    async def _move(self, copy: LocalCopy) -> bool:
        """Have another copy made, unless there is one; answers whether there is one in the end."""
        failed: set[InstanceId] = {self._me}
        for _ in range(TRIES_MAX):
            await self._wait_for_store()
            if copy.phase is Phase.GONE:
                return False
            record = self._registry.get(copy.model_id)
            if record is None:
                return False
            chosen, needed_count = None, record.policy.copies_needed
            others_count = len(self._others(record))
            if others_count < max(1, needed_count):
                used_ms = self._copies.last_used_ms(copy)
                chosen = await self._preloader.request(
                    copy.model_id,
                    # What has to be somewhere makes way for nothing.
                    last_used_ms=self._copies.clock.now_ms() if needed_count else used_ms,
                    exclude=frozenset(failed) | self._policies.crowded(record),
                    reason=PreloadReason.DRAIN,
                )
                if chosen is None and not others_count:
                    return False
            wanted_count = max(1, min(needed_count, others_count + (chosen is not None)))
            if await self._is_ready_elsewhere(copy, chosen, wanted_count):
                last_used_ms = self._copies.last_used_ms(copy)
                await self._registrar.withdraw(copy, self._is_served, last_used_ms)
                return True
            if chosen is not None:
                failed.add(chosen)
        return False

    async def _wait_for_store(self) -> None:
        """No load begins without it, so until then ours is the copy that serves."""
        while not self._store.connected:
            with anyio.move_on_after(LOOK_S):
                await anyio.sleep_forever()

    async def _is_ready_elsewhere(
        self, copy: LocalCopy, chosen: InstanceId | None, wanted_count: int
    ) -> bool:
        """Wait for so many other copies to be ready; False when they are not on their way any
        more.
        """
        model_id, begun_s = copy.model_id, anyio.current_time()
        while copy.phase is not Phase.GONE:
            event = self._waits[model_id] = anyio.Event()
            record = self._registry.get(model_id)
            if record is None:
                break
            if self._served_count(record) >= wanted_count:
                return True
            is_told = chosen is None or anyio.current_time() - begun_s > TOLD_S
            if is_told and len(self._others(record)) < wanted_count:
                break
            with anyio.move_on_after(LOOK_S):
                await event.wait()
        return False

    def _others(self, record: ModelRecord) -> list[InstanceId]:
        """Answer who of those that stay has a copy, ready or on its way."""
        return [i for i in record.copies if i != self._me and self._members.stays(i)]

    def _is_served(self, record: ModelRecord) -> bool:
        return self._served_count(record) > 0

    def _served_count(self, record: ModelRecord) -> int:
        others = [i for i in record.copies if i != self._me]
        return sum(self._members.serves(i, record) for i in others)

    def _record_changed(self, model_id: ModelId, _record: ModelRecord | None) -> None:
        event = self._waits.pop(model_id, None)
        if event is not None:
            event.set()

"""Sees that models have the copies that their policies ask for, called or not (issue 5 part 1).

Owns when it is looked, and what is asked for. The leader does it: a model without a copy has nobody
else. Where a copy goes, and what makes way for it, is ``preloader``'s; that copies which are there
are not given up, ``scaler``, ``janitor`` and ``drain`` know themselves.
"""

from __future__ import annotations

import logging
import math
from typing import Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.absences import Absences
from mm.core.asked_copies import AskedCopies
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.mesh.leader import Leader
from mm.mesh.members import Members
from mm.mesh.policies import Policies
from mm.mesh.ports import Clock
from mm.mesh.preloader import Preloader, PreloadReason
from mm.mesh.registry import Registry
from mm.mesh.seldom import FAILURES_LOUD_MAX, Seldom
from mm.mesh.waiting import first_of

logger = logging.getLogger(__name__)

#: After a copy that found no place, or whose load failed, the next try; doubled for each in a row.
#: An instance that came or went brings it forward.
PAUSE_MIN_S: Final = 2.0
PAUSE_MAX_S: Final = 60.0
#: A copy that was evicted so soon after it was ready counts as one that found no place.
KEPT_S: Final = 60.0
#: An instance whose record vanished is given so long to come back, as after a moment without the
#: store; when more are gone than are there, or we are, as long as the reaper gives them.
BACK_S: Final = 2.0
#: It is not looked again sooner than this without news: the time until a moment, slept, may end a
#: rounding before it.
LOOK_GAP_S: Final = 0.05
#: Models that are not as they should be are looked at again after this.
LOOK_S: Final = 2.0
#: Loads take their time: what is not met is told aloud when it has not been for so long.
TOLD_S: Final = 30.0
#: Models looked at between two turns of the event loop.
CHUNK: Final = 200


class Keeper:
    """Looks at models with a policy when their record, or who is there, changes; a new leader looks
    at all of them.

    Invariant: ``unmet`` are those that had fewer ready copies than their policy asks for when this
    instance, as the leader, looked at them last; empty at all others.
    """

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        members: Members,
        leader: Leader,
        policies: Policies,
        preloader: Preloader,
        clock: Clock,
    ) -> None:
        self._config = config
        self._registry = registry
        self._members = members
        self._leader = leader
        self._policies = policies
        self._preloader = preloader
        self._clock = clock
        self.unmet = policies.unmet
        self._changed: set[ModelId] = set()
        self._asked: dict[ModelId, AskedCopies] = {}
        self._asking_count = 0
        #: Those that have to wait because enough is asked for, first come first served.
        self._waiting: dict[ModelId, None] = {}
        self._unmet_due_s = 0.0
        #: Kept at all instances: a new leader must know who is only away for a moment.
        self._absences = Absences(config.instance_id, BACK_S, config.gone_after_s)
        #: Since when; None: it was told.
        self._unmet_since_s: dict[ModelId, float | None] = {}
        self._unmet_told = Seldom(loud_max=FAILURES_LOUD_MAX)
        self._wake = anyio.Event()
        self._leads = False
        registry.policies.listen(self._policy_changed)

    def _policy_changed(self, model_id: ModelId) -> None:
        if not self._leads:
            return  # who begins to lead looks at all of them
        self._changed.add(model_id)
        self._wake.set()

    async def run(self) -> None:
        """Look at what changed, and at what is not met, until cancelled."""
        async with anyio.create_task_group() as group:
            while True:
                self._wake = anyio.Event()
                elected, is_leader = self._leader.changed, self._leader.is_leader
                news = self._members.news if is_leader else self._members.somebody_moved
                moves = self._absences.look(
                    self._members.present(),
                    self._registry.holders(),
                    anyio.current_time(),
                    left=self._members.left(),
                )
                led, self._leads = self._leads, is_leader
                if is_leader:
                    if moves.has_come or moves.lost or not led:
                        self._changed.update(self._registry.policies)
                        for asked in self._asked.values():
                            asked.forgive()
                    await self._look(group)
                else:
                    self._changed.clear()
                    self.unmet.clear()
                    self._unmet_since_s.clear()
                    # Those who ask go on until they look next.
                    self._asked = {i: each for i, each in self._asked.items() if each.is_asking}
                    self._waiting.clear()
                await self._wait(news, elected)

    async def _wait(self, news: anyio.Event, elected: anyio.Event) -> None:
        """Return when there may be something to do."""
        waits = [elected.wait, news.wait]
        if self._leader.is_leader:
            waits.append(self._wake.wait)
        await first_of(*waits, timeout_s=self._wait_s(anyio.current_time()))

    def _wait_s(self, now_s: float) -> float:
        if not self._leader.is_leader:
            return math.inf
        wait_s = LOOK_S if self.unmet else math.inf
        if self._absences.next_s is not None:
            wait_s = min(wait_s, self._absences.next_s - now_s)
        return max(LOOK_GAP_S, wait_s)

    # --- what is missing ----------------------------------------------------------------------

    async def _look(self, group: TaskGroup) -> None:
        now_s = anyio.current_time()
        if now_s >= self._unmet_due_s:
            self._unmet_due_s = now_s + LOOK_S
            self._changed.update(self.unmet)
        changed, self._changed = self._changed, set()
        for number, model_id in enumerate(sorted(changed)):
            if number % CHUNK == CHUNK - 1:
                await anyio.lowlevel.checkpoint()
            self._look_at(group, model_id)

    def _look_at(self, group: TaskGroup, model_id: ModelId) -> None:
        promise, record = self._registry.policies.get(model_id), self._registry.get(model_id)
        if promise is None or record is None:
            self._note(model_id, "", anyio.current_time())
            self._asked.pop(model_id, None)
            return
        now_s = anyio.current_time()
        missing_count = self._missing_count(model_id, record, now_s)
        self._note(model_id, self._policies.unmet_because(model_id, record), now_s)
        if missing_count <= 0:
            return
        if self._asking_count >= self._config.scale_ups_at_once_max:
            self._waiting[model_id] = None
            return
        asked = self._asked.setdefault(model_id, AskedCopies(PAUSE_MIN_S, PAUSE_MAX_S, KEPT_S))
        if asked.may_ask(now_s):
            self._asking_count += 1
            asked.begin()
            group.start_soon(self._ask, model_id, asked, missing_count)

    def _missing_count(self, model_id: ModelId, record: ModelRecord, now_s: float) -> int:
        """Count every copy that is there or on its way, also those of instances that are about to
        stop: they see to their successors themselves.
        """
        members = self._members
        there = [i for i in record.copies if i in self._absences and not members.is_foreign(i)]
        asked, unseen = self._asked.get(model_id), frozenset[InstanceId]()
        if asked is not None:
            ready = members.holders(record, self._clock.now_ms()).ready
            asked.look(there, ready, now_s)
            unseen = asked.unseen
            if asked.is_forgettable:
                del self._asked[model_id]
        return self._policies.kept_count(model_id) - len(there) - len(unseen)

    async def _ask(self, model_id: ModelId, asked: AskedCopies, count: int) -> None:
        """Ask for copies, one after the other: each excludes those before it."""
        try:
            for _ in range(count):
                record = self._registry.get(model_id)
                if record is None or not self._leader.is_leader:
                    return
                taken = await self._preloader.request(
                    model_id,
                    # Nothing was used later: what makes way is the oldest, whatever it is, but
                    # for what policies ask for.
                    last_used_ms=self._clock.now_ms(),
                    exclude=asked.unseen | self._policies.crowded(record),
                    reason=PreloadReason.POLICY,
                )
                if taken is None:
                    asked.refused(anyio.current_time())
                    return
                asked.accepted(taken, anyio.current_time())
        finally:
            asked.end()
            self._asking_count -= 1
            self._policy_changed(model_id)
            if self._waiting:
                waiting_id = next(iter(self._waiting))
                del self._waiting[waiting_id]
                self._policy_changed(waiting_id)

    def _note(self, model_id: ModelId, because: str, now_s: float) -> None:
        if not because:
            self.unmet.pop(model_id, None)
            if self._unmet_since_s.pop(model_id, now_s) is None:
                logger.info("model %s has the copies that its policy asks for again", model_id)
            return
        self.unmet[model_id] = because
        since_s = self._unmet_since_s.setdefault(model_id, now_s)
        if since_s is None or now_s - since_s < TOLD_S:
            return
        self._unmet_since_s[model_id] = None
        logger.log(
            self._unmet_told.level(now_s),
            "model %s has not the copies that its policy asks for: %s (others are told at DEBUG)",
            model_id,
            because,
        )

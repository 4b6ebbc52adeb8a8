"""Carries out transitions of vmodels: the leader loads the target, then switches (spec core 6.5).

Owns who is at work on which vmodel, what it waits for, and when it tries again. When to switch is
``core.transitions``' decision, what is written ``core.vmodel_changes``', by ``vmodel_writer``.
Those who wait for a transition wait for the vmodel's record, at any instance (``vmodels``).

Everything is taken from the records, so the next leader goes on where the last one stopped; and as
every write is conditional on the vmodel's record, two leaders do no harm.
"""

from __future__ import annotations

import logging
from typing import Final

import anyio
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.core.transitions import CopiesSeen, Pair, Step, next_step
from mm.core.vmodel_changes import ModelRecords, VModelChange, plan_complete, plan_failed
from mm.errors import MeshError, ModelNotFoundError
from mm.mesh.composition import Parts
from mm.mesh.leader import Leader
from mm.mesh.members import Members
from mm.mesh.models import EnsureRequest, Models
from mm.mesh.ports import Clock, Item
from mm.mesh.preloader import Preloader, PreloadReason
from mm.mesh.registry import Registry
from mm.mesh.statistics import Counters
from mm.mesh.transition_worker import TransitionWorker
from mm.mesh.vmodel_writer import VModelWriter
from mm.mesh.vmodels import VModels

logger = logging.getLogger(__name__)

#: Without an event, copies on their way are looked at again after this: those of Java instances
#: say nothing when they are ready.
LOOK_S: Final = 1.0
#: A copy that was asked for is in the record by then, or comes to nothing.
SEEN_AFTER_S: Final = 10.0
#: After a failure the next try comes when the failure expires, or something changes, but within
#: these bounds: what else may help (room, an instance with the right labels) tells nobody.
RETRY_MIN_S: Final = 1.0
RETRY_MAX_S: Final = 30.0
#: However many are blocked, there are no more tries than this, as far as RETRY_MAX_S allows.
RETRIES_PER_S_MAX: Final = 100
#: A further copy has no place if so many askings in a row, LOOK_S apart, came to nothing: one may
#: have been lost on its way, and a switch to a single copy cannot be taken back.
REFUSALS_MAX: Final = 3


class _BlockedError(Exception):
    """A transition that cannot go on for now; the text says why."""


class Transitions:
    """At most one worker a vmodel, at the leader. Invariant: a worker is there exactly for the
    vmodels that are in transition, as this instance sees them, while it leads.
    """

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        vmodels: VModels,
        writer: VModelWriter,
        models: Models,
        preloader: Preloader,
        members: Members,
        leader: Leader,
        clock: Clock,
        counters: Counters,
    ) -> None:
        self._config = config
        self._registry = registry
        self._vmodels = vmodels
        self._writer = writer
        self._models = models
        self._preloader = preloader
        self._members = members
        self._leader = leader
        self._clock = clock
        self._counters = counters
        self._slots = anyio.Semaphore(config.transitions_at_once_max)
        #: In transition, whoever leads: a new leader need not look through all vmodels.
        self._pairs: dict[str, Pair] = {}
        self._workers: dict[str, TransitionWorker] = {}
        #: Of them, those that cannot go on for now.
        self._blocked: set[str] = set()
        #: The workers that depend on a model's record.
        self._watching: dict[ModelId, set[str]] = {}
        #: Vmodels whose pair changed since it was last looked at.
        self._changed: set[str] = set()
        self._news = anyio.Event()
        for vmodel_id in vmodels.mirror:
            self._vmodel_changed(vmodel_id, vmodels.get(vmodel_id))
        vmodels.listen(self._vmodel_changed)
        registry.listen(self._model_changed)
        # The registry's own listeners hear nothing of a record that names no instance.
        registry.mirror.listen(self._record_changed)

    @property
    def count(self) -> int:
        """Vmodels in transition, as this instance sees them."""
        return len(self._pairs)

    @property
    def blocked_count(self) -> int:
        """Of those that this instance works on, the ones that cannot go on for now."""
        return len(self._blocked)

    async def run(self) -> None:
        """Work while this instance leads, until cancelled. What it may not write it does not load
        for either.
        """
        while True:
            elected = self._leader.changed
            if self._leader.is_leader and not self._config.kv_read_only:
                await self._lead(elected)
            else:
                await elected.wait()

    # --- who is at work ---

    async def _lead(self, deposed: anyio.Event) -> None:
        """Keep the workers in step with the vmodels until somebody else leads."""
        self._changed = set(self._pairs)
        if self._pairs:
            logger.info("%d vmodels are in transition", len(self._pairs))
        try:
            async with anyio.create_task_group() as group:

                async def until_deposed() -> None:
                    await deposed.wait()
                    group.cancel_scope.cancel()

                group.start_soon(until_deposed)
                while True:
                    news = self._news
                    changed, self._changed = self._changed, set()
                    for vmodel_id in sorted(changed):
                        self._see_to(group, vmodel_id)
                    if not self._changed:
                        await news.wait()
        finally:
            self._workers.clear()
            self._blocked.clear()
            self._watching.clear()

    def _see_to(self, group: TaskGroup, vmodel_id: str) -> None:
        """Begin, replace or end the work on a vmodel."""
        pair, worker = self._pairs.get(vmodel_id), self._workers.get(vmodel_id)
        if worker is not None:
            if worker.pair == pair:
                worker.wake()
                return
            self._remove(vmodel_id, worker)
            worker.scope.cancel()
        if pair is not None:
            worker = self._workers[vmodel_id] = TransitionWorker(pair)
            for model_id in pair:
                self._watching.setdefault(model_id, set()).add(vmodel_id)
            group.start_soon(self._work, vmodel_id, worker)

    def _remove(self, vmodel_id: str, worker: TransitionWorker) -> None:
        if self._workers.get(vmodel_id) is not worker:
            return
        del self._workers[vmodel_id]
        self._blocked.discard(vmodel_id)
        for model_id in worker.pair:
            watching = self._watching[model_id]
            watching.discard(vmodel_id)
            if not watching:
                del self._watching[model_id]

    def _vmodel_changed(self, vmodel_id: str, vmodel: VModelRecord | None) -> None:
        before, pair = self._pairs.pop(vmodel_id, None), Pair.of(vmodel)
        if pair is not None:
            self._pairs[vmodel_id] = pair
        elif before is None:
            return
        if not self._leader.is_leader:
            return
        if before is not None and pair is None and vmodel is not None:
            if vmodel.active_model_id == before.target_id:
                self._counters.transitions_completed += 1
                logger.info("vmodel %s: %s has taken over from %s", vmodel_id, *reversed(before))
            else:
                logger.info("vmodel %s stays with %s after all", vmodel_id, before.active_id)
        self._changed.add(vmodel_id)
        self._news.set()
        self._news = anyio.Event()

    def _model_changed(self, model_id: ModelId, _record: ModelRecord | None) -> None:
        switches: dict[Pair, bool] = {}  # many may have the same
        for vmodel_id in self._watching.get(model_id, ()):
            worker = self._workers[vmodel_id]
            worker.wake()
            if worker.line is None:
                continue
            if worker.pair not in switches:
                switches[worker.pair] = next_step(self._look(worker)) is Step.SWITCH
            if switches[worker.pair]:
                worker.line.cancel()

    def _record_changed(self, key_id: str, item: Item | None) -> None:
        if item is not None:
            for vmodel_id in self._watching.get(ModelId(key_id), ()):
                self._workers[vmodel_id].hear_that_there_is(ModelId(key_id))

    # --- one transition ---

    async def _work(self, vmodel_id: str, worker: TransitionWorker) -> None:
        with worker.scope:
            tries_count = 0
            while True:
                try:
                    step = next_step(self._look(worker))
                    if step is Step.SWITCH and await self._switch(vmodel_id, worker):
                        break  # without a slot: nothing is loaded
                    with anyio.CancelScope() as worker.line:
                        async with self._slots:
                            worker.line = None
                            await self._carry_out(vmodel_id, worker)
                        break
                    continue
                except (_BlockedError, MeshError) as exc:
                    if vmodel_id not in self._blocked:
                        logger.warning(
                            "vmodel %s stays with its model: %s (it serves %s, and is set to %s)",
                            vmodel_id, exc, worker.pair.active_id, worker.pair.target_id,
                        )  # fmt: skip
                self._blocked.add(vmodel_id)
                tries_count += 1
                await self._pause(worker, tries_count)
        self._remove(vmodel_id, worker)

    async def _carry_out(self, vmodel_id: str, worker: TransitionWorker) -> None:
        """Return when the transition is over. Raises ``_BlockedError`` or ``MeshError``."""
        while True:
            woken = worker.woken
            match next_step(self._look(worker)):
                case Step.SWITCH:
                    if await self._switch(vmodel_id, worker):
                        return
                case Step.TARGET_MISSING:
                    await self._registry.read(worker.pair.target_id)
                    if self._registry.get(worker.pair.target_id) is None:
                        worker.is_missing = True
                        await self._say(vmodel_id, worker.pair, failed=True)
                        raise _BlockedError(f"model {worker.pair.target_id} does not exist")
                case _ if worker.is_missing:
                    await self._say(vmodel_id, worker.pair, failed=False)
                    worker.is_missing = False
                case Step.LOAD_FIRST:
                    await self._load_first(vmodel_id, worker)
                    self._blocked.discard(vmodel_id)
                case Step.ADD:
                    self._blocked.discard(vmodel_id)
                    await self._add(worker)
                case Step.WAIT:
                    self._blocked.discard(vmodel_id)
                    with anyio.move_on_after(LOOK_S):
                        await woken.wait()

    def _look(self, worker: TransitionWorker) -> CopiesSeen:
        """Answer what the records here say of the copies of both models."""
        return self._judge(worker, *(self._registry.get(each) for each in worker.pair))

    def _judge(
        self, worker: TransitionWorker, active: ModelRecord | None, target: ModelRecord | None
    ) -> CopiesSeen:
        now_s, now_ms = anyio.current_time(), self._clock.now_ms()
        active_ready_count = 0
        if active is not None:
            active_ready_count = len(self._members.holders(active, now_ms).ready)
        if target is None:
            return CopiesSeen(0, active_ready_count, None)
        holders = self._members.holders(target, now_ms)
        # Whom only instances of the Java mesh serve, their copies of the target serve, too.
        serving = holders.ready if active_ready_count else holders.ready + holders.foreign
        worker.asked_s = {
            instance_id: asked_s
            for instance_id, asked_s in worker.asked_s.items()
            if instance_id not in target.copies and now_s - asked_s < SEEN_AFTER_S
        }
        if not serving:
            worker.serves_since_s = None
            worker.refusals_count = 0
        elif worker.serves_since_s is None:
            worker.serves_since_s = now_s
        serves_s = 0.0 if worker.serves_since_s is None else now_s - worker.serves_since_s
        return CopiesSeen(
            active_count=0 if active is None else len(active.copies),
            active_ready_count=active_ready_count,
            target_ready_count=len(serving),
            target_coming_count=len(holders.coming) + len(worker.asked_s),
            has_place=worker.refusals_count < REFUSALS_MAX,
            has_time=serves_s < self._config.transition_scale_max_s,
        )

    async def _load_first(self, vmodel_id: str, worker: TransitionWorker) -> None:
        """Return when a copy of the target serves, wherever, or nobody needs one. What is loaded
        counts as used now: it is to take over, and must not be the next to go.
        """
        problem: MeshError | str = ""
        async with anyio.create_task_group() as group:

            async def until_pointless() -> None:
                while next_step(self._look(worker)) is Step.LOAD_FIRST:
                    await worker.woken.wait()
                group.cancel_scope.cancel()

            group.start_soon(until_pointless)
            try:
                with anyio.move_on_after(self._config.ensure_loaded_sync_timeout_s):
                    problem = await self._ensure(worker.pair.target_id)
            except MeshError as exc:
                problem = exc  # not to be wrapped in a group
            finally:
                group.cancel_scope.cancel()
        if isinstance(problem, MeshError):
            raise problem
        if problem:
            await self._say(vmodel_id, worker.pair, failed=True)
            raise _BlockedError(problem)

    async def _ensure(self, target_id: ModelId) -> str:
        """Answer why the target cannot be loaded; empty if it is, or is still on its way."""
        used_ms = self._clock.now_ms()
        try:
            status = await self._models.ensure_loaded(
                EnsureRequest(target_id, sync=True, last_used_ms=used_ms)
            )
        except ModelNotFoundError:
            await anyio.sleep(LOOK_S)  # the next look finds out
            return ""
        if status.status == "LOADED":
            await self._wait_told(target_id)
            return ""
        record = self._registry.get(target_id)
        if record is not None and self._members.holders(record, self._clock.now_ms()).coming:
            await anyio.sleep(LOOK_S)
            return ""
        return status.errors[0] if status.errors else f"its load ended as {status.status}"

    async def _wait_told(self, model_id: ModelId) -> None:
        """Wait until the record says here that a copy serves, as it soon does."""
        with anyio.move_on_after(LOOK_S):
            while True:
                record = self._registry.get(model_id)
                if record is None or self._members.holders(record, self._clock.now_ms()).ready:
                    return
                await anyio.sleep(LOOK_S / 100)

    async def _add(self, worker: TransitionWorker) -> None:
        """Ask for the copies that are missing, one after the other."""
        for _ in range(self._look(worker).missing_count):
            asked = await self._preloader.ask(
                worker.pair.target_id,
                last_used_ms=self._clock.now_ms(),
                exclude=frozenset(worker.asked_s),
                reason=PreloadReason.TRANSITION,
            )
            if asked.taken is None:
                worker.heard_nothing(anyio.current_time(), is_open=asked.is_open)
                await anyio.sleep(LOOK_S)
                return
            worker.refusals_count, worker.silent_since_s = 0, None
            worker.asked_s[asked.taken] = anyio.current_time()

    async def _pause(self, worker: TransitionWorker, tries_count: int) -> None:
        """Wait for the next try: until something changed, or time may have helped."""
        now_ms = self._clock.now_ms()
        wait_s = min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(tries_count - 1, 10))
        record = self._registry.get(worker.pair.target_id)
        if record is not None:
            rules, target_id = self._config.failure_rules, worker.pair.target_id
            counting = rules.counting(target_id, record, now_ms)
            over_ms = [rules.over_ms(target_id, each) for each in counting]
            if over_ms:
                wait_s = min(wait_s, max(RETRY_MIN_S, (min(over_ms) - now_ms) / 1000))
        pace_s = min(RETRY_MAX_S, len(self._blocked) / RETRIES_PER_S_MAX)
        with anyio.move_on_after(pace_s):
            await worker.came_back.wait()
        if not worker.came_back.is_set():
            with anyio.move_on_after(max(0.0, wait_s - pace_s)):
                await worker.woken.wait()
        worker.came_back = anyio.Event()

    # --- what is written ---

    async def _switch(self, vmodel_id: str, worker: TransitionWorker) -> bool:
        """Answer whether the transition is over: the records here may have been old."""
        pair = worker.pair

        def plan(vmodel: VModelRecord | None, models: ModelRecords) -> VModelChange | None:
            if vmodel is None or Pair.of(vmodel) != pair:
                return None
            seen = self._judge(worker, *(models[each] for each in pair))
            if next_step(seen) is not Step.SWITCH:
                return None
            others = self._vmodels.references.others(vmodel_id, models)
            return plan_complete(vmodel, models, others)

        outcome = await self._writer.switch(vmodel_id, plan)
        return outcome.change is not None or Pair.of(outcome.vmodel) != pair

    async def _say(self, vmodel_id: str, pair: Pair, *, failed: bool) -> None:
        """Once: whoever looks at the vmodel's record sees each change of it."""

        def plan(vmodel: VModelRecord | None, models: ModelRecords) -> VModelChange | None:
            if vmodel is None or Pair.of(vmodel) != pair:
                return None
            return plan_failed(vmodel, models, failed=failed)

        known = self._vmodels.get(vmodel_id)
        if known is None or known.failed == failed:
            return
        outcome = await self._writer.switch(vmodel_id, plan)
        self._counters.transitions_failed += failed and outcome.change is not None


def compose_transitions(
    config: Config, clock: Clock, parts: Parts, writer: VModelWriter, leader: Leader
) -> Transitions:
    """Put it together; the mirrors are there already."""
    return Transitions(
        config=config,
        registry=parts.registry,
        vmodels=parts.vmodels,
        writer=writer,
        models=parts.models,
        preloader=parts.preloader,
        members=parts.members,
        leader=leader,
        clock=clock,
        counters=parts.counters,
    )

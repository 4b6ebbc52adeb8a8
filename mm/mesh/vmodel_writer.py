"""Changes of vmodels in the store: all records of a change at once, or none (spec core 1.4, 6).

Owns reading, the transaction, and trying again when somebody else was quicker. What is to be
written is decided by a plan of ``core.vmodel_changes``, which is asked anew each time.

A plan is first asked with what is mirrored here. If that is out of date the transaction does not
come about, and tells what is stored, for what a plan relies on is a condition even where it is not
written; so only an answer that writes nothing could be wrong: it is
given only on the word of the store. Most calls are about a vmodel that is as it should be: then
that word is the revisions of it and of its models, which all calls of the moment ask for together
(``confirmations``). For a refusal, and for a count believed to be wrong, everything concerned is
read.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import anyio
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.core.vmodel_changes import ModelRecords, VModelChange, references
from mm.errors import ContendedError, LimitError, MeshError, StoreUnavailableError
from mm.mesh.confirmations import Confirmations
from mm.mesh.keyed_locks import KeyedLocks
from mm.mesh.ports import Store
from mm.mesh.registry import Registry
from mm.mesh.shared_turns import SharedTurns
from mm.mesh.statistics import Counters
from mm.mesh.vmodel_records import VModelRecords
from mm.mesh.vmodels import VModels
from mm.mesh.waiting import refuse_to_queue

logger = logging.getLogger(__name__)

#: Asked for the change, with the vmodel and the models that it and the request name; None: there is
#: nothing to write. Raises ``MeshError`` for a refusal.
Plan = Callable[[VModelRecord | None, ModelRecords], VModelChange | None]

#: Each but the last finds that what it was to write is done by others while it waited for them.
LOOKS_MAX: Final = 4
#: Each loss means that somebody else's change succeeded; instances compete with one change each.
TRIES_MAX: Final = 64
#: Changes of one model's count that are made in one transaction: each has three records at most,
#: besides that model, and a transaction has room for 64.
TOGETHER_MAX: Final = 20
#: Before each is tried by itself.
TOGETHER_TRIES_MAX: Final = 8
PAUSE_FIRST_S: Final = 0.001
PAUSE_MAX_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a change: the records that it was planned with, and the vmodel as it is now.

    ``change`` is None if there was nothing to write.
    """

    before: VModelRecord | None
    models: ModelRecords
    change: VModelChange | None

    @property
    def vmodel(self) -> VModelRecord | None:
        """The vmodel as it is now; None if there is none."""
        return self.before if self.change is None else self.change.vmodel


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a plan comes to that has nothing to write, and the models that it was made from."""

    models: Collection[ModelId]
    answer: Outcome | MeshError

    def result(self) -> Outcome:
        """Answer the outcome; raises the refusal."""
        if isinstance(self.answer, MeshError):
            raise self.answer
        return self.answer


@dataclass(eq=False, slots=True)
class _Job:
    """A change whose turn is waited for, and what became of it."""

    vmodel_id: str
    plan: Plan
    target_id: ModelId | None
    fresh: bool
    outcome: Outcome | None = None
    failure: MeshError | None = None

    @property
    def is_open(self) -> bool:
        return self.outcome is None and self.failure is None


class VModelWriter:
    """Makes changes, a bounded number at a time; those of one vmodel one after the other, and those
    that change the number of references of one model, because they come to it or leave it, in few
    transactions.
    """

    def __init__(
        self,
        *,
        config: Config,
        store: Store,
        registry: Registry,
        vmodels: VModels,
        counters: Counters,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._store = store
        self._registry = registry
        self._vmodels = vmodels
        self._counters = counters
        self._rng = rng
        self.locks = KeyedLocks()
        self._turns: SharedTurns[_Job] = SharedTurns(self._take_turn, jobs_max=TOGETHER_MAX)
        self._slots = anyio.Semaphore(config.vmodel_changes_at_once_max)
        self._switch_slots = anyio.Semaphore(config.vmodel_switches_at_once_max)
        self._in_line_count = 0
        self.records = VModelRecords(config, store, registry, vmodels, counters)
        self.confirmations = Confirmations(store, config, counters)
        #: The leader's own: however many clients ask, and stand in line, it has not to.
        self._switch_confirmations = Confirmations(store, config, counters)

    def open(self, group: TaskGroup) -> None:
        """Name the task group for reads that outlive their calls: the node's."""
        group.start_soon(self.confirmations.run)
        group.start_soon(self._switch_confirmations.run)

    async def change(
        self,
        vmodel_id: str,
        plan: Plan,
        *,
        target_id: ModelId | None = None,
        limit_s: float | None = None,
    ) -> Outcome:
        """Do what the plan says. ``target_id``: a model that it needs besides those of the vmodel.
        ``limit_s``: if the caller has less time than is usual.

        Raises ``StoreUnavailableError`` (also if it takes too long), ``LimitError``, and what the
        plan raises.
        """
        usual_s = self._config.vmodel_change_s
        limit_s = usual_s if limit_s is None else min(limit_s, usual_s)
        with anyio.move_on_after(limit_s):
            return await self._change_in_turn(vmodel_id, plan, target_id)
        self._counters.vmodel_changes_late += 1
        raise StoreUnavailableError(
            f"vmodel {vmodel_id} could not be changed within {limit_s:.3g} s, because the store is"
            " slow or many changes wait for it; it may be changed yet"
        )

    async def _change_in_turn(
        self, vmodel_id: str, plan: Plan, target_id: ModelId | None
    ) -> Outcome:
        for look in range(LOOKS_MAX):
            is_old = False
            seen = self._look(vmodel_id, plan, target_id)
            if seen is not None:
                # From the look to the question nobody else has a turn.
                entries = self.records.entries(vmodel_id, seen.models)
                is_old = bool(await self.confirmations.outdated(entries))
                if not is_old:
                    return seen.result()
            self._enter_line()
            try:
                # Whoever has a turn waits for no lock.
                async with self.locks.hold(vmodel_id):
                    may_look = not is_old and look < LOOKS_MAX - 1
                    if may_look and self._look(vmodel_id, plan, target_id) is not None:
                        continue  # done meanwhile: many ask about that together
                    job = _Job(vmodel_id, plan, target_id, fresh=is_old)
                    shared_id = self._most_referred(vmodel_id, target_id)
                    if shared_id is not None:
                        await self._turns.do(shared_id, job)
                    else:
                        async with self._slots:
                            await self._do(job)
                    break
            finally:
                self._in_line_count -= 1
        if job.failure is not None:
            raise job.failure
        assert job.outcome is not None
        return job.outcome

    def _most_referred(self, vmodel_id: str, target_id: ModelId | None) -> ModelId | None:
        """Answer the model whose count others are the likeliest to change, too: the target, unless
        more vmodels stand for one that this one leaves; None if there is neither.
        """
        found, most = target_id, 1
        target = self._registry.get(target_id) if target_id is not None else None
        if target is not None:
            most = max(most, target.references)
        for model_id in sorted(references(self._vmodels.get(vmodel_id))):
            record = self._registry.get(model_id)
            if record is not None and record.references > most:
                found, most = model_id, record.references
        return found

    async def _take_turn(self, _model_id: str, jobs: Sequence[_Job]) -> None:
        """Do what many want that changes the count of one model."""
        async with self._slots:
            await self._do_together(jobs)
            for job in jobs:
                if job.is_open:
                    await self._do(job, is_queue=len(jobs) > 1)

    async def _do(self, job: _Job, *, is_queue: bool = False) -> None:
        try:
            refuse_to_queue(self._store, is_queue)
            job.outcome = await self._change(job, self.confirmations)
        except MeshError as exc:
            job.failure = exc

    async def _do_together(self, jobs: Sequence[_Job]) -> None:
        """Do in one transaction what is possible; what is not, or not simple, is left."""
        for attempt in range(TOGETHER_TRIES_MAX):
            outcomes = self._plan_together(jobs)
            if len(outcomes) < 2:
                return
            changes = {job.vmodel_id: each.change for job, each in outcomes.items() if each.change}
            try:
                refuse_to_queue(self._store, is_queue=True)
                succeeded = await self.records.write(changes)
            except StoreUnavailableError as exc:
                for job in outcomes:
                    job.failure = exc.another()
                return
            except MeshError:
                return  # each hears of it by itself
            if succeeded:
                for job, outcome in outcomes.items():
                    job.outcome = outcome
                return
            await self._pause(attempt)

    def _plan_together(self, jobs: Sequence[_Job]) -> dict[_Job, Outcome]:
        """Plan one after the other, each on what those before it leave."""
        left: dict[ModelId, ModelRecord | None] = {}
        outcomes: dict[_Job, Outcome] = {}
        for job in jobs:
            vmodel = self._vmodels.get(job.vmodel_id)
            concerned = _concerned(vmodel, job.target_id)
            if not job.is_open or job.fresh or not self.records.are_known(job.vmodel_id, concerned):
                continue
            try:
                models = self.records.models(concerned, job.target_id)
                models = {key: left.get(key, record) for key, record in models.items()}
                change = job.plan(vmodel, models)
            except MeshError:
                continue
            # There is no room for conditions besides the writes.
            entries = self.records.relied_on(job.vmodel_id, models, job.target_id)
            is_simple = {key_id for _, key_id in entries} <= {job.target_id}
            if change is not None and not change.miscounts and is_simple:
                outcomes[job] = Outcome(vmodel, models, change)
                left.update(change.models)
        return outcomes

    async def switch(self, vmodel_id: str, plan: Plan) -> Outcome:
        """Do what the plan of a transition says; as many as there are may wait for their turn.

        What it depends on is not all written, so the store has to say that it is as mirrored here.
        """
        refuse_to_queue(self._store, self._switch_slots.value == 0)
        # Whoever has a slot waits for no lock: clients may stand in line for that.
        async with self.locks.hold(vmodel_id), self._switch_slots:
            confirmations = self._switch_confirmations
            entries = self.records.entries(vmodel_id, references(self._vmodels.get(vmodel_id)))
            is_old = bool(await confirmations.outdated(entries))
            return await self._change(_Job(vmodel_id, plan, None, fresh=is_old), confirmations)

    def _enter_line(self) -> None:
        if self._in_line_count >= self._config.vmodel_changes_waiting_max:
            raise LimitError(
                f"{self._in_line_count} changes of vmodels wait already, the limit; retry later",
                retry_after_ms=1000,
            )
        refuse_to_queue(self._store, self._slots.value == 0)
        self._in_line_count += 1

    def _look(self, vmodel_id: str, plan: Plan, target_id: ModelId | None) -> _Seen | None:
        """Answer what there is to say as far as the mirrors tell; None if something is to be
        written.
        """
        vmodel = self._vmodels.get(vmodel_id)
        if vmodel is None and self._vmodels.mirror.get(vmodel_id) is not None:
            return None  # unreadable
        concerned = _concerned(vmodel, target_id)
        try:
            models = self.records.models(concerned, target_id)
            change = plan(vmodel, models)
        except MeshError as exc:
            return _Seen(concerned, exc)
        return _Seen(concerned, Outcome(vmodel, models, None)) if change is None else None

    async def _change(self, job: _Job, confirmations: Confirmations) -> Outcome:
        vmodel_id, target_id, fresh = job.vmodel_id, job.target_id, job.fresh
        suspects: Collection[ModelId] = ()
        for attempt in range(TRIES_MAX):
            vmodel = await self.records.vmodel(vmodel_id, fresh=fresh)
            item = self._vmodels.mirror.get(vmodel_id)
            concerned = _concerned(vmodel, target_id)
            await self.records.update_models(concerned, fresh=fresh)
            is_sure = await self._look_at_references(suspects)
            if self._vmodels.mirror.get(vmodel_id) is not item or not is_sure:
                continue  # meanwhile
            try:
                models = self.records.models(concerned, target_id)
                change = job.plan(vmodel, models)
            except MeshError:
                if fresh:
                    raise
                fresh = True
                continue
            if change is None:
                # Its models may be gone because it does not name them any more, and nobody has
                # said so here yet: so it has to be what it was before they were read.
                entries = self.records.entries(vmodel_id)
                if fresh and (vmodel is None or not await confirmations.outdated(entries)):
                    return Outcome(vmodel, models, None)
                fresh = True
                continue
            if not change.miscounts.keys() <= set(suspects):
                fresh, suspects = True, change.miscounts.keys()  # only the mirror may be wrong
                continue
            if await self.records.write(
                {vmodel_id: change}, self.records.relied_on(vmodel_id, models, target_id)
            ):
                for miscount in change.miscounts.values():
                    logger.warning("%s; put right", miscount)
                return Outcome(vmodel, models, change)
            fresh, suspects = False, ()  # the conflict told
            await self._pause(attempt)
        raise ContendedError(
            f"vmodel {vmodel_id} or its models changed {TRIES_MAX} times while being changed"
        )

    async def _look_at_references(self, suspects: Collection[ModelId]) -> bool:
        """See that it is known who refers to these models; answer whether they stayed the same
        meanwhile: nobody comes to refer to a model, or ceases to, without writing its record.
        """
        mirror = self._registry.mirror
        items = [mirror.get(each) for each in suspects]
        for model_id in suspects:
            await self._vmodels.look_at_references(model_id)
        return all(mirror.get(i) is item for i, item in zip(suspects, items, strict=True))

    async def _pause(self, attempt: int) -> None:
        pause_s = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2**attempt)
        await anyio.sleep(self._rng.uniform(0, pause_s))


def _concerned(vmodel: VModelRecord | None, target_id: ModelId | None) -> list[ModelId]:
    """In the same order each time: simulations are repeated."""
    return sorted(references(vmodel) | ({target_id} if target_id is not None else set()))

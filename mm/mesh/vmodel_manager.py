"""What clients do with vmodels: set, delete, ask for the status (spec core 6.2-6.4, around 10).

Owns the meaning of the calls and of their answers. What is written is ``vmodel_writer``'s and
``core.vmodel_changes``'; who carries a transition out is the leader.

Without ``sync`` no answer waits for a load, or for what another instance says: a controller makes
these calls one after the other, for thousands of vmodels. What is told of copies elsewhere is what
their records say.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Final

import anyio
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.core.vmodel_changes import (
    Facts,
    ModelRecords,
    OtherReferences,
    SetVModel,
    VModelChange,
    is_in_transition,
    is_owner,
    plan_delete,
    plan_set,
)
from mm.errors import (
    InvalidRequestError,
    LimitError,
    MeshError,
    ModelNotFoundError,
    NoRoomError,
    StoreUnavailableError,
)
from mm.mesh.composition import Parts, Ports
from mm.mesh.doubtful_sets import DoubtfulSets
from mm.mesh.id_checks import check_length_of_new, check_model_id, check_vmodel_id
from mm.mesh.models import EnsureRequest, Models
from mm.mesh.new_models import check_new_model, check_type
from mm.mesh.ports import Clock, ModelStatus
from mm.mesh.registry import Registry
from mm.mesh.seldom import FAILURES_LOUD_MAX, Seldom
from mm.mesh.statistics import Counters
from mm.mesh.switch_waits import SwitchWaits
from mm.mesh.time_left import TimeLeft, share_left_s
from mm.mesh.vmodel_records import UnreadableVModelError
from mm.mesh.vmodel_snapshots import VModelSnapshot, VModelSnapshots
from mm.mesh.vmodel_writer import Outcome, VModelWriter
from mm.mesh.vmodels import VModels

logger = logging.getLogger(__name__)

NO_STATUS: Final = ModelStatus("NOT_FOUND")


@dataclass(frozen=True, slots=True)
class VModelStatus:
    """The answer to set and status: NOT_FOUND, DEFINED, TRANSITIONING or TRANSITION_FAILED.

    ``target`` is told in a transition only.
    """

    status: str
    active_model_id: str = ""
    target_model_id: str = ""
    owner: str = ""
    active: ModelStatus | None = None
    target: ModelStatus | None = None


NO_VMODEL: Final = VModelStatus("NOT_FOUND")


@dataclass(slots=True)
class _Start:
    """A load that was asked for, and what came of asking."""

    done: anyio.Event = field(default_factory=anyio.Event)
    status: ModelStatus | None = None
    failure: MeshError | None = None


class VModelManager:
    """What clients do with vmodels. Every method raises ``MeshError`` for what they must hear."""

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        vmodels: VModels,
        models: Models,
        writer: VModelWriter,
        clock: Clock,
        counters: Counters,
    ) -> None:
        self._config = config
        self._counters = counters
        self._registry = registry
        self._vmodels = vmodels
        self._models = models
        self.writer = writer
        self._snapshots = VModelSnapshots(config, registry, vmodels, writer.confirmations)
        self._switch_waits = SwitchWaits(vmodels, config, counters)
        self._clock = clock
        self._group: TaskGroup | None = None
        self._starts: dict[ModelId, _Start] = {}
        self._doubtful_sets = DoubtfulSets(
            vmodels, lambda model_id: self._begin_load(EnsureRequest(model_id, sync=False))
        )
        self._failures_told = Seldom(loud_max=FAILURES_LOUD_MAX)

    def open(self, group: TaskGroup) -> None:
        """Name the task group for loads that outlive their calls: the node's."""
        self._group = group
        self.writer.open(group)

    # --- the three calls ---

    async def set(
        self,
        request: SetVModel,
        *,
        sync: bool = False,
        balanced: bool = False,
        deadline_s: float | None = None,
    ) -> VModelStatus:
        """Create the vmodel, or have it point to the target, at once or when that is loaded.

        With ``sync`` the answer comes when the target serves, or cannot; ``deadline_s`` is when the
        caller stops listening (``anyio.current_time()``).
        """
        answer_at_s = anyio.current_time() + self._config.vmodel_answer_s
        check_vmodel_id(request.vmodel_id)
        if not request.target_id:
            raise InvalidRequestError("must provide non-empty targetModelId")
        check_model_id(request.target_id)
        # What nothing can have is asked of nobody: the store bears less than a message holds.
        check_length_of_new(request.vmodel_id, self._vmodels.mirror, self._config)
        for model_id in (request.target_id, request.expected_target_id):
            check_length_of_new(model_id, self._registry.mirror, self._config)
        if request.info is not None:
            check_type(request.info)
        if sync:
            self._switch_waits.refuse_if_full()
        planned = Outcome(None, {}, None)

        def plan(vmodel: VModelRecord | None, models: ModelRecords) -> VModelChange | None:
            nonlocal planned
            change = self._plan_set(request, vmodel, models)
            if change is not None:
                planned = Outcome(vmodel, models, change)
            return change

        try:
            outcome = await self.writer.change(
                request.vmodel_id,
                plan,
                target_id=request.target_id,
                limit_s=share_left_s(deadline_s),
            )
        except (StoreUnavailableError, anyio.get_cancelled_exc_class()):
            # The store may have taken it, although its answer was lost or whoever asked has left.
            if planned.vmodel is not None and _had_copies_before(planned):
                self._doubtful_sets.add(request.vmodel_id, planned.vmodel)
            raise
        vmodel = outcome.vmodel
        assert vmodel is not None, "a set leaves one"
        limit = TimeLeft(self._config.vmodel_wait_s, deadline_s)
        if is_in_transition(vmodel) and sync:
            return await self._wait_switched(request, limit)
        # It may have been made by a try whose end nobody saw.
        made = planned if planned.vmodel == vmodel else outcome
        if is_in_transition(vmodel) or not (request.load_now or _had_copies_before(made)):
            return self._describe(await self._since(request, outcome, answer_at_s))
        ensure = EnsureRequest(request.target_id, sync=False, balanced=balanced)
        if sync and request.info is not None:
            loading = self._ensure_loaded(replace(ensure, sync=True))
            active = await limit.wait(loading, f"model {request.target_id} to be loaded")
        else:
            active = await self._start_load(ensure, answer_at_s)
        if active.status == NO_STATUS.status:  # set anew meanwhile, and gone with that
            return self._describe(_left(outcome))
        return _steady(vmodel, active)

    async def delete(
        self, vmodel_id: str, owner: str = "", *, deadline_s: float | None = None
    ) -> None:
        """Delete the vmodel, and models that nobody else refers to if they are of that kind.
        ``deadline_s``: as in ``set``.

        Raises ``UnreadableVModelError`` if only an ``owner``'s is to be deleted, and the record
        cannot be read: it may be somebody else's.
        """
        check_vmodel_id(vmodel_id)
        check_length_of_new(vmodel_id, self._vmodels.mirror, self._config)
        try:
            await self.writer.change(
                vmodel_id,
                lambda vmodel, models: plan_delete(
                    owner, vmodel, models, self._others(vmodel_id, models)
                ),
                limit_s=share_left_s(deadline_s),
            )
        except UnreadableVModelError:
            if owner:
                raise UnreadableVModelError(vmodel_id, owner=owner) from None
            logger.warning("vmodel %s is deleted although its record is unreadable", vmodel_id)
            await self.writer.records.delete_unreadable(vmodel_id)

    async def status(self, vmodel_id: str, owner: str = "") -> VModelStatus:
        """Answer what the vmodel stands for; an unknown one, or another's, is NOT_FOUND."""
        check_vmodel_id(vmodel_id)
        # Whoever asks because something has just changed elsewhere must hear so.
        snapshot = await self._snapshots.take(vmodel_id)
        if snapshot is None or not is_owner(owner, snapshot.vmodel):
            return NO_VMODEL
        return self._describe(snapshot)

    # --- behind them ---

    async def _since(
        self, request: SetVModel, outcome: Outcome, answer_at_s: float
    ) -> VModelSnapshot:
        """Answer what there is after a set: its models may have changed before it was made. But
        whoever asked for a target is told of its transition, although that is over already, or
        another set came next; and of what was set, if there is no time to ask.
        """
        if outcome.change is None:
            return _left(outcome)  # on the word of the store
        since: VModelSnapshot | None = None
        try:
            with anyio.CancelScope(deadline=answer_at_s):
                since = await self._snapshots.take(request.vmodel_id)
        except (LimitError, StoreUnavailableError) as exc:
            logger.debug("%s is told as it was set: %s", request.vmodel_id, exc)
        return since if since and since.vmodel == outcome.vmodel else _left(outcome)

    def _plan_set(
        self, request: SetVModel, vmodel: VModelRecord | None, models: ModelRecords
    ) -> VModelChange | None:
        target = models[request.target_id]
        may_switch = vmodel is not None and vmodel.active_model_id != request.target_id
        facts = Facts(
            now_ms=self._clock.now_ms(),
            target_is_loaded=may_switch and self._is_loaded(request.target_id, target),
            others=self._others(request.vmodel_id, models),
            default_owner=self._config.default_vmodel_owner,
        )
        change = plan_set(request, vmodel, models, facts)
        if change is not None and vmodel is None:
            self._check_new(request)
        if change is not None and target is None and request.info is not None:
            check_new_model(request.target_id, request.info, self._registry, self._config)
        return change

    def _others(self, vmodel_id: str, models: ModelRecords) -> OtherReferences:
        return self._vmodels.references.others(vmodel_id, models)

    def _is_loaded(self, model_id: ModelId, record: ModelRecord | None) -> bool:
        if record is None:
            return False
        return self._models.statuses.known(model_id, record).status == "LOADED"

    def _check_new(self, request: SetVModel) -> None:
        config, count = self._config, len(self._vmodels)
        length = len(request.owner.encode())
        if length > config.type_bytes_max:
            raise InvalidRequestError(
                f"the owner of a vmodel has at most {config.type_bytes_max} bytes,"
                f" this one {length}"
            )
        if config.models_max and count >= config.models_max:
            raise LimitError(
                f"there are {count} vmodels, the limit is {config.models_max}, as for models:"
                " delete some, or set MM_MAX_MODELS higher on all instances"
            )

    async def _wait_switched(self, request: SetVModel, limit: TimeLeft) -> VModelStatus:
        """Wait until the target serves, is said to have failed, or is no longer the target."""

        switched = self._switch_waits.wait(request.vmodel_id, request.target_id)
        what = f"vmodel {request.vmodel_id} to switch to model {request.target_id}"
        vmodel = await limit.wait(switched, what)
        if vmodel is None:
            return NO_VMODEL
        if is_in_transition(vmodel):
            return self._describe(await self._snapshots.take(request.vmodel_id))
        # Time is no matter here, and a client that waited for a load wants to hear of it.
        active = await self._models.status(vmodel.active_model_id)
        if active.status == NO_STATUS.status:  # most likely it stands for another one by now
            return self._describe(await self._snapshots.take(request.vmodel_id))
        return _steady(vmodel, active)

    async def _start_load(self, request: EnsureRequest, answer_at_s: float) -> ModelStatus:
        """See that the model is loaded or loading somewhere, without waiting for what that takes.

        A load begins in a moment, unless another instance has to be asked that is slow to answer:
        then it is said to be loading, and goes on without this call.
        """
        record = self._registry.get(request.model_id)
        if record is not None:
            status = self._models.statuses.known(request.model_id, record)
            if status.status in ("LOADED", "LOADING"):
                return status
        start = self._begin_load(request)
        if start is None:
            text = f"{len(self._starts)} loads are being begun already: set the vmodel again"
            return ModelStatus("NOT_LOADED", (text,))
        with anyio.CancelScope(deadline=answer_at_s):
            await start.done.wait()
        if start.failure is not None:
            raise start.failure.another()
        if start.status is not None:
            return start.status
        record = self._registry.get(request.model_id)
        if record is None:  # taken away since it was set
            return NO_STATUS
        return self._models.statuses.present("LOADING", request.model_id, record)

    def _begin_load(self, request: EnsureRequest) -> _Start | None:
        """Answer the load of a model that is being begun; None: there are too many."""
        start = self._starts.get(request.model_id)
        if start is not None:
            return start
        if len(self._starts) >= self._config.vmodel_loads_begun_max:
            self._counters.vmodel_loads_refused += 1
            return None
        assert self._group is not None, "open() first"
        start = self._starts[request.model_id] = _Start()
        self._group.start_soon(self._load, request, start)
        return start

    async def _load(self, request: EnsureRequest, start: _Start) -> None:
        try:
            start.status = await self._ensure_loaded(request)
        except MeshError as exc:
            start.failure = exc
            level = self._failures_told.level(anyio.current_time())
            logger.log(level, "model %s is not loaded: %s", request.model_id, exc.message)
        finally:
            del self._starts[request.model_id]
            start.done.set()

    async def _ensure_loaded(self, request: EnsureRequest) -> ModelStatus:
        """Answer what became of a load. Want of room is no error, for the vmodel is set; nor is it
        that another change came next, and the model is gone with it.
        """
        try:
            return await self._models.ensure_loaded(request)
        except ModelNotFoundError:
            return NO_STATUS
        except NoRoomError as exc:
            return ModelStatus("LOADING_FAILED", (exc.message,))

    # --- answers ---

    def _describe(self, snapshot: VModelSnapshot | None) -> VModelStatus:
        """Answer what is said of a vmodel and its models."""
        if snapshot is None:
            return NO_VMODEL
        vmodel, models = snapshot.vmodel, snapshot.models
        active_id, target_id = vmodel.active_model_id, vmodel.target_model_id
        record = models[active_id]
        active = NO_STATUS if record is None else self._models.statuses.known(active_id, record)
        if not is_in_transition(vmodel):
            return _steady(vmodel, active)
        return VModelStatus(
            "TRANSITION_FAILED" if vmodel.failed else "TRANSITIONING",
            active_id,
            target_id,
            vmodel.owner,
            active,
            self._target_status(vmodel, models[target_id]),
        )

    def _target_status(self, vmodel: VModelRecord, record: ModelRecord | None) -> ModelStatus:
        """Answer what a transition waits for: it is over once the target is loaded."""
        model_id = vmodel.target_model_id
        if record is None:
            return ModelStatus("LOADING_FAILED", (f"Target model {model_id} not found",))
        has_failed = vmodel.failed and record.failures and not record.copies
        status = "LOADING_FAILED" if has_failed else "LOADING"
        return self._models.statuses.present(status, model_id, record)


def compose_vmodels(config: Config, ports: Ports, parts: Parts) -> VModelManager:
    """Put the manager and its writer together; nothing runs yet."""
    writer = VModelWriter(
        config=config,
        store=ports.store,
        registry=parts.registry,
        vmodels=parts.vmodels,
        counters=parts.counters,
        rng=ports.rng,
    )
    return VModelManager(
        config=config,
        registry=parts.registry,
        vmodels=parts.vmodels,
        models=parts.models,
        writer=writer,
        clock=ports.clock,
        counters=parts.counters,
    )


def _steady(vmodel: VModelRecord, active: ModelStatus) -> VModelStatus:
    model_id = vmodel.active_model_id
    return VModelStatus("DEFINED", model_id, model_id, vmodel.owner, active)


def _left(outcome: Outcome) -> VModelSnapshot:
    """Answer what a set left, as of its transaction."""
    assert outcome.vmodel is not None, "a set leaves one"
    changed = {} if outcome.change is None else outcome.change.models
    return VModelSnapshot(outcome.vmodel, {**outcome.models, **changed})


def _had_copies_before(outcome: Outcome) -> bool:
    """Answer whether a model served that does not any longer."""
    before = outcome.before
    if before is None or outcome.vmodel is None:
        return False
    if before.active_model_id == outcome.vmodel.active_model_id:
        return False
    active = outcome.models[before.active_model_id]
    return active is not None and bool(active.copies)

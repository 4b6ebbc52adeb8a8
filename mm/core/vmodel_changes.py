"""What a change of a vmodel does to its record and to those of its models (spec core 6).

Owns the rules of setVModel, deleteVModel and of the end of a transition, and the reference counts:
nobody else changes ``ModelRecord.references``. Each function takes what is stored and answers what
is to be stored instead, all of it or nothing; reading, writing and trying again are
``mm.mesh.vmodel_writer``'s.

A vmodel counts once for its active model, and once for its target if that is another one. So the
counts follow from the models that a vmodel named before and those that it names after, whatever
became of it in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from mm.core.first_use import first_use_ms
from mm.core.ids import ModelId
from mm.core.records import ModelInfo, ModelRecord, VModelRecord
from mm.errors import ModelExistsError, ModelNotFoundError, TargetConflictError

#: Models by id; None for one that does not exist.
ModelRecords = Mapping[ModelId, ModelRecord | None]
#: How many other vmodels name a model, as far as is known; one that is not here: none.
OtherReferences = Mapping[ModelId, int]

#: ``refs`` is an int32 for Java (spec core 1.6), and one more must still be one. There are never so
#: many vmodels: whoever wrote more was mistaken.
REFERENCES_MAX: Final = 2**31 - 2


@dataclass(frozen=True, slots=True)
class SetVModel:
    """What a setVModel asks for; empty texts were not given."""

    vmodel_id: str
    target_id: ModelId
    #: What the target is to be, and is created as; None: it must exist.
    info: ModelInfo | None = None
    owner: str = ""
    expected_target_id: str = ""
    update_only: bool = False
    auto_delete: bool = False
    force: bool = False
    load_now: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What a setVModel depends on besides the records."""

    now_ms: int
    target_is_loaded: bool
    #: If the target is gone, and comes back, they count.
    others: OtherReferences = field(default_factory=dict)
    #: MM_DEFAULT_VMODEL_OWNER: of a vmodel that is created without one.
    default_owner: str = ""


@dataclass(frozen=True, slots=True)
class VModelChange:
    """What is to be stored, in one transaction; None deletes.

    ``miscounts`` says which counts were found to be wrong, and are put right by this. It relies on
    what is known of other vmodels, so that has to be made sure of first.
    """

    vmodel: VModelRecord | None
    models: ModelRecords
    miscounts: Mapping[ModelId, str] = field(default_factory=dict)


def references(vmodel: VModelRecord | None) -> frozenset[ModelId]:
    """Answer the models that a vmodel counts for."""
    if vmodel is None:
        return frozenset()
    return frozenset((vmodel.active_model_id, vmodel.target_model_id))


def is_in_transition(vmodel: VModelRecord) -> bool:
    """Answer whether the target is still to become the active model."""
    return vmodel.active_model_id != vmodel.target_model_id


def is_owner(owner: str, vmodel: VModelRecord) -> bool:
    """Answer whether a request may see the vmodel; one that names no owner may."""
    return not owner or owner == vmodel.owner


def plan_set(
    request: SetVModel, vmodel: VModelRecord | None, models: ModelRecords, facts: Facts
) -> VModelChange | None:
    """Answer what setVModel changes, None if it is all as asked for (spec core 6.2).

    ``models`` has the target and the models of the vmodel. Raises ``MeshError`` for a refusal.
    """
    target = models[request.target_id]
    _check_expected_target(request, vmodel)
    _check_target(request, target)
    if vmodel is None:
        if request.update_only:
            raise ModelNotFoundError(f"vmodel {request.vmodel_id} not found")
        wanted = VModelRecord(
            request.target_id, request.target_id, owner=request.owner or facts.default_owner
        )
    else:
        _check_owner(request, vmodel)
        wanted = _retargeted(request, vmodel, models, facts)
        if target is None:
            wanted = replace(wanted, failed=False)  # for want of it
        # A target that is gone although it was referred to comes back, as the request describes it.
        if wanted == vmodel and target is not None:
            return None
    active = None if vmodel is None else models[vmodel.active_model_id]
    used_ms = active.last_used_ms if active is not None else 0
    used_ms = used_ms or first_use_ms(facts.now_ms, load_now=request.load_now)
    if target is None:
        assert request.info is not None, "checked"
        target = ModelRecord(
            request.info,
            auto_delete=request.auto_delete,
            references=facts.others.get(request.target_id, 0),
        )
    changed = {**models, request.target_id: target.used(used_ms)}
    return _with_counts(vmodel, wanted, changed, models, facts.others)


def plan_delete(
    owner: str, vmodel: VModelRecord | None, models: ModelRecords, others: OtherReferences
) -> VModelChange | None:
    """Answer what deleteVModel changes, None if there is nothing to delete (spec core 6.3)."""
    if vmodel is None or not is_owner(owner, vmodel):
        return None
    return _with_counts(vmodel, None, models, models, others)


def plan_complete(
    vmodel: VModelRecord, models: ModelRecords, others: OtherReferences
) -> VModelChange | None:
    """Answer how the target becomes the active model, None if it is already (spec core 6.5)."""
    if not is_in_transition(vmodel):
        return None
    wanted = replace(vmodel, active_model_id=vmodel.target_model_id, failed=False)
    return _with_counts(vmodel, wanted, models, models, others)


def plan_failed(vmodel: VModelRecord, models: ModelRecords, *, failed: bool) -> VModelChange | None:
    """Answer how a transition is said to be blocked, or no longer; None if that is said, or there
    is none.
    """
    if vmodel.failed == failed or not is_in_transition(vmodel):
        return None
    return _with_counts(vmodel, replace(vmodel, failed=failed), models, models, {})


# --- behind them ---


def _check_expected_target(request: SetVModel, vmodel: VModelRecord | None) -> None:
    expected_id = request.expected_target_id
    if not expected_id:
        return
    if vmodel is None:
        if expected_id != request.target_id:
            raise TargetConflictError(
                f"vmodel {request.vmodel_id} does not exist, so its target is not {expected_id}"
            )
        return
    _check_owner(request, vmodel)
    if vmodel.target_model_id not in (expected_id, request.target_id):
        raise TargetConflictError(
            f"the target of vmodel {request.vmodel_id} is {vmodel.target_model_id},"
            f" not {expected_id}"
        )


def _check_owner(request: SetVModel, vmodel: VModelRecord) -> None:
    if not is_owner(request.owner, vmodel):
        raise ModelExistsError(
            f'vmodel {request.vmodel_id} already exists with different owner "{vmodel.owner}"'
        )


def _check_target(request: SetVModel, target: ModelRecord | None) -> None:
    if request.info is None:
        if target is None:
            raise ModelNotFoundError(f"Target model {request.target_id} not found")
    elif target is not None and target.info != request.info:
        raise ModelExistsError(
            f"Target model {request.target_id} already exists with different attribute values"
        )


def _retargeted(
    request: SetVModel, vmodel: VModelRecord, models: ModelRecords, facts: Facts
) -> VModelRecord:
    target_id, active_id = request.target_id, vmodel.active_model_id
    if target_id == vmodel.target_model_id and (target_id == active_id or not request.force):
        return vmodel
    if request.force or _may_switch_at_once(models[active_id], facts):
        active_id = target_id
    return replace(vmodel, active_model_id=active_id, target_model_id=target_id, failed=False)


def _may_switch_at_once(active: ModelRecord | None, facts: Facts) -> bool:
    """Answer whether nobody would notice: there is no copy to lose, or one for one."""
    count = 0 if active is None else len(active.copies)
    return count == 0 or (count == 1 and facts.target_is_loaded)


def _with_counts(
    before: VModelRecord | None,
    after: VModelRecord | None,
    models: ModelRecords,
    stored: ModelRecords,
    others: OtherReferences,
) -> VModelChange:
    """Answer the change from one vmodel record to the next, with the counts of all its models.

    A count can only be wrong if somebody else wrote it: one that cannot be, or that this vmodel
    alone makes up although others name the model, too. It becomes what is known of; no model is
    deleted on the word of such a count. Its record is written even if the number comes out the
    same: whoever counts at that moment takes an unchanged record for unchanged references.
    """
    writes = dict(models)
    miscounts = {}
    held, wanted = references(before), references(after)
    for model_id in sorted(held | wanted):
        record = models[model_id]
        if record is None:
            continue  # it is gone, whoever deleted it
        own = int(model_id in held and stored[model_id] is not None)
        known, count = own + others.get(model_id, 0), record.references
        is_last = count == own and model_id not in wanted
        if not own <= count <= REFERENCES_MAX or (is_last and known > own):
            miscounts[model_id] = (
                f"model {model_id} had {count} references, at least {known} was right"
            )
            count, is_last = known, False
        left = count - own + (model_id in wanted)
        writes[model_id] = (
            None if is_last and record.auto_delete else replace(record, references=left)
        )
    changed = {i: record for i, record in writes.items() if record != stored[i] or i in miscounts}
    return VModelChange(after, changed, miscounts)

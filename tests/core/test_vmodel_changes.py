"""What changes of vmodels write: the rules one by one, and the counts against an obvious model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mm.core.first_use import HOUR_MS
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelInfo, ModelRecord, VModelRecord
from mm.core.vmodel_changes import (
    Facts,
    SetVModel,
    VModelChange,
    plan_complete,
    plan_delete,
    plan_failed,
    plan_set,
)
from mm.errors import MeshError, ModelExistsError, ModelNotFoundError, TargetConflictError

NOW_MS = 1_000 * HOUR_MS
INFO = ModelInfo("type", "path", "key")
OTHER = ModelInfo("type", "another path")
A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
FACTS = Facts(NOW_MS, target_is_loaded=False)


def copies(count: int) -> dict[InstanceId, int]:
    return {InstanceId(f"i{number}"): NOW_MS for number in range(count)}


def model(count: int = 0, **changes: Any) -> ModelRecord:
    return replace(ModelRecord(INFO, copies=copies(count), references=1), **changes)


def change(
    target: ModelId,
    vmodel: VModelRecord | None,
    models: dict[ModelId, ModelRecord | None],
    *,
    facts: Facts = FACTS,
    **wishes: Any,
) -> VModelChange | None:
    request = SetVModel("v", target, **wishes)
    return plan_set(request, vmodel, {target: None, **models}, facts)


# --- setVModel -----------------------------------------------------------------------------------


def test_a_new_vmodel_and_its_new_model() -> None:
    found = change(A, None, {}, info=INFO, auto_delete=True, owner="me")
    record = ModelRecord(INFO, references=1, auto_delete=True, last_used_ms=NOW_MS - 6 * HOUR_MS)
    assert found == VModelChange(VModelRecord(A, A, owner="me"), {A: record})
    found = change(A, None, {}, info=INFO, load_now=True, facts=replace(FACTS, default_owner="us"))
    record = ModelRecord(INFO, references=1, last_used_ms=NOW_MS - HOUR_MS)
    assert found == VModelChange(VModelRecord(A, A, owner="us"), {A: record})


def test_an_existing_model_keeps_what_it_is() -> None:
    used_ms = NOW_MS - 2 * HOUR_MS
    present = ModelRecord(INFO, last_used_ms=used_ms, copies=copies(2))
    found = change(A, None, {A: present}, info=INFO, auto_delete=True)
    assert found is not None
    assert found.models == {A: replace(present, references=1)}, "nor does its last use go back"


@pytest.mark.parametrize(
    ("active_copies", "target_is_loaded", "force", "at_once"),
    [
        (0, False, False, True),
        (1, False, False, False),
        (1, True, False, True),
        (2, True, False, False),
        (2, False, True, True),
    ],
)
def test_when_the_target_is_active_at_once(
    active_copies: int, target_is_loaded: bool, force: bool, at_once: bool
) -> None:
    active = model(active_copies, auto_delete=True, last_used_ms=NOW_MS - 3 * HOUR_MS)
    facts = Facts(NOW_MS, target_is_loaded)
    found = change(B, VModelRecord(A, A, "o"), {A: active}, facts=facts, info=INFO, force=force)
    assert found is not None
    assert found.vmodel == VModelRecord(B if at_once else A, B, "o")
    assert (A in found.models) == at_once
    assert found.models.get(A) is None, "if it is written, then it is deleted"
    target = found.models[B]
    assert target is not None
    assert (target.references, target.last_used_ms) == (1, NOW_MS - 3 * HOUR_MS)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("vmodel", [VModelRecord(A, A), VModelRecord(B, A)])
def test_what_is_so_is_left_alone(vmodel: VModelRecord, failed: bool) -> None:
    vmodel = replace(vmodel, failed=failed)
    models: dict[ModelId, ModelRecord | None] = {A: model(1), B: model(1)}
    assert change(A, vmodel, models, info=INFO) is None
    assert change(A, vmodel, models, expected_target_id="a") is None
    assert change(A, vmodel, models, expected_target_id="c") is None, "it is there already"
    forced = change(A, vmodel, models, force=True)
    assert (forced is None) == (vmodel.active_model_id == A)


def test_back_to_the_active_model() -> None:
    """Java counts it once more each time: it could never be unregistered again (10.4)."""
    target = model(auto_delete=True)
    found = change(A, VModelRecord(A, B, failed=True), {A: model(2), B: target})
    assert found is not None
    assert found.vmodel == VModelRecord(A, A)
    assert found.models[B] is None
    active = found.models.get(A, model())
    assert active is not None
    assert active.references == 1


def test_a_pending_target_forced_counts_once() -> None:
    found = change(B, VModelRecord(A, B, failed=True), {A: model(2), B: model()}, force=True)
    assert found is not None
    assert found.vmodel == VModelRecord(B, B)
    forced, old = found.models[B], found.models[A]
    assert forced is not None
    assert old is not None
    assert (forced.references, old.references) == (1, 0)


def test_another_target_replaces_a_pending_one() -> None:
    found = change(C, VModelRecord(A, B), {A: model(2), B: model()}, info=INFO)
    assert found is not None
    assert found.vmodel == VModelRecord(A, C)
    dropped, new = found.models[B], found.models[C]
    assert A not in found.models
    assert dropped is not None
    assert new is not None
    assert (dropped.references, new.references) == (0, 1)


@pytest.mark.parametrize(
    ("error", "text", "wishes"),
    [
        (ModelNotFoundError, "Target model c not found", {"target": C}),
        (
            ModelExistsError,
            "Target model a already exists with different attribute values",
            {"info": OTHER},
        ),
        (
            ModelExistsError,
            'vmodel v already exists with different owner "me"',
            {"owner": "you"},
        ),
        (
            ModelExistsError,
            'vmodel v already exists with different owner "me"',
            {"owner": "you", "expected_target_id": "a"},
        ),
        (
            TargetConflictError,
            "the target of vmodel v is a, not b",
            {"target": C, "info": INFO, "expected_target_id": "b"},
        ),
    ],
)
def test_refusals(error: type[MeshError], text: str, wishes: dict[str, Any]) -> None:
    wishes = {"target": A, **wishes}
    with pytest.raises(error) as caught:
        change(wishes.pop("target"), VModelRecord(A, A, "me"), {A: model(), B: model()}, **wishes)
    assert caught.value.message == text


def test_refusals_for_one_that_does_not_exist() -> None:
    with pytest.raises(ModelNotFoundError, match="vmodel v not found"):
        change(A, None, {}, info=INFO, update_only=True)
    with pytest.raises(TargetConflictError, match="does not exist"):
        change(A, None, {}, info=INFO, expected_target_id="b", update_only=True)
    assert change(A, None, {}, info=INFO, expected_target_id="a") is not None


def test_a_target_that_vanished_comes_back() -> None:
    found = change(A, VModelRecord(A, A), {}, info=INFO)
    assert found is not None
    assert not found.miscounts
    record = found.models[A]
    assert record is not None
    assert record.references == 1


# --- the end of a transition ---------------------------------------------------------------------


def test_complete_and_failed() -> None:
    models: dict[ModelId, ModelRecord | None] = {A: model(auto_delete=True), B: model()}
    found = plan_complete(VModelRecord(A, B, "o", failed=True), models, {})
    assert found == VModelChange(VModelRecord(B, B, "o"), {A: None})
    assert plan_complete(VModelRecord(B, B), models, {}) is None
    found = plan_failed(VModelRecord(A, B), models, failed=True)
    assert found == VModelChange(VModelRecord(A, B, failed=True), {})
    assert plan_failed(VModelRecord(A, B), models, failed=False) is None
    assert plan_failed(VModelRecord(B, B), models, failed=True) is None


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -3])
def test_a_count_that_is_too_low(count: int) -> None:
    wrong = model(references=count, auto_delete=True)
    gone = plan_delete("", VModelRecord(A, A), {A: wrong}, {})
    assert gone is not None
    assert gone.models == {A: replace(wrong, references=0)}, "written, and not deleted"
    assert gone.miscounts == {A: f"model a had {count} references, at least 1 was right"}
    added = change(A, None, {A: wrong})
    assert added is not None
    assert added.models[A] is not None
    assert added.models[A].references == 1
    kept = change(B, VModelRecord(A, A), {A: replace(wrong, copies=copies(2)), B: model()})
    assert kept is not None
    assert kept.models[A] is not None
    assert kept.models[A].references == 1


@pytest.mark.parametrize("count", [0, 1, -3, 2**31 - 1, 2**63 - 1])
def test_a_count_that_others_belie(count: int) -> None:
    """Nobody loses a model, nor a record its form, for what somebody wrote by hand."""
    wrong = model(references=count, auto_delete=True)
    left = plan_delete("", VModelRecord(A, A), {A: wrong}, {A: 2})
    completed = plan_complete(VModelRecord(A, B), {A: wrong, B: model()}, {A: 2})
    for found in (left, completed):
        assert found is not None
        assert found.models == {A: replace(wrong, references=2)}
        assert found.miscounts == {A: f"model a had {count} references, at least 3 was right"}


@pytest.mark.parametrize("count", [2**31 - 1, 2**63 - 1, -(2**63)])
def test_a_count_that_cannot_be_is_not_added_to(count: int) -> None:
    added = change(A, None, {A: model(references=count)}, facts=replace(FACTS, others={A: 2}))
    assert added is not None
    assert added.models[A] is not None
    assert added.models[A].references == 3
    assert added.miscounts
    most = change(A, None, {A: model(references=2**31 - 2)})
    assert most is not None
    assert not most.miscounts


@dataclass
class _Stored:
    """What anybody would expect of a model: whether it goes when nobody refers to it."""

    auto_delete: bool


class ReferencesMachine(RuleBasedStateMachine):
    """Any sequence of changes; after each one the counts are what is referred to, and a model of
    that kind is gone exactly when nobody refers to it any longer.
    """

    ids = st.sampled_from([ModelId(name) for name in "abc"])
    names = st.sampled_from("vw")

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[ModelId, ModelRecord] = {}
        self.vmodels: dict[str, VModelRecord] = {}
        self.expected: dict[ModelId, _Stored] = {}

    def _known(self) -> dict[ModelId, ModelRecord | None]:
        return {ModelId(name): self.models.get(ModelId(name)) for name in "abc"}

    def _apply(self, name: str, found: VModelChange | None) -> None:
        if found is None:
            return
        assert not found.miscounts
        before = self._referred()
        for model_id, record in found.models.items():
            if record is None:
                del self.models[model_id]
            else:
                self.models[model_id] = record
        if found.vmodel is None:
            del self.vmodels[name]
        else:
            self.vmodels[name] = found.vmodel
        for model_id in set(before) - set(self._referred()):
            if self.expected[model_id].auto_delete:
                del self.expected[model_id]

    def _referred(self, besides: str = "") -> dict[ModelId, int]:
        found: dict[ModelId, int] = {}
        for vmodel in (each for name, each in self.vmodels.items() if name != besides):
            for model_id in {vmodel.active_model_id, vmodel.target_model_id}:
                found[model_id] = found.get(model_id, 0) + 1
        return found

    @rule(
        name=names,
        model_id=ids,
        info=st.booleans(),
        auto_delete=st.booleans(),
        force=st.booleans(),
        loaded=st.booleans(),
    )
    def set(
        self, name: str, model_id: ModelId, info: bool, auto_delete: bool, force: bool, loaded: bool
    ) -> None:
        request = SetVModel(
            name, model_id, info=INFO if info else None, auto_delete=auto_delete, force=force
        )
        known = self._known()
        try:
            found = plan_set(
                request,
                self.vmodels.get(name),
                known,
                Facts(NOW_MS, target_is_loaded=loaded, others=self._referred(name)),
            )
        except ModelNotFoundError:
            assert known[model_id] is None
            assert not info
            return
        if model_id not in self.expected:
            self.expected[model_id] = _Stored(auto_delete)
        self._apply(name, found)

    @rule(name=names)
    def delete(self, name: str) -> None:
        others = self._referred(name)
        self._apply(name, plan_delete("", self.vmodels.get(name), self._known(), others))
        assert name not in self.vmodels

    @rule(name=names)
    def complete(self, name: str) -> None:
        if name in self.vmodels:
            others = self._referred(name)
            self._apply(name, plan_complete(self.vmodels[name], self._known(), others))
            assert self.vmodels[name].active_model_id == self.vmodels[name].target_model_id

    @rule(name=names, failed=st.booleans())
    def fail(self, name: str, failed: bool) -> None:
        if name in self.vmodels:
            self._apply(name, plan_failed(self.vmodels[name], self._known(), failed=failed))

    @rule(model_id=ids)
    def register(self, model_id: ModelId) -> None:
        if model_id not in self.models:
            self.models[model_id] = ModelRecord(INFO)
            self.expected[model_id] = _Stored(auto_delete=False)

    @rule(model_id=ids)
    def unregister(self, model_id: ModelId) -> None:
        record = self.models.get(model_id)
        if record is not None and record.references == 0:
            del self.models[model_id], self.expected[model_id]

    @rule(model_id=ids, count=st.integers(0, 2))
    def load(self, model_id: ModelId, count: int) -> None:
        if model_id in self.models:
            self.models[model_id] = replace(self.models[model_id], copies=copies(count))

    @invariant()
    def counts_are_references(self) -> None:
        referred = self._referred()
        assert {i: r.references for i, r in self.models.items() if r.references} == referred
        assert set(self.models) == set(self.expected)
        assert all(self.models[i].auto_delete == e.auto_delete for i, e in self.expected.items())


TestReferences = ReferencesMachine.TestCase
TestReferences.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

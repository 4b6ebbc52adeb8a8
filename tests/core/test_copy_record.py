"""How far each copy is, as a model's record says it beside Java's ``instanceIds``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.core.copy_record import CopyRecord, CopyStage
from mm.core.ids import InstanceId
from mm.core.records import ModelInfo, ModelRecord
from tests.core.test_records import INT64, MODELS, A, B, model, written

ENTRY = {"ts": 7, "state": "ready", "since": 9, "size": 12}


def test_a_copy_tells_how_far_it_is() -> None:
    record = ModelRecord(ModelInfo("t")).with_copy(A, enqueued_ms=7, last_used_ms=0)
    assert record.copy_state(A) == CopyRecord(7, CopyStage.QUEUED, since_ms=7)
    record = record.with_copy_state(A, CopyStage.LOADING, since_ms=8)
    assert record.copy_state(A) == CopyRecord(7, CopyStage.LOADING, since_ms=8)
    assert written(record)["copies"] == {"a": {"ts": 7, "state": "loading", "since": 8}}
    record = record.with_copy_state(A, CopyStage.READY, since_ms=9, size_units=12)
    assert written(record)["copies"] == {"a": ENTRY}
    state = record.copy_state(A)
    assert state == CopyRecord(7, CopyStage.READY, 9, 12)
    assert state.is_ready
    assert record.copy_state(B) is None


def test_a_size_once_known_stays_until_the_copy_is_another() -> None:
    record = model(type="t", instanceIds={"a": 7}, copies={"a": ENTRY})
    assert record.with_copy_state(A, CopyStage.READY, 10).copy_state(A) == CopyRecord(
        7, CopyStage.READY, 10, 12
    )
    again = record.with_copy(A, enqueued_ms=20, last_used_ms=0)
    assert again.copy_state(A) == CopyRecord(20, CopyStage.QUEUED, 20)


def test_the_same_state_is_no_change() -> None:
    record = model(type="t", instanceIds={"a": 7}, copies={"a": ENTRY})
    assert record.with_copy_state(A, CopyStage.READY, 9, 12) is record
    assert record.with_copy_state(A, CopyStage.READY, 9) is record
    assert record.with_copy_state(B, CopyStage.READY, 9) is record


def test_a_state_of_another_registration_does_not_count() -> None:
    """Java keeps the attribute as it was while it removes a copy, and adds one."""
    assert model(type="t", copies={"a": ENTRY}).copy_state(A) is None
    assert model(type="t", instanceIds={"a": 8}, copies={"a": ENTRY}).copy_state(A) is None
    assert model(type="t", instanceIds={"a": 0}, copies={"a": {**ENTRY, "ts": None}}).copy_state(A)


def test_states_without_a_copy_go_with_the_next_change_and_only_then() -> None:
    left = {"gone": ENTRY, "b": {"ts": 1, "new": True}, "c": "foreign"}
    record = model(type="t", instanceIds={"a": 7, "b": 2, "c": 3}, copies=left)
    assert written(record)["copies"] == left
    kept = {"b": {"ts": 1, "new": True}, "c": "foreign"}
    assert written(record.without_copy(A, now_ms=9))["copies"] == kept
    assert written(record.with_failure(A, 9, "x"))["copies"] == kept
    assert "gone" not in written(record.with_copy(A, 9, 9))["copies"]
    assert written(record.without_copy(B, now_ms=9))["copies"] == {"c": "foreign"}


def test_the_state_goes_with_its_copy() -> None:
    record = model(type="t", instanceIds={"a": 7}, copies={"a": ENTRY})
    assert "copies" not in written(record.without_copy(A, now_ms=9))
    assert "copies" not in written(record.with_failure(A, 9, "x"))


def test_what_a_newer_version_says_of_a_copy_is_kept_while_it_is_the_same() -> None:
    entry = {**ENTRY, "state": "loading", "gpu": [0, 1]}
    record = model(type="t", instanceIds={"a": 7}, copies={"a": entry})
    ready = record.with_copy_state(A, CopyStage.READY, 9, 12)
    assert written(ready)["copies"] == {"a": {**ENTRY, "gpu": [0, 1]}}
    again = record.with_copy(A, 20, 0).with_copy_state(A, CopyStage.READY, 21)
    assert written(again)["copies"] == {"a": {"ts": 20, "state": "ready", "since": 21}}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "ready",
        5,
        [ENTRY],
        {},
        {**ENTRY, "state": "sizing"},
        {**ENTRY, "state": ["ready"]},
        {**ENTRY, "state": None},
        {**ENTRY, "ts": "7"},
        {**ENTRY, "ts": 7.0},
        {**ENTRY, "since": True},
        {**ENTRY, "since": 2**63},
        {**ENTRY, "size": -1},
        {**ENTRY, "size": {"mem": 4}},
    ],
)
def test_a_foreign_state_is_no_state_and_is_kept(entry: object) -> None:
    record = model(type="t", instanceIds={"a": 7}, copies={"a": entry})
    assert record.copy_state(A) is None
    assert written(record)["copies"] == {"a": entry}
    assert record.with_copy_state(A, CopyStage.READY, 9, 12).copy_state(A) == CopyRecord(
        7, CopyStage.READY, 9, 12
    )


@pytest.mark.parametrize("value", ["x", 5, [], [1], True, False, 0, ""])
def test_a_foreign_attribute_of_that_name_is_kept_until_states_are_written(value: object) -> None:
    record = model(type="t", instanceIds={"a": 7}, copies=value)
    assert record.copy_state(A) is None
    assert written(record)["copies"] == value
    assert written(record.with_copy(A, 9, 0))["copies"] == {
        "a": {"ts": 9, "state": "queued", "since": 9}
    }


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["copy", "uncopy", "fail", "queued", "loading", "ready"]),
        st.sampled_from([A, B]),
        INT64,
    ),
    max_size=8,
)


def changed(record: ModelRecord, kind: str, instance_id: InstanceId, now_ms: int) -> ModelRecord:
    match kind:
        case "copy":
            return record.with_copy(instance_id, now_ms, 0)
        case "uncopy":
            return record.without_copy(instance_id, now_ms)
        case "fail":
            return record.with_failure(instance_id, now_ms, "x")
        case _:
            return record.with_copy_state(instance_id, CopyStage(kind), now_ms)


@given(record=MODELS, changes=CHANGES)
def test_states_keep_in_step_with_copies(
    record: ModelRecord, changes: list[tuple[str, InstanceId, int]]
) -> None:
    others = {i: e for i, e in record.copy_details.items() if i in record.copies}
    for kind, instance_id, now_ms in changes:
        others.pop(instance_id, None)
        record = changed(record, kind, instance_id, now_ms)
        assert ModelRecord.decode(record.encode()) == record
        assert others.items() <= record.copy_details.items()
        state = record.copy_state(instance_id)
        assert (state is not None) == (instance_id in record.copies)
        if state is not None:
            assert state.stage is CopyStage("queued" if kind == "copy" else kind)

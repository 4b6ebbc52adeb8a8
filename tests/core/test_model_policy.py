"""The attribute ``policy`` of a model's record: read leniently, written with what is others'."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mm.core.ids import InstanceId
from mm.core.model_policy import COPIES_MIN_MAX, ModelPolicy
from mm.core.records import ModelInfo, ModelRecord


def record(**attributes: Any) -> ModelRecord:
    return ModelRecord.decode(json.dumps({"type": "t", **attributes}).encode())


def written(record: ModelRecord) -> Any:
    return json.loads(record.encode())


def test_what_is_said_by_default_is_not_written() -> None:
    assert "policy" not in written(ModelRecord(ModelInfo("t")))
    policy = ModelPolicy(2, pinned=True)
    assert written(ModelRecord(ModelInfo("t")).with_policy(policy))["policy"] == {
        "min_copies": 2,
        "pinned": True,
    }
    assert record(policy={"min_copies": 2, "pinned": True}).policy == policy
    assert written(record(policy={"min_copies": 2}).with_policy(ModelPolicy())) == {"type": "t"}
    assert written(
        record(policy={"min_copies": 2, "pinned": True}).with_policy(ModelPolicy(2))
    ) == {
        "type": "t",
        "policy": {"min_copies": 2},
    }


def test_every_change_of_a_record_keeps_its_policy_and_what_others_wrote_there() -> None:
    before = record(policy={"min_copies": 3, "newer": [1]})
    changed = before.with_copy(InstanceId("i"), 5, 7).with_failure(InstanceId("i"), 8, "no")
    changed = changed.without_failure(InstanceId("i")).used(9)
    assert written(changed)["policy"] == {"min_copies": 3, "newer": [1]}
    assert written(changed.with_policy(ModelPolicy(pinned=True)))["policy"] == {
        "pinned": True,
        "newer": [1],
    }
    assert before.with_policy(ModelPolicy(3)) is before


@pytest.mark.parametrize(
    ("found", "policy"),
    [
        ({"min_copies": -1, "pinned": True}, ModelPolicy(0, pinned=True)),
        ({"min_copies": COPIES_MIN_MAX + 1}, ModelPolicy()),
        ({"min_copies": COPIES_MIN_MAX}, ModelPolicy(COPIES_MIN_MAX)),
        ({"min_copies": "3", "pinned": 1}, ModelPolicy()),
        ({"min_copies": 2.5, "pinned": "true"}, ModelPolicy()),
        ({"min_copies": None}, ModelPolicy()),
        ({"min_copies": True}, ModelPolicy()),
        ([1], ModelPolicy()),
        ("pinned", ModelPolicy()),
    ],
)
def test_what_is_no_policy_is_kept_and_means_none(found: Any, policy: ModelPolicy) -> None:
    assert record(policy=found).policy == policy
    assert written(record(policy=found))["policy"] == found


def test_of_what_is_pinned_a_copy_is_needed() -> None:
    needed = [ModelPolicy(n, pinned=p).copies_needed for n in (0, 1, 3) for p in (False, True)]
    assert needed == [0, 1, 1, 1, 3, 3]

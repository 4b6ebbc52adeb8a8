"""Which replica sets are on their way out (spec core 4.6)."""

from __future__ import annotations

import pytest

from mm.core.ids import InstanceId
from mm.core.replica_sets import ReplicaSets, replica_set_of

MINUTE = 60_000
NOW = 10**12
OLD = [InstanceId(f"bbbbbb-2222{n}") for n in "bcd"]
NEW = [InstanceId(f"zzzzzz-2222{n}") for n in "bcd"]
LABELS = ("a", "b")


def sets_of(old_ago: list[int], new_ago: list[int]) -> ReplicaSets:
    """Answer sets whose pods started so many minutes ago."""
    sets = ReplicaSets()
    for ids, ages in ((OLD, old_ago), (NEW, new_ago)):
        for instance_id, age in zip(ids, ages, strict=False):
            sets.add(instance_id, LABELS, NOW - age * MINUTE)
    return sets


def replaced(sets: ReplicaSets, now_ms: int = NOW) -> list[str]:
    return sorted(name for _, name in sets.replaced(now_ms))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("f9c5bc-x7k2p", "f9c5bc"),
        ("instance-one", ""),
        ("a", ""),
        ("f9c5bc-x7k2pp", ""),
        ("f9c5bcx-7k2p", ""),
        ("node01-abcde", ""),
    ],
)
def test_the_replica_set_is_part_of_a_pods_id(name: str, expected: str) -> None:
    assert replica_set_of(name) == expected


@pytest.mark.parametrize(
    ("name", "old_ago", "new_ago", "expected"),
    [
        ("alone", [500, 400], [], []),
        ("a rollout has begun", [500, 400], [1], ["bbbbbb"]),
        ("the newest pod is still starting", [500], [10], ["bbbbbb"]),
        ("nothing has happened for long", [500], [11], []),
        ("the old one changed not long ago", [14, 500], [12], ["bbbbbb"]),
        ("the rollout is over", [500], [21], []),
        ("both are still growing", [500, 1], [5], []),
        ("rolled back: the old one is the newest", [2], [500], ["zzzzzz"]),
    ],
)
def test_who_is_being_replaced(
    name: str, old_ago: list[int], new_ago: list[int], expected: list[str]
) -> None:
    assert replaced(sets_of(old_ago, new_ago)) == expected, name


def test_pods_that_go_keep_the_rollout_going() -> None:
    sets = sets_of([500, 500], [12])
    assert replaced(sets) == []
    sets.remove(OLD[0], LABELS, NOW - 500 * MINUTE, NOW)
    assert replaced(sets) == ["bbbbbb"]
    assert replaced(sets, NOW + 9 * MINUTE) == [], "the newest pod is too old by now"


def test_other_labels_are_another_deployment() -> None:
    sets = sets_of([500], [])
    sets.add(NEW[0], ("a",), NOW)
    assert replaced(sets) == []


def test_equal_labels_are_one_group_though_not_one_object() -> None:
    sets = sets_of([500], [])
    sets.add(NEW[0], tuple("ab"), NOW)
    assert replaced(sets) == ["bbbbbb"]


def test_nothing_is_left_of_those_that_are_gone() -> None:
    sets = sets_of([500, 400], [1])
    for instance_id, age in ((OLD[0], 500), (NEW[0], 1), (OLD[1], 400)):
        sets.remove(instance_id, LABELS, NOW - age * MINUTE, NOW)
    assert (sets._groups, sets._mixed) == ({}, set())
    sets.add(InstanceId("plain"), LABELS, NOW)
    sets.remove(InstanceId("plain"), LABELS, NOW, NOW)

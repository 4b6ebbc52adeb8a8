"""Placement beyond room and age: versions, labels, calls, copies elsewhere, rollouts."""

from __future__ import annotations

from itertools import permutations
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.cluster_view import ClusterView, InstanceView
from mm.core.ids import InstanceId, ModelId
from mm.core.placement import (
    Placement,
    PlacementReason,
    PlacementRequest,
    choose_instance,
    is_still_right,
)
from mm.core.placement_bands import Ranking
from mm.core.records import InstanceRecord
from tests.core.placements import (
    HOUR_MS,
    MINUTE_MS,
    NOW_MS,
    SATURATED_MS,
    SECOND_MS,
    cluster,
    instance,
)


def place(view: ClusterView, *, seed: int = 0, **request: Any) -> Placement:
    for name in ("excludes", "holders"):
        request[name] = frozenset(InstanceId(each) for each in request.get(name, "").split())
    wanted = PlacementRequest(ModelId("m"), "t", **request)
    return choose_instance(view, wanted, Random(seed))


def shortlist(view: ClusterView, **request: Any) -> str:
    return " ".join(place(view, **request).shortlist)


# --- versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instances", "expected"),
    [
        (
            "the newer version first, though it has less room",
            [instance("old", free=900, version=1), instance("new", free=200, version=2)],
            "new",
        ),
        (
            "though it is full and the other is not",
            [instance("old", free=900, version=1), instance("new", free=0, version=2)],
            "new",
        ),
        (
            "but not once it throws out what is in use",
            [
                instance("old", free=900, version=1),
                instance("new", free=0, age_ms=SATURATED_MS - 1, version=2),
            ],
            "old",
        ),
        (
            "if all thrash, the version does not matter",
            [
                instance("old", free=0, age_ms=MINUTE_MS, version=1),
                instance("new", free=0, age_ms=MINUTE_MS, version=2),
            ],
            "new old",
        ),
        (
            "one that does not say its version is the oldest",
            [instance("java", free=900), instance("new", version=2)],
            "new",
        ),
    ],
)
def test_versions(name: str, instances: list[InstanceView], expected: str) -> None:
    assert shortlist(cluster(*instances)) == expected, name


# --- labels -------------------------------------------------------------------------------------


def test_required_labels_rule_instances_out() -> None:
    instances = [instance("a", free=900), instance("b", free=200, labels="gpu")]
    view = cluster(*instances, types={"t": ("gpu", "")})
    assert shortlist(view) == "b"
    assert place(view, excludes="b") == Placement(None, PlacementReason.NOWHERE)
    nobody = cluster(instances[0], types={"t": ("gpu", "")})
    assert place(nobody) == Placement(None, PlacementReason.NOT_ALLOWED)
    assert place(nobody, favour_self=True).instance_id is None


@pytest.mark.parametrize(
    ("name", "instances", "expected"),
    [
        (
            "a preferred one with room is taken, however little it is",
            [instance("a", free=900), instance("b", free=100, labels="ssd")],
            "b",
        ),
        (
            "among preferred ones the most spacious count",
            [
                instance("a", free=900),
                instance("b", free=100, labels="ssd"),
                instance("c", free=300, labels="ssd"),
                instance("d", free=200, labels="ssd"),
            ],
            "c d",
        ),
        (
            "no room at preferred ones: there are others",
            [instance("a", free=900), instance("b", free=99, labels="ssd")],
            "a",
        ),
        (
            "the best is preferred: others that are as good are not wanted",
            [instance("a", free=800), instance("b", free=900, labels="ssd")],
            "b",
        ),
        (
            "all full: a preferred one may throw out something two minutes younger",
            [
                instance("a", free=0, age_ms=5 * MINUTE_MS),
                instance("b", free=0, age_ms=3 * MINUTE_MS, labels="ssd"),
            ],
            "b",
        ),
        (
            "but not what is much younger",
            [
                instance("a", free=0, age_ms=5 * MINUTE_MS),
                instance("b", free=0, age_ms=3 * MINUTE_MS - 1, labels="ssd"),
            ],
            "a",
        ),
        (
            "or a quarter younger",
            [
                instance("a", free=0, age_ms=40 * HOUR_MS),
                instance("b", free=0, age_ms=30 * HOUR_MS, labels="ssd"),
                instance("c", free=0, age_ms=30 * HOUR_MS - 1, labels="ssd"),
            ],
            "b",
        ),
    ],
)
def test_preferred_labels(name: str, instances: list[InstanceView], expected: str) -> None:
    assert shortlist(cluster(*instances, types={"t": ("", "ssd")})) == expected, name


def test_a_type_without_preference_keeps_specialised_instances_free() -> None:
    gpu = instance("gpu", free=900, labels="gpu")
    view = cluster(gpu, instance("plain", free=200), types={"other": ("gpu", "")})
    assert shortlist(view) == "plain"


# --- calls, and copies elsewhere ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age_ms", "expected"),
    [
        (-2 * SECOND_MS, "a"),
        (0, "a b"),
        (4 * SECOND_MS, "a b"),
        (11 * MINUTE_MS, "a b c"),
        (23 * HOUR_MS, "a b c d"),
        (25 * HOUR_MS, "a b c d e"),
    ],
)
def test_busy_instances_are_spared_the_models_that_bring_calls(age_ms: int, expected: str) -> None:
    rpm = {"a": 200, "b": 300, "c": 600, "d": 800, "e": 801}
    view = cluster(*(instance(name, busyness_rpm=each) for name, each in rpm.items()))
    assert shortlist(view, last_used_ms=NOW_MS - age_ms) == expected


def test_below_a_hundred_calls_a_minute_nobody_is_busy() -> None:
    view = cluster(instance("a"), instance("b", busyness_rpm=110), instance("c", busyness_rpm=111))
    assert shortlist(view, last_used_ms=NOW_MS + 2 * SECOND_MS) == "a b"


@pytest.mark.parametrize(("loads_count", "expected"), [(4, "a"), (8, "a"), (9, "a b")])
def test_who_has_few_calls_is_no_place_to_queue_at(loads_count: int, expected: str) -> None:
    """Four loads are a round; the other one has one to itself."""
    idle = instance("b", busyness_rpm=900, loads_in_progress=4)
    view = cluster(instance("a", busyness_rpm=200, loads_in_progress=loads_count), idle)
    assert shortlist(view, last_used_ms=NOW_MS) == expected


def test_copies_are_spread_over_zones_and_then_over_machines() -> None:
    at = {"a": ("z1", "n1"), "b": ("z1", "n2"), "c": ("z2", "n3"), "d": ("z2", "n3")}
    view = cluster(*(instance(n, zone=zone, location=node) for n, (zone, node) in at.items()))
    assert shortlist(view) == "a b c d"
    assert shortlist(view, holders="a", excludes="a") == "c d"
    assert shortlist(view, holders="c", excludes="c") == "a b"
    assert shortlist(view, holders="a c", excludes="a c") == "b"
    assert shortlist(view, holders="a b c", excludes="a b c") == "d"


def test_no_zone_is_not_a_zone_of_its_own() -> None:
    view = cluster(instance("a"), instance("b"), instance("c", location="n"))
    assert shortlist(view, holders="a", excludes="a") == "b c"


def test_spreading_is_for_equals_only() -> None:
    near = [instance("a", zone="z"), instance("b", free=800, zone="z")]
    view = cluster(*near, instance("far", free=100, zone="y"))
    assert shortlist(view, holders="a", excludes="a") == "b"


# --- rollouts -------------------------------------------------------------------------------------


def test_replica_sets_on_their_way_out_are_avoided_while_there_are_others() -> None:
    view = cluster(
        instance("old", free=900, replica_set="bbbbbb"),
        instance("new", free=200, replica_set="zzzzzz"),
        replaced=frozenset({((), "bbbbbb")}),
    )
    assert shortlist(view) == "new"
    assert shortlist(view, excludes="new") == "old"


@pytest.mark.parametrize(
    ("name", "new", "expected"),
    [
        ("it has room", {"free": 200}, "new"),
        ("what it throws out has not been used for long", {"free": 0, "age_ms": HOUR_MS}, "new"),
        ("it would throw out what is in use", {"free": 0, "age_ms": MINUTE_MS}, "old"),
    ],
)
def test_one_new_instance_has_not_to_take_what_all_the_old_ones_would(
    name: str, new: dict[str, Any], expected: str
) -> None:
    view = cluster(
        instance("old", free=0, replica_set="bbbbbb"),
        instance("new", replica_set="zzzzzz", **new),
        replaced=frozenset({((), "bbbbbb")}),
    )
    assert shortlist(view) == expected, name


def test_where_first_loads_failed_others_load_while_there_are_any() -> None:
    view = cluster(
        instance("old", free=100, replica_set="bbbbbb"),
        instance("new", free=900, replica_set="zzzzzz", version=2, loads_fail=True),
        replaced=frozenset({((), "bbbbbb")}),
    )
    assert shortlist(view) == "old"
    assert shortlist(view, excludes="old") == "new"


def test_an_instance_that_is_too_small_need_not_try() -> None:
    view = cluster(instance("a", free=900), instance("b", capacity_units=2000))
    assert place(view, needed_units=1001).shortlist == ("b",)
    assert place(view, needed_units=2001).reason is PlacementReason.NOWHERE


# --- what always holds ----------------------------------------------------------------------------

RECORDS = st.builds(
    InstanceRecord,
    version=st.integers(0, 2),
    zone=st.sampled_from(["", "y", "z"]),
    location=st.sampled_from(["", "n", "m"]),
    labels=st.sampled_from([(), ("gpu",), ("ssd",), ("gpu", "ssd")]),
    lru_time_ms=st.integers(NOW_MS - 10**8, NOW_MS),
    count=st.integers(0, 30),
    capacity_units=st.integers(0, 2000),
    used_units=st.integers(0, 2500),
    loading_threads=st.integers(0, 4),
    loads_in_progress=st.integers(0, 9),
    busyness_rpm=st.integers(0, 900),
    shutting_down=st.booleans(),
    min_space_units=st.sampled_from([0, 300]),
    loads_fail=st.booleans(),
)
INSTANCES = st.lists(
    st.builds(
        InstanceView,
        instance_id=st.sampled_from(["me", *"abcdefgh"]).map(InstanceId),
        record=RECORDS,
        reachable=st.booleans(),
        sent_units=st.integers(0, 500),
        sent_count=st.integers(0, 3),
        replica_set=st.sampled_from(["", "bbbbbb"]),
    ),
    unique_by=lambda each: each.instance_id,
    max_size=9,
)
TYPES = st.sampled_from(
    [{}, {"t": ("gpu", "")}, {"t": ("", "ssd")}, {"t": ("gpu", "ssd")}, {"u": ("gpu", "")}]
)
IDS = st.frozensets(st.sampled_from(["me", *"abcd"]).map(InstanceId))


@settings(deadline=None)
@given(
    instances=INSTANCES,
    types=TYPES,
    excludes=IDS,
    holders=IDS,
    needed_units=st.sampled_from([0, 0, 1500]),
    size_units=st.integers(0, 2500),
    age_ms=st.integers(-9999, 10**9),
    favour_self=st.booleans(),
    is_rollout=st.booleans(),
    seed=st.integers(0, 10**9),
)
def test_who_may_not_is_never_chosen_and_someone_who_may_is(
    instances: list[InstanceView],
    types: dict[str, tuple[str, str]],
    excludes: frozenset[InstanceId],
    holders: frozenset[InstanceId],
    needed_units: int,
    size_units: int,
    age_ms: int,
    favour_self: bool,
    is_rollout: bool,
    seed: int,
) -> None:
    replaced = frozenset({(("gpu",), "bbbbbb")}) if is_rollout else frozenset()
    view = cluster(*instances, types=types, replaced=replaced)
    request = PlacementRequest(
        ModelId("m"),
        "t",
        excludes=excludes,
        holders=holders,
        size_units=size_units,
        needed_units=needed_units,
        last_used_ms=NOW_MS - age_ms,
        favour_self=favour_self,
    )
    placement = choose_instance(view, request, Random(seed))
    required = set(types.get("t", ("", ""))[0].split())
    may = {
        each.instance_id
        for each in instances
        if each.reachable
        and not each.record.shutting_down
        and each.instance_id not in excludes
        and each.record.capacity_units >= needed_units
        and required <= set(each.record.labels)
    }
    assert (placement.instance_id is None) == (not may)
    assert set(placement.shortlist) <= may
    if placement.instance_id is not None:
        assert placement.instance_id in placement.shortlist
    assert is_still_right(view, request) in (True, False)


@settings(deadline=None)
@given(instances=INSTANCES, size_units=st.integers(0, 2500))
def test_the_key_is_a_total_and_transitive_order(
    instances: list[InstanceView], size_units: int
) -> None:
    ranking = Ranking(cluster(*instances), size_units)

    def before(x: InstanceView, y: InstanceView) -> bool:
        return ranking.key(x) < ranking.key(y)

    for x, y in permutations(instances, 2):
        assert before(x, y) != before(y, x)
    for x, y, z in permutations(instances[:5], 3):
        assert before(x, z) or not (before(x, y) and before(y, z))
    if not instances:
        return
    best, grade, alike = ranking.leaders(instances)
    assert best is min(instances, key=ranking.key)
    assert grade is ranking.grade(best)
    assert alike == [e for e in instances if ranking.key(e)[:2] == ranking.key(best)[:2]]
    assert best in ranking.as_good(alike, best, grade)
    assert all(weight > 0 for weight in ranking.weights(alike, grade))

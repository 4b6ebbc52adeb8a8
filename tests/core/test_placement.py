"""Placement: tables of who is as good as whom, and what must hold in every cluster."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.cluster_view import ClusterView, InstanceView
from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.placement import (
    Placement,
    PlacementReason,
    PlacementRequest,
    choose_instance,
)
from mm.core.records import InstanceRecord

NOW_MS = 1_700_000_000_000
MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
MIN_SPACE = 100

ROOM, OLDEST, TOO_SMALL, NOWHERE = (
    PlacementReason.ROOM,
    PlacementReason.OLDEST,
    PlacementReason.TOO_SMALL,
    PlacementReason.NOWHERE,
)


def instance(name: str, *, free: int = 500, age_ms: int = HOUR_MS, **changes: Any) -> InstanceView:
    """Answer an instance of 1000 units whose oldest model was last used ``age_ms`` ago."""
    view = {
        key: changes.pop(key) for key in ("reachable", "sent_units", "sent_count") if key in changes
    }
    record = {
        "capacity_units": 1000,
        "used_units": changes.get("capacity_units", 1000) - free,
        "lru_time_ms": NOW_MS - age_ms,
        "loading_threads": 4,
        "count": 5,
        "address": f"{name}:8080",
    }
    return InstanceView(InstanceId(name), InstanceRecord(**{**record, **changes}), **view)


def place(
    *instances: InstanceView,
    excludes: str = "",
    size_units: int = 0,
    favour_self: bool = False,
    seed: int = 0,
) -> Placement:
    """Place a model; the instance called "me" decides."""
    view = ClusterView(instances, InstanceId("me"), NOW_MS, MIN_SPACE)
    request = PlacementRequest(
        ModelId("m"),
        excludes=frozenset(InstanceId(name) for name in excludes.split()),
        size_units=size_units,
        favour_self=favour_self,
    )
    return choose_instance(view, request, Random(seed))


def shortlist(*instances: InstanceView, **request: Any) -> str:
    return " ".join(place(*instances, **request).shortlist)


# --- who may be chosen --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unfit",
    [
        instance("a", free=900, reachable=False),
        instance("a", free=900, shutting_down=True),
        instance("x", free=900),
    ],
)
def test_the_unreachable_the_leaving_and_the_excluded_are_not_chosen(unfit: InstanceView) -> None:
    placement = place(unfit, instance("b", free=0), excludes="x")
    assert placement.instance_id == "b"
    assert place(unfit, excludes="x") == Placement(None, NOWHERE)


def test_in_an_empty_cluster_there_is_nowhere() -> None:
    assert place() == Placement(None, NOWHERE)


# --- who is best, and who is as good ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instances", "expected"),
    [
        (
            "half of the best one's space is as good",
            [instance("a", free=800), instance("b", free=400), instance("c", free=399)],
            "a b",
        ),
        (
            "a full one is not as good as one with room",
            [instance("a", free=100), instance("b", free=99), instance("c", free=0)],
            "a",
        ),
        (
            "many more models count, from ten on",
            [
                instance("a", free=800, count=8),
                instance("b", free=700, count=9),
                instance("c", free=700, count=12),
                instance("d", free=700, count=13),
            ],
            "a b c",
        ),
        (
            "up to nine models their number does not matter",
            [instance("a", free=800, count=0), instance("b", free=700, count=9)],
            "a b",
        ),
        (
            "of two with the same space the one with fewer models is the measure",
            [instance("a", count=100), instance("b", count=5)],
            "b",
        ),
        (
            "fewer models than the best one are no objection",
            [instance("a", free=800, count=100), instance("b", free=700, count=1)],
            "a b",
        ),
        (
            "with room the age of models does not matter",
            [instance("a", free=800, age_ms=1), instance("b", free=800, age_ms=100 * HOUR_MS)],
            "a b",
        ),
        (
            "what was sent and is not published yet is not free",
            [instance("a", free=800, sent_units=500), instance("b", free=700)],
            "b",
        ),
        (
            "more sent than was free is full, not negative",
            [instance("a", free=800, sent_units=900), instance("b", free=99, age_ms=HOUR_MS)],
            "a b",
        ),
    ],
)
def test_with_room(name: str, instances: list[InstanceView], expected: str) -> None:
    assert shortlist(*instances) == expected, name


@pytest.mark.parametrize(
    ("name", "instances", "expected"),
    [
        (
            "45 seconds make no difference",
            [
                instance("a", age_ms=2 * MINUTE_MS),
                instance("b", age_ms=2 * MINUTE_MS - 45_000),
                instance("c", age_ms=2 * MINUTE_MS - 45_001),
            ],
            "a b",
        ),
        (
            "nor does a tenth of the oldest one's age",
            [
                instance("a", age_ms=20 * HOUR_MS),
                instance("b", age_ms=18 * HOUR_MS),
                instance("c", age_ms=18 * HOUR_MS - 1),
            ],
            "a b",
        ),
        (
            "a used time in the future has no age",
            [instance("a", age_ms=-20 * HOUR_MS), instance("b", age_ms=-20 * HOUR_MS - 45_001)],
            "a",
        ),
        (
            "one that does not say is the last to ask",
            [instance("a", lru_time_ms=0), instance("b", age_ms=0)],
            "b",
        ),
        (
            "one that is full without models (all is being unloaded) is the last to ask",
            [instance("a", lru_time_ms=NEVER_MS), instance("b", age_ms=0)],
            "b",
        ),
        (
            "two of those are equal",
            [instance("a", lru_time_ms=NEVER_MS), instance("b", lru_time_ms=0)],
            "a b",
        ),
    ],
)
def test_full(name: str, instances: list[InstanceView], expected: str) -> None:
    full = [
        InstanceView(each.instance_id, each.record, sent_units=each.record.remaining_units)
        for each in instances
    ]
    assert shortlist(*full) == expected, name
    assert place(*full).reason is OLDEST


@pytest.mark.parametrize(
    ("size_units", "expected", "reason"),
    [
        (0, "a", ROOM),
        (100, "a", ROOM),
        (101, "a b", OLDEST),
        (200, "a b", OLDEST),
        (201, "a", OLDEST),
        (1000, "a", OLDEST),
        (1001, "c", OLDEST),
        (2001, "c", TOO_SMALL),
    ],
)
def test_a_known_size_must_fit(size_units: int, expected: str, reason: PlacementReason) -> None:
    instances = [
        instance("a", free=100),
        instance("b", free=99, capacity_units=200),
        instance("c", free=50, capacity_units=2000, age_ms=0),
    ]
    placement = place(*instances, size_units=size_units)
    assert " ".join(placement.shortlist) == expected
    assert placement.reason is reason


def test_remaining_space_is_never_negative() -> None:
    assert instance("a", free=10, sent_units=11).remaining_units == 0
    assert instance("a", free=10, sent_units=9).remaining_units == 1


# --- chance -------------------------------------------------------------------------------------


def chosen(*instances: InstanceView, **request: Any) -> Counter[str]:
    picks = (place(*instances, seed=seed, **request).instance_id for seed in range(1000))
    return Counter(str(pick) for pick in picks)


def test_equals_are_chosen_equally_often() -> None:
    counts = chosen(*(instance(name) for name in "abcd"))
    assert set(counts) == set("abcd")
    assert min(counts.values()) > 180


def test_the_busier_of_two_is_not_chosen() -> None:
    counts = chosen(instance("a", loads_in_progress=1), instance("b"))
    assert counts == {"b": 1000}


def test_busy_is_measured_by_loading_threads() -> None:
    busy = instance("a", loads_in_progress=5, loading_threads=8)
    assert chosen(busy, instance("b", loads_in_progress=1, loading_threads=1)) == {"a": 1000}
    silent = instance("c", loads_in_progress=1, loading_threads=0)
    assert chosen(busy, silent) == {"a": 1000}


def test_loads_sent_there_count_before_they_are_published() -> None:
    assert chosen(instance("a", sent_count=1), instance("b")) == {"b": 1000}


def test_of_many_the_least_busy_is_not_run_over() -> None:
    """Stale records would send everybody to one favourite: it gets its two chances in n."""
    busy = [instance(name, loads_in_progress=2) for name in "abcdefg"]
    counts = chosen(instance("idle"), *busy)
    assert 180 < counts["idle"] < 320
    assert min(counts.values()) > 60


def test_a_burst_spreads_if_each_load_is_noted() -> None:
    sent: Counter[str] = Counter()
    for seed in range(40):
        instances = [
            instance(name, sent_units=10 * sent[name], sent_count=sent[name]) for name in "abcd"
        ]
        sent[str(place(*instances, seed=seed).instance_id)] += 1
    assert max(sent.values()) - min(sent.values()) <= 3


# --- ourselves ----------------------------------------------------------------------------------


def test_self_is_favoured_if_it_is_as_good() -> None:
    here = instance("me", free=450, loads_in_progress=3)
    assert chosen(here, instance("a", free=800), favour_self=True) == {"me": 1000}
    assert chosen(here, instance("a", free=800)) == {"a": 1000}


def test_self_is_not_favoured_if_it_is_worse_or_excluded() -> None:
    here = instance("me", free=100)
    assert chosen(here, instance("a", free=800), favour_self=True) == {"a": 1000}
    here = instance("me", free=900)
    assert chosen(here, instance("a"), favour_self=True, excludes="me") == {"a": 1000}


# --- what always holds --------------------------------------------------------------------------

TIMES = st.one_of(st.sampled_from([0, NEVER_MS, -1]), st.integers(NOW_MS - 10**9, NOW_MS + 10**5))
RECORDS = st.builds(
    InstanceRecord,
    lru_time_ms=TIMES,
    count=st.integers(0, 30),
    capacity_units=st.integers(0, 2000),
    used_units=st.integers(0, 2500),
    loading_threads=st.integers(0, 4),
    loads_in_progress=st.integers(0, 9),
    shutting_down=st.booleans(),
)
INSTANCES = st.lists(
    st.builds(
        InstanceView,
        instance_id=st.sampled_from(["me", *"abcdefgh"]).map(InstanceId),
        record=RECORDS,
        reachable=st.booleans(),
        sent_units=st.integers(0, 500),
        sent_count=st.integers(0, 3),
    ),
    unique_by=lambda each: each.instance_id,
    max_size=9,
)
REQUESTS = st.builds(
    PlacementRequest,
    model_id=st.just(ModelId("m")),
    excludes=st.frozensets(st.sampled_from(["me", *"abcd"]).map(InstanceId)),
    size_units=st.integers(0, 2500),
    favour_self=st.booleans(),
)


def fit(instances: list[InstanceView], request: PlacementRequest) -> dict[InstanceId, InstanceView]:
    return {
        each.instance_id: each
        for each in instances
        if each.reachable
        and not each.record.shutting_down
        and each.instance_id not in request.excludes
    }


@settings(deadline=None)
@given(instances=INSTANCES, request=REQUESTS, seed=st.integers(0, 10**9))
def test_in_every_cluster(
    instances: list[InstanceView], request: PlacementRequest, seed: int
) -> None:
    view = ClusterView(tuple(instances), InstanceId("me"), NOW_MS, MIN_SPACE)
    placement = choose_instance(view, request, Random(seed))
    allowed = fit(instances, request)
    assert (placement.instance_id is None) is (not allowed)
    if placement.instance_id is None:
        return
    assert placement.instance_id in placement.shortlist
    assert set(placement.shortlist) <= set(allowed)
    if request.favour_self and "me" in placement.shortlist:
        assert placement.instance_id == "me"
    able = [each for each in allowed.values() if each.record.capacity_units >= request.size_units]
    space = max(MIN_SPACE, request.size_units)
    roomy = [each for each in able if each.remaining_units >= space]
    chosen_view = allowed[placement.instance_id]
    if roomy:
        assert chosen_view in roomy
        assert placement.reason is ROOM
    elif able:
        assert chosen_view in able


@settings(deadline=None)
@given(instances=INSTANCES, request=REQUESTS, seed=st.integers(0, 10**9), shuffle=st.randoms())
def test_neither_the_order_nor_those_that_cannot_be_chosen_change_anything(
    instances: list[InstanceView], request: PlacementRequest, seed: int, shuffle: Random
) -> None:
    allowed = list(fit(instances, request).values())
    shuffle.shuffle(allowed)
    answers = [
        choose_instance(
            ClusterView(tuple(view), InstanceId("me"), NOW_MS, MIN_SPACE), request, Random(seed)
        )
        for view in (instances, allowed)
    ]
    assert answers[0] == answers[1]

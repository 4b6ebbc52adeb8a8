"""Bursts of placements from old records, and what the chosen instance makes of a choice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.cluster_state import ClusterState
from mm.core.cluster_view import InstanceView
from mm.core.hop_state import HopState
from mm.core.ids import InstanceId, ModelId
from mm.core.placement import (
    REFUSE_LOADS_MIN,
    PlacementRequest,
    choose_instance,
    is_still_right,
)
from mm.core.records import InstanceRecord
from tests.core.placements import HOUR_MS, ME, MIN_SPACE, MINUTE_MS, NOW_MS, cluster, instance

# --- bursts ---------------------------------------------------------------------------------------

NAMES = [InstanceId(f"i{number:02}") for number in range(16)]
IDLE = InstanceRecord(
    address="x:1", capacity_units=10_000, used_units=1_000, loading_threads=4, count=10
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 80))
def test_a_burst_at_one_instance_is_spread_evenly(seed: int, count: int) -> None:
    state = ClusterState(ME, min_space_units=MIN_SPACE)
    for name in NAMES:
        state.put(name, IDLE, now_ms=NOW_MS, now_s=0.0)
    rng, loads = Random(seed), Counter[str]()
    for number in range(count):
        view = state.view(IDLE, now_ms=NOW_MS, now_s=1.0)
        model_id = ModelId(f"m{number}")
        chosen = choose_instance(view, PlacementRequest(model_id, size_units=50), rng).instance_id
        assert chosen is not None
        state.load_sent(chosen, model_id, 50, now_s=1.0)
        # Our own record is fresh in truth; here it never changes, so we count ourselves out.
        loads[chosen] += chosen != ME
    assert max(loads.values()) <= count / 16 + 4


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_burst_at_all_instances_is_spread_by_refusals(seed: int) -> None:
    """Fifty senders with the same old records, none of which knows of the others' loads."""
    rng, loads = Random(seed), Counter[InstanceId]()
    states = {name: _state_of(name) for name in NAMES}
    for _ in range(50):
        here = rng.choice(NAMES)
        chosen = _place_with_refusals(states, here, loads, rng)
        loads[chosen] += 1
    assert max(loads.values()) <= 2 * 50 / 16


def _place_with_refusals(
    states: dict[InstanceId, ClusterState],
    here: InstanceId,
    loads: Counter[InstanceId],
    rng: Random,
    refusals: int = 2,
) -> InstanceId:
    sender = states[here]
    excludes: frozenset[InstanceId] = frozenset()
    while True:
        if len(excludes) == refusals:
            excludes = frozenset(NAMES) - excludes
        request = PlacementRequest(ModelId("m"), excludes=excludes, size_units=50)
        view = sender.view(_fresh(here, loads), now_ms=NOW_MS, now_s=1.0)
        chosen = choose_instance(view, request, rng).instance_id
        assert chosen is not None
        receiver = states[chosen].view(_fresh(chosen, loads), now_ms=NOW_MS, now_s=1.0)
        if chosen == here or len(excludes) > refusals or is_still_right(receiver, request):
            return chosen
        excludes |= {chosen}
        sender.learn(chosen, HopState.of(_fresh(chosen, loads)), now_s=1.0)


def _state_of(here: InstanceId) -> ClusterState:
    state = ClusterState(here, min_space_units=MIN_SPACE)
    for name in NAMES:
        state.put(name, IDLE, now_ms=NOW_MS, now_s=0.0)
    return state


def _fresh(name: InstanceId, loads: Counter[InstanceId]) -> InstanceRecord:
    return replace(IDLE, loads_in_progress=loads[name], used_units=1_000 + 50 * loads[name])


# --- the check at the chosen one ------------------------------------------------------------------


def is_right(*instances: InstanceView, **request: Any) -> bool:
    excludes = frozenset(InstanceId(each) for each in request.pop("excludes", "").split())
    wanted = PlacementRequest(ModelId("m"), "t", excludes=excludes, **request)
    return is_still_right(cluster(*instances), wanted)


@pytest.mark.parametrize(
    ("name", "own", "other", "expected"),
    [
        ("as good", {"free": 500}, {"free": 500}, True),
        ("worse, but not by far", {"free": 250}, {"free": 999}, True),
        ("far worse", {"free": 240}, {"free": 999}, False),
        ("full, and there is room elsewhere", {"free": 50}, {"free": 500}, False),
        ("room, and elsewhere there is none", {"free": 500}, {"free": 50}, True),
        (
            "full, and so are the others",
            {"free": 0, "age_ms": 3 * MINUTE_MS},
            {"free": 0, "age_ms": 4 * MINUTE_MS},
            True,
        ),
        (
            "full of models in use, while others have old ones",
            {"free": 0, "age_ms": MINUTE_MS},
            {"free": 0, "age_ms": 40 * HOUR_MS},
            False,
        ),
        ("a few loads", {"loads_in_progress": REFUSE_LOADS_MIN - 1}, {}, True),
        ("some loads", {"loads_in_progress": REFUSE_LOADS_MIN}, {}, False),
        ("less than twice the average", {"loads_in_progress": 4}, {"loads_in_progress": 1}, True),
        ("all are busy", {"loads_in_progress": 9}, {"loads_in_progress": 8}, True),
    ],
)
def test_the_check(name: str, own: dict[str, Any], other: dict[str, Any], expected: bool) -> None:
    assert is_right(instance("me", **own), instance("a", **other)) is expected, name


def test_the_busiest_of_many_refuses() -> None:
    idle = [instance(name) for name in "abcd"]
    assert not is_right(instance("me", loads_in_progress=REFUSE_LOADS_MIN), *idle)
    busy = [instance(name, loads_in_progress=9) for name in "abcd"]
    assert is_right(instance("me", loads_in_progress=15), *busy)
    assert not is_right(instance("me", loads_in_progress=40), *busy)


def test_if_nobody_else_is_left_it_stays() -> None:
    worst = instance("me", free=0, loads_in_progress=99)
    assert is_right(worst)
    assert is_right(worst, instance("a"), excludes="a")
    assert is_right(worst, instance("a", reachable=False))

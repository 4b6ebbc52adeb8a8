"""When a load that says nothing counts as done: figures worked out by hand from spec core 3.15."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.core.load_times import TYPES_MAX, LoadTimes


def after(*durations_ms: float, default_ms: int = 3000) -> int:
    times = LoadTimes(default_ms)
    for duration_ms in durations_ms:
        times.add("t", duration_ms)
    return times.assumed_ms("t")


@pytest.mark.parametrize(
    ("durations_ms", "assumed_ms"),
    [
        ((), 3000),
        ((600,), 2200),
        ((600, 600), 1667),
        ((600, 600, 600), 1312),
        ((600, 600, 600, 600), 600),
        # Mean 500, standard deviation 100, five of them.
        ((400, 600, 400, 600), 1000),
        # The next three change nothing.
        ((400, 600, 400, 600, 9000, 9000, 9000), 1000),
        ((400, 600) * 10, 1000),
        # From the 24th on three are enough.
        ((400, 600) * 11 + (1,), 1000),
        ((400, 600) * 12, 800),
    ],
)
def test_the_rule(durations_ms: tuple[float, ...], assumed_ms: int) -> None:
    assert after(*durations_ms) == assumed_ms


def test_types_know_nothing_of_each_other() -> None:
    times = LoadTimes(3000)
    for _ in range(4):
        times.add("fast", 10)
        times.add("slow", 90_000)
    assert (times.assumed_ms("fast"), times.assumed_ms("slow")) == (10, 90_000)
    assert times.assumed_ms("new") == 3000


def test_types_are_bounded_and_the_idle_one_goes() -> None:
    times = LoadTimes(3000)
    for number in range(TYPES_MAX):
        times.add(f"t{number}", 0)
    times.add("t0", 0)
    times.add("one too many", 0)
    assert times.assumed_ms("t1") == 3000
    assert times.assumed_ms("t0") < 3000


@given(st.lists(st.floats(0, 1e7), min_size=4, max_size=40))
def test_it_is_the_plain_statistic(durations_ms: list[float]) -> None:
    known = durations_ms[: len(durations_ms) // 4 * 4]
    deviations = 5 if len(known) <= 20 else 3
    expected_ms = statistics.fmean(known) + deviations * statistics.pstdev(known)
    assert math.isclose(after(*durations_ms), expected_ms, rel_tol=1e-6, abs_tol=1.01)

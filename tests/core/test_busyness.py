"""Calls a minute, as the record of an instance tells them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.busyness import SAMPLE_MS, WINDOW_MS, Busyness

START = 10**12


def test_nothing_is_said_before_a_minute_has_passed() -> None:
    busyness = Busyness()
    assert busyness.rpm(0, START) == 0
    assert busyness.rpm(500, START + SAMPLE_MS - 1) == 0
    assert busyness.rpm(600, START + SAMPLE_MS) == 600


def test_it_is_the_mean_of_the_last_six_minutes() -> None:
    busyness = Busyness()
    counts = [0, 1000, 1000, 1000, 1000, 1000, 1000]
    told = [busyness.rpm(count, START + n * SAMPLE_MS) for n, count in enumerate(counts)]
    assert told == [0, 1000, 500, 333, 250, 200, 167]
    assert busyness.rpm(1000, START + 7 * SAMPLE_MS) == 0
    assert busyness.rpm(1600, START + 8 * SAMPLE_MS) == 100


def test_a_clock_that_is_set_back_starts_anew() -> None:
    busyness = Busyness()
    busyness.rpm(0, START)
    assert busyness.rpm(600, START + SAMPLE_MS) == 600
    assert busyness.rpm(700, START - 10 * SAMPLE_MS) == 600, "as long as nothing better is known"
    assert busyness.rpm(800, START - 9 * SAMPLE_MS) == 100


@settings(deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 999)), max_size=60))
def test_it_never_exceeds_the_fastest_stretch_and_keeps_little(
    steps: list[tuple[int, int]],
) -> None:
    busyness, now_ms, count = Busyness(), START, 0
    busyness.rpm(0, now_ms)
    for pause_ms, calls in steps:
        now_ms, count = now_ms + pause_ms, count + calls
        rpm = busyness.rpm(count, now_ms)
        assert 0 <= rpm <= 60_000 * count / SAMPLE_MS + 1
        assert len(busyness._samples) <= 2 + WINDOW_MS // SAMPLE_MS

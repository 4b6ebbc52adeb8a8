"""Averages of sizes by type, and when they stand in for the runtime's own guess."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.load_sizes import SAMPLES_MIN, TYPES_MAX, LoadSizes, is_crowded


def sizes_of(model_type: str, *sizes: int) -> LoadSizes:
    sizes_here = LoadSizes()
    for size in sizes:
        sizes_here.add(model_type, size)
    return sizes_here


def test_a_few_models_are_no_average() -> None:
    assert sizes_of("t", *[5] * (SAMPLES_MIN - 1)).guess("t") == 0
    assert sizes_of("t", *[5] * SAMPLES_MIN).guess("t") == 5
    assert sizes_of("t", *[5] * SAMPLES_MIN).guess("other") == 0


def test_the_average_follows_what_is_loaded_now() -> None:
    assert sizes_of("t", *[1000] * 500, *[10] * 1000).guess("t") in (10, 11)


def test_types_are_bounded() -> None:
    sizes = LoadSizes()
    for number in range(TYPES_MAX + 5):
        for _ in range(SAMPLES_MIN):
            sizes.add(f"t{number}", 1)
            sizes.add("used", 1)
    assert len(sizes._types) == TYPES_MAX
    assert sizes.guess("used")
    assert not sizes.guess("t0")


@pytest.mark.parametrize(
    ("loads", "concurrency", "expected"),
    [(32, 1, False), (33, 1, True), (64, 16, False), (65, 16, True)],
)
def test_loads_are_crowded_some_rounds_above_what_the_runtime_takes(
    loads: int, concurrency: int, expected: bool
) -> None:
    assert is_crowded(loads, concurrency) is expected


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 2**40), min_size=SAMPLES_MIN, max_size=300))
def test_a_guess_is_among_the_sizes(sizes: list[int]) -> None:
    assert min(sizes) <= sizes_of("t", *sizes).guess("t") <= max(sizes) + 1

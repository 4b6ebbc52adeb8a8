"""Start-up sizing: the formulas of spec core 3.1, and the refusal of what a runtime may say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.accounting import UnloadAccounting
from mm.core.ids import UNIT_BYTES
from mm.core.sizing import CacheSizing
from mm.errors import StartupError

MIB = 2**20


def sizing(**changes: Any) -> CacheSizing:
    numbers = {
        "capacity_bytes": 64 * MIB,
        "default_model_size_bytes": MIB,
        "loading_concurrency_max": 2,
        "load_timeout_ms": 90_000,
    }
    return CacheSizing.from_runtime(**{**numbers, **changes})


def test_everything_from_one_answer() -> None:
    assert sizing(capacity_bytes=64 * MIB + 8191, default_model_size_bytes=MIB - 1) == CacheSizing(
        capacity_units=8192,
        default_units=128,
        reserve_units=128,
        min_space_units=256,
        load_timeout_ms=90_000,
        loading_concurrency=2,
    )


@pytest.mark.parametrize(("timeout_ms", "assumed_ms"), [(90_000, 30_000), (5000, 3000)])
def test_how_long_a_load_takes_before_one_was_seen(timeout_ms: int, assumed_ms: int) -> None:
    assert sizing(load_timeout_ms=timeout_ms).assumed_load_ms == assumed_ms


@pytest.mark.parametrize(
    ("capacity_units", "default_units", "concurrency", "reserve_units", "why"),
    [
        (100_000, 100, 1, 1000, "a hundredth of everything, at least"),
        (10_000, 100, 2, 100, "half of what may load at once"),
        (10_000, 100, 8, 200, "a quarter of it, beyond two"),
        (10_000, 1000, 8, 1000, "but no more than a tenth of everything"),
        (10_000, 100, 3, 100, "rounded down, but not below a hundredth"),
    ],
)
def test_reserve(
    capacity_units: int, default_units: int, concurrency: int, reserve_units: int, why: str
) -> None:
    answer = sizing(
        capacity_bytes=capacity_units * UNIT_BYTES,
        default_model_size_bytes=default_units * UNIT_BYTES,
        loading_concurrency_max=concurrency,
    )
    assert answer.reserve_units == reserve_units, why


@pytest.mark.parametrize(
    ("concurrency", "min_space_units"),
    [(1, 100), (3, 300), (5, 500), (8, 500)],
)
def test_full_means_less_than_what_loads_at_once_but_at_most_a_twentieth(
    concurrency: int, min_space_units: int
) -> None:
    answer = sizing(
        capacity_bytes=10_000 * UNIT_BYTES,
        default_model_size_bytes=100 * UNIT_BYTES,
        loading_concurrency_max=concurrency,
    )
    assert answer.min_space_units == min_space_units


def test_min_space_is_at_least_one_default_model() -> None:
    answer = sizing(capacity_bytes=16 * MIB, default_model_size_bytes=MIB)
    assert answer.min_space_units == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity_bytes": 0}, "model runtime reports capacityInBytes 0: must be at least 1"),
        (
            {"default_model_size_bytes": 0},
            "model runtime reports defaultModelSizeInBytes 0: must be at least 1",
        ),
        (
            {"loading_concurrency_max": 0},
            "model runtime reports maxLoadingConcurrency 0: must be at least 1",
        ),
        (
            {"load_timeout_ms": 99},
            "model runtime reports modelLoadingTimeoutMs 99: must be at least 100",
        ),
        (
            {"capacity_bytes": 10 * MIB - 1},
            "model runtime reports capacityInBytes 10485759: must be at least 10485760 for its"
            " defaultModelSizeInBytes (rounded up to 1048576); give it more memory or state a"
            " smaller default size",
        ),
    ],
)
def test_nonsense_is_refused_by_name_value_and_limit(changes: Any, message: str) -> None:
    with pytest.raises(StartupError) as caught:
        sizing(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("capacity_bytes", "default_bytes"),
    [(10 * MIB, MIB), (512 * MIB, 100 * MIB), (800 * MIB, 400 * MIB), (16 * MIB, 1_000_000)],
)
def test_just_enough_capacity(capacity_bytes: int, default_bytes: int) -> None:
    sizing(capacity_bytes=capacity_bytes, default_model_size_bytes=default_bytes)


@settings(deadline=None)
@given(
    capacity_bytes=st.integers(1, 2**45),
    default_bytes=st.integers(1, 2**42),
    concurrency=st.integers(1, 500),
)
def test_what_is_accepted_makes_an_accounting_with_room_for_a_default_model(
    capacity_bytes: int, default_bytes: int, concurrency: int
) -> None:
    try:
        answer = sizing(
            capacity_bytes=capacity_bytes,
            default_model_size_bytes=default_bytes,
            loading_concurrency_max=concurrency,
        )
    except StartupError:
        return
    accounting = UnloadAccounting(answer.capacity_units, answer.reserve_units)
    assert accounting.can_ever_fit(answer.default_units)
    assert answer.min_space_units <= answer.capacity_units

"""When the churn guard refuses a load, and for how long."""

from __future__ import annotations

import pytest

from mm.core.churn import churn_pause_ms
from mm.core.ids import NEVER_MS

NOW_MS = 1_000_000


@pytest.mark.parametrize(
    ("free_units", "oldest_use_ms", "min_age_ms", "pause_ms"),
    [
        (0, NOW_MS - 1_000, 10_000, 9_000),
        (9, NOW_MS - 1_000, 10_000, 9_000),
        (10, NOW_MS - 1_000, 10_000, 0),
        (0, NOW_MS - 10_000, 10_000, 0),
        (0, NOW_MS - 90_000, 10_000, 0),
        (0, NOW_MS + 5_000, 10_000, 10_000),
        (0, NOW_MS, 0, 0),
        (0, NOW_MS, -1, 0),
        (0, NEVER_MS, 10_000, 0),
    ],
)
def test_the_pause(free_units: int, oldest_use_ms: int, min_age_ms: int, pause_ms: int) -> None:
    assert pause_ms == churn_pause_ms(
        free_units=free_units,
        min_space_units=10,
        oldest_use_ms=oldest_use_ms,
        now_ms=NOW_MS,
        min_age_ms=min_age_ms,
    )

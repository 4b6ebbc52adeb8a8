"""Readers without the GIL against the one writer: real threads, everything they see is checked.

The same runs under ThreadSanitizer and AddressSanitizer by ``tests/table/sanitize/run.py``.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from bench.building import load
from tests.table.hammering import hammer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def hammer_module() -> ModuleType:
    return load("mm_test_hammer", HERE / "hammer.pyx")


@pytest.mark.timeout(120)  # the first time, the readers are compiled
@pytest.mark.parametrize("seed", [1, 2])
def test_readers_see_nothing_that_is_not_so(hammer_module: ModuleType, seed: int) -> None:
    reports = hammer(hammer_module, seed=seed, reader_count=3, steps=15_000)
    for report in reports:
        assert report["wrong_id"] == 0
        assert report["unloaded_while_pinned"] == 0
        assert report["wrong_choice"] == 0
        assert report["turns"] >= 50
    for what in ("found", "missed", "pinned", "chosen", "aliases"):
        assert sum(each[what] for each in reports) > 0, what

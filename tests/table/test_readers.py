"""Readers without the GIL against the one writer: real threads, everything they see is checked.

The same runs under ThreadSanitizer and AddressSanitizer by ``tests/table/sanitize/run.py``.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from bench.building import load
from mm._lru import Table
from tests.table.hammering import hammer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def hammer_module() -> ModuleType:
    return load("mm_test_hammer", HERE / "hammer.pyx")


@pytest.mark.parametrize("length", [5, 8, 20, 40, 64])
def test_ids_that_share_their_tag_are_told_apart(hammer_module: ModuleType, length: int) -> None:
    """A tag has 32 bits: among so many ids a few pairs share one, whatever the secret is."""
    table = Table(10)
    ids = [f"{each:0{length}x}" for each in range(0xFFFFF, 0xFFFFF - 400_000, -1)]
    groups = hammer_module.same_tag(table, ids)
    assert groups, "no two of 400,000 ids share a tag: the hash is not what it was"
    known = [group[0] for group in groups]
    unknown = [model_id for group in groups for model_id in group[1:]]
    for model_id in known:
        table.add(model_id)
    assert not any(model_id in table for model_id in unknown)
    found = hammer_module.found_at_once(table, known + unknown)
    assert found == known + [None] * len(unknown)
    for model_id in unknown:
        table.add(model_id)
    assert hammer_module.found_at_once(table, known + unknown) == known + unknown
    for model_id in known:
        table.discard(model_id)
    assert not any(model_id in table for model_id in known)
    assert all(model_id in table for model_id in unknown)
    table.check_invariants()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40])
def test_a_batch_finds_what_one_by_one_finds(hammer_module: ModuleType, count: int) -> None:
    table = Table(10)
    ids = [f"model-{each}-{'x' * each}" for each in range(count)]
    for model_id in ids[::2]:
        table.add(model_id)
    found = hammer_module.found_at_once(table, ids)
    assert found == [model_id if model_id in table else None for model_id in ids]


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

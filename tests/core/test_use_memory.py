"""Uses of models without copies: kept for as many as there is room for, nearly exactly."""

from __future__ import annotations

import zlib

import pytest

from mm.core.use_memory import SLOTS_MIN, UseMemory


def test_what_was_stored_is_taken_once() -> None:
    memory = UseMemory()
    memory.store("a", 3.25, 1_764_000_000_500)
    assert len(memory) == 1
    assert memory.take("b") is None
    assert memory.take("a") == (3.25, 1_764_000_000_000)
    assert memory.take("a") is None
    assert len(memory) == 0


def test_next_to_no_use_takes_no_place_and_much_use_is_cut() -> None:
    memory = UseMemory()
    memory.store("a", 0.03, 1000)
    memory.store("b", 1e9, 1000)
    assert len(memory) == 1
    assert memory.take("b") == (255 / 16, 1000)


def test_the_later_of_two_that_want_one_place_has_it() -> None:
    place = zlib.crc32(b"a") % SLOTS_MIN
    other = next(
        name for name in map(str, range(100_000)) if zlib.crc32(name.encode()) % SLOTS_MIN == place
    )
    memory = UseMemory()
    memory.store("a", 1.0, 1000)
    memory.store(other, 2.0, 2000)
    assert memory.take("a") is None
    assert memory.take(other) == (2.0, 2000)


@pytest.mark.parametrize("count", [1, 500, 700, 1_300, 5_000, 20_000])
def test_most_are_still_known_however_many_there_are(count: int) -> None:
    memory = UseMemory()
    for number in range(count):
        memory.store(f"model-{number}", 1.0 + number % 8, number * 1000)
    slots_count = memory.memory_bytes / 8
    assert len(memory) <= slots_count / 2 + 1
    assert memory.memory_bytes <= max(8 * SLOTS_MIN, 24 * count)
    taken = [(number, memory.take(f"model-{number}")) for number in range(count)]
    for number, found in taken:
        assert found is None or found == (1.0 + number % 8, number * 1000)
    assert sum(found is not None for _, found in taken) > 0.65 * count
    assert len(memory) == 0

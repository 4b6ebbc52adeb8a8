"""What the extension takes from the system, and that it gives back what is its own to give."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest

from mm import _lru
from mm._lru import Table
from mm.table import CopyState, Evicted

BYTES_A_MODEL_MAX = 300
#: What the interpreter may take besides: its heap grows in pieces of 1 MiB.
NOISE_BYTES = 4 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.without_sanitizers("resident memory: a sanitizer keeps what was freed")
@pytest.mark.parametrize("id_length", [36, 64])
def test_a_model_takes_at_most_300_bytes_everything_counted(id_length: int) -> None:
    table = Table(10**9)
    count = 100_000
    before = resident_bytes()
    for each in range(count):
        table.put(f"{each:0{id_length}}", 1, each)
    assert table.memory_bytes() / count <= BYTES_A_MODEL_MAX
    # What is counted is what is taken: the process may have had some of it lying about.
    assert resident_bytes() - before <= table.memory_bytes() * 1.1 + NOISE_BYTES


def churn(table: Table) -> None:
    """Let everything that takes memory come and go."""
    handles = [table.add_instance(f"instance-{each}") for each in range(6)]
    for each in range(400):
        model_id = f"model-{each}-{'x' * (each % 90)}"
        table.put(model_id, 1, each)
        table.set_peers(model_id, handles[: each % 6])
        table.set_alias(f"vmodel-{each}-{'y' * (each % 90)}", model_id)
    for each in range(400):
        model_id = f"model-{each}-{'x' * (each % 90)}"
        table.remove_alias(f"vmodel-{each}-{'y' * (each % 90)}")
        table.remove(model_id)
        table.discard(model_id)
    for handle in handles:
        table.remove_instance(handle)
    table.reclaim()


def test_what_came_and_went_leaves_nothing_behind() -> None:
    table = Table(10_000)
    churn(table)
    settled = table.memory_bytes()
    for _ in range(20):
        churn(table)
    # A queue of Python's takes its memory in pieces of half a KiB.
    assert table.memory_bytes() <= settled + 1_024
    assert len(table) == 0
    table.check_invariants()


def test_memory_held_for_readers_is_given_back_when_they_pass() -> None:
    table = Table(10_000)
    churn(table)
    settled = table.memory_bytes()
    reader = table.register_reader()
    table.reader_online(reader)
    churn(table)
    held = table.memory_bytes()
    assert held > settled
    table.reader_offline(reader)
    churn(table)
    assert table.memory_bytes() < held


@pytest.mark.without_sanitizers("resident memory: a sanitizer keeps what was freed")
def test_tables_that_are_gone_leave_nothing_behind() -> None:
    def fill() -> None:
        table = Table(10_000)
        churn(table)
        handles = [table.add_instance(f"instance-{each}") for each in range(60)]
        for each in range(200):
            table.set_peers(f"model-{each}-{'x' * 300}", handles)
            table.set_alias(f"vmodel-{each}-{'x' * 300}", f"model-{each}-{'x' * 300}")

    for _ in range(3):
        fill()
    before = resident_bytes()
    for _ in range(100):
        fill()
    # Each has about 200 KiB outside its arena: of peers, and of ids.
    assert resident_bytes() - before < 4 << 20


def test_objects_are_not_leaked_by_any_method() -> None:
    table = Table(2)
    model_id, long_id = "m" * 36, "long" * 20

    def use() -> None:
        handle = table.add_instance("i")
        table.put(model_id, 2, 5)
        table.put(long_id, 2, 6)
        table.set_state(long_id, CopyState.READY)
        table.set_peers(long_id, [handle, handle])
        table.choose(long_id, 5, [handle] * 20)
        table.report_load(handle, long_id, 4)
        table.set_alias("v", long_id)
        table.resolve("v")
        table.remove_alias("v")
        list(table.cached())
        table.oldest()
        with pytest.raises(ValueError, match="bytes"):
            table.add("")
        with pytest.raises(KeyError):
            table.set_flags("unknown", 1)
        table.remove(long_id)
        table.set_state(long_id, CopyState.ABSENT)
        table.discard(long_id)
        table.discard(model_id)
        table.remove_instance(handle)

    for _ in range(50):
        use()
    gc.collect()
    before = sys.getallocatedblocks()
    references = sys.getrefcount(model_id), sys.getrefcount(long_id)
    for _ in range(1_000):
        use()
    gc.collect()
    assert (sys.getrefcount(model_id), sys.getrefcount(long_id)) == references
    assert sys.getallocatedblocks() - before < 500


def test_code_that_runs_while_evicting_finds_the_table_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Making a result may run the collector and so anybody's code, even this table's methods."""
    table = Table(10)
    for each in range(10):
        table.put(f"m{each}", 1, each)
    made: list[str] = []
    told: list[Evicted] = []

    def meddling(model_id: str, weight_units: int, last_used_ms: int) -> Any:
        list(table.cached())
        made.append(model_id)
        if len(made) == 1:
            table.remove("m0")
            table.remove("m1")
            told.extend(table.put("m0", 1, 50))  # which evicts, and tells what: here, not there
        return Evicted(model_id, weight_units, last_used_ms)

    monkeypatch.setattr(_lru, "Evicted", meddling)
    told.extend(table.set_capacity(6))
    monkeypatch.undo()
    assert [each.model_id for each in told] == ["m2", "m3", "m4"]
    assert table.used_units == 6
    table.check_invariants()

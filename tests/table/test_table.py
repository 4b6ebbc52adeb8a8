"""What both tables mean, one rule a test: models, vmodels, readers (design section 4)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from mm import _lru, _lru_py
from mm._lru import Table
from mm._lru_words import ID_BYTES_MAX, READER_COUNT_MAX
from mm.table import NONE, CopyState

MakeTable = Callable[..., Table]
ABSENT, LOADING, READY, UNLOADING = CopyState


def test_a_model_is_known_from_add_to_discard(table: Table) -> None:
    assert "m" not in table
    table.add("m")
    table.add("m")
    assert "m" in table
    assert len(table) == 1
    table.discard("m")
    table.discard("m")
    assert "m" not in table
    assert len(table) == 0


def test_nothing_that_is_no_id_is_in_a_table(table: Table) -> None:
    table.add("m")
    assert 7 not in table
    assert "" not in table
    assert "m" * (ID_BYTES_MAX + 1) not in table
    assert b"m" not in table


@pytest.mark.parametrize(
    "model_id", ["m", "é" * 20, "m" * 40, "m" * 41, "a\0b", "x" * ID_BYTES_MAX]
)
def test_ids_of_any_length_and_content_are_told_apart(table: Table, model_id: str) -> None:
    other = model_id[:-1] + "~"
    table.put(model_id, 1, 5)
    table.put(other, 2, 6)
    assert table.weight(model_id) == 1
    assert table.oldest() == (model_id, 5)
    assert [each[0] for each in table.cached()] == [model_id, other]
    table.remove(other)
    table.discard(other)
    assert other not in table
    assert model_id in table


@pytest.mark.parametrize("length", range(1, 90))
def test_every_byte_of_an_id_counts(table: Table, length: int) -> None:
    base = "a" * length
    ids = [base] + [base[:at] + "b" + base[at + 1 :] for at in range(length)]
    for model_id in ids:
        table.add(model_id)
    assert len(table) == length + 1
    assert base + "a" not in table
    assert base[:-1] not in table


@pytest.mark.parametrize("bad_id", ["", "x" * (ID_BYTES_MAX + 1), "é" * (ID_BYTES_MAX // 2 + 1)])
def test_an_id_outside_the_limit_is_refused_with_the_limit(table: Table, bad_id: str) -> None:
    asks: list[Callable[[], object]] = [
        lambda: table.add(bad_id),
        lambda: table.discard(bad_id),
        lambda: table.put(bad_id, 1, 1),
        lambda: table.set_weight(bad_id, 1),
        lambda: table.remove(bad_id),
        lambda: table.state(bad_id),
        lambda: table.set_state(bad_id, READY),
        lambda: table.pin(bad_id),
        lambda: table.unpin(bad_id),
        lambda: table.touch(bad_id, 1),
        lambda: table.choose(bad_id, 1),
        lambda: table.set_peers(bad_id, []),
        lambda: table.set_alias(bad_id, "m"),
        lambda: table.set_alias("v", bad_id),
        lambda: table.resolve(bad_id),
        lambda: table.add_instance(bad_id),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=f"1 to {ID_BYTES_MAX} bytes"):
            ask()
    assert len(table) == 0


def test_half_a_surrogate_pair_is_no_id(table: Table) -> None:
    with pytest.raises(UnicodeEncodeError):
        table.add("\ud800")


def test_what_is_asked_of_an_unknown_model_is_as_of_one_without_copies(table: Table) -> None:
    assert table.state("m") is ABSENT
    assert table.weight("m") == 0
    assert table.last_used("m") is None
    assert table.remove("m") is None
    assert not table.touch("m", 1)
    assert not table.pin("m")
    assert table.in_flight("m") == 0
    assert table.take_busy() == []
    assert table.flags("m") == 0
    assert table.concurrency_max("m") == 0
    assert table.peers("m") == []
    assert table.peer_loads("m") == []
    assert table.choose("m", 0) == NONE
    assert table.resolve("v") is None
    table.remove_alias("v")
    table.set_peers("m", [])
    table.report_load(1 << 16 | 1, "m", 3)
    assert "m" not in table


def test_what_is_demanded_of_an_unknown_model_is_a_key_error(table: Table) -> None:
    demands: list[Callable[[], object]] = [
        lambda: table.set_state("m", READY),
        lambda: table.set_weight("m", 1),
        lambda: table.set_flags("m", 1),
        lambda: table.set_concurrency_max("m", 1),
        lambda: table.begin_unload("m"),
        lambda: table.unpin("m"),
    ]
    for demand in demands:
        with pytest.raises(KeyError, match="m"):
            demand()


def test_a_discarded_model_stays_while_its_copy_counts(table: Table) -> None:
    table.put("m", 1, 1)
    table.discard("m")
    assert "m" in table
    table.remove("m")
    assert "m" not in table


def test_a_discarded_model_stays_until_its_copy_is_absent(table: Table) -> None:
    table.put("m", 1, 1)
    table.set_state("m", READY)
    table.discard("m")
    assert table.remove("m") == ("m", 1, 1)
    assert table.state("m") is UNLOADING
    table.set_state("m", ABSENT)
    assert "m" not in table


def test_a_discarded_model_stays_until_its_last_call_has_ended(table: Table) -> None:
    table.add("m")
    table.set_state("m", READY)
    assert table.pin("m")
    table.set_state("m", ABSENT)
    table.discard("m")
    assert table.in_flight("m") == 1
    table.unpin("m")
    assert "m" not in table


def test_a_discarded_model_stays_while_an_alias_names_it(table: Table) -> None:
    table.set_alias("v", "m")
    table.set_alias("w", "m")
    table.discard("m")
    table.remove_alias("v")
    assert table.resolve("w") == "m"
    assert "m" in table
    table.set_alias("w", "n")
    assert "m" not in table
    assert table.resolve("w") == "n"


def test_a_discarded_model_goes_when_eviction_takes_what_held_it(make_table: MakeTable) -> None:
    table = make_table(1)
    table.put("m", 1, 1)
    table.discard("m")
    assert table.put("n", 1, 2) == [("m", 1, 1)]
    assert "m" not in table


def test_a_discarded_model_that_is_wanted_again_stays(table: Table) -> None:
    table.put("m", 1, 1)
    table.discard("m")
    table.add("m")
    table.remove("m")
    assert "m" in table


def test_a_discarded_model_loses_its_peers_at_once(table: Table) -> None:
    handles = [table.add_instance(f"i{each}") for each in range(5)]
    table.set_peers("m", handles)
    table.put("m", 1, 1)
    table.discard("m")
    assert table.peers("m") == []
    assert table.choose("m", 0) == NONE


def test_a_slot_used_again_remembers_nothing(table: Table) -> None:
    handles = [table.add_instance(f"i{each}") for each in range(5)]
    table.put("m", 7, 8)
    table.set_flags("m", 9)
    table.set_concurrency_max("m", 3)
    table.set_peers("m", handles)
    table.set_state("m", READY)
    table.pin("m")
    table.unpin("m")
    table.set_state("m", ABSENT)
    table.remove("m")
    table.discard("m")
    table.add("n")
    assert table.flags("n") == 0
    assert table.concurrency_max("n") == 0
    assert table.peers("n") == []
    assert table.last_used("n") is None
    assert table.weight("n") == 0
    assert table.state("n") is ABSENT
    table.put("n", 1, 1)
    assert table.take_busy() == []


def test_many_models_come_and_go(table: Table) -> None:
    for round_ in range(3):
        for each in range(2_000):
            table.add(f"model-{round_}-{each}")
        for each in range(2_000):
            assert f"model-{round_}-{each}" in table
        table.check_invariants()
        for each in range(0, 2_000, 2):
            table.discard(f"model-{round_}-{each}")
        for each in range(2_000):
            assert (f"model-{round_}-{each}" in table) == (each % 2 == 1)
        table.check_invariants()
    assert len(table) == 3_000


# VModel ids


def test_an_alias_names_the_active_model(table: Table) -> None:
    table.set_alias("v", "m1")
    assert table.resolve("v") == "m1"
    assert "m1" in table
    table.set_alias("v", "m2")
    assert table.resolve("v") == "m2"
    table.set_alias("v", "m2")
    assert table.resolve("v") == "m2"
    table.remove_alias("v")
    table.remove_alias("v")
    assert table.resolve("v") is None


def test_models_and_vmodels_are_two_key_spaces(table: Table) -> None:
    table.set_alias("same", "m")
    assert "same" not in table
    assert len(table) == 1
    assert table.resolve("m") is None
    table.add("same")
    assert table.resolve("same") == "m"
    assert len(table) == 2


def test_many_aliases_come_and_go(table: Table) -> None:
    for each in range(500):
        table.set_alias(f"v{each}", f"m{each % 7}")
    for each in range(500):
        assert table.resolve(f"v{each}") == f"m{each % 7}"
    table.check_invariants()
    for each in range(500):
        table.remove_alias(f"v{each}")
    for each in range(7):
        table.discard(f"m{each}")
    assert len(table) == 0


# Readers


def test_what_a_reader_may_still_see_is_not_used_again(table: Table) -> None:
    reader = table.register_reader()
    table.add("a")
    table.reader_online(reader)
    table.discard("a")
    assert table.reclaim() == 0
    table.reader_online(reader)
    assert table.reclaim() == 1
    table.add("b")
    table.discard("b")
    assert table.reclaim() == 0
    table.reader_offline(reader)
    assert table.reclaim() == 1
    assert table.reclaim() == 0


def test_a_reader_offline_or_gone_holds_nothing(table: Table) -> None:
    offline, gone = table.register_reader(), table.register_reader()
    table.reader_online(gone)
    table.add("a")
    table.discard("a")
    assert table.reclaim() == 0
    table.unregister_reader(gone)
    assert table.reclaim() == 1
    table.unregister_reader(offline)


def test_every_reader_online_must_have_passed(table: Table) -> None:
    readers = [table.register_reader() for _ in range(3)]
    for each in readers:
        table.reader_online(each)
    table.set_alias("v", "a")
    table.remove_alias("v")
    for each in readers:
        assert table.reclaim() == 0
        table.reader_online(each)
    assert table.reclaim() == 1


def test_a_reader_that_came_online_later_holds_nothing_older(table: Table) -> None:
    table.add("a")
    table.discard("a")
    table.reader_online(table.register_reader())
    assert table.reclaim() == 1


def test_reader_numbers_are_limited_and_used_again(table: Table) -> None:
    readers = [table.register_reader() for _ in range(READER_COUNT_MAX)]
    assert len(set(readers)) == READER_COUNT_MAX
    with pytest.raises(OverflowError, match=f"more than {READER_COUNT_MAX} readers"):
        table.register_reader()
    table.unregister_reader(readers[7])
    assert table.register_reader() == readers[7]


@pytest.mark.parametrize("reader", [-1, 1, READER_COUNT_MAX, 2**40])
def test_a_reader_that_is_none_is_refused(table: Table, reader: int) -> None:
    table.register_reader()
    for ask in (table.reader_online, table.reader_offline, table.unregister_reader):
        with pytest.raises(ValueError, match=f"no reader {reader}"):
            ask(reader)


def test_reclaim_takes_discarded_models_that_calls_have_left(table: Table) -> None:
    table.add("m")
    table.set_state("m", READY)
    table.pin("m")
    table.set_state("m", ABSENT)
    table.discard("m")
    assert table.reclaim() == 0
    assert "m" in table
    table.unpin("m")
    assert table.reclaim() == 1


def test_memory_is_counted(table: Table) -> None:
    before = table.memory_bytes()
    assert before > 0
    for each in range(5_000):
        table.add(f"a-model-with-an-id-longer-than-forty-bytes-{each}")
    grown = table.memory_bytes()
    assert grown - before > 5_000 * 100
    assert table.memory_bytes() == grown


# The two


def test_both_have_the_same_methods_with_the_same_arguments() -> None:
    def shape(table_type: Any) -> dict[str, list[str] | None]:
        return {
            name: list(inspect.signature(member).parameters) if callable(member) else None
            for name, member in inspect.getmembers(table_type)
            if not name.startswith("_")
        }

    assert shape(_lru.Table) == shape(_lru_py.Table)

"""What both tables mean, one rule a test: the order and what it evicts (spec core 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mm._lru import Table
from mm._lru_words import U32_MAX
from mm.table import CopyState, Evicted

MakeTable = Callable[..., Table]
ABSENT, LOADING, READY, UNLOADING = CopyState


def ids_of(evicted: list[Evicted]) -> list[str]:
    return [each.model_id for each in evicted]


def test_copies_go_by_the_time_given_and_not_by_call(make_table: MakeTable) -> None:
    table = make_table(3)
    table.put("new", 1, 30)
    table.put("old", 1, 10)
    table.put("mid", 1, 20)
    assert table.oldest() == ("old", 10)
    assert list(table.cached()) == [("old", 1, 10), ("mid", 1, 20), ("new", 1, 30)]
    assert table.put("next", 2, 40) == [("old", 1, 10), ("mid", 1, 20)]


def test_of_equal_times_the_copy_put_first_goes_first(make_table: MakeTable) -> None:
    table = make_table(3)
    table.put("b", 1, 5)
    table.put("a", 1, 1)
    table.put("c", 1, 5)
    table.touch("a", 5)
    assert [each[0] for each in table.cached()] == ["b", "a", "c"]
    assert ids_of(table.set_capacity(0)) == ["b", "a", "c"]


def test_a_copy_put_again_after_it_left_stands_behind_its_equals(make_table: MakeTable) -> None:
    table = make_table(3)
    table.put("a", 1, 5)
    table.put("b", 1, 5)
    table.remove("a")
    table.put("a", 1, 5)
    assert [each[0] for each in table.cached()] == ["b", "a"]


def test_touch_raises_the_time_and_never_lowers_it(table: Table) -> None:
    table.put("a", 1, 10)
    table.put("b", 1, 20)
    assert table.touch("a", 30)
    assert table.last_used("a") == 30
    assert table.oldest() == ("b", 20)
    assert table.touch("a", 5)
    assert table.last_used("a") == 30
    assert table.touch("b", 30)
    assert table.oldest() == ("a", 30)


def test_the_victim_is_the_least_recently_used_after_any_touches(make_table: MakeTable) -> None:
    table = make_table(500)
    for each in range(500):
        table.put(f"m{each}", 1, each)
    for each in range(500):
        if each % 7:
            table.touch(f"m{each}", 1_000 + each * 37 % 500)
    expected = sorted(
        (1_000 + each * 37 % 500 if each % 7 else each, f"m{each}") for each in range(500)
    )
    assert ids_of(table.put("big", 400, 5_000)) == [each[1] for each in expected[:400]]
    assert table.oldest() == expected[400][::-1]


def test_future_times_stay_in_the_future(make_table: MakeTable) -> None:
    table = make_table(2)
    table.put("soon", 1, 20_000)
    table.put("now", 1, 100)
    table.touch("now", 200)
    assert table.put("next", 1, 300) == [("now", 1, 200)]
    assert table.oldest() == ("next", 300)


def test_a_copy_put_where_one_counts_changes_weight_and_raises_time(make_table: MakeTable) -> None:
    table = make_table(10)
    table.put("a", 4, 10)
    table.put("b", 4, 20)
    assert table.put("a", 6, 5) == []
    assert (table.weight("a"), table.last_used("a"), table.used_units) == (6, 10, 10)
    assert table.put("a", 2, 30) == []
    assert (table.weight("a"), table.last_used("a"), table.count) == (2, 30, 2)
    assert table.put("a", 7, 30) == [("b", 4, 20)]


def test_a_copy_that_left_takes_the_time_given_when_it_is_put_again(table: Table) -> None:
    table.put("a", 1, 50)
    table.remove("a")
    table.put("a", 1, 10)
    assert table.last_used("a") == 10


def test_the_entry_put_is_itself_a_candidate(make_table: MakeTable) -> None:
    table = make_table(10)
    table.put("a", 6, 20)
    assert table.put("old", 6, 10) == [("old", 6, 10)]
    assert table.put("giant", 11, 30) == [("a", 6, 20), ("giant", 11, 30)]
    assert (table.used_units, table.count) == (0, 0)


def test_the_entry_grown_is_itself_a_candidate(make_table: MakeTable) -> None:
    table = make_table(10)
    table.put("a", 2, 10)
    table.put("b", 2, 20)
    assert table.set_weight("a", 9) == [("a", 9, 10)]
    assert table.set_weight("b", 10) == []
    assert table.set_weight("b", 11) == [("b", 11, 20)]
    with pytest.raises(KeyError):
        table.set_weight("b", 1)


def test_a_copy_without_weight_goes_in_its_turn(make_table: MakeTable) -> None:
    table = make_table(1)
    table.put("nothing", 0, 1)
    table.put("a", 1, 2)
    assert ids_of(table.put("b", 1, 3)) == ["nothing", "a"]


def test_capacity_shrinks_and_grows(make_table: MakeTable) -> None:
    table = make_table(10)
    for each in range(5):
        table.put(f"m{each}", 2, each)
    assert ids_of(table.set_capacity(5)) == ["m0", "m1", "m2"]
    assert table.capacity_units == 5
    assert table.set_capacity(100) == []
    assert table.put("big", 90, 9) == []
    assert table.used_units == 94


def test_what_leaves_is_unloading_if_it_was_loading_or_ready(make_table: MakeTable) -> None:
    table = make_table(4)
    for name, state in zip("alru", CopyState, strict=True):
        table.put(name, 1, 1)
        table.set_state(name, state)
    assert ids_of(table.set_capacity(0)) == list("alru")
    assert [table.state(each) for each in "alru"] == [ABSENT, UNLOADING, UNLOADING, UNLOADING]
    table.set_capacity(1)
    table.put("r", 1, 1)
    table.set_state("r", READY)
    table.remove("r")
    assert table.state("r") is UNLOADING


def test_remove_answers_what_left(table: Table) -> None:
    table.put("a", 3, 7)
    evicted = table.remove("a")
    assert evicted is not None
    assert (evicted.model_id, evicted.weight_units, evicted.last_used_ms) == ("a", 3, 7)
    assert table.remove("a") is None
    assert (table.used_units, table.count, table.oldest()) == (0, 0, None)
    assert "a" in table


def test_a_copy_that_does_not_count_has_no_time(table: Table) -> None:
    table.add("m")
    assert table.last_used("m") is None
    assert not table.touch("m", 5)
    table.put("m", 1, 1)
    assert table.last_used("m") == 1


def test_cached_is_a_snapshot(table: Table) -> None:
    table.put("a", 1, 1)
    table.put("b", 1, 2)
    snapshot = table.cached()
    table.remove("b")
    assert [each[0] for each in snapshot] == ["a", "b"]


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda t: t.put("m", -1, 0), f"weight_units is -1, allowed is 0 to {U32_MAX}"),
        (lambda t: t.put("m", 2**32, 0), f"weight_units is {2**32}, allowed is 0 to {U32_MAX}"),
        (lambda t: t.put("m", 1, -1), f"last_used_ms is -1, allowed is 0 to {2**63 - 1}"),
        (lambda t: t.put("m", 1, 2**63), f"last_used_ms is {2**63}, allowed"),
        (lambda t: t.touch("m", -5), "now_ms is -5, allowed"),
        (lambda t: t.set_weight("m", 2**70), f"weight_units is {2**70}, allowed"),
        (lambda t: t.set_capacity(-1), "capacity_units is -1, allowed"),
        (lambda t: type(t)(-1), "capacity_units is -1, allowed"),
        (lambda t: t.report_load(1, "m", -1), "in_flight is -1, allowed"),
    ],
)
def test_numbers_outside_their_limits_are_refused(
    table: Table, ask: Callable[[Table], object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ask(table)
    assert len(table) == 0


def test_numbers_at_their_limits_are_held(make_table: MakeTable) -> None:
    table = make_table(2**63 - 1)
    assert table.put("m", U32_MAX, 2**63 - 1) == []
    assert table.put("n", U32_MAX, 0) == []
    assert table.used_units == 2 * U32_MAX
    assert list(table.cached()) == [("n", U32_MAX, 0), ("m", U32_MAX, 2**63 - 1)]
    assert ids_of(table.set_capacity(U32_MAX)) == ["n"]


# --- what is kept --------------------------------------------------------------------------------


def test_what_is_kept_goes_when_nothing_else_is_left(make_table: MakeTable) -> None:
    table = make_table(6)
    for number, model_id in enumerate("abcd"):
        table.put(model_id, 1, 10 + number)
    assert table.keep("b", True)
    assert table.keep("a", True)
    assert table.kept_units == 2
    assert table.oldest() == ("c", 12)
    assert [each[0] for each in table.cached()] == ["c", "d", "b", "a"]
    # However young they are.
    assert ids_of(table.put("e", 6, 99)) == ["c", "d", "e"]
    assert table.oldest() is None
    assert (table.used_units, table.count) == (2, 2)
    assert ids_of(table.set_capacity(1)) == ["b"]
    assert table.is_kept("a")
    assert not table.is_kept("b")
    assert table.kept_units == 1


def test_what_is_kept_no_more_goes_by_its_time_again(make_table: MakeTable) -> None:
    table = make_table(4)
    for number, model_id in enumerate("abcd"):
        table.put(model_id, 1, 10 + number)
    table.keep("a", True)
    table.keep("c", True)
    table.touch("c", 13)
    table.keep("a", False)
    table.keep("c", False)
    table.keep("c", False)
    # "d" was put after "c", but before "c" was kept.
    assert [each[0] for each in table.cached()] == ["a", "b", "d", "c"]
    assert table.kept_units == 0
    assert ids_of(table.set_capacity(1)) == ["a", "b", "d"]


def test_what_is_kept_is_used_and_weighed_as_all_are(make_table: MakeTable) -> None:
    table = make_table(10)
    table.put("a", 2, 10)
    table.put("b", 2, 20)
    table.keep("a", True)
    table.touch("a", 30)
    assert table.last_used("a") == 30
    assert table.set_weight("a", 9) == [("b", 2, 20)]
    assert (table.kept_units, table.used_units) == (9, 9)
    assert table.put("a", 3, 5) == []
    assert (table.kept_units, table.last_used("a")) == (3, 30)
    table.set_state("a", READY)
    table.pin("a")
    assert table.take_busy() == [("a", 1, 1)]
    table.unpin("a")
    assert table.remove("a") == ("a", 3, 30)
    assert table.kept_units == 0
    assert not table.is_kept("a")


def test_what_leaves_is_kept_no_more(make_table: MakeTable) -> None:
    table = make_table(3)
    table.put("a", 1, 10)
    table.keep("a", True)
    table.remove("a")
    assert not table.keep("a", True)
    table.put("a", 1, 10)
    table.put("b", 1, 20)
    assert not table.is_kept("a")
    assert ids_of(table.set_capacity(1)) == ["a"]
    assert not table.keep("unknown", True)
    assert not table.is_kept("unknown")


def test_kept_copies_cost_those_that_come_nothing(make_table: MakeTable) -> None:
    table = make_table(4_000)
    for each in range(2_000):
        table.put(f"kept{each}", 1, 1_000_000)
        table.keep(f"kept{each}", True)
    for each in range(3_000):
        evicted = ids_of(table.put(f"m{each}", 1, each))
        assert evicted == ([f"m{each - 2_000}"] if each >= 2_000 else [])
        table.touch(f"m{each}", each)
    table.check_invariants()

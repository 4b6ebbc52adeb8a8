"""What both tables mean, one rule a test: the copy here and copies elsewhere (design section 4)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mm._lru import Table
from mm._lru_words import GENERATION_MAX, U32_MAX
from mm.table import LOCAL, NONE, CopyState

MakeTable = Callable[..., Table]
ABSENT, LOADING, READY, UNLOADING = CopyState


def test_only_a_ready_copy_can_be_pinned(table: Table) -> None:
    table.put("m", 1, 1)
    for state in CopyState:
        table.set_state("m", state)
        assert table.pin("m") == (state is READY)
    assert table.in_flight("m") == 1
    assert table.take_busy() == [("m", 1, 1)]


def test_a_pin_lasts_until_it_is_undone(table: Table) -> None:
    table.add("m")
    table.set_state("m", READY)
    assert table.pin("m")
    assert table.pin("m")
    assert table.begin_unload("m") == 2
    assert table.state("m") is UNLOADING
    assert not table.pin("m")
    table.unpin("m")
    assert table.in_flight("m") == 1
    table.unpin("m")
    assert table.begin_unload("m") == 0
    with pytest.raises(ValueError, match="no call is in flight on 'm'"):
        table.unpin("m")


def test_a_pin_takes_no_notice_of_the_concurrency_limit(table: Table) -> None:
    table.add("m")
    table.set_state("m", READY)
    table.set_concurrency_max("m", 1)
    assert table.pin("m")
    assert table.pin("m")
    assert table.concurrency_max("m") == 1


def test_calls_are_counted_until_they_are_taken(table: Table) -> None:
    table.put("m", 1, 1)
    table.set_state("m", READY)
    for _ in range(3):
        table.pin("m")
        table.unpin("m")
    table.pin("m")
    assert table.take_busy() == [("m", 4, 1)]
    assert table.take_busy() == [("m", 0, 1)]


def test_what_is_busy_is_told_at_once(table: Table) -> None:
    for model_id in ("called", "in flight", "idle"):
        table.put(model_id, 1, 1)
        table.set_state(model_id, READY)
    table.add("not counted")
    table.set_state("not counted", READY)
    for model_id in ("called", "called", "in flight", "not counted"):
        table.pin(model_id)
    table.unpin("called")
    table.unpin("called")
    assert sorted(table.take_busy()) == [("called", 2, 0), ("in flight", 1, 1)]
    assert table.take_busy() == [("in flight", 0, 1)]


def test_flags_hold_32_bits(table: Table) -> None:
    table.add("m")
    table.set_flags("m", U32_MAX)
    assert table.flags("m") == U32_MAX
    with pytest.raises(ValueError, match="flags is 4294967296"):
        table.set_flags("m", U32_MAX + 1)


def test_a_state_that_is_none_is_refused(table: Table) -> None:
    table.add("m")
    with pytest.raises(ValueError, match="4 is not a valid CopyState"):
        table.set_state("m", 4)  # type: ignore[arg-type]


# Other instances


def test_a_handle_names_its_instance_until_it_is_removed(table: Table) -> None:
    a, b = table.add_instance("a"), table.add_instance("b")
    assert a > 0
    assert b > 0
    assert a != b
    assert table.add_instance("a") == a
    assert (table.instance_of(a), table.instance_of(b)) == ("a", "b")
    table.remove_instance(a)
    assert table.instance_of(a) is None
    again = table.add_instance("a")
    assert again != a
    table.remove_instance(a)
    assert table.instance_of(again) == "a"


@pytest.mark.parametrize("handle", [LOCAL, NONE, 1, 1 << 16, 2 << 16 | 1, 2**31, 2**40, -(2**40)])
def test_what_was_never_a_handle_leads_nowhere(table: Table, handle: int) -> None:
    table.add_instance("a")
    assert table.instance_of(handle) is None
    table.remove_instance(handle)
    table.set_peers("m", [handle])
    assert table.peers("m") == []
    assert table.choose("m", 0) == NONE
    table.report_load(handle, "m", 1)


def test_an_index_used_again_never_matches_an_old_handle(table: Table) -> None:
    table.add("m")
    old: set[int] = set()
    for _ in range(5):
        handle = table.add_instance("a")
        assert handle not in old
        table.set_peers("m", [*old, handle])
        assert table.peers("m") == [handle]
        table.remove_instance(handle)
        assert table.peers("m") == []
        assert table.choose("m", 0) == NONE
        old.add(handle)


def test_an_index_whose_generations_are_used_up_is_left_alone(table: Table) -> None:
    first = table.add_instance("a")
    handle = first
    for _ in range(GENERATION_MAX):
        assert handle & 0xFFFF == first & 0xFFFF
        table.remove_instance(handle)
        handle = table.add_instance("a")
    assert handle & 0xFFFF != first & 0xFFFF
    assert table.instance_of(first) is None


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_peers_are_held_in_the_order_given(table: Table, count: int) -> None:
    handles = [table.add_instance(f"i{each}") for each in range(count)]
    table.set_peers("m", reversed(handles))
    assert table.peers("m") == handles[::-1]
    table.set_peers("m", handles + handles)
    assert table.peers("m") == handles
    table.set_peers("m", handles[:1])
    assert table.peers("m") == handles[:1]
    assert "m" in table


def test_one_removal_ends_an_instance_everywhere(table: Table) -> None:
    handles = [table.add_instance(f"i{each}") for each in range(6)]
    for model in range(50):
        table.set_peers(f"m{model}", handles)
    table.remove_instance(handles[0])
    table.remove_instance(handles[4])
    for model in range(50):
        assert table.peers(f"m{model}") == [handles[each] for each in (1, 2, 3, 5)]


def test_the_less_busy_of_two_is_chosen(table: Table) -> None:
    handles = [table.add_instance(f"i{each}") for each in range(5)]
    table.set_peers("m", handles)
    for load, handle in enumerate(handles):
        table.report_load(handle, "m", 10 - load)
    for first in range(5):
        for second in range(4):
            drawn = (first << 32) // 5 + 1 | ((second << 32) // 4 + 1) << 32
            other = second + (second >= first)
            assert table.choose("m", drawn) == handles[max(first, other)]


def test_of_equally_busy_ones_the_copy_here_is_chosen_else_the_first_drawn(table: Table) -> None:
    handles = [table.add_instance(f"i{each}") for each in range(3)]
    table.set_peers("m", handles)
    last, first = 2**32 - 1, 0
    assert table.choose("m", first | last << 32) == handles[0]
    assert table.choose("m", last | first << 32) == handles[2]
    table.set_state("m", READY)
    assert table.choose("m", first | last << 32) == LOCAL
    assert table.choose("m", last | first << 32) == LOCAL
    table.pin("m")
    assert table.choose("m", last | first << 32) == handles[2]
    table.report_load(handles[2], "m", 1)
    assert table.choose("m", last | first << 32) == LOCAL


def test_a_copy_here_is_a_candidate_only_while_ready(table: Table) -> None:
    table.add("m")
    for state in CopyState:
        table.set_state("m", state)
        assert table.choose("m", 0) == (LOCAL if state is READY else NONE)


def test_the_excluded_are_not_chosen(table: Table) -> None:
    handles = [table.add_instance(f"i{each}") for each in range(30)]
    table.set_peers("m", handles)
    table.set_state("m", READY)
    assert table.choose("m", 0, [LOCAL]) == handles[0]
    assert table.choose("m", 0, handles) == LOCAL
    assert table.choose("m", 7, {LOCAL, *handles[:29]}) == handles[29]
    assert table.choose("m", 0, (LOCAL, *handles)) == NONE


def test_chance_is_64_bits_of_any_integer(table: Table) -> None:
    handles = [table.add_instance(f"i{each}") for each in range(3)]
    table.set_peers("m", handles)
    for random in (0, 2**64 - 1, 2**63, 2**64, 2**100 + 5, -1):
        assert table.choose("m", random) == table.choose("m", random & (2**64 - 1))


def test_loads_are_kept_when_peers_change(table: Table) -> None:
    a, b, c = (table.add_instance(each) for each in "abc")
    table.set_peers("m", [a, b])
    table.report_load(a, "m", 5)
    table.report_load(b, "m", 9)
    table.report_load(c, "m", 1)  # no peer yet
    table.set_peers("m", [c, b, a])
    first_and_last = 0 | (2**32 - 1) << 32
    assert table.choose("m", first_and_last) == c
    assert table.choose("m", first_and_last, [c]) == a
    assert table.choose("m", first_and_last, [a]) == c


def test_a_load_told_late_reaches_nobody_else(table: Table) -> None:
    a = table.add_instance("a")
    table.set_peers("m", [a])
    table.remove_instance(a)
    b, c = table.add_instance("b"), table.add_instance("c")
    assert b & 0xFFFF == a & 0xFFFF
    table.set_peers("m", [b, c])
    table.report_load(a, "m", 1_000)
    assert table.choose("m", 0) == b

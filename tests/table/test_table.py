"""What both tables mean, one rule a test (design section 4, spec core 3.2).

Each table made here is walked by ``check_invariants`` when its test ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mm._lru import Table
from mm._lru_words import GENERATION_MAX, ID_BYTES_MAX, READER_COUNT_MAX, U32_MAX
from mm.table import LOCAL, NONE, CopyState, Evicted

MakeTable = Callable[..., Table]
ABSENT, LOADING, READY, UNLOADING = CopyState


@pytest.fixture
def make_table(table_type: type[Table]) -> Iterator[MakeTable]:
    made: list[Table] = []

    def make(capacity_units: int = 100) -> Table:
        made.append(table_type(capacity_units))
        return made[-1]

    yield make
    for each in made:
        each.check_invariants()


@pytest.fixture
def table(make_table: MakeTable) -> Table:
    return make_table()


def ids_of(evicted: list[Evicted]) -> list[str]:
    return [each.model_id for each in evicted]


# Slots


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
    assert table.take_calls("m") == 0
    assert table.flags("m") == 0
    assert table.concurrency_max("m") == 0
    assert table.peers("m") == []
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
    assert table.take_calls("n") == 0
    assert table.last_used("n") is None
    assert table.weight("n") == 0
    assert table.state("n") is ABSENT


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


# The order of local copies


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


# The life of the local copy


def test_only_a_ready_copy_can_be_pinned(table: Table) -> None:
    table.add("m")
    for state in CopyState:
        table.set_state("m", state)
        assert table.pin("m") == (state is READY)
    assert table.in_flight("m") == 1
    assert table.take_calls("m") == 1


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
    table.add("m")
    table.set_state("m", READY)
    for _ in range(3):
        table.pin("m")
        table.unpin("m")
    table.pin("m")
    assert table.take_calls("m") == 4
    assert table.take_calls("m") == 0
    assert table.in_flight("m") == 1


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


# Other instances, and which of them hold a ready copy


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
    table.report_load(a, "m", 9)
    table.report_load(b, "m", 5)
    table.report_load(c, "m", 1)
    table.set_peers("m", [c, b, a])
    both = 0 | (2**32 - 1) << 32
    assert table.choose("m", both) == c
    assert table.choose("m", both, [c]) == b


def test_a_load_told_late_reaches_nobody_else(table: Table) -> None:
    a = table.add_instance("a")
    table.set_peers("m", [a])
    table.remove_instance(a)
    b, c = table.add_instance("b"), table.add_instance("c")
    assert b & 0xFFFF == a & 0xFFFF
    table.set_peers("m", [b, c])
    table.report_load(a, "m", 1_000)
    assert table.choose("m", 0) == b


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

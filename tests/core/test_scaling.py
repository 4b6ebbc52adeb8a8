"""How many copies: one more, one less, a second one, and nothing back and forth."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.core.scaling import (
    DROPPED_PERIOD_MS,
    HOUR_MS,
    MINUTE_MS,
    CopyCounts,
    CopyUse,
    DropBudget,
    Room,
    ScalingRules,
    Surplus,
    copies_to_add,
    has_room_for_second,
    is_unused_second,
)

RULES = ScalingRules()
NOW_MS = 10**12
FULL = Room(free_part=0.01, cache_age_ms=HOUR_MS)


def counts(ready: int, coming: int = 0, left: int = 10, **more: int) -> CopyCounts:
    return CopyCounts(ready, coming, left, **more)


# --- adding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "present", "added"),
    [
        (0.0, counts(1), 0),
        (1.0, counts(1), 0),
        (1.01, counts(1), 1),
        (2.0, counts(1), 2),
        # Those on their way count.
        (2.0, counts(1, coming=1), 0),
        (2.5, counts(1, coming=1), 2),
        # No more than there are instances for it,
        (9.0, counts(1, left=0), 0),
        (9.0, counts(1, left=1), 1),
        # and at a time no more than a third of them, but two.
        (99.0, counts(1, left=11), 4),
        (99.0, counts(1, coming=4, left=7), 0),
        (99.0, counts(5, left=7), 4),
        (3.0, counts(1, left=3), 2),
        (3.0, counts(1, coming=1, left=2), 1),
    ],
)
def test_copies_are_added(demand: float, present: CopyCounts, added: int) -> None:
    assert copies_to_add(demand, present) == added


@given(st.floats(0, 100), st.integers(1, 20), st.integers(0, 20), st.integers(0, 50))
def test_additions_are_bounded(demand: float, ready: int, coming: int, left: int) -> None:
    added = copies_to_add(demand, counts(ready, coming, left))
    assert 0 <= added <= left
    assert added == 0 or ready + coming + added <= math.ceil(demand / 0.8)


# --- taking away --------------------------------------------------------------------------------


def after(demand: float, ready: int, held_ms: int, *, room: Room = FULL, **more: int) -> bool:
    """Whether one is too many when the demand was so for so long."""
    surplus = Surplus(NOW_MS - held_ms)
    surplus.look(demand, ready, NOW_MS)
    return surplus.is_one_too_many(counts(ready, **more), room, RULES, NOW_MS)


def test_a_copy_goes_when_it_was_too_many_for_long_enough() -> None:
    assert after(1.0, 3, 10 * MINUTE_MS)
    assert not after(1.0, 3, 10 * MINUTE_MS - 1)
    # Two thirds of what two bear is needed.
    assert after(4 / 3, 3, 10 * MINUTE_MS)
    assert not after(1.34, 3, 10 * MINUTE_MS)


def test_a_copy_stays_while_nobody_needs_its_memory() -> None:
    assert not after(0.0, 5, HOUR_MS, room=Room(0.06, HOUR_MS))


def test_what_is_old_is_held_longer() -> None:
    week = Room(0.0, 100 * HOUR_MS)
    assert not after(0.0, 3, 3 * HOUR_MS - 1, room=week)
    assert after(0.0, 3, 3 * HOUR_MS, room=week)
    assert after(0.0, 3, 5 * HOUR_MS, room=Room(0.0, 10_000 * HOUR_MS))


def test_a_copy_stays_while_others_come_or_have_just_come_or_gone() -> None:
    assert not after(0.0, 3, HOUR_MS, coming=1)
    assert not after(0.0, 3, HOUR_MS, newest_ms=NOW_MS - 30 * MINUTE_MS + 1)
    assert after(0.0, 3, HOUR_MS, newest_ms=NOW_MS - 30 * MINUTE_MS)
    assert not after(0.0, 3, HOUR_MS, dropped_ms=NOW_MS - 79_999)
    assert after(0.0, 3, HOUR_MS, dropped_ms=NOW_MS - 80_000)


def test_the_last_copies_stay() -> None:
    assert not after(0.0, 1, HOUR_MS)
    assert after(0.0, 2, HOUR_MS)
    assert not after(0.0, 3, HOUR_MS, copies_min=3)
    # Where a second copy would be made again, it is not taken away for want of demand.
    assert not after(0.0, 2, 6 * HOUR_MS, room=Room(0.0, 11 * HOUR_MS))


def test_one_busy_moment_begins_the_time_anew() -> None:
    surplus = Surplus(NOW_MS - HOUR_MS)
    surplus.look(2.5, 3, NOW_MS - 5 * MINUTE_MS)
    surplus.look(0.1, 3, NOW_MS)
    assert not surplus.is_one_too_many(counts(3), FULL, RULES, NOW_MS)
    surplus.look(0.1, 3, NOW_MS + 5 * MINUTE_MS)
    assert surplus.is_one_too_many(counts(3), FULL, RULES, NOW_MS + 5 * MINUTE_MS)


@given(st.floats(0.01, 50))
def test_what_is_added_is_not_at_the_edge_of_going(demand: float) -> None:
    have = 1
    for _ in range(20):
        have += copies_to_add(demand, counts(have, left=100))
    assert copies_to_add(demand, counts(have, left=100)) == 0
    # A twentieth of noise changes nothing.
    assert not after(1.05 * demand, have, HOUR_MS) or have > math.ceil(demand / 0.8)


@given(st.floats(0, 20), st.integers(2, 25))
def test_what_is_taken_away_is_not_added_again(demand: float, ready: int) -> None:
    while after(demand, ready, HOUR_MS):
        ready -= 1
        assert copies_to_add(1.4 * demand, counts(ready)) == 0


# --- second copies ------------------------------------------------------------------------------


def uses(*at_s: float, rules: ScalingRules) -> list[bool]:
    use = CopyUse(round(1000 * at_s[0]))
    return [use.used(round(1000 * each), rules) for each in at_s[1:]]


SHORT = ScalingRules(second_age_min_ms=4_000, second_age_max_ms=10_000)


@pytest.mark.parametrize(
    ("at_s", "hits"),
    [
        # testSecondCopyTrigger of the Java mesh.
        ((0, 1, 12, 16.75), [False, False, True]),
        ((0, 5), [True]),
        ((0, 3), [False]),
        ((0, 11), [False]),
        # The use in the middle is the one that lies in the window.
        ((0, 3, 11), [False, True]),
        ((0, 1, 2, 3, 4), [False, False, False, True]),
    ],
)
def test_recurring_use_is_seen(at_s: tuple[float, ...], hits: list[bool]) -> None:
    assert uses(*at_s, rules=SHORT) == hits


def test_steady_use_is_recurring() -> None:
    hits = uses(*range(0, 120, 1), rules=SHORT)
    assert hits[10:].count(True) > 60


def test_second_copies_need_room() -> None:
    assert has_room_for_second(Room(0.10, 0), RULES)
    assert not has_room_for_second(Room(0.09, 20 * HOUR_MS), RULES)
    assert has_room_for_second(Room(0.0, 20 * HOUR_MS + 1), RULES)
    assert not has_room_for_second(Room(0.0, 6 * HOUR_MS), SHORT)
    assert has_room_for_second(Room(0.0, 6 * HOUR_MS + 1), SHORT)


def unused(unused_ms: int, heavy_ms: int = 0, room: Room = FULL, **more: int) -> bool:
    return is_unused_second(unused_ms, heavy_ms, counts(2, **more), room, RULES, NOW_MS)


def test_a_second_copy_that_nobody_uses_goes() -> None:
    assert unused(6 * MINUTE_MS + 1)
    assert not unused(6 * MINUTE_MS)
    assert not unused(HOUR_MS, room=Room(0.06, HOUR_MS))
    assert not unused(HOUR_MS, copies_min=2)
    assert not unused(HOUR_MS, newest_ms=NOW_MS - MINUTE_MS)


def test_after_heavy_use_a_second_copy_stays_longer() -> None:
    old = Room(0.0, 200 * HOUR_MS)
    assert unused(10 * HOUR_MS + 1, room=old)
    assert not unused(19 * HOUR_MS, NOW_MS - 39 * HOUR_MS, room=old)
    assert unused(20 * HOUR_MS + 1, NOW_MS - 39 * HOUR_MS, room=old)
    assert unused(19 * HOUR_MS, NOW_MS - 41 * HOUR_MS, room=old)


# --- the rest -----------------------------------------------------------------------------------


def test_an_instance_gives_up_little_at_a_time() -> None:
    budget = DropBudget()
    assert budget.has(80, 1000, NOW_MS)  # the first one in any case
    budget.take(80, NOW_MS)
    assert not budget.has(1, 1000, NOW_MS + 1)
    later_ms = NOW_MS + DROPPED_PERIOD_MS
    assert budget.has(25, 1000, later_ms)
    budget.take(25, later_ms)
    assert budget.has(25, 1000, later_ms)
    assert not budget.has(26, 1000, later_ms)
    assert budget.has(26, 1000, NOW_MS - 1)  # the clock was set back


def test_what_a_copy_bears() -> None:
    assert RULES.capacity(0).calls_per_s == pytest.approx(2000 / 60)
    assert RULES.capacity(0).in_flight == 4
    assert RULES.capacity(2).in_flight == pytest.approx(1.8)
    latency = ScalingRules(limits_concurrency=True, bandwidth=0.5)
    assert latency.capacity(2).calls_per_s == math.inf
    assert latency.capacity(2).in_flight == 1

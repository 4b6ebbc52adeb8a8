"""Copies asked for: counted until the record tells of them, and not asked for again at once."""

from __future__ import annotations

from mm.core.asked_copies import PAUSE_MAX_S, PAUSE_MIN_S, SEEN_AFTER_S, AskedCopies
from mm.core.ids import InstanceId

A, B = InstanceId("a"), InstanceId("b")


def test_an_accepted_copy_counts_until_the_record_tells_of_it() -> None:
    asked = AskedCopies()
    assert asked.may_ask(0.0)
    asked.begin()
    assert not asked.may_ask(0.0)
    asked.accepted(A, 0.0)
    asked.end()
    assert asked.unseen == {A}
    asked.look({B}, {B}, 1.0)
    assert asked.unseen == {A}
    asked.look({A, B}, {B}, 2.0)
    assert asked.unseen == frozenset()
    assert asked.may_ask(2.0)
    assert not asked.is_forgettable  # what becomes of it is still to be seen
    asked.look({A, B}, {A, B}, 3.0)
    assert asked.is_forgettable


def test_one_that_never_comes_or_goes_again_stops_the_asking_for_a_while() -> None:
    asked = AskedCopies()
    asked.accepted(A, 0.0)
    asked.look({B}, {B}, SEEN_AFTER_S + 1)
    assert not asked.may_ask(SEEN_AFTER_S + PAUSE_MIN_S)
    again_s = SEEN_AFTER_S + 1 + PAUSE_MIN_S
    assert asked.may_ask(again_s)
    asked.accepted(A, again_s)
    asked.look({A, B}, {B}, again_s)
    asked.look({B}, {B}, again_s + 1)  # its load failed
    assert not asked.may_ask(again_s + 2 * PAUSE_MIN_S)
    assert asked.may_ask(again_s + 1 + 2 * PAUSE_MIN_S)


def test_what_went_wrong_is_stale_a_pause_after_the_end_of_its_pause() -> None:
    asked = AskedCopies()
    asked.refused(0.0)
    asked.refused(PAUSE_MIN_S)
    assert not asked.is_stale(5 * PAUSE_MIN_S - 1)
    assert asked.is_stale(5 * PAUSE_MIN_S)
    asked.begin()
    assert not asked.is_stale(5 * PAUSE_MIN_S)
    asked.end()
    asked.accepted(A, 5 * PAUSE_MIN_S)
    assert not asked.is_stale(100 * PAUSE_MIN_S)


def test_one_that_goes_soon_after_it_was_ready_came_to_nothing() -> None:
    asked = AskedCopies(1.0, 60.0, kept_s=30.0)
    now_s, pause_s = 0.0, 1.0
    for _ in range(8):
        assert asked.may_ask(now_s)
        asked.accepted(A, now_s)
        asked.look({A}, {A}, now_s)
        asked.look(set(), set(), now_s + 29.0)
        assert not asked.may_ask(now_s + 28.9 + pause_s)
        now_s += 29.0 + pause_s
        pause_s = min(60.0, 2 * pause_s)
    asked.accepted(A, now_s)
    asked.look({A}, {A}, now_s)
    assert not asked.is_forgettable
    asked.look(set(), set(), now_s + 30.0)
    assert asked.may_ask(now_s + 30.0)
    assert asked.is_forgettable


def test_pauses_grow_up_to_a_limit_and_end_with_a_success() -> None:
    asked = AskedCopies()
    for _ in range(20):
        asked.refused(0.0)
    assert not asked.may_ask(PAUSE_MAX_S - 1)
    assert asked.may_ask(PAUSE_MAX_S)
    assert not asked.is_forgettable
    asked.accepted(A, PAUSE_MAX_S)
    asked.look({A}, set(), PAUSE_MAX_S)
    asked.look({A}, {A}, PAUSE_MAX_S)
    assert asked.is_forgettable
    asked.refused(0.0)
    assert asked.may_ask(PAUSE_MIN_S)

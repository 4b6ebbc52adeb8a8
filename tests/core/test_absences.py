"""Who vanished, and how long that means nothing."""

from __future__ import annotations

from mm.core.absences import Absences
from mm.core.ids import InstanceId

GRACE_S, LONG_S = 2.0, 600.0
A, B, C, D = map(InstanceId, "abcd")
ALL = frozenset((A, B, C, D))


def absences() -> Absences:
    found = Absences(A, GRACE_S, LONG_S)
    assert found.look(ALL, ALL, 0.0).has_come
    assert not found.look(ALL, ALL, 1.0).has_come
    assert found.next_s is None
    return found


def test_one_that_vanished_counts_for_a_moment() -> None:
    found = absences()
    assert not found.look(ALL - {D}, ALL, 10.0).lost
    assert D in found
    assert found.next_s == 10.0 + GRACE_S
    assert not found.look(ALL - {D}, ALL, 11.0).lost
    assert found.look(ALL - {D}, ALL, 12.0).lost == {D}
    assert D not in found
    assert found.late == {D}
    assert not found.look(ALL - {D}, ALL, 13.0).lost, "that is told once"
    assert found.look(ALL, ALL, 14.0).has_come
    assert D in found
    assert not found.late


def test_when_most_vanish_each_is_waited_for_long_also_when_the_others_are_back() -> None:
    found = absences()
    found.look(frozenset((A,)), ALL, 10.0)
    assert found.look(frozenset((A, B, C)), ALL, 20.0).has_come
    assert D in found
    assert found.next_s == 10.0 + LONG_S
    assert found.look(frozenset((A, B, C)), ALL, 10.0 + LONG_S).lost == {D}
    assert D not in found


def test_when_we_vanish_who_is_gone_then_is_waited_for_long() -> None:
    found = absences()
    found.look(frozenset((B, C)), ALL, 10.0)
    found.look(frozenset((A, B, C)), ALL, 11.0)
    assert D in found
    found.look(frozenset((A, B, C)), ALL, 100.0)
    assert D in found


def test_whom_records_name_and_nobody_has_seen_is_waited_for_long() -> None:
    found, there = Absences(A, GRACE_S, LONG_S), frozenset((A, B))
    found.look(there, {B, C}, 1.0)
    assert C in found
    assert D not in found
    assert found.next_s == 1.0 + LONG_S
    assert found.look(there, {B, C}, 1.0 + LONG_S).lost == {C}
    # Who did not come back in time has no second one, until it was there again.
    found.look(there, {B, C}, 2.0 + LONG_S)
    assert C not in found
    found.look(frozenset((A, B, C)), {B, C}, 3.0 + LONG_S)
    assert C in found


def test_of_those_that_no_record_names_nothing_is_remembered() -> None:
    found = absences()
    found.look(ALL - {D}, ALL - {D}, 10.0)
    assert found.look(ALL - {D}, ALL - {D}, 20.0).lost == {D}
    assert not found.late


def test_whose_time_was_over_before_makes_nothing_the_doing_of_the_store() -> None:
    """One that does not lead looks only when somebody moves."""
    found = absences()
    found.look(frozenset((A, B)), frozenset(), 10.0)
    moves = found.look(frozenset((A,)), frozenset(), 3610.0)
    assert moves.lost == {C, D}
    assert B in found
    assert found.next_s == 3610.0 + GRACE_S


def test_those_who_left_in_order_are_lost_at_once_and_make_nothing_the_doing_of_the_store() -> None:
    found = absences()
    moves = found.look(frozenset((A,)), ALL, 10.0, left={C, D})
    assert moves.lost == {C, D} == found.late
    assert C not in found
    assert found.next_s == 10.0 + GRACE_S, "of b, which vanished"
    assert found.look(frozenset((A,)), ALL, 12.0, left={C, D}).lost == {B}
    found.look(frozenset((A, C)), ALL, 13.0, left={D})
    found.look(frozenset((A,)), ALL, 14.0, left={D})
    assert C in found, "this time it vanished"

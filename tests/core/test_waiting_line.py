"""The order of a waiting line, and that its length costs nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.waiting_line import WaitingLine


def line_of(*entries: tuple[str, int]) -> WaitingLine[str]:
    line: WaitingLine[str] = WaitingLine()
    for key, priority in entries:
        line.add(key, priority)
    return line


def test_the_most_urgent_first_and_equals_in_order_of_arrival() -> None:
    line = line_of(("a", 1), ("b", 2), ("c", 1), ("d", 2))
    assert list(line) == ["b", "d", "a", "c"]
    assert line.head() == "b"
    assert line.head() == "b", "looking takes nobody out"


def test_whoever_is_raised_keeps_its_place_among_equals() -> None:
    line = line_of(("a", 1), ("b", 2), ("c", 1))
    assert line.raise_priority("c", 2)
    assert line.raise_priority("a", 2)
    assert list(line) == ["a", "b", "c"]
    assert not line.raise_priority("a", 1)
    assert not line.raise_priority("nobody", 9)


def test_whoever_goes_is_gone_and_may_come_again() -> None:
    line = line_of(("a", 1), ("b", 1))
    assert line.discard("a")
    assert not line.discard("a")
    line.add("a", 1)
    assert list(line) == ["b", "a"]
    with pytest.raises(AssertionError):
        line.add("a", 2)


def test_an_empty_line_has_no_head() -> None:
    line = line_of(("a", 1))
    line.discard("a")
    assert line.head() is None
    assert len(line) == 0


STEPS = st.lists(
    st.tuples(st.sampled_from("ardp"), st.integers(0, 12), st.integers(-3, 3)), max_size=200
)


@settings(deadline=None)
@given(steps=STEPS)
def test_it_is_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    line: WaitingLine[int] = WaitingLine()
    model: list[tuple[int, int, int]] = []
    for arrival, (step, key, priority) in enumerate(steps):
        entry = next((each for each in model if each[2] == key), None)
        if step == "a" and entry is None:
            line.add(key, priority)
            model.append((-priority, arrival, key))
        elif step == "r":
            is_raised = entry is not None and -entry[0] < priority
            assert line.raise_priority(key, priority) == is_raised
            if entry is not None and is_raised:
                model[model.index(entry)] = (-priority, entry[1], key)
        elif step == "d":
            assert line.discard(key) == (entry is not None)
            if entry is not None:
                model.remove(entry)
        elif step == "p" and model:
            assert line.head() == min(model)[2]
        model.sort()
        assert list(line) == [each[2] for each in model]
        assert len(line) == len(model)
        assert all((each[2] in line) for each in model)


def test_ten_thousand_waiters_do_not_make_an_event_dearer() -> None:
    """Told by what is kept, not by a clock: raising and leaving never piles up."""
    line: WaitingLine[int] = WaitingLine()
    for key in range(10_000):
        line.add(key, 0)
    for priority in range(1, 20):
        for key in range(0, 10_000, 10):
            line.raise_priority(key, priority)
    assert len(line._heap) <= 2 * len(line) + 33
    for key in range(9_990):
        line.discard(key)
    assert len(line._heap) <= 2 * 10 + 33
    assert line.head() == 9_990

"""The order in which recorded failures are over, against a plain dict."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from mm.core.failure_ends import FailureEnds
from mm.core.ids import ModelId

MODELS = [ModelId(name) for name in "abcd"]


def test_the_longest_over_come_first_and_no_more_than_asked_for() -> None:
    ends = FailureEnds()
    for end_ms, model_id in enumerate(MODELS):
        ends.note(model_id, 10 * end_ms)
    assert ends.over(20, 2) == ["a", "b"]
    assert ends.over(20, 9) == ["a", "b", "c"], "until they are gone"
    assert ends.left_ms(20) == 0
    for model_id in MODELS[:3]:
        ends.note(model_id, None)
    assert ends.over(20, 9) == []
    assert ends.left_ms(20) == 10


@given(st.lists(st.tuples(st.sampled_from(MODELS), st.none() | st.integers(0, 9))))
def test_it_is_what_a_dict_says(notes: list[tuple[ModelId, int | None]]) -> None:
    ends = FailureEnds()
    expected: dict[ModelId, int] = {}
    for model_id, end_ms in notes:
        ends.note(model_id, end_ms)
        expected.pop(model_id, None)
        if end_ms is not None:
            expected[model_id] = end_ms
        assert len(ends) == len(expected)
        assert sorted(ends.over(5, 9)) == sorted(m for m, each in expected.items() if each <= 5)
        assert ends.left_ms(0) == min(expected.values(), default=math.inf)


def test_what_changes_all_the_time_is_not_kept() -> None:
    ends = FailureEnds()
    for end_ms in range(10_000):
        ends.note(MODELS[0], end_ms)
    assert len(ends._heap) < 100
    assert ends.left_ms(0) == 9_999

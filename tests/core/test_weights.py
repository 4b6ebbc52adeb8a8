"""The comparisons of weights: what they must also be once a weight is more than a number."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.weights import NOTHING, common, covering, fits, share

WEIGHTS = st.integers(-(2**62), 2**62)


@settings(deadline=None)
@given(one=WEIGHTS, other=WEIGHTS, third=WEIGHTS)
def test_they_are_those_of_a_lattice(one: int, other: int, third: int) -> None:
    """All that the accounting relies on; a tuple compared part by part has it too."""
    assert fits(common(one, other), one)
    assert fits(common(one, other), other)
    assert fits(one, covering(one, other))
    assert fits(other, covering(one, other))
    assert common(one, other) + covering(one, other) == one + other
    if fits(third, one) and fits(third, other):
        assert fits(third, common(one, other))
    if fits(one, third) and fits(other, third):
        assert fits(covering(one, other), third)
    assert fits(one, other) == fits(one - other, NOTHING)


@settings(deadline=None)
@given(weight=st.integers(0, 2**62), parts=st.integers(1, 100))
def test_parts_together_are_no_more_than_the_whole(weight: int, parts: int) -> None:
    assert fits(share(weight, parts) * parts, weight)

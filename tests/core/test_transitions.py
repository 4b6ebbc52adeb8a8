"""When a vmodel goes over to its target, from the copies of both models."""

from __future__ import annotations

import pytest

from mm.core.ids import ModelId
from mm.core.records import VModelRecord
from mm.core.transitions import CopiesSeen, Pair, Step, next_step

M, N = ModelId("m"), ModelId("n")


def test_only_a_vmodel_with_two_models_is_in_transition() -> None:
    assert Pair.of(None) is None
    assert Pair.of(VModelRecord(M, M, failed=True)) is None
    assert Pair.of(VModelRecord(M, N, failed=True)) == Pair(M, N) == (M, N)


@pytest.mark.parametrize(
    ("seen", "step"),
    [
        # Nobody is served: there is nothing to wait for, but something to go over to.
        (CopiesSeen(0, 0, 0), Step.SWITCH),
        (CopiesSeen(0, 0, 0, 1), Step.SWITCH),
        (CopiesSeen(0, 0, None), Step.TARGET_MISSING),
        (CopiesSeen(1, 1, None), Step.TARGET_MISSING),
        # At least one, even if the copies of the active model are gone or still loading.
        (CopiesSeen(1, 0, 0), Step.LOAD_FIRST),
        (CopiesSeen(1, 1, 0, 1), Step.LOAD_FIRST),
        (CopiesSeen(1, 0, 1), Step.SWITCH),
        (CopiesSeen(1, 1, 1), Step.SWITCH),
        # As many as serve; those on their way do not count as serving, nor are they asked for.
        (CopiesSeen(3, 3, 1), Step.ADD),
        (CopiesSeen(3, 3, 1, 1), Step.ADD),
        (CopiesSeen(3, 3, 1, 2), Step.WAIT),
        (CopiesSeen(3, 3, 3), Step.SWITCH),
        (CopiesSeen(3, 3, 5), Step.SWITCH),
        (CopiesSeen(3, 2, 2), Step.SWITCH),
        # No place for more: what is on its way is waited for, then it must do.
        (CopiesSeen(3, 3, 1, 1, has_place=False), Step.WAIT),
        (CopiesSeen(3, 3, 1, has_place=False), Step.SWITCH),
        (CopiesSeen(1, 1, 0, has_place=False), Step.LOAD_FIRST),
        # And not for ever.
        (CopiesSeen(3, 3, 1, 1, has_time=False), Step.SWITCH),
        (CopiesSeen(1, 1, 0, has_time=False), Step.LOAD_FIRST),
    ],
)
def test_next_step(seen: CopiesSeen, step: Step) -> None:
    assert next_step(seen) is step


def test_missing_copies() -> None:
    assert CopiesSeen(3, 3, 1, 1).missing_count == 1
    assert CopiesSeen(3, 3, None).missing_count == 3
    assert CopiesSeen(1, 1, 2).missing_count == 0

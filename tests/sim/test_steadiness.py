"""Simulated runs see copies that come and go: a rule of scaling broken on purpose is told."""

from __future__ import annotations

import pytest

from mm.core.scaling import Room, Surplus
from mm.testing import invariants, steadiness
from mm.testing.simulator import simulate
from mm.testing.steadiness import turns

#: Runs that have the last part. Which copies come and go in it is chance: it shows in one of them.
STEADY_SEEDS = (49, 97, 1)


def test_turns_are_told_from_what_rises_or_falls() -> None:
    assert turns([]) == turns([2]) == turns([1, 3, 4]) == turns([4, 3, 1]) == 0
    assert turns([1, 4, 1]) == turns([3, 1, 2]) == 1
    assert turns([2, 1, 2, 1, 2]) == 3


def test_copies_that_come_and_go_under_even_load_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies go as soon as fewer would do, for a load of which all were needed a moment ago."""

    def look(self: Surplus, demand: float, ready_count: int, now_ms: int) -> None:
        self._since_ms, self._needed_count = 0, 1

    monkeypatch.setattr(Surplus, "look", look)
    # What takes a quarter of an hour else.
    monkeypatch.setattr(Room, "hold_ms", 0)
    limits = steadiness.LIMITS | {"scaledown_settled_s": 10.0, "scaledown_gap_s": 5.0}
    monkeypatch.setattr(steadiness, "LIMITS", limits)
    monkeypatch.setattr(steadiness, "BEGIN_S", 20.0)
    monkeypatch.setattr(steadiness, "STEADY_S", 100.0)
    monkeypatch.setattr(invariants, "HELD_S", 0.0)
    failures = (simulate(seed).failure for seed in STEADY_SEEDS)
    failure = next((each for each in failures if each is not None), None)
    assert failure is not None
    assert failure.text.startswith("copies do not come and go under even load"), failure.text

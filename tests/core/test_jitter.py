"""Pauses between tries: their bounds, and that nobody stays in step with anybody."""

from __future__ import annotations

import random
from itertools import accumulate

from mm.core.jitter import SPREAD, jittered_s


def test_a_pause_is_near_what_it_was_meant_to_be() -> None:
    rng = random.Random(1)
    pauses_s = [jittered_s(2.0, rng) for _ in range(1_000)]
    assert min(pauses_s) >= 2.0 * (1 - SPREAD)
    assert max(pauses_s) <= 2.0 * (1 + SPREAD)
    assert 1.9 < sum(pauses_s) / len(pauses_s) < 2.1


def test_two_who_begin_together_are_soon_apart() -> None:
    ways = [
        list(accumulate(jittered_s(1.0, rng) for _ in range(5)))
        for rng in (random.Random(f"instance {number}") for number in range(100))
    ]
    for try_number in range(2, 5):
        times_s = sorted(way[try_number] for way in ways)
        most = max(sum(t <= each < t + 0.1 for each in times_s) for t in times_s)
        assert most <= 30, try_number

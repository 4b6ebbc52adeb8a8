"""What eviction by cost promises, held on a few streams of `bench/policies`, shorter than there.

At least a tenth fewer load seconds than LRU where popularity lasts and sizes are unequal, and never
three hundredths more, whatever the calls are. Everything comes from seeds: a figure that moves was
moved by a change of the code. All streams, and other policies: `make bench ARGS=policies`.
"""

from __future__ import annotations

import pytest

from bench.policies.__main__ import GOAL_MEAN, GOAL_WORST
from bench.policies.classic import Lru
from bench.policies.ours import Ours
from bench.policies.replay import replay
from bench.policies.shapes import Shape, held_out, tuned
from mm.core.eviction import CostEviction

SIZE = (300, 4_000, 1)  # models, calls, seed
SHAPES = {f"{each.name}, {each.world}": each for each in (*held_out(), *tuned())}
GOAL = (
    "Zipf 0.7, with-size",
    "Zipf 0.9, apart",
    "Zipf 1.1, fixed",
    "Zipf 0.9 drifting, with-size",
)
#: Where use, cost and size say nothing of who is called next, or the wrong thing.
NASTY = (
    "bursts, equal",
    "3 times, equal",
    "phases that just fit, apart",
    "phases too large, equal",
    "recency alone, equal",
)


def ratio(shape: Shape) -> float:
    """Answer the load seconds of a stream in those of LRU."""
    stream = shape.stream(*SIZE)
    return replay(stream, Ours(stream.world)).load_s / replay(stream, Lru(stream.world)).load_s


def test_less_is_loaded_where_popularity_lasts() -> None:
    assert all(SHAPES[name].is_goal for name in GOAL)
    assert sum(ratio(SHAPES[name]) for name in GOAL) / len(GOAL) <= GOAL_MEAN


@pytest.mark.parametrize("name", NASTY)
def test_it_is_never_much_worse(name: str) -> None:
    assert ratio(SHAPES[name]) <= GOAL_WORST


def test_without_its_check_against_lru_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostEviction, "_lost", lambda self, known: None)
    assert ratio(SHAPES["phases too large, equal"]) > GOAL_WORST

"""The order in which waiting loads claim space, and that nobody waits for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.accounting import UnloadAccounting
from mm.core.ids import ModelId
from mm.core.space_queue import SpaceQueue

A, B, C = (ModelId(name) for name in "abc")


def full_house(*unloading: int) -> UnloadAccounting:
    """Answer an accounting of 100 in which models of these weights are being unloaded."""
    accounting = UnloadAccounting(100, 0)
    for weight in unloading:
        accounting.inserted(weight)
        accounting.claimed(weight)
        accounting.left(weight, claimed=True)
    return accounting


def waiting(accounting: UnloadAccounting, **weights: int) -> SpaceQueue:
    queue = SpaceQueue()
    for name, weight in weights.items():
        accounting.inserted(weight)
        queue.add(ModelId(name), weight, 0)
    return queue


def test_all_that_fit_start_at_once_in_order_of_arrival() -> None:
    accounting = full_house()
    queue = waiting(accounting, b=10, a=20, c=30)
    assert queue.claim(accounting) == [B, A, C]
    assert len(queue) == 0


def test_a_small_load_does_not_overtake_a_large_one() -> None:
    accounting = full_house(60, 40)
    queue = waiting(accounting, a=70, b=5)
    accounting.unload_completed(60)
    assert queue.claim(accounting) == []
    accounting.unload_completed(40)
    assert queue.claim(accounting) == [A, B]


def test_a_higher_priority_goes_first() -> None:
    accounting = full_house()
    queue = waiting(accounting, a=1, b=1, c=1)
    queue.raise_priority(C, 5)
    queue.raise_priority(A, -5)
    queue.raise_priority(ModelId("not waiting"), 5)
    assert list(queue) == [C, A, B]
    assert repr(queue) == "<SpaceQueue [c 1, a 1, b 1]>"


def test_when_the_head_gives_up_the_next_may_start() -> None:
    accounting = full_house(60)
    queue = waiting(accounting, a=70, b=5)
    assert queue.claim(accounting) == []
    assert queue.discard(A)
    assert not queue.discard(A)
    accounting.left(70, claimed=False)
    assert queue.claim(accounting) == [B]
    assert B not in queue


def test_nobody_waits_twice() -> None:
    queue = SpaceQueue()
    queue.add(A, 1, 0)
    with pytest.raises(AssertionError):
        queue.add(A, 1, 0)


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    reserve=st.integers(0, 30),
    chance=st.randoms(use_true_random=False),
)
def test_everybody_starts_once_the_unloads_before_are_done(
    weights: list[int], reserve: int, chance: random.Random
) -> None:
    """Loads evict their predecessors; in whatever order unloads end, all claim, in order."""
    accounting = UnloadAccounting(100, reserve)
    queue = SpaceQueue()
    held: list[tuple[ModelId, int]] = []
    unloads: list[int] = []
    started: list[ModelId] = []
    overtaken: list[ModelId] = []
    for number, weight in enumerate(weights):
        model_id = ModelId(str(number))
        accounting.inserted(weight)
        held.append((model_id, weight))
        queue.add(model_id, weight, 0)
        while accounting.used_units > accounting.table_capacity_units:
            victim, victim_weight = held.pop(0)
            claimed = not queue.discard(victim)
            accounting.left(victim_weight, claimed=claimed)
            unloads.extend([victim_weight] if claimed else [])
            overtaken.extend([] if claimed else [victim])
        if unloads and chance.random() < 0.5:
            accounting.unload_completed(unloads.pop(chance.randrange(len(unloads))))
        started += queue.claim(accounting)
        accounting.check_invariants()
    while unloads:
        accounting.unload_completed(unloads.pop())
        started += queue.claim(accounting)
    assert started == sorted(started, key=int)
    assert len(started) + len(overtaken) == len(weights)
    assert len(queue) == 0

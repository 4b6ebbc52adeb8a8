"""The unload accounting against spec core 3.9, taken literally, with a pseudo entry in the cache.

``JavaCache`` is the naive twin: every row of the table as written, a buffer weight clamped to
[R, C], and a loop that evicts from the oldest end while everything together is too heavy. A
hypothesis state machine drives it in step with ``UnloadAccounting`` and a plain weighted LRU of
capacity C - R. They must evict the same, grant the same claims and publish the same numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mm.core.accounting import UnloadAccounting
from tests.core.java_cache import Entry, JavaCache

TRANSCRIPT = Path(__file__).parent.parent / "testdata" / "accounting.txt"


class ReferenceLru:
    """What ``mm._lru.Table`` does, in a few lines: weights, times, a capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.weights: dict[int, int] = {}
        self.used_ms: dict[int, int] = {}

    def used(self) -> int:
        return sum(self.weights.values())

    def evict(self) -> list[tuple[int, int]]:
        evicted = []
        while self.used() > self.capacity:
            key = min(self.weights, key=lambda key: (self.used_ms[key], key))
            evicted.append((key, self.weights.pop(key)))
        return evicted


class AccountingMachine(RuleBasedStateMachine):
    """Both in step: the same events, then the same evictions, claims and published numbers."""

    @initialize(capacity=st.integers(1, 60), tenths=st.integers(0, 5))
    def start(self, capacity: int, tenths: int) -> None:
        reserve = min(capacity - 1, capacity * tenths // 10)
        self.java = JavaCache(capacity, reserve)
        self.ours = UnloadAccounting(capacity, reserve)
        self.lru = ReferenceLru(self.ours.table_capacity_units)
        #: What our side remembers of an entry: whether its load started.
        self.claimed: dict[int, bool] = {}
        self.unloads: list[int] = []
        self.given_up: list[int] = []
        self.keys = 0

    def settle(self) -> None:
        """Let both evict what they must; tell the accounting as the mesh would."""
        self.lru.capacity = self.ours.table_capacity_units
        evicted = self.lru.evict()
        assert [key for key, _ in evicted] == self.java.evict()
        for key, weight in evicted:
            self.gone(key, weight)

    def gone(self, key: int, weight: int) -> None:
        self.ours.left(weight, claimed=self.claimed[key])
        if self.claimed.pop(key):
            self.unloads.append(weight)

    def pick(self, data: st.DataObject, *, claimed: bool) -> int | None:
        keys = [key for key in self.claimed if self.claimed[key] is claimed]
        return data.draw(st.sampled_from(keys)) if keys else None

    @rule(used_ms=st.integers(0, 20))
    def insert(self, used_ms: int) -> None:
        key, self.keys = self.keys, self.keys + 1
        self.lru.weights[key], self.lru.used_ms[key] = 1, used_ms
        self.claimed[key] = False
        self.ours.inserted(1)
        self.java.insert(Entry(key, used_ms, 1))
        self.settle()

    @rule(data=st.data(), delta=st.integers(-8, 25))
    def predict(self, data: st.DataObject, delta: int) -> None:
        key = self.pick(data, claimed=False)
        if key is None:
            return
        delta = max(delta, 1 - self.lru.weights[key])
        self.ours.grown(delta)
        self.java.grow(self.java.entries[key], delta)
        self.lru.weights[key] += delta
        self.settle()

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        key = self.pick(data, claimed=False)
        if key is None:
            return
        weight = self.lru.weights[key]
        assert self.ours.can_claim(weight) is self.java.ready(weight)
        if self.ours.can_claim(weight):
            self.ours.claimed(weight)
            self.java.claim(self.java.entries[key])
            self.claimed[key] = True

    @rule(data=st.data(), delta=st.integers(-20, 25))
    def measure(self, data: st.DataObject, delta: int) -> None:
        key = self.pick(data, claimed=True)
        if key is None:
            return
        delta = max(delta, 1 - self.lru.weights[key])
        room = _room(self.ours)
        woken = self.ours.measured(delta)
        assert woken is (_room(self.ours) > room)
        self.java.measure(self.java.entries[key], delta)
        self.lru.weights[key] += delta
        self.settle()

    @rule(data=st.data(), claimed=st.booleans())
    def remove(self, data: st.DataObject, claimed: bool) -> None:
        key = self.pick(data, claimed=claimed)
        if key is None:
            return
        self.java.leave(self.java.entries[key])
        self.gone(key, self.lru.weights.pop(key))
        self.settle()

    @rule(data=st.data(), used_ms=st.integers(0, 20))
    def touch(self, data: st.DataObject, used_ms: int) -> None:
        key = self.pick(data, claimed=True)
        if key is not None:
            self.lru.used_ms[key] = self.java.entries[key].used_ms = used_ms

    @precondition(lambda self: self.unloads)
    @rule(data=st.data())
    def unload_completes(self, data: st.DataObject) -> None:
        weight = self.unloads.pop(data.draw(st.integers(0, len(self.unloads) - 1)))
        room = _room(self.ours)
        woken = self.ours.unload_completed(weight)
        assert woken is (_room(self.ours) > room)
        self.java.complete(weight)
        self.settle()

    @precondition(lambda self: self.unloads)
    @rule(data=st.data())
    def unload_fails(self, data: st.DataObject) -> None:
        weight = self.unloads.pop(data.draw(st.integers(0, len(self.unloads) - 1)))
        self.ours.unload_failed(weight)
        self.given_up.append(weight)
        self.java.give_up(weight)
        self.settle()

    @precondition(lambda self: self.given_up)
    @rule()
    def unload_recovers(self) -> None:
        weight = self.given_up.pop()
        room = _room(self.ours)
        assert self.ours.unload_recovered(weight) is (_room(self.ours) > room)
        self.java.recover(weight)
        self.settle()

    @invariant()
    def same_claims(self) -> None:
        if self.java.capacity < self.java.reserve:
            # So much was lost that nothing can be held, and nobody asks.
            assert not self.java.entries
            return
        room = _room(self.ours)
        assert self.java.ready(room)
        assert not self.java.ready(room + 1)

    @invariant()
    def same_numbers(self) -> None:
        java = self.java
        assert self.ours.published_capacity_units == java.capacity - java.buffer
        assert self.ours.published_used_units == java.occupied
        assert self.ours.free_units == java.capacity - (java.occupied + java.buffer)
        assert self.ours.deficit_units == java.deficit
        assert self.ours.used_units == self.lru.used()

    @invariant()
    def unloads_are_counted(self) -> None:
        assert self.ours.unloading_units == sum(self.unloads)
        assert self.ours.lost_units == sum(self.given_up)

    @invariant()
    def holds_its_own_invariants(self) -> None:
        self.ours.check_invariants()


def _room(accounting: UnloadAccounting) -> int:
    """Answer the largest weight that could be claimed, negative when there is less than none."""
    weights = range(-1000, 1000)
    refused = bisect_left(weights, True, key=lambda weight: not accounting.can_claim(weight))
    return weights[refused] - 1


# The invariants need `start` to have run; hypothesis runs initialize rules first.
AccountingMachine.TestCase.settings = settings(
    max_examples=100, deadline=None, stateful_step_count=40
)
TestAgainstJava = AccountingMachine.TestCase


# --- transcripts ----------------------------------------------------------------------


def _run(accounting: UnloadAccounting, command: str) -> str:
    """Run one line of a transcript: a method, its weight, perhaps "claimed" or "unclaimed"."""
    verb, *words = command.split()
    numbers = [int(word) for word in words if word[-1].isdigit()]
    keywords = {"claimed": "claimed" in words} if {"claimed", "unclaimed"} & set(words) else {}
    answer = getattr(accounting, verb)(*numbers, **keywords)
    return f"  {accounting!r}" if answer is None else f"  {answer}; {accounting!r}"


@pytest.mark.parametrize("case", TRANSCRIPT.read_text().strip().split("\n\n"))
def test_transcript(case: str) -> None:
    """Prose, then "new C R", then commands, each with what it must answer and leave behind."""
    lines = case.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("new "))
    accounting = UnloadAccounting(*(int(word) for word in lines[start].split()[1:]))
    said = [lines[start]]
    for command in (line for line in lines[start + 1 :] if not line.startswith(" ")):
        said += [command, _run(accounting, command)]
    accounting.check_invariants()
    assert said == lines[start:]


# --- single facts ---------------------------------------------------------------------


def test_a_claim_without_space_is_a_bug() -> None:
    accounting = UnloadAccounting(10, 0)
    accounting.inserted(11)
    with pytest.raises(AssertionError):
        accounting.claimed(11)


def test_two_completions_of_one_unload_are_a_bug() -> None:
    accounting = UnloadAccounting(10, 0)
    accounting.inserted(5)
    accounting.claimed(5)
    accounting.left(5, claimed=True)
    accounting.unload_completed(5)
    with pytest.raises(AssertionError):
        accounting.unload_completed(5)


def test_an_eviction_that_was_not_told_is_found_at_rest() -> None:
    accounting = UnloadAccounting(10, 2)
    accounting.inserted(9)
    with pytest.raises(AssertionError):
        accounting.check_invariants()
    accounting.left(9, claimed=False)
    accounting.check_invariants()


def test_a_model_between_table_capacity_and_capacity_can_never_fit() -> None:
    accounting = UnloadAccounting(1280, 128)
    assert accounting.can_ever_fit(1152)
    assert not accounting.can_ever_fit(1153)
    assert accounting.too_large_message("m", 1280) == (
        "Predicted size of 10.0 MiB for model m is larger than total effective capacity of 9.0 MiB"
    )


def test_capacity_never_falls_below_one_unit_and_comes_back() -> None:
    accounting = UnloadAccounting(4, 0)
    accounting.inserted(4)
    accounting.claimed(4)
    accounting.left(4, claimed=True)
    accounting.unload_failed(4)
    assert accounting.capacity_units == 1
    assert accounting.lost_units == 4
    assert accounting.unload_recovered(4)
    assert accounting.capacity_units == 4
    accounting.check_invariants()


def test_what_recovers_beyond_the_whole_capacity_frees_nothing() -> None:
    accounting = UnloadAccounting(4, 0)
    for weight in (3, 1):
        accounting.inserted(weight)
        accounting.claimed(weight)
    accounting.measured(9)
    for weight in (3, 10):
        accounting.left(weight, claimed=True)
        accounting.unload_failed(weight)
    assert not accounting.unload_recovered(10)
    assert accounting.unload_recovered(3)


def test_with_less_capacity_than_reserve_nothing_is_published_or_held() -> None:
    accounting = UnloadAccounting(20, 10)
    accounting.inserted(10)
    accounting.claimed(10)
    accounting.measured(5)
    accounting.left(15, claimed=True)
    accounting.unload_failed(15)
    assert accounting.capacity_units == 5
    assert accounting.published_capacity_units == 0
    assert accounting.table_capacity_units == 0


def test_more_cannot_recover_than_was_lost() -> None:
    with pytest.raises(AssertionError):
        UnloadAccounting(4, 0).unload_recovered(1)


class ResizedMachine(RuleBasedStateMachine):
    """Another capacity at any moment: whatever was loaded, loading or leaving, all of it adds up,
    and nothing more is let in than there is room for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ours = UnloadAccounting(40, 4)
        self.lru = ReferenceLru(self.ours.table_capacity_units)
        self.claimed: dict[int, bool] = {}
        self.unloads: list[int] = []
        self.keys = 0

    def evict(self) -> None:
        for key, weight in self.lru.evict():
            self.leave(key, weight)

    def leave(self, key: int, weight: int) -> None:
        claimed = self.claimed.pop(key)
        self.ours.left(weight, claimed=claimed)
        if claimed:
            self.unloads.append(weight)

    @rule(weight=st.integers(1, 12))
    def insert(self, weight: int) -> None:
        if self.ours.can_ever_fit(weight):
            self.keys += 1
            self.ours.inserted(weight)
            self.lru.weights[self.keys], self.lru.used_ms[self.keys] = weight, self.keys
            self.claimed[self.keys] = False
            self.evict()

    @rule()
    def claim(self) -> None:
        for key, weight in self.lru.weights.items():
            if not self.claimed[key] and self.ours.can_claim(weight):
                self.ours.claimed(weight)
                self.claimed[key] = True

    @precondition(lambda self: self.unloads)
    @rule()
    def unload(self) -> None:
        self.ours.unload_completed(self.unloads.pop(0))

    @rule(capacity=st.integers(1, 80), tenths=st.integers(0, 5))
    def resize(self, capacity: int, tenths: int) -> None:
        deficit, before = self.ours.deficit_units, self.ours.capacity_units
        reserve = min(capacity - 1, capacity * tenths // 10)
        freed = self.ours.resized(capacity, reserve)
        assert not freed or capacity >= before or not deficit
        self.lru.capacity = self.ours.table_capacity_units
        self.evict()

    @invariant()
    def adds_up(self) -> None:
        self.ours.check_invariants()
        assert self.lru.used() == self.ours.used_units
        assert self.ours.unloading_units == sum(self.unloads)

    def teardown(self) -> None:
        """In the end everything is unloaded, and nothing is owed."""
        while self.unloads:
            self.ours.unload_completed(self.unloads.pop())
        self.claim()
        assert self.ours.deficit_units == 0
        assert all(self.claimed.values()), "what waits gets its turn"


ResizedMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestResized = ResizedMachine.TestCase

"""Victims by cost: what is chosen, what that is learned from, and books that agree with LRU."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mm.core.eviction import ADVANCE, PART_MIN, SAMPLE, CostEviction
from mm.core.ids import ModelId

CAPACITY = 20
SECOND_MS = 1000
#: What the table has of copies that are not to go.
NEVER_MS = 2**62


class Cache:
    """What the table and the loader do, in a few lines; every load is a use."""

    def __init__(self, capacity: int = CAPACITY, *, seed: int = 1) -> None:
        self.capacity = capacity
        self.copies: OrderedDict[ModelId, int] = OrderedDict()
        self.weights: dict[ModelId, int] = {}
        self.used = 0
        self.now_ms = 1
        self.loaded_s = 0.0
        self.eviction = CostEviction(self.copies.get, random.Random(seed))

    def make_room(self, weight: int) -> list[ModelId]:
        """Evict until so much fits; answers which ones went."""
        gone = []
        while self.copies and self.used + weight > self.capacity:
            some = (each for each, used_ms in self.copies.items() if used_ms != NEVER_MS)
            oldest = next(some, next(iter(self.copies)))
            victim = self.eviction.victim(oldest, self.now_ms)
            self.eviction.evicted(victim)
            self.remove(victim)
            gone.append(victim)
        return gone

    def remove(self, model_id: ModelId) -> None:
        """Take a copy out."""
        del self.copies[model_id]
        self.used -= self.weights.pop(model_id)

    def weigh(self, model_id: ModelId, weight: int) -> None:
        """Note what a copy takes."""
        self.used += weight - self.weights.get(model_id, 0)
        self.weights[model_id] = weight

    def use(self, name: str, *, weight: int = 1, load_s: float = 1.0) -> list[ModelId]:
        """Call a model, a second after the last call; answers who went for it."""
        model_id = ModelId(name)
        self.now_ms += SECOND_MS
        gone: list[ModelId] = []
        if model_id not in self.copies:
            gone = self.make_room(weight)
            self.eviction.admitted(
                model_id,
                weight,
                load_s,
                used_ms=self.now_ms,
                capacity=self.capacity,
                now_ms=self.now_ms,
            )
            self.eviction.loaded(model_id, load_s)
            self.weigh(model_id, weight)
            self.loaded_s += load_s
        self.copies[model_id] = self.now_ms
        self.copies.move_to_end(model_id)
        return gone


def lru_loads_s(calls: list[str], capacity: int, load_s: Callable[[str], float]) -> float:
    """Answer what LRU loads for, with models of weight one."""
    order: OrderedDict[str, None] = OrderedDict()
    total_s = 0.0
    for name in calls:
        if name not in order:
            total_s += load_s(name)
        order[name] = None
        order.move_to_end(name)
        if len(order) > capacity:
            order.popitem(last=False)
    return total_s


def test_of_the_old_ones_that_goes_which_is_cheap_to_load() -> None:
    cache = Cache()
    for number in range(CAPACITY):
        cache.use(f"m{number}", load_s=1.0 if number == 1 else 10.0)
    assert cache.use("new", load_s=10.0) == ["m1"]
    cache.eviction.check_invariants()


def test_of_the_old_ones_that_goes_which_takes_much_room() -> None:
    cache = Cache()
    for number in range(CAPACITY - 2):
        cache.use(f"m{number}", weight=3 if number == 1 else 1)
    assert cache.use("new") == ["m1"]


def test_use_before_an_eviction_still_counts_after_it() -> None:
    cache = Cache()
    for _ in range(3):
        for number in range(CAPACITY):
            cache.use(f"m{number}")
            cache.eviction.victim(ModelId("m0"), cache.now_ms)  # looks at all, now and then
    while "m0" in cache.copies:
        cache.use(f"n{cache.now_ms}")
    for number in range(CAPACITY):  # and out of LRU's books
        cache.use(f"o{number}")
    known = cache.eviction
    cache.use("m0")
    assert known._known[ModelId("m0")].use > known._known[ModelId("o19")].use


def test_nothing_that_loads_or_must_stay_is_chosen_as_long_as_there_is_another() -> None:
    cache = Cache()
    for number in range(CAPACITY):
        cache.use(f"m{number}")
    for number in range(CAPACITY - 1):
        if number % 2:
            cache.copies[ModelId(f"m{number}")] = NEVER_MS
        else:
            cache.eviction._known[ModelId(f"m{number}")].is_loaded = False
    others = {cache.eviction.victim(ModelId("m0"), cache.now_ms) for _ in range(100)}
    assert others == {"m19"}
    spared = ModelId("m19")
    assert cache.eviction.victim(ModelId("m0"), cache.now_ms, spare=spared) == "m0"


@pytest.mark.parametrize("length", [CAPACITY + 2, CAPACITY * 2])
def test_where_lru_is_helpless_what_is_dear_stays(length: int) -> None:
    cache, chance = Cache(), random.Random(length)
    calls = [f"m{number % length}" for number in range(50 * length)]
    costs = {name: chance.lognormvariate(0, 1) for name in calls}
    for name in calls:
        cache.use(name, load_s=costs[name])
    assert cache.loaded_s < 0.7 * lru_loads_s(calls, CAPACITY, costs.__getitem__)
    assert cache.eviction.saved_s > 5 * cache.eviction.lost_s
    cache.eviction.check_invariants()


@pytest.mark.parametrize("seed", range(3))
def test_where_cost_misleads_it_loads_hardly_more_than_lru(seed: int) -> None:
    """Each model is called a few times and never again: the dearest are as useless as the rest."""
    cache, chance = Cache(50, seed=seed), random.Random(seed)
    calls: list[str] = []
    for number in range(60):
        working = [f"m{number}-{each}" for each in range(40)]
        calls += chance.choices(working, k=100)
    costs = {name: chance.lognormvariate(0, 1) for name in calls}
    for name in calls:
        cache.use(name, load_s=costs[name])
    lru_s = lru_loads_s(calls, 50, costs.__getitem__)
    assert cache.loaded_s < 1.03 * lru_s
    assert cache.eviction.lost_s - cache.eviction.saved_s == pytest.approx(
        cache.loaded_s - lru_s, abs=0.02 * lru_s
    ), "the books tell what the difference is"


def test_below_a_balance_of_nothing_the_victim_is_lrus() -> None:
    cache = Cache()
    for number in range(CAPACITY):
        cache.use(f"m{number}", load_s=1.0 if number == 1 else 10.0)
    cache.eviction._balance_s = -0.1
    assert cache.use("new") == ["m0"]


class Machine(RuleBasedStateMachine):
    """Anything that may happen to copies, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        self.names = st.sampled_from([f"m{number}" for number in range(40)])

    @rule(
        number=st.integers(0, 39),
        weight=st.integers(1, 8),
        load_s=st.floats(0, 1000),
    )
    def use(self, number: int, weight: int, load_s: float) -> None:
        self.cache.use(f"m{number}", weight=weight, load_s=load_s)

    @rule(number=st.integers(0, 39), weight=st.integers(1, 8))
    def begin(self, number: int, weight: int) -> None:
        """A load that does not end."""
        model_id = ModelId(f"m{number}")
        if model_id in self.cache.copies:
            return
        self.cache.make_room(weight)
        now_ms = self.cache.now_ms
        self.cache.eviction.admitted(
            model_id, weight, 1.0, used_ms=now_ms, capacity=CAPACITY, now_ms=now_ms
        )
        self.cache.copies[model_id] = NEVER_MS
        self.cache.weigh(model_id, weight)

    @precondition(lambda self: self.cache.copies)
    @rule(data=st.data(), weight=st.integers(1, 8))
    def resize(self, data: st.DataObject, weight: int) -> None:
        model_id = data.draw(st.sampled_from(sorted(self.cache.copies)))
        self.cache.eviction.resized(model_id, weight)
        self.cache.weigh(model_id, weight)

    @precondition(lambda self: self.cache.copies)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        model_id = data.draw(st.sampled_from(sorted(self.cache.copies)))
        self.cache.remove(model_id)
        self.cache.eviction.removed(model_id)

    @rule(seconds=st.integers(0, 1000))
    def wait(self, seconds: int) -> None:
        self.cache.now_ms += seconds * SECOND_MS

    @invariant()
    def books_agree(self) -> None:
        eviction = self.cache.eviction
        eviction.check_invariants()
        assert len(eviction) == len(self.cache.copies)
        assert eviction.boundary_ms <= self.cache.now_ms
        assert eviction._balance_s <= ADVANCE * 40 * 1000


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)


def test_a_choice_costs_the_same_however_many_copies_there_are() -> None:
    looks = 0
    times: dict[ModelId, int] = {}

    def last_used_ms(model_id: ModelId) -> int | None:
        nonlocal looks
        looks += 1
        return times[model_id]

    eviction = CostEviction(last_used_ms, random.Random(1))
    for number in range(5_000):
        model_id = ModelId(f"m{number}")
        eviction.admitted(model_id, 1, 1.0, used_ms=number, capacity=5_000, now_ms=number)
        eviction.loaded(model_id, 1.0)
        times[model_id] = number
    looks = 0
    eviction.victim(ModelId("m0"), 5_000)
    assert SAMPLE / 2 < looks <= SAMPLE + 1
    assert eviction._part == PART_MIN

"""The demand for a model: what is proved by calls that come by chance, and what is only likely."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.core.demand import Capacity, Demand, at_least

LOOK_S = 0.4
#: 2,000 calls a minute, or four in flight.
CAPACITY = Capacity(2000 / 60, 4.0)
T = CAPACITY.calls_per_s


def poisson(mean: float, rng: random.Random) -> int:
    """Calls that come by chance."""
    count, product = 0, rng.random()
    while product > math.exp(-mean):
        count += 1
        product *= rng.random()
    return count


class Model:
    """A model that is called, and looked at."""

    def __init__(self, *, service_s: float = 0.01, slots: int = 0, seed: int = 0) -> None:
        self.demand = Demand()
        self._rng = random.Random(seed)
        self._service_s = service_s
        self._slots = slots
        self._backlog = 0.0

    def run(self, calls_per_s: float, seconds: float) -> Iterable[float]:
        """Look at it, with so many calls; answers what is proved after each look."""
        for _ in range(round(seconds / LOOK_S)):
            calls = poisson(calls_per_s * LOOK_S, self._rng)
            self.take(calls)
            yield self.demand.copies_at_least(CAPACITY)

    def take(self, calls: int) -> None:
        """One look, with the calls in flight of as many servers as are needed (or slots)."""
        self._backlog += calls
        can_end = LOOK_S / self._service_s
        if self._slots:
            can_end *= self._slots
        else:
            can_end *= max(1.0, self._backlog)
        self._backlog = max(0.0, self._backlog - can_end)
        self.demand.look(calls, math.ceil(self._backlog), self._slots, LOOK_S)


def test_a_count_proves_less_than_it_is() -> None:
    assert at_least(0) == 0
    assert at_least(4) == pytest.approx(1.2, abs=0.1)
    assert at_least(100) == pytest.approx(77.9, abs=0.1)


@given(st.floats(0, 1e6), st.floats(0, 1e3))
def test_more_calls_prove_more(count: float, more: float) -> None:
    assert 0 <= at_least(count) <= count
    assert at_least(count) <= at_least(count + more) + 1e-6


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_what_one_copy_bears_is_never_proved_to_be_more(share: float) -> None:
    # An hour each of chance: 9,000 looks.
    assert all(each <= 1 for each in Model(seed=1).run(share * T, 3600))


def test_twenty_times_the_calls_are_seen_in_two_looks() -> None:
    model = Model()
    list(model.run(0.25 * T, 600))
    proved = list(model.run(5 * T, 2 * LOOK_S))
    assert proved[0] <= 1  # one look may be a burst
    assert 3.5 < proved[1] < 5
    assert 4 < max(model.run(5 * T, 10)) <= 5.5


def test_a_burst_is_no_demand() -> None:
    model = Model()
    model.take(100)
    assert model.demand.copies_at_least(CAPACITY) <= 1
    list(model.run(0, 4))
    assert model.demand.copies_at_least(CAPACITY) < 1


def test_a_steady_load_a_little_too_high_is_seen_within_two_minutes() -> None:
    model = Model()
    assert any(each > 1 for each in model.run(1.2 * T, 120))


def test_what_is_likely_fades() -> None:
    model = Model()
    list(model.run(5 * T, 120))
    assert model.demand.copies_likely(CAPACITY) == pytest.approx(5, rel=0.1)
    list(model.run(0.25 * T, 180))
    assert model.demand.copies_likely(CAPACITY) == pytest.approx(0.25, rel=0.3)
    assert not model.demand.is_idle
    list(model.run(0, 300))
    assert model.demand.is_idle


SLOW = Capacity(T, 0.9)  # one call at a time, nine tenths of it


def slow_model(calls_each: int, looks: int, *, in_flight: int, slots: int = 1) -> Demand:
    """Calls of two seconds: half a call ends in a second with one slot."""
    demand = Demand()
    for number in range(looks):
        calls = calls_each if number % 10 == 0 else 0  # each four seconds
        demand.look(calls, in_flight, slots, LOOK_S)
    return demand


def test_slow_calls_count_by_the_time_they_take() -> None:
    # Ten looks of 0.4 s, two calls of two seconds each: the slot is always taken.
    demand = slow_model(2, 300, in_flight=1)
    assert demand.copies_likely(SLOW) == pytest.approx(1 / 0.9, rel=0.1)
    # At 30 calls a minute, which would be nothing by calls a minute.
    assert demand.copies_likely(Capacity(T, math.inf)) < 0.05


def test_calls_that_wait_are_not_taken_for_slow_ones() -> None:
    # Four wait all the time: by calls in flight it would be five copies and more.
    demand = slow_model(2, 300, in_flight=5)
    assert demand.copies_likely(SLOW) == pytest.approx(1 / 0.9, rel=0.1)


def test_before_calls_have_ended_those_in_flight_count() -> None:
    demand = Demand()
    demand.look(6, 6, 1, LOOK_S)
    assert demand.copies_at_least(SLOW) <= 1  # one look
    demand.look(6, 12, 1, LOOK_S)
    assert demand.copies_at_least(SLOW) == pytest.approx(at_least(6) / 0.9)
    assert demand.copies_at_least(SLOW) > 2


def test_one_slow_call_is_no_demand() -> None:
    demand = Demand()
    for _ in range(50):
        demand.look(0, 2, 1, LOOK_S)
        assert demand.copies_at_least(SLOW) <= 1


def test_without_known_slots_calls_in_flight_count_against_four() -> None:
    demand = Demand()
    for _ in range(300):
        demand.look(4, 12, 0, LOOK_S)  # ten a second, 1.2 s each
    assert demand.copies_likely(CAPACITY) == pytest.approx(3, rel=0.05)
    assert 2.2 < demand.copies_at_least(CAPACITY) <= 3


def test_a_look_that_comes_late_is_no_burst() -> None:
    model = Model()
    list(model.run(0.5 * T, 60))
    late = round(0.5 * T * 10)
    model.demand.look(late, 0, 0, 10.0)
    assert model.demand.copies_at_least(CAPACITY) <= 1

"""Ids in order, against ``sorted`` and ``set``."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from mm.core import sorted_ids
from mm.core.sorted_ids import RUN_LENGTH, SortedIds

IDS = st.text(st.sampled_from("ab/é\uffff😀"), min_size=1, max_size=4)


class InStep(RuleBasedStateMachine):
    """The same changes to a plain set; runs of four, so that they are split all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.plain = SortedIds(), set[str]()

    @rule(key_id=IDS)
    def change(self, key_id: str) -> None:
        if key_id in self.plain:
            self.ids.remove(key_id)
            self.plain.remove(key_id)
        else:
            self.ids.add(key_id)
            self.plain.add(key_id)

    @rule(after=st.just("") | IDS, count=st.integers(1, 9), prefix=st.just("") | IDS)
    def page(self, after: str, count: int, prefix: str) -> None:
        wanted = sorted(each for each in self.plain if each > after and each.startswith(prefix))
        assert self.ids.following(after, count, prefix=prefix) == wanted[:count]

    @invariant()
    def is_sorted(self) -> None:
        assert list(self.ids) == sorted(self.plain)
        assert len(self.ids) == len(self.plain)
        assert [run[0] for run in self.ids._runs] == self.ids._firsts
        assert all(len(run) <= 2 * sorted_ids.RUN_LENGTH for run in self.ids._runs)


def test_in_step_with_a_plain_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_ids, "RUN_LENGTH", 4)
    run_state_machine_as_test(InStep, settings=settings(max_examples=60, deadline=None))


@given(st.lists(IDS, unique=True, max_size=60))
def test_the_order_is_that_of_the_keys_of_etcd(ids: list[str]) -> None:
    found = SortedIds()
    for each in ids:
        found.add(each)
    assert list(found) == sorted(ids, key=str.encode)


def test_a_table_read_in_order_makes_full_runs() -> None:
    found = SortedIds()
    for number in range(10 * RUN_LENGTH):
        found.add(f"{number:08}")
    assert [len(run) for run in found._runs] == [RUN_LENGTH] * 10


def test_pages_lose_and_repeat_nothing_while_ids_come_and_go() -> None:
    """Whatever is there all the time is told once."""
    found = SortedIds()
    for number in range(0, 5000, 2):
        found.add(f"{number:04}")
    told: list[str] = []
    number = 0
    # Some ids go after they were told, and some come before and behind the place that was reached.
    while page := found.following(told[-1] if told else "", 100):
        told += page
        for key_id in {page[-1], page[len(page) // 3]}:
            found.remove(key_id)
        found.add(f"{number:04}~")
        found.add(f"{4999 - number:04}~")
        number += 1
    assert len(told) == len(set(told))
    assert set(told) >= {f"{n:04}" for n in range(0, 5000, 2)}
    assert told == sorted(told)

"""What peers are told of busy copies: only news, only to those who call, not too often."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mm.core.ids import InstanceId, ModelId
from mm.core.load_reports import RECENT_S, LoadReports, ReportLimits

A, B = InstanceId("a"), InstanceId("b")
M, N = ModelId("m"), ModelId("n")


def make(copies_max: int = 10) -> LoadReports:
    return LoadReports(ReportLimits(interval_min_s=0.005, copies_max=copies_max))


def test_only_peers_that_call_are_told() -> None:
    reports = make()
    reports.began(M, None)
    assert (len(reports), reports.is_pending) == (0, False), "nobody is interested"
    reports.began(M, A)
    reports.began(M, None)
    assert reports.due(1.0, {M: 2}.__getitem__) == {A: {M: 2}}
    assert not reports.is_pending
    assert reports.due(2.0, {M: 3}.__getitem__) == {}, "without a call nothing has changed"


def test_what_a_reply_told_is_no_news() -> None:
    reports = make()
    reports.began(M, A)
    reports.began(M, B)
    reports.ended(M, A, told=1)
    assert reports.due(1.0, {M: 1}.__getitem__) == {B: {M: 1}}
    reports.ended(M, B, told=0)
    assert reports.due(1.5, {M: 0}.__getitem__) == {A: {M: 0}}


def test_a_count_that_came_and_went_is_pushed_to_whom_a_reply_told_of_it() -> None:
    reports = make()
    reports.began(M, A)
    assert reports.due(1.0, {M: 0}.__getitem__) == {A: {M: 0}}
    reports.began(M, A)
    reports.ended(M, A, told=4)
    assert reports.due(1.5, {M: 0}.__getitem__) == {A: {M: 0}}


def test_who_was_sent_away_hears_when_it_may_come_back() -> None:
    reports = make()
    reports.told(M, A, 4)
    assert reports.due(1.0, {M: 4}.__getitem__) == {}
    reports.ended(M, B, told=3)
    assert reports.due(1.5, {M: 3}.__getitem__) == {A: {M: 3}}


def test_pushes_are_a_quarter_of_a_service_time_apart_and_never_less_than_5_ms() -> None:
    for service_s, interval_s in ((0.001, 0.005), (0.02, 0.005), (0.2, 0.05)):
        reports = make()
        assert reports.began(M, A)
        assert not reports.began(M, A), "one call is timed at a time"
        reports.timed(M, service_s)
        assert reports.due(1.0, {M: 1}.__getitem__) == {A: {M: 1}}
        reports.began(M, A)
        assert reports.due(1.0 + 0.99 * interval_s, {M: 2}.__getitem__) == {}
        assert reports.is_pending
        assert reports.due(1.0 + 1.01 * interval_s, {M: 2}.__getitem__) == {A: {M: 2}}


def test_a_look_costs_what_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = make(copies_max=1000)
    slow = [ModelId(f"slow{number}") for number in range(500)]
    counts = Counter({M: 1, **dict.fromkeys(slow, 1)})
    for model in slow:
        reports.began(model, A)
        reports.timed(model, 0.8)
    assert reports.due(1.0, counts.__getitem__) == {A: dict.fromkeys(slow, 1)}
    counts.update(slow)
    for model in slow:
        reports.began(model, A)
    looks: list[ModelId] = []
    interval_s = reports.interval_s

    def look(model_id: ModelId) -> float:
        looks.append(model_id)
        return interval_s(model_id)

    monkeypatch.setattr(reports, "interval_s", look)
    for turn in range(1, 31):
        counts[M] += 1
        reports.began(M, A)
        assert reports.due(1.0 + 0.006 * turn, counts.__getitem__) == {A: {M: counts[M]}}
    assert not set(looks) & set(slow)
    assert reports.due(1.201, counts.__getitem__) == {A: dict.fromkeys(slow, 2)}
    assert not reports.is_pending


def test_calls_that_turn_out_slower_are_told_of_later() -> None:
    reports = make()
    reports.began(M, A)
    reports.timed(M, 0.04)
    reports.due(1.0, {M: 1}.__getitem__)
    reports.began(M, A)
    reports.timed(M, 0.04 + 4 * 0.16)
    assert reports.due(1.02, {M: 2}.__getitem__) == {}
    assert reports.is_pending
    assert reports.due(1.051, {M: 2}.__getitem__) == {A: {M: 2}}


def test_the_mean_service_time_follows_slowly() -> None:
    reports = make()
    reports.began(M, A)
    reports.timed(M, 1.0)
    reports.timed(M, 5.0)
    assert reports.interval_s(M) == 0.5


def test_who_did_not_call_of_late_is_forgotten() -> None:
    reports = make()
    reports.began(M, A)
    reports.due(1.0, {M: 1}.__getitem__)
    reports.began(M, B)
    assert set(reports.due(1.0 + 0.9 * RECENT_S, {M: 2}.__getitem__)) == {A, B}
    reports.began(M, B)
    assert set(reports.due(1.0 + 1.1 * RECENT_S, {M: 3}.__getitem__)) == {B}
    reports.began(M, A)
    assert set(reports.due(9.0, {M: 4}.__getitem__)) == {A}, "however long ago the last look was"
    reports.ended(M, A, told=0)
    assert set(reports.due(9.1, {M: 0}.__getitem__)) == {B}, "who heard of three stays away"
    reports.sweep(9.5)
    assert len(reports) == 1
    reports.sweep(9.0 + 1.1 * RECENT_S)
    assert len(reports) == 0
    reports.ended(M, B, told=0)
    reports.timed(M, 1.0)
    assert not reports.is_pending


def test_a_local_call_after_a_long_time_tells_nobody() -> None:
    reports = make()
    reports.began(M, A)
    reports.due(1.0, {M: 0}.__getitem__)
    reports.began(M, None)
    assert reports.due(9.0, {M: 5}.__getitem__) == {}
    assert len(reports) == 0


def test_who_stays_away_from_a_busy_copy_is_told_of_each_halving() -> None:
    reports = make()
    reports.began(M, A)
    reports.due(1.0, {M: 40}.__getitem__)
    told = []
    for count in range(39, -1, -1):
        reports.ended(M, None, told=None)
        loads = reports.due(10.0 + 40 - count, {M: count}.__getitem__)
        told += [each[M] for peer, each in loads.items() if peer == A]
    assert told == [20, 10, 5, 2, 1, 0]
    reports.sweep(99.0)
    assert len(reports) == 0


def test_copies_are_bounded() -> None:
    reports = make(copies_max=1)
    reports.began(M, A)
    assert not reports.began(N, A)
    assert reports.due(1.0, Counter({M: 0, N: 1}).__getitem__) == {A: {M: 0}}
    reports.sweep(9.0)
    reports.began(N, A)
    assert reports.due(9.0, {N: 1}.__getitem__) == {A: {N: 1}}


def test_what_was_not_sent_is_due_again_and_what_was_refused_is_not() -> None:
    reports = make()
    reports.began(M, A)
    loads = reports.due(1.0, {M: 1}.__getitem__)
    reports.again(A, loads[A])
    reports.again(B, loads[A])
    assert reports.due(1.5, {M: 1}.__getitem__) == {A: {M: 1}}
    reports.forget(A, loads[A])
    reports.began(M, None)
    assert reports.due(1.6, {M: 7}.__getitem__) == {}


class Beliefs(RuleBasedStateMachine):
    """At rest, everyone who called of late believes what is true, and nobody avoids a copy for
    long that is not busy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reports = make(copies_max=3)
        self.now_s = 10.0
        self.open: list[tuple[ModelId, InstanceId]] = []
        self.counts: Counter[ModelId] = Counter()
        self.believed: dict[tuple[InstanceId, ModelId], int] = {}
        self.called_s: dict[tuple[InstanceId, ModelId], float] = {}

    @rule(model=st.sampled_from([M, N]), peer=st.sampled_from([A, B]))
    def begin(self, model: ModelId, peer: InstanceId) -> None:
        self.open.append((model, peer))
        self.counts[model] += 1
        self.called_s[peer, model] = self.now_s
        self.reports.began(model, peer)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.open) - 1))
        model, peer = self.open.pop(index)
        self.counts[model] -= 1
        self.believed[peer, model] = self.counts[model]
        self.reports.ended(model, peer, self.counts[model])

    @rule(passed_s=st.sampled_from([0.001, 0.004, 0.3]))
    def push(self, passed_s: float) -> None:
        self.now_s += passed_s
        for peer, loads in self.reports.due(self.now_s, self.counts.__getitem__).items():
            for model, count in loads.items():
                self.believed[peer, model] = count

    @invariant()
    def at_rest_all_is_known(self) -> None:
        if self.reports.is_pending:
            return
        for (peer, model), called_s in self.called_s.items():
            assert self.believed[peer, model] <= 2 * self.counts[model] + 1
            if self.now_s - called_s < RECENT_S:
                assert self.believed[peer, model] == self.counts[model]


Beliefs.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestBeliefs = Beliefs.TestCase

"""Routing: tables of where a call goes and what a failure means, and what must hold always."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.core.calls import Hop, Outcome
from mm.core.copy_record import CopyStage
from mm.core.ids import InstanceId
from mm.core.records import ModelInfo, ModelRecord
from mm.core.routing import (
    Action,
    Again,
    ComingCopy,
    Decision,
    Here,
    ReadyCopy,
    Reason,
    RoutingLimits,
    RoutingView,
    choose_of_two,
    decide,
    is_ready,
    retry_after,
    stays,
)
from mm.table import LOCAL, CopyState, Table

NOW_MS = 1_700_000_000_000
LIMITS = RoutingLimits(attempts_max=8, copies_tried_max=5, load_failures_max=3)
A, B, C, D = (InstanceId(name) for name in "abcd")


def ready(*calls: int) -> tuple[ReadyCopy, ...]:
    """Answer copies at b, c, d, ... with these calls in flight."""
    return tuple(ReadyCopy(InstanceId("bcdefghij"[i]), count) for i, count in enumerate(calls))


def coming(**ages_ms: int) -> tuple[ComingCopy, ...]:
    """Answer loads that began so long ago; of a name in capitals the load is still queued."""
    return tuple(
        ComingCopy(InstanceId(name.lower()), NOW_MS - age_ms, name.isupper())
        for name, age_ms in ages_ms.items()
    )


def ask(seed: int = 0, **values: Any) -> Decision:
    return decide(RoutingView(**{"now_ms": NOW_MS, **values}), LIMITS, Random(seed))


def answer(**values: Any) -> tuple[Action, InstanceId | None]:
    decision = ask(**values)
    return decision.action, decision.instance_id


# --- hits ----------------------------------------------------------------------------------------

SERVE, FORWARD, FAIL = (Action.SERVE, None), Action.FORWARD, (Action.FAIL, None)
WAIT_HERE, WAIT_THERE, LOAD = (Action.WAIT_HERE, None), Action.WAIT_THERE, (Action.LOAD, None)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # A copy here: alone, idle, as busy as the other, busier, and favoured all the same.
        ({"here": Here.READY}, SERVE),
        ({"here": Here.READY, "here_calls_count": 9}, SERVE),
        ({"here": Here.READY, "ready": ready(0)}, SERVE),
        ({"here": Here.READY, "here_calls_count": 3, "ready": ready(3)}, SERVE),
        ({"here": Here.READY, "here_calls_count": 3, "ready": ready(2)}, (FORWARD, B)),
        (
            {"here": Here.READY, "here_calls_count": 3, "ready": ready(2), "favour_self": True},
            SERVE,
        ),
        ({"here": Here.READY, "here_calls_count": 3, "ready": ready(2), "hops_left": 0}, SERVE),
        # A peer sent it here because of the copy here.
        (
            {"here": Here.READY, "here_calls_count": 3, "ready": ready(0), "hop": Hop.HIT_ONLY},
            SERVE,
        ),
        (
            {"here": Here.READY, "here_calls_count": 3, "ready": ready(0), "hop": Hop.LOAD_LOCAL},
            SERVE,
        ),
        # Copies elsewhere only.
        ({"ready": ready(7)}, (FORWARD, B)),
        ({"ready": ready(7, 2)}, (FORWARD, C)),
        ({"ready": ready(7, 2), "tried": {C}}, (FORWARD, B)),
        ({"ready": ready(7, 2), "busy": C}, (FORWARD, B)),
        ({"ready": ready(7, 2), "busy": C, "tried": {B}}, (FORWARD, C)),
        ({"ready": ready(7), "hop": Hop.LOAD_LOCAL, "hops_left": 1}, (FORWARD, B)),
        ({"ready": ready(7), "hop": Hop.LOAD_LOCAL, "hops_left": 0}, LOAD),
        # The copy here failed it.
        ({"here": Here.READY, "is_here_tried": True, "ready": ready(7)}, (FORWARD, B)),
        ({"here": Here.READY, "is_here_tried": True}, LOAD),
        ({"here": Here.READY, "is_here_tried": True, "hop": Hop.HIT_ONLY}, FAIL),
        # A ready copy is better than the best of loads, wherever it is.
        ({"here": Here.COMING, "ready": ready(7), "coming": coming(c=0)}, (FORWARD, B)),
    ],
)
def test_calls_with_a_ready_copy(
    values: dict[str, Any], expected: tuple[Action, InstanceId | None]
) -> None:
    assert answer(**values) == expected


def test_two_are_drawn_and_the_busiest_of_many_never_gets_it() -> None:
    chosen = Counter(ask(seed, ready=ready(0, 1, 2, 9)).instance_id for seed in range(3000))
    assert chosen[InstanceId("e")] == 0
    # Of six pairs b is in three, c beats two, d one.
    assert [round(chosen[name] / 500) for name in (B, C, D)] == [3, 2, 1]


def test_a_busy_copy_here_takes_part_as_one_of_many() -> None:
    chosen = Counter(
        ask(seed, here=Here.READY, here_calls_count=1, ready=ready(1, 1, 1)).instance_id
        for seed in range(3000)
    )
    # A tie is the local copy's whenever it is drawn: three pairs of six.
    assert round(chosen[None] / 500) == 3


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=7),
    st.none() | st.integers(0, 3),
    st.integers(0, 2**64 - 1),
)
def test_the_table_chooses_alike(counts: list[int], here: int | None, random: int) -> None:
    table = Table(1)
    handles = [table.add_instance(f"i{number}") for number in range(len(counts))]
    table.set_peers("m", handles)
    for handle, count in zip(handles, counts, strict=True):
        table.report_load(handle, "m", count)
    candidates = list(table.peer_loads("m"))
    if here is not None:
        table.set_state("m", CopyState.READY)
        for _ in range(here):
            table.pin("m")
        candidates.insert(0, (LOCAL, here))
    index = choose_of_two([count for _, count in candidates], random, here is not None)
    assert table.choose("m", random) == candidates[index][0]


@pytest.mark.parametrize(
    ("values", "may_redirect"),
    [
        ({"ready": ready(1)}, False),
        ({"ready": ready(1, 1)}, True),
        ({"ready": ready(0), "here": Here.READY, "here_calls_count": 1}, True),
        ({"ready": ready(1, 1), "busy": B}, False),
        ({"ready": ready(1, 1), "tried": {B}}, False),
    ],
)
def test_a_busy_copy_may_send_a_call_back_once_and_only_to_another(
    values: dict[str, Any], may_redirect: bool
) -> None:
    assert ask(**values).may_redirect is may_redirect


# --- loads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, LOAD),
        ({"hop": Hop.LOAD_LOCAL}, LOAD),
        ({"hop": Hop.HIT_ONLY}, FAIL),
        ({"here": Here.COMING}, WAIT_HERE),
        ({"here": Here.COMING, "hop": Hop.HIT_ONLY, "hops_left": 0}, WAIT_HERE),
        ({"here": Here.COMING, "is_here_tried": True}, LOAD),
        # The one that began first; loading before queued.
        ({"coming": coming(b=10, c=20)}, (WAIT_THERE, C)),
        ({"coming": coming(B=20, c=10)}, (WAIT_THERE, C)),
        ({"coming": coming(b=10, c=20), "tried": {C}}, (WAIT_THERE, B)),
        ({"coming": coming(b=10), "hops_left": 0}, LOAD),
        ({"coming": coming(b=10), "hop": Hop.LOAD_LOCAL, "hops_left": 1}, (WAIT_THERE, B)),
        # Here, if that began first, or the other has no head start to speak of.
        ({"here": Here.COMING, "here_since_ms": NOW_MS - 90, "coming": coming(b=80)}, WAIT_HERE),
        ({"here": Here.COMING, "here_since_ms": NOW_MS, "coming": coming(b=1499)}, WAIT_HERE),
        ({"here": Here.COMING, "here_since_ms": NOW_MS, "coming": coming(b=1500)}, (WAIT_THERE, B)),
        (
            {
                "here": Here.COMING,
                "here_since_ms": NOW_MS,
                "coming": coming(b=1500),
                "hop": Hop.LOAD_LOCAL,
            },
            WAIT_HERE,
        ),
    ],
)
def test_calls_without_a_ready_copy(
    values: dict[str, Any], expected: tuple[Action, InstanceId | None]
) -> None:
    assert answer(**values) == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"attempts_count": 8, "here": Here.READY}, Reason.ATTEMPTS_SPENT),
        ({"tried": set("fghij"), "ready": ready(1)}, Reason.COPIES_FAILED),
        ({"may_load": False}, Reason.NOTHING_LEFT),
        ({"load_failures_count": 3}, Reason.LOADS_FAILED),
        ({"hop": Hop.HIT_ONLY, "ready": ready(1)}, Reason.NOT_HERE),
        # A copy that could not be reached a moment ago is no way out here:
        ({"may_load": False, "suspects": [B], "tried": {B}}, Reason.NOTHING_LEFT),
        ({"may_load": False, "suspects": [B], "hops_left": 0}, Reason.NOTHING_LEFT),
        ({"may_load": False, "suspects": [B], "hop": Hop.LOAD_LOCAL}, Reason.NOTHING_LEFT),
        ({"hop": Hop.HIT_ONLY, "suspects": [B]}, Reason.NOT_HERE),
        ({"attempts_count": 8, "suspects": [B]}, Reason.ATTEMPTS_SPENT),
    ],
)
def test_calls_that_end(values: dict[str, Any], reason: Reason) -> None:
    decision = ask(**values)
    assert (decision.action, decision.reason) == (Action.FAIL, reason)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"may_load": False}, (FORWARD, B)),
        ({"load_failures_count": 3}, (FORWARD, B)),
        ({"may_load": False, "suspects": [B, C], "tried": {B}}, (FORWARD, C)),
        # Not as long as there is another way.
        ({}, LOAD),
        ({"ready": [ReadyCopy(C, 9)]}, (FORWARD, C)),
        ({"coming": coming(c=5), "may_load": False}, (WAIT_THERE, C)),
        ({"here": Here.READY, "here_calls_count": 9}, SERVE),
    ],
)
def test_what_could_not_be_reached_is_the_last_resort(
    values: dict[str, Any], expected: tuple[Action, InstanceId | None]
) -> None:
    assert answer(**{"suspects": [B], **values}) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Also one that could not load it.
        ({"may_load": False}, (Action.RELAY, C)),
        ({"load_failures_count": 3}, (Action.RELAY, C)),
        ({}, LOAD),
        ({"may_load": False, "suspects": [D]}, (FORWARD, D)),
        ({"may_load": False, "hops_left": 1}, FAIL),
        ({"may_load": False, "hop": Hop.LOAD_LOCAL}, FAIL),
    ],
)
def test_what_cannot_be_reached_from_here_is_looked_for_another_way(
    values: dict[str, Any], expected: tuple[Action, InstanceId | None]
) -> None:
    assert answer(**{"relays": [C], "tried": {B, C}, **values}) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"suspects": [B], "relays": [C]}, (FORWARD, B)),
        ({"suspects": [B], "tried": {B}, "relays": [C]}, (Action.RELAY, C)),
        # That one's way to the store may be all that is broken.
        ({}, LOAD),
        ({"load_failures_count": 2}, LOAD),
        ({"load_failures_count": 3}, FAIL),
        ({"relays": [C], "hop": Hop.LOAD_LOCAL}, LOAD),
        ({"relays": [C], "ready": ready(1)}, (FORWARD, B)),
        ({"relays": [C], "coming": coming(c=5)}, (WAIT_THERE, C)),
        ({"relays": [C], "attempts_count": 8}, FAIL),
    ],
)
def test_without_the_store_the_last_resorts_come_before_more_loads(
    values: dict[str, Any], expected: tuple[Action, InstanceId | None]
) -> None:
    assert answer(**{"is_store_away": True, "load_failures_count": 1, **values}) == expected


def test_reasons_can_be_read_in_a_log() -> None:
    assert str(Reason.HERE_IDLE) == "the copy here is idle"


# --- always --------------------------------------------------------------------------------------

_names = st.sampled_from([B, C, D])
_views = st.builds(
    RoutingView,
    hop=st.sampled_from(Hop),
    hops_left=st.integers(0, 2),
    here=st.sampled_from(Here),
    here_since_ms=st.integers(NOW_MS - 9000, NOW_MS),
    here_calls_count=st.integers(0, 3),
    is_here_tried=st.booleans(),
    ready=st.lists(
        st.builds(ReadyCopy, _names, st.integers(0, 3)), unique_by=lambda c: c.instance_id
    ),
    coming=st.lists(
        st.builds(ComingCopy, _names, st.integers(NOW_MS - 9000, NOW_MS), st.booleans()),
        unique_by=lambda c: c.instance_id,
    ),
    suspects=st.lists(_names, unique=True),
    relays=st.lists(_names, unique=True),
    tried=st.sets(_names),
    busy=st.none() | _names,
    favour_self=st.booleans(),
    may_load=st.booleans(),
    is_store_away=st.booleans(),
    load_failures_count=st.integers(0, 4),
    attempts_count=st.integers(0, 8),
    now_ms=st.just(NOW_MS),
)


@given(_views, st.integers())
def test_what_is_decided_can_be_done(view: RoutingView, seed: int) -> None:
    decision = decide(view, LIMITS, Random(seed))
    action, chosen = decision.action, decision.instance_id
    assert (chosen is not None) == (action in (Action.FORWARD, Action.WAIT_THERE, Action.RELAY))
    if view.hop is Hop.HIT_ONLY or view.hops_left == 0:
        assert chosen is None, "a hop too many"
    if view.hop is Hop.HIT_ONLY:
        assert action is not Action.LOAD
    if action is Action.RELAY:
        assert chosen in view.relays
        assert view.hop is Hop.EXTERNAL
        assert view.hops_left > 1, "it goes on from there"
    else:
        assert chosen not in view.tried
    if decision.reason in (Reason.LAST_RESORT, Reason.OTHER_WAY):
        assert view.is_store_away or not view.may_load or view.load_failures_count >= 3
    if decision.reason is Reason.LAST_RESORT:
        assert chosen in view.suspects
        assert {copy.instance_id for copy in (*view.ready, *view.coming)} <= view.tried
    elif action is Action.FORWARD:
        assert chosen in {copy.instance_id for copy in view.ready}
    if action is Action.WAIT_THERE:
        assert chosen in {copy.instance_id for copy in view.coming}
    if action in (Action.SERVE, Action.WAIT_HERE):
        assert view.here is (Here.READY if action is Action.SERVE else Here.COMING)
        assert not view.is_here_tried
    if action is Action.LOAD:
        assert view.may_load
    assert not (decision.may_redirect and view.busy)


@given(_views, st.integers())
def test_no_call_fails_that_a_ready_copy_could_serve(view: RoutingView, seed: int) -> None:
    decision = decide(view, LIMITS, Random(seed))
    usable = view.here is Here.READY and not view.is_here_tried
    if view.hop is not Hop.HIT_ONLY and view.hops_left:
        usable = usable or any(copy.instance_id not in view.tried for copy in view.ready)
    if usable and view.attempts_count < LIMITS.attempts_max:
        assert decision.action in (Action.SERVE, Action.FORWARD)


@given(_views, st.integers())
def test_who_stays_without_a_look_would_have_stayed_after_one(view: RoutingView, seed: int) -> None:
    if view.here is not Here.READY or view.is_here_tried or view.attempts_count == 8:
        return
    if stays(view.hop, view.favour_self, view.here_calls_count):
        assert decide(view, LIMITS, Random(seed)).action is Action.SERVE


# --- which copies are ready ----------------------------------------------------------------------


def test_copies_are_ready_when_they_say_so_or_had_the_time() -> None:
    record = ModelRecord(ModelInfo("t"), copies={B: NOW_MS - 5000})
    assert is_ready(record, B, NOW_MS, 4999)
    assert not is_ready(record, B, NOW_MS, 5000)
    record = ModelRecord(ModelInfo("t")).with_copy(B, NOW_MS - 5000, 0)
    assert not is_ready(record, B, NOW_MS, 0)
    record = record.with_copy_state(B, CopyStage.LOADING, NOW_MS)
    assert not is_ready(record, B, NOW_MS, 0)
    record = record.with_copy_state(B, CopyStage.READY, NOW_MS)
    assert is_ready(record, B, NOW_MS, 10**9)


# --- what a failed attempt means -----------------------------------------------------------------

YES, IF_COPY, NO = Again.YES, Again.IF_COPY, Again.NO


@pytest.mark.parametrize(
    ("outcome", "again", "is_copy_out", "is_instance_out", "may_load"),
    [
        (Outcome.ANSWERED, NO, False, False, True),
        (Outcome.ABANDONED, NO, False, False, True),
        (Outcome.NOT_HERE, YES, True, False, True),
        (Outcome.STALE, YES, True, True, True),
        (Outcome.STORE_AWAY, YES, True, True, True),
        (Outcome.DRAINING, YES, True, True, True),
        (Outcome.UNREACHABLE, YES, True, True, True),
        (Outcome.LOAD_FAILED, YES, True, True, True),
        (Outcome.LOAD_TIMEOUT, YES, True, True, True),
        (Outcome.LOAD_REFUSED, IF_COPY, True, True, False),
        (Outcome.LOST, NO, True, True, True),
        (Outcome.NO_MODEL, NO, True, True, True),
        (Outcome.RUNTIME_UNAVAILABLE, IF_COPY, True, False, False),
        (Outcome.EXHAUSTED, IF_COPY, True, False, False),
        (Outcome.REDIRECT, YES, False, False, True),
    ],
)
def test_what_a_peers_answer_means(
    outcome: Outcome, again: Again, is_copy_out: bool, is_instance_out: bool, may_load: bool
) -> None:
    for hop in Hop:
        retry = retry_after(outcome, hop, is_here=False)
        assert retry.again is (NO if hop is Hop.HIT_ONLY else again)
        assert (retry.is_copy_out, retry.is_instance_out) == (is_copy_out, is_instance_out)
        assert retry.may_load is may_load


def test_what_the_runtime_here_did_is_for_the_sender_to_go_round_or_not() -> None:
    expected = {
        (Outcome.UNREACHABLE, Hop.EXTERNAL): YES,
        (Outcome.UNREACHABLE, Hop.LOAD_LOCAL): NO,
        (Outcome.RUNTIME_UNAVAILABLE, Hop.EXTERNAL): IF_COPY,
        (Outcome.RUNTIME_UNAVAILABLE, Hop.LOAD_LOCAL): IF_COPY,
        (Outcome.EXHAUSTED, Hop.EXTERNAL): IF_COPY,
        (Outcome.EXHAUSTED, Hop.LOAD_LOCAL): IF_COPY,
        (Outcome.EXHAUSTED, Hop.HIT_ONLY): NO,
    }
    for (outcome, hop), again in expected.items():
        assert retry_after(outcome, hop, is_here=True).again is again


def test_resource_exhausted_is_believed_the_second_time() -> None:
    for is_here in (True, False):
        retry = retry_after(Outcome.EXHAUSTED, Hop.EXTERNAL, is_here=is_here, exhausted_count=1)
        assert retry.again is NO


def test_every_outcome_has_a_meaning() -> None:
    for outcome in Outcome:
        assert retry_after(outcome, Hop.EXTERNAL, is_here=False).again in Again

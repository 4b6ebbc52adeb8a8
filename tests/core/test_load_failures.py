"""Kinds of failed loads, how long they count, and what a record of them says about the next try."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.ids import InstanceId, ModelId
from mm.core.load_failures import (
    COUNT_MAX,
    FailureKind,
    FailureRules,
    LoadFailure,
    Verdict,
    kind_of,
)
from mm.core.records import ModelInfo, ModelRecord
from mm.errors import StatusCode

S, K = StatusCode, FailureKind
M = ModelId("m")
A, B, C, D = (InstanceId(name) for name in "abcd")
RULES = FailureRules(expiry_ms=900_000, pause_first_ms=10_000, failures_max=3)
NOW_MS = 1_000_000_000


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (S.INVALID_ARGUMENT, "", K.PERMANENT),
        (S.FAILED_PRECONDITION, "", K.PERMANENT),
        (S.NOT_FOUND, "no such file", K.PERMANENT),
        (S.PERMISSION_DENIED, "", K.PERMANENT),
        (S.UNAUTHENTICATED, "", K.PERMANENT),
        (S.UNIMPLEMENTED, "", K.PERMANENT),
        (S.OUT_OF_RANGE, "", K.PERMANENT),
        (S.RESOURCE_EXHAUSTED, "", K.CAPACITY),
        (S.UNKNOWN, "CUDA out of memory. Tried to allocate", K.CAPACITY),
        (S.INTERNAL, "Out of GPU memory", K.CAPACITY),
        (S.INVALID_ARGUMENT, "std::bad_alloc", K.CAPACITY),
        (S.UNKNOWN, "Failed to pull model from storage", K.TRANSIENT),
        (S.INTERNAL, "bad file", K.TRANSIENT),
        (S.UNAVAILABLE, "", K.TRANSIENT),
        (S.DEADLINE_EXCEEDED, "", K.TRANSIENT),
        (S.CANCELLED, "", K.TRANSIENT),
        (S.ABORTED, "", K.TRANSIENT),
        (S.ALREADY_EXISTS, "", K.TRANSIENT),
        (S.DATA_LOSS, "", K.TRANSIENT),
        (99, "", K.TRANSIENT),
    ],
)
def test_kinds(code: int, message: str, kind: FailureKind) -> None:
    assert kind_of(code, message) is kind


def failed(
    at: InstanceId, ago_ms: int, kind: FailureKind | None = K.TRANSIENT, count: int = 1, **more: int
) -> LoadFailure:
    return LoadFailure(at, NOW_MS - ago_ms, f"at {at}", kind, count, **more)


def record_of(*failures: LoadFailure) -> ModelRecord:
    record = ModelRecord(ModelInfo("t"), copies={f.instance_id: 1 for f in failures})
    for failure in failures:
        record = failure.written_to(record)
    assert record.copies == {}
    return record


def test_a_failure_is_read_as_it_was_written() -> None:
    failures = [
        failed(A, 1, K.PERMANENT, 3),
        failed(B, 2, K.CAPACITY, needed_units=7),
        failed(C, 3, None),
    ]
    record = ModelRecord.decode(record_of(*failures).encode())
    assert [LoadFailure.read(record, at) for at in (A, B, C)] == failures


@pytest.mark.parametrize(
    "details", [None, 7, [], {"kind": 7, "n": "x"}, {"kind": "new", "n": -5, "needs": -1}]
)
def test_what_others_left_there_is_no_obstacle(details: object) -> None:
    record = replace(record_of(failed(A, 1)), failure_details={A: details})
    assert LoadFailure.read(record, A) == LoadFailure(A, NOW_MS - 1)


def test_transient_failures_count_for_a_doubling_pause() -> None:
    for count, longest_ms in [(1, 10_000), (2, 20_000), (5, 160_000), (7, 640_000), (8, 900_000)]:
        pause_ms = RULES.over_ms(M, failed(A, 0, count=count)) - NOW_MS
        assert 0.75 * longest_ms <= pause_ms <= longest_ms
    assert RULES.over_ms(M, failed(A, 0, count=2**62)) <= NOW_MS + 900_000


def test_failures_at_one_time_are_not_over_at_one_time() -> None:
    over = {RULES.over_ms(M, failed(InstanceId(f"i{n}"), 0)) for n in range(50)}
    assert len(over) > 40
    assert max(over) - min(over) > 2_000


@pytest.mark.parametrize("kind", [K.PERMANENT, None])
def test_permanent_failures_and_those_of_java_count_for_the_expiry(
    kind: FailureKind | None,
) -> None:
    failure = failed(A, 0, kind, count=9)
    assert RULES.over_ms(M, failure) == NOW_MS + 450_000
    assert RULES.over_ms(M, failure, in_use=False) == NOW_MS + 900_000


def test_a_permanent_failure_is_final_and_others_only_in_number() -> None:
    permanent, transient = failed(A, 5, K.PERMANENT), failed(B, 1)
    assert RULES.verdict(M, record_of(permanent, transient), NOW_MS).final == permanent
    two = [failed(A, 1), failed(B, 2)]
    verdict = RULES.verdict(M, record_of(*two), NOW_MS)
    assert verdict == Verdict(frozenset({A, B}), 0, None, two[0])
    assert RULES.verdict(M, record_of(*two, failed(C, 3)), NOW_MS).final == two[0]
    assert RULES.verdict(M, record_of(*two, failed(C, 10_001)), NOW_MS).final is None
    assert RULES.verdict(M, record_of(*two, failed(C, 10_001, None)), NOW_MS).final == two[0]


def test_instances_that_are_too_small_are_not_held_against_the_model() -> None:
    small = [failed(at, 1, K.CAPACITY, needed_units=n) for at, n in ((A, 50), (B, 60), (C, 55))]
    verdict = RULES.verdict(M, record_of(*small), NOW_MS)
    assert verdict.final is None
    assert (verdict.excluded, verdict.needed_units) == (
        frozenset({A, B, C}),
        60,
    )
    full = [replace(each, needed_units=0) for each in small]
    assert RULES.verdict(M, record_of(*full), NOW_MS).final is not None, "but a runtime's word is"


def test_no_failures_no_verdict() -> None:
    assert RULES.verdict(M, record_of(), NOW_MS) == Verdict()
    assert RULES.count_next(M, record_of(), NOW_MS) == 1


def test_a_round_of_tries_counts_once() -> None:
    assert RULES.count_next(M, record_of(failed(A, 1), failed(B, 1)), NOW_MS) == 1
    first_is_over = record_of(failed(A, 11_000), failed(B, 1))
    assert RULES.count_next(M, first_is_over, NOW_MS) == 2
    second_began = record_of(failed(A, 11_000), failed(C, 1, count=2))
    assert RULES.count_next(M, second_began, NOW_MS) == 2
    assert RULES.count_next(M, record_of(failed(A, 1_800_000)), NOW_MS) == 1, "long ago"
    assert RULES.count_next(M, record_of(failed(A, 950_000, None)), NOW_MS) == 1
    assert RULES.count_next(M, record_of(failed(A, 900_001, count=2**60)), NOW_MS) == COUNT_MAX


def test_a_failure_from_a_time_far_ahead_does_not_count() -> None:
    assert RULES.counting(M, record_of(failed(A, -2_000_000)), NOW_MS) == []
    assert RULES.counting(M, record_of(failed(A, -10_000)), NOW_MS) != []


@settings(deadline=None)
@given(
    kinds=st.lists(st.sampled_from([*K, None]), min_size=1, max_size=6),
    expiry_ms=st.integers(1, 10**7),
    pause_first_ms=st.integers(1, 10**6),
    count=st.integers(-(2**70), 2**70),
)
def test_every_failure_is_over_by_the_expiry_and_forgotten_after_it(
    kinds: list[FailureKind | None], expiry_ms: int, pause_first_ms: int, count: int
) -> None:
    rules = FailureRules(expiry_ms, pause_first_ms, 3)
    record = record_of(*(failed(InstanceId(str(n)), 0, k, count) for n, k in enumerate(kinds)))
    for in_use in (True, False):
        assert rules.counting(M, record, NOW_MS + expiry_ms, in_use=in_use) == []
    for at in record.failures:
        failure = LoadFailure.read(record, at)
        assert rules.over_ms(M, failure) <= NOW_MS + expiry_ms
        over_ms = rules.over_ms(M, failure, in_use=False)
        assert over_ms <= rules.forgotten_ms(failure) <= NOW_MS + 2 * expiry_ms


@settings(deadline=None, max_examples=8)
@given(instances=st.integers(1, 20), seed=st.integers(0, 1000))
def test_a_model_that_always_fails_is_tried_ever_more_seldom(instances: int, seed: int) -> None:
    """Asked for every 3 s for an hour, over any number of instances."""
    record = ModelRecord(ModelInfo("t"))
    tries: list[int] = []
    for now_ms in range(NOW_MS, NOW_MS + 3_600_000, 3000):
        verdict = RULES.verdict(M, record, now_ms)
        left = [f"{n}" for n in range(instances) if f"{n}" not in verdict.excluded]
        if verdict.final is None and left:
            at = InstanceId(left[(seed + len(tries)) % len(left)])
            count = RULES.count_next(M, record, now_ms)
            tries.append(now_ms)
            record = LoadFailure(at, now_ms, "boom", K.TRANSIENT, count).written_to(record)
    # 3 at a time; 10 s, 20 s, ... 640 s and then each quarter of an hour.
    assert 5 <= len(tries) <= 3 * 16
    assert sum(t > NOW_MS + 1_800_000 for t in tries) <= 3 * 4

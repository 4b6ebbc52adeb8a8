"""The count of an instance's first loads (spec core 7.3, intentions of 10.3)."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from mm.core.copy_record import CopyStage
from mm.core.ids import InstanceId, ModelId
from mm.core.load_failures import FailureKind
from mm.core.probation import (
    FAILED_MODELS_MAX,
    FATAL_MAX,
    LOADS_MIN,
    RECOVERY_LOADS,
    Judgement,
    Probation,
    Terms,
    judge,
)
from mm.core.records import ModelInfo, ModelRecord

ME, OTHER, THIRD = (InstanceId(name) for name in ("me", "other", "third"))
START_MS = 10**12
PERIOD_MS = 180_000
LOAD_TIMEOUT_MS = 90_000
NOW_MS = START_MS + 100_000
TERMS = Terms(ME, START_MS, PERIOD_MS, LOAD_TIMEOUT_MS)
INFO = ModelInfo("t", "p")


def record(
    copies: dict[str, int] | None = None, failures: dict[str, int] | None = None
) -> ModelRecord:
    """Copies that say nothing of their state, and failures, each so many ms ago."""
    return ModelRecord(
        INFO,
        copies={InstanceId(name): NOW_MS - ago for name, ago in (copies or {}).items()},
        failures={InstanceId(name): NOW_MS - ago for name, ago in (failures or {}).items()},
    )


def with_copy(stage: CopyStage) -> ModelRecord:
    return record().with_copy(OTHER, NOW_MS - 10, 0).with_copy_state(OTHER, stage, NOW_MS - 5)


# --- one failure ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "of", "expected"),
    [
        ("nobody has it", record(), Judgement.GENERAL),
        ("another has it", with_copy(CopyStage.READY), Judgement.FATAL),
        ("another is loading it", with_copy(CopyStage.LOADING), Judgement.GENERAL),
        (
            "an instance of Java must have it by now",
            record({"other": LOAD_TIMEOUT_MS + 1}),
            Judgement.FATAL,
        ),
        (
            "an instance of Java may be loading it",
            record({"other": LOAD_TIMEOUT_MS}),
            Judgement.GENERAL,
        ),
        ("only we have it, or had", record({"me": 10**6}), Judgement.GENERAL),
        (
            "it failed long before we were there",
            record(failures={"other": NOW_MS - START_MS + PERIOD_MS + 1}),
            Judgement.EXEMPT,
        ),
        (
            "it failed at another one of the same rollout",
            record(failures={"other": NOW_MS - START_MS + PERIOD_MS}),
            Judgement.GENERAL,
        ),
        (
            "it failed here, before a restart",
            record(failures={"me": 10**6}),
            Judgement.GENERAL,
        ),
        (
            "it failed long ago, and serves elsewhere all the same",
            record({"other": 10**6}, {"third": 10**6}),
            Judgement.FATAL,
        ),
    ],
)
def test_what_a_failure_says(name: str, of: ModelRecord, expected: Judgement) -> None:
    assert judge(TERMS, of, FailureKind.TRANSIENT, NOW_MS) is expected, name


def test_a_model_that_is_too_large_says_nothing_of_the_version() -> None:
    larger = with_copy(CopyStage.READY)
    assert judge(TERMS, larger, FailureKind.CAPACITY, NOW_MS) is Judgement.EXEMPT
    assert judge(TERMS, larger, FailureKind.PERMANENT, NOW_MS) is Judgement.FATAL


# --- many -----------------------------------------------------------------------------------------


def models(count: int, prefix: str = "m") -> list[ModelId]:
    return [ModelId(f"{prefix}{number}") for number in range(count)]


def after(
    fatal: Iterable[str] = (),
    general: Iterable[str] = (),
    successes: int = 0,
    in_progress: int = 0,
    now_ms: int = NOW_MS,
) -> Probation:
    probation = Probation(TERMS)
    for model_id in models(successes, "s"):
        probation.succeeded(model_id, now_ms)
    for failed, judgement in ((fatal, Judgement.FATAL), (general, Judgement.GENERAL)):
        for name in failed:
            probation.failed(ModelId(name), judgement, in_progress_count=in_progress, now_ms=now_ms)
    return probation


@pytest.mark.parametrize(
    ("name", "probation", "expected"),
    [
        ("nothing has happened", Probation(TERMS), False),
        ("some fail though they serve elsewhere", after("ab"), False),
        ("too many do", after("abc"), True),
        ("one of them does, again and again", after("aaaaaaaaaa"), False),
        ("nobody knows of few loads", after(general=models(20)), False),
        ("more than half of many fail", after(general=models(11), successes=10), True),
        ("half of many fail", after(general=models(11), successes=11), False),
        ("loads in progress are many", after(general=models(11), in_progress=10), True),
        ("loads in progress may all succeed", after(general=models(11), in_progress=12), False),
        ("both kinds count", after("ab", models(9), successes=10), True),
        (
            "the period is over",
            after("abcdef", models(40), now_ms=START_MS + PERIOD_MS),
            False,
        ),
        ("a clock went back", after("abcdef", models(40), now_ms=START_MS - 1), False),
    ],
)
def test_how_many_failures_are_too_many(name: str, probation: Probation, expected: bool) -> None:
    assert probation.has_failed is expected, name


def test_the_limits_are_those_of_java() -> None:
    assert (FATAL_MAX, LOADS_MIN) == (2, 20)


def test_a_model_that_loads_at_last_is_no_failure() -> None:
    probation = after("ab")
    probation.succeeded(ModelId("a"), NOW_MS)
    probation.failed(ModelId("c"), Judgement.FATAL, in_progress_count=0, now_ms=NOW_MS)
    assert not probation.has_failed


def test_exempt_failures_count_for_nothing() -> None:
    probation = Probation(TERMS)
    for model_id in models(100):
        probation.failed(model_id, Judgement.EXEMPT, in_progress_count=0, now_ms=NOW_MS)
    assert not probation.has_failed
    assert probation.failed_models == ()


def test_without_a_period_nothing_counts() -> None:
    probation = Probation(Terms(ME, START_MS, 0, LOAD_TIMEOUT_MS))
    for model_id in models(100):
        probation.failed(model_id, Judgement.FATAL, in_progress_count=0, now_ms=START_MS)
    assert not probation.has_failed


# --- recovery -------------------------------------------------------------------------------------


def test_it_recovers_when_enough_loads_in_a_row_succeed_also_after_the_period() -> None:
    later_ms = START_MS + 10 * PERIOD_MS
    probation = after(models(10))
    for _ in range(RECOVERY_LOADS - 1):
        probation.succeeded(ModelId("x"), later_ms)
    probation.failed(ModelId("y"), Judgement.GENERAL, in_progress_count=0, now_ms=later_ms)
    for _ in range(RECOVERY_LOADS - 1):
        probation.succeeded(ModelId("x"), later_ms)
    assert probation.has_failed, "the row was broken"
    probation.succeeded(ModelId("x"), later_ms)
    assert not probation.has_failed
    assert probation.failed_models == ()


def test_it_recovers_when_nothing_that_failed_is_left() -> None:
    probation = after("abc")
    for name in "ab":
        probation.forget(ModelId(name))
    assert probation.has_failed
    probation.forget(ModelId("c"))
    assert not probation.has_failed


def test_in_the_period_it_may_fail_once_more_and_after_it_not() -> None:
    for now_ms, expected in ((NOW_MS, True), (START_MS + PERIOD_MS, False)):
        probation = after("abc")
        for name in "abc":
            probation.succeeded(ModelId(name), now_ms)
        assert not probation.has_failed
        for name in "abc":
            probation.failed(ModelId(name), Judgement.FATAL, in_progress_count=0, now_ms=now_ms)
        assert probation.has_failed is expected


def test_what_failed_is_tried_in_turn() -> None:
    probation = after("abc")
    probation.postpone(ModelId("a"))
    probation.postpone(ModelId("unknown"))
    assert probation.failed_models == ("b", "c", "a")
    probation.failed(ModelId("b"), Judgement.FATAL, in_progress_count=0, now_ms=NOW_MS)
    assert probation.failed_models == ("c", "a", "b")


def test_what_is_remembered_is_bounded() -> None:
    probation = after(general=models(2 * FAILED_MODELS_MAX))
    assert len(probation.failed_models) == FAILED_MODELS_MAX
    assert probation.failed_models[-1] == f"m{2 * FAILED_MODELS_MAX - 1}"


def test_what_failed_in_the_period_is_forgotten_after_it() -> None:
    probation = after("ab")
    probation.succeeded(ModelId("x"), START_MS + PERIOD_MS)
    assert probation.failed_models == ()

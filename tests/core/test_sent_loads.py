"""Loads sent and not visible yet: counted once, as long as nobody can know better."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.ids import InstanceId, ModelId
from mm.core.sent_loads import COUNTED_S_MAX, SETTLE_S, SentLoads

A, B = InstanceId("a"), InstanceId("b")
M, N = ModelId("m"), ModelId("n")


def test_many_calls_for_one_model_are_one_load() -> None:
    sent = SentLoads()
    for _ in range(3):
        sent.sent(A, M, 100, 0.0)
    sent.sent(A, N, 10, 0.0)
    assert (sent.sums(A), sent.sums(B), len(sent)) == ((110, 2), (0, 0), 2)
    assert sent.target(M) == A


def test_a_load_that_ended_takes_memory_until_the_record_says_so() -> None:
    sent = SentLoads()
    sent.sent(A, M, 100, 0.0)
    sent.ended(A, M, took=True, is_loading=False)
    assert sent.sums(A) == (100, 0)
    sent.ended(A, M, took=True, is_loading=False)
    assert sent.sums(A) == (100, 0), "the second of two calls that waited"
    sent.observed(A, 1.0)
    assert (sent.sums(A), len(sent), sent.target(M)) == ((0, 0), 0, None)


def test_a_call_that_was_given_up_leaves_its_load_running() -> None:
    sent = SentLoads()
    sent.sent(A, M, 100, 0.0)
    sent.ended(A, M, took=True, is_loading=True)
    assert sent.sums(A) == (100, 1)


def test_what_was_refused_takes_nothing() -> None:
    sent = SentLoads()
    sent.sent(A, M, 100, 0.0)
    sent.ended(A, M, took=False, is_loading=False)
    assert (sent.sums(A), len(sent), sent.target(M)) == ((0, 0), 0, None)
    sent.ended(A, M, took=False, is_loading=False)
    assert sent.sums(A) == (0, 0)


def test_a_record_that_was_on_its_way_already_knows_nothing_of_it() -> None:
    sent = SentLoads()
    sent.sent(A, M, 100, 10.0)
    sent.sent(A, N, 10, 11.0)
    sent.observed(A, 10.0 + SETTLE_S / 2)
    assert sent.sums(A) == (110, 2)
    sent.observed(A, 11.0)
    assert sent.sums(A) == (10, 1)
    sent.observed(B, 99.0)
    assert sent.sums(A) == (10, 1)


def test_a_vanished_instance_is_forgotten() -> None:
    sent = SentLoads()
    sent.sent(A, M, 100, 0.0)
    sent.sent(B, N, 10, 0.0)
    sent.forget(A)
    assert (sent.sums(A), sent.sums(B), len(sent)) == ((0, 0), (10, 1), 1)


def test_what_nobody_confirms_is_not_counted_for_ever() -> None:
    sent = SentLoads()
    sent.sent(A, M, 100, 0.0)
    sent.sent(A, N, 10, 5.0)
    assert sent.expire(COUNTED_S_MAX) == []
    assert sent.expire(COUNTED_S_MAX + 1) == [A]
    assert sent.sums(A) == (10, 1)


def test_a_load_that_was_sent_again_has_its_whole_time() -> None:
    sent = SentLoads()
    sent.sent(A, M, 100, 0.0)
    sent.ended(A, M, took=False, is_loading=False)
    sent.sent(A, M, 100, 50.0)
    assert sent.expire(COUNTED_S_MAX + 1) == []
    assert sent.sums(A) == (100, 1)
    assert sent.expire(COUNTED_S_MAX + 51) == [A]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["sent", "took", "loading", "refused", "observed", "forget", "expire"]),
        st.sampled_from([A, B]),
        st.sampled_from([M, N, ModelId("o")]),
        st.floats(0.0, 60.0),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps=STEPS)
def test_sums_are_never_negative_and_end_at_nothing(
    steps: list[tuple[str, InstanceId, ModelId, float]],
) -> None:
    sent, now_s = SentLoads(), 0.0
    for step, instance_id, model_id, pause_s in steps:
        now_s += pause_s
        match step:
            case "sent":
                sent.sent(instance_id, model_id, 7, now_s)
            case "observed":
                sent.observed(instance_id, now_s)
            case "forget":
                sent.forget(instance_id)
            case "expire":
                sent.expire(now_s)
            case _:
                sent.ended(
                    instance_id, model_id, took=step != "refused", is_loading=step == "loading"
                )
        for each in (A, B):
            units, count = sent.sums(each)
            assert units % 7 == 0
            assert 0 <= count <= units // 7 <= 3
        assert 7 * len(sent) == sent.sums(A)[0] + sent.sums(B)[0]
    sent.expire(now_s + COUNTED_S_MAX + 1)
    assert (len(sent), sent.sums(A), sent.sums(B)) == (0, (0, 0), (0, 0))
    assert not any(sent.target(m) for m in (M, N, ModelId("o")))

"""The cluster as events tell it: views, partitions and sums must be as if made anew each time."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import MappingProxyType

from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.cluster_state import ClusterState
from mm.core.cluster_statistics import ClusterStatistics
from mm.core.cluster_view import ClusterView, InstanceView
from mm.core.constraints import TypeConstraints, constraint
from mm.core.hop_state import HopState
from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.records import InstanceRecord

ME, A, B = InstanceId("me"), InstanceId("a"), InstanceId("b")
M = ModelId("m")
OWN = InstanceRecord(capacity_units=100)
MIN_SPACE = 10


def record(*, labels: str = "", address: str = "x:1", **changes: int) -> InstanceRecord:
    base = InstanceRecord(
        labels=tuple(labels.split()), address=address, capacity_units=100, used_units=20, count=2
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def constraints(**required: str) -> TypeConstraints:
    types = {name: constraint(labels.split()) for name, labels in required.items()}
    return TypeConstraints(MappingProxyType(types))


def state(
    given_constraints: TypeConstraints | None = None, /, **records: InstanceRecord
) -> ClusterState:
    made = ClusterState(
        ME, min_space_units=MIN_SPACE, constraints=given_constraints or constraints()
    )
    for name, each in records.items():
        made.put(InstanceId(name), each, now_ms=0, now_s=0.0)
    return made


def view(of: ClusterState, now_s: float = 0.0) -> ClusterView:
    return of.view(OWN, now_ms=0, now_s=now_s)


def seen(of: ClusterState, instance_id: InstanceId, now_s: float = 0.0) -> InstanceView:
    found = view(of, now_s).find(instance_id)
    assert found is not None
    return found


def sizes(made: ClusterState) -> dict[tuple[str, ...], int]:
    return {tuple(sorted(key)): each.instance_count for key, each in made.partitions().items()}


# --- the view -----------------------------------------------------------------------------------


def test_the_view_has_the_others_and_ourselves_as_of_now() -> None:
    made = state(me=record(count=99), a=record())
    instances = {each.instance_id: each.record for each in view(made).instances}
    assert instances == {A: record(), ME: OWN}


def test_between_events_nothing_is_built_anew() -> None:
    made = state(a=record(), b=record())
    first, second = view(made).find(A), view(made).find(A)
    assert first is second
    made.put(B, record(count=7), now_ms=0, now_s=0.0)
    assert view(made).find(A) is first
    assert seen(made, B).record.count == 7


def test_whoever_shuts_down_is_as_good_as_gone() -> None:
    made = state(a=record())
    made.put(A, replace(record(), shutting_down=True), now_ms=0, now_s=0.0)
    assert view(made).find(A) is None
    assert made.partitions() == {}
    made.remove(A, now_ms=0)


def test_whoever_has_no_address_or_does_not_answer_is_not_reachable() -> None:
    made = state(a=record(address=""), b=record())
    assert not seen(made, A).reachable
    made.set_away(B, until_s=5.0)
    assert not seen(made, B, 4.9).reachable
    assert seen(made, B, 5.0).reachable
    made.set_away(B, until_s=9.0)
    made.set_back(B)
    assert seen(made, B, 6.0).reachable
    made.set_away(InstanceId("nobody"), until_s=9.0)
    made.set_back(InstanceId("nobody"))


def test_an_instance_that_is_away_stays_so_when_its_record_changes() -> None:
    made = state(a=record())
    made.set_away(A, until_s=5.0)
    made.put(A, record(count=3), now_ms=0, now_s=1.0)
    assert not seen(made, A, 2.0).reachable


def test_loads_that_were_sent_are_counted_until_news_come() -> None:
    made = state(a=record())
    made.load_sent(A, M, 30, now_s=0.0)
    assert made.load_target(M) == A
    assert (seen(made, A).sent_units, seen(made, A).sent_count) == (30, 1)
    made.load_ended(A, M, took=True, is_loading=False)
    assert (seen(made, A).sent_units, seen(made, A).sent_count) == (30, 0)
    made.put(A, record(used_units=50), now_ms=0, now_s=1.0)
    assert (seen(made, A).sent_units, made.load_target(M)) == (0, None)
    made.load_sent(A, M, 30, now_s=1.0)
    assert seen(made, A, 100.0).sent_units == 0, "nobody ever confirmed it"
    made.load_sent(InstanceId("nobody"), M, 1, now_s=0.0)
    assert made.load_target(M) is None


def test_what_a_refusal_tells_holds_until_the_next_record() -> None:
    made = state(a=record())
    made.load_sent(A, M, 30, now_s=0.0)
    made.learn(A, HopState(100, 95, 17, 9, 4), now_s=1.0)
    told = seen(made, A)
    assert HopState.of(told.record) == HopState(100, 95, 17, 9, 4)
    assert told.sent_count == 0
    made.put(A, record(), now_ms=0, now_s=2.0)
    assert seen(made, A).record == record()
    made.learn(InstanceId("nobody"), HopState(1, 1, 1, 1, 1), now_s=1.0)


def test_a_refusal_tells_of_all_that_was_sent_before_it() -> None:
    """Not of what was sent afterwards, nor is anything counted twice."""
    made = state(a=record())
    earlier, later = ModelId("earlier"), ModelId("later")
    for model_id in (earlier, M, later):
        made.load_sent(A, model_id, 30, now_s=1.0)
    made.learn(A, HopState(1000, 95, 17, 9, 4), now_s=1.1, refused=M)
    told = seen(made, A)
    assert (told.record.used_units, told.sent_units, told.sent_count) == (95, 30, 1)
    made.learn(A, HopState(1000, 95, 17, 9, 4), now_s=1.1, refused=M)
    assert seen(made, A).sent_units == 30


# --- types --------------------------------------------------------------------------------------


def allowed(made: ClusterState, model_type: str) -> set[str]:
    now = view(made)
    rule = now.label_groups.rule(model_type)
    return {
        each.instance_id
        for each in now.instances
        if rule.allowed is None or each.label_group in rule.allowed
    }


def preferred(made: ClusterState, model_type: str) -> set[str]:
    now = view(made)
    rule = now.label_groups.rule(model_type)
    return {i.instance_id for i in now.instances if i.label_group in (rule.preferred or ())}


def test_labels_decide_who_may() -> None:
    made = state(constraints(t="gpu"), a=record(labels="gpu"), b=record(labels="cpu gpu"))
    assert allowed(made, "t") == {"a", "b"}
    assert allowed(made, "other") == {"a", "b", "me"}
    made.put(A, record(labels="cpu"), now_ms=0, now_s=0.0)
    assert allowed(made, "t") == {"b"}
    made.remove(B, now_ms=0)
    assert allowed(made, "t") == set()


def test_a_new_instance_takes_part_in_inferred_preferences_at_once() -> None:
    made = state(constraints(t="gpu"), a=record(labels="gpu"))
    assert preferred(made, "other") == {"me"}
    made.put(B, record(labels="tpu"), now_ms=0, now_s=0.0)
    assert preferred(made, "other") == {"b", "me"}


def test_new_constraints_hold_at_once() -> None:
    made = state(a=record(labels="gpu"), b=record())
    assert (allowed(made, "t"), sizes(made)) == ({"a", "b", "me"}, {(): 2})
    made.set_constraints(constraints(t="gpu", u="gpu"))
    assert (allowed(made, "t"), sizes(made)) == ({"a"}, {(): 1, ("t", "u"): 1})
    made.set_constraints(constraints())
    assert (allowed(made, "t"), sizes(made)) == ({"a", "b", "me"}, {(): 2})


# --- statistics ---------------------------------------------------------------------------------


def test_statistics_are_kept_by_what_instances_may_host() -> None:
    made = state(
        constraints(t="gpu", _default="none"),
        a=record(labels="gpu", lru_time_ms=500, count=3),
        b=record(labels="none", lru_time_ms=100, used_units=95),
        me=record(labels="gpu", lru_time_ms=0, count=4, used_units=0),
    )
    assert made.partitions() == {
        frozenset({"_default"}): ClusterStatistics(2, 200, 180, 7, 500),
        frozenset({"t"}): ClusterStatistics(1, 100, 0, 2, 100),
    }


def test_an_instance_says_itself_when_it_is_full() -> None:
    made = state(a=record(used_units=80, min_space_units=21), b=record(used_units=80))
    assert made.partitions()[frozenset()].free_units == 20


RECORDS = st.builds(
    record,
    labels=st.sampled_from(["", "gpu", "cpu", "cpu gpu"]),
    lru_time_ms=st.sampled_from([0, 1, 5, 9, NEVER_MS]),
    count=st.integers(0, 5),
    used_units=st.integers(0, 110),
    start_time_ms=st.integers(0, 3),
    min_space_units=st.sampled_from([0, 50]),
)
NAMES = st.sampled_from(["me", "a", "b", "bbbbbb-22222", "zzzzzz-22222"]).map(InstanceId)
CONSTRAINTS = st.sampled_from(
    [constraints(), constraints(t="gpu"), constraints(t="gpu", u="cpu", _default="none")]
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), NAMES, RECORDS),
        st.tuples(st.just("shut"), NAMES, RECORDS),
        st.tuples(st.just("remove"), NAMES, st.none()),
        st.tuples(st.just("away"), NAMES, st.none()),
        st.tuples(st.just("sent"), NAMES, st.none()),
        st.tuples(st.just("constraints"), st.none(), CONSTRAINTS),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(events=EVENTS)
def test_after_any_events_all_is_as_if_made_anew(events: list[tuple[str, object, object]]) -> None:
    kept: dict[InstanceId, InstanceRecord] = {}
    made, held = state(), constraints()
    for kind, name, value in events:
        match kind, name, value:
            case "put", str(), InstanceRecord():
                kept[InstanceId(name)] = value
                made.put(InstanceId(name), value, now_ms=0, now_s=0.0)
            case "shut", str(), InstanceRecord():
                kept.pop(InstanceId(name), None)
                down = replace(value, shutting_down=True)
                made.put(InstanceId(name), down, now_ms=0, now_s=0.0)
            case "remove", str(), _:
                kept.pop(InstanceId(name), None)
                made.remove(InstanceId(name), now_ms=0)
            case "away", str(), _:
                made.set_away(InstanceId(name), until_s=0.0)
            case "sent", str(), _:
                made.load_sent(InstanceId(name), M, 3, now_s=0.0)
            case "constraints", _, TypeConstraints():
                held = value
                made.set_constraints(value)
    anew = state(held, **{str(name): each for name, each in kept.items()})
    assert {each.instance_id: each.record for each in view(made, 1.0).instances} == {
        each.instance_id: each.record for each in view(anew, 1.0).instances
    }
    for model_type in ("t", "u", "other"):
        assert allowed(made, model_type) == allowed(anew, model_type)
        assert preferred(made, model_type) == preferred(anew, model_type)
    assert made.partitions() == anew.partitions()
    assert view(made, 1.0).replaced == view(anew, 1.0).replaced


def test_an_event_costs_the_same_in_a_small_cluster_and_a_large_one() -> None:
    """Counted in calls into Python, not in seconds: a walk over all instances would show."""

    def cost(size: int) -> int:
        records = {
            f"i{n}": record(labels="gpu" if n % 2 else "", lru_time_ms=n + 1) for n in range(size)
        }
        made = state(constraints(t="gpu"), **records)
        changed = record(labels="gpu", lru_time_ms=3, count=7)
        calls = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            made.put(InstanceId("i1"), changed, now_ms=0, now_s=0.0)
            made.partitions()
        finally:
            sys.setprofile(None)
        return calls

    assert cost(1000) <= cost(10) + 5


def test_newcomers_can_be_left_out_of_the_sums_of_a_type() -> None:
    old = record(labels="gpu", start_time_ms=5, used_units=30)
    full = record(labels="gpu", start_time_ms=9, used_units=95)
    new = record(labels="gpu", start_time_ms=9, used_units=10)
    other = record(start_time_ms=9)
    made = state(constraints(t="gpu"), a=old, b=new, c=full, d=other)
    newcomers = made.newcomers(after_ms=5)
    assert newcomers == {"b", "c", "d"}
    assert made.statistics_of("t", newcomers) == state(a=old).statistics_of("t")
    assert made.statistics_of("t").instance_count == 3
    gone = newcomers | {InstanceId("e")}
    assert made.statistics_of("t", gone) == made.statistics_of("t", newcomers)

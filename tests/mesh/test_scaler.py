"""Copies by load in a cluster, in virtual time: one more, one less, never the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import anyio
import pytest

from mm.core.calls import Outcome
from mm.core.ids import InstanceId, ModelId
from mm.errors import StatusCode
from mm.mesh.ports import PeerCallError
from mm.mesh.preloader import PreloadReason
from mm.mesh.scaler import Scaler
from mm.scaling_settings import ScalingSettings
from mm.testing.cluster import Cluster, Instance, running_cluster, small_parameters, until
from mm.testing.fake_network import FakePeers
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST, M, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

#: One call a second for a copy, so that tests need few calls; and fewer looks for long times.
ONE_A_SECOND = ScalingSettings(rpm_threshold=60)
SLOW_PACE: dict[str, Any] = {"scaling": ONE_A_SECOND}
SELDOM: dict[str, Any] = {"scaling": ONE_A_SECOND, "demand_interval_s": 5.0}
LOADS = ModelPlan(load_s=2.0, unload_s=0.1)
MINUTE_S = 60.0


async def call(
    cluster: Cluster, calls_per_s: float, seconds: float, *, at: str = "", model_id: str = "m"
) -> None:
    """Call a model evenly, by all instances in turn or by one."""
    async with anyio.create_task_group() as group:
        for number in range(round(calls_per_s * seconds)):
            entries = cluster.serving
            entry = cluster[at] if at else entries[number % len(entries)]
            group.start_soon(entry.invoke, model_id)
            await anyio.sleep(1 / calls_per_s)


def ready(cluster: Cluster, model_id: str = "m") -> set[InstanceId]:
    record = cluster.record(model_id)
    assert record is not None
    states = {each: record.copy_state(each) for each in record.copies}
    return {each for each, state in states.items() if state is not None and state.is_ready}


def count_of(cluster: Cluster, name: str) -> int:
    counters = [each.node.parts.counters for each in cluster.instances.values()]
    return sum(getattr(each, name) for each in counters)


async def fill(cluster: Cluster, instance: Instance, count: int) -> None:
    """Load others, so that no room is left."""
    for number in range(count):
        model_id = f"other-{instance.name}-{number}"
        await instance.register(model_id)
        await instance.load_here(model_id)
    await cluster.settle()


# --- more ---------------------------------------------------------------------------------------


async def test_a_model_gets_as_many_copies_as_it_is_called_for() -> None:
    async with running_cluster(*"abcdefgh", plan=LOADS, **SLOW_PACE) as cluster:
        await loaded_at(cluster, "a")
        await call(cluster, 0.5, 60)
        assert ready(cluster) == {"a"}
        await call(cluster, 4.0, 120)
        # Three to four are full of it; five have a fifth to spare.
        assert 4 <= len(ready(cluster)) <= 6
        assert count_of(cluster, "copies_added") == len(ready(cluster)) - 1
        cluster["a"].node.parts.copies.check_invariants()


async def test_a_call_in_flight_at_the_first_look_is_no_demand() -> None:
    """However long ago the clock began, which is when the machine started."""
    async with running_cluster(plan=FAST) as cluster:
        cluster.call_s = 0.5
        await anyio.sleep(86_400)
        await cluster.start("a")
        await cluster["a"].register("m")
        await cluster.start("b")
        await call(cluster, 3.0, 10, at="a")
        assert ready(cluster) == {"a"} or ready(cluster) == {"b"}


async def test_the_one_who_decides_hears_of_calls_that_it_does_not_see() -> None:
    async with running_cluster(*"abcd", plan=LOADS, **SLOW_PACE) as cluster:
        await loaded_at(cluster, "a", "b")
        assert ready(cluster) == {"a", "b"}
        await call(cluster, 3.0, 60, at="b")  # whose own copy is idle each time
        assert cluster["a"].node.parts.counters.calls == 0
        assert cluster["a"].node.parts.counters.copies_added >= 1
        assert cluster["b"].node.parts.counters.copies_added == 0
        assert cluster["b"].node.parts.counters.demands_told > 10
        assert len(ready(cluster)) >= 3


async def test_all_calls_at_one_idle_copy_are_counted_once() -> None:
    async with running_cluster(*"abcdef", plan=FAST, **SLOW_PACE) as cluster:
        await loaded_at(cluster, "a", "b")
        # By its own calls times the number of copies, each new copy would ask for another one.
        await call(cluster, 1.3, 300, at="a")
        assert ready(cluster) == {"a", "b"}


async def test_another_decides_when_the_one_who_did_is_gone() -> None:
    async with running_cluster(*"abcd", plan=FAST, **SLOW_PACE) as cluster:
        await loaded_at(cluster, "a", "b")
        await cluster["a"].crash()
        await anyio.sleep(30)
        await call(cluster, 4.0, 120)
        assert cluster["b"].node.parts.counters.copies_added == 2
        assert ready(cluster) >= {"b", "c", "d"}


async def test_slow_calls_are_counted_by_the_time_they_take() -> None:
    parameters = small_parameters(64, limit_model_concurrency=True)
    plan = ModelPlan(load_s=2.0, concurrency_max=1)
    async with running_cluster(*"abcdef", plan=plan, parameters=parameters) as cluster:
        await loaded_at(cluster, "a")
        cluster.call_s = 3.0
        await call(cluster, 0.1, 60)
        assert ready(cluster) == {"a"}
        await call(cluster, 1.0, 90)  # sixty a minute: three are always in flight
        assert 3 <= len(ready(cluster)) <= 6
        assert count_of(cluster, "calls_overloaded") == 0


async def test_slow_calls_count_also_where_nothing_is_known_of_slots() -> None:
    async with running_cluster(*"abcdef", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster.call_s = 10.0
        await call(cluster, 1.0, 60)  # ten in flight, at four a copy
        assert 2 <= len(ready(cluster)) <= 5


async def test_a_copy_that_cannot_be_loaded_is_not_asked_for_at_each_look() -> None:
    async with running_cluster(*"abcd", plan=FAST, **SLOW_PACE) as cluster:
        await loaded_at(cluster, "a")
        for name in "bcd":
            cluster[name].runtime.fail_loads("m", StatusCode.INTERNAL, "broken", times=1000)
        await call(cluster, 4.0, 120)
        attempts = sum(cluster[name].runtime.loads_begun[M] for name in "bcd")
        assert 1 <= attempts <= 8
        assert ready(cluster) == {"a"}


async def test_late_records_make_no_copies_too_many() -> None:
    async with running_cluster(*"abcdefgh", plan=LOADS, **SLOW_PACE) as cluster:
        cluster.watch_delay_s = 2.0
        await loaded_at(cluster, "a")
        await call(cluster, 4.0, 120)
        await cluster.settle()
        assert 3 <= len(ready(cluster)) <= 6


async def test_copies_asked_for_in_a_row_do_not_take_each_other_for_a_surprise() -> None:
    """The second instance finds a copy in the record that its own view does not have yet."""
    async with running_cluster(*"abcdef", plan=LOADS) as cluster:
        await loaded_at(cluster, "a")
        cluster.watch_delay_s = 0.5
        preloader = cluster["a"].node.parts.preloader
        taken: set[InstanceId] = set()
        for _ in range(3):
            where = await preloader.request(
                M, last_used_ms=0, exclude=frozenset(taken), reason=PreloadReason.SCALE_UP
            )
            assert where is not None
            taken.add(where)
        assert len(taken) == 3
        await cluster.settle()
        assert ready(cluster) == {"a", *taken}


async def test_a_peer_that_does_not_listen_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Counter[str] = Counter()

    async def deaf(
        _self: object, address: str, me: object, demands: Mapping[ModelId, Any], timeout_s: float
    ) -> None:
        told[address] += 1
        raise PeerCallError(Outcome.UNREACHABLE, "no such method")

    monkeypatch.setattr(FakePeers, "tell_demand", deaf)
    async with running_cluster(*"abc", plan=FAST, **SLOW_PACE) as cluster:
        await loaded_at(cluster, "a", "b")
        await call(cluster, 4.0, 60, at="b")
        assert 3 <= told["a:8080"] <= 7  # once in ten seconds, not at each look


async def test_of_what_was_asked_for_in_vain_nothing_is_left_in_the_end() -> None:
    async with running_cluster("a", "b", plan=FAST, **SLOW_PACE) as cluster:
        for model_id in ("gone", "quiet"):
            cluster["b"].runtime.fail_loads(model_id, StatusCode.UNAVAILABLE, "no network")
            await loaded_at(cluster, "a", model_id=model_id)
            await call(cluster, 10.0, 6, at="a", model_id=model_id)
        asked = cluster["a"].node.services.scaler._asked
        assert asked.keys() == {"gone", "quiet"}
        await cluster["a"].node.models.unregister(ModelId("gone"))
        await anyio.sleep(300)
        assert not asked


async def test_what_is_called_more_does_not_wait_for_peers_that_do_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def wait(_self: object) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(Scaler, "_give_up_surplus", wait)
    async with running_cluster(*"abcd", plan=FAST, **SLOW_PACE) as cluster:
        await loaded_at(cluster, "a")
        await anyio.sleep(30)
        await call(cluster, 4.0, 30)
        assert len(ready(cluster)) >= 3


async def test_a_peer_that_does_not_answer_is_asked_once_a_look_to_give_up_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: Counter[str] = Counter()

    async def mute(self: FakePeers, address: str, model_id: ModelId, timeout_s: float) -> bool:
        await anyio.sleep(timeout_s)
        told[self._address] += 1
        raise PeerCallError(Outcome.ABANDONED, "no answer in time")

    monkeypatch.setattr(FakePeers, "withdraw_copy", mute)
    monkeypatch.setattr(Scaler, "_is_too_many", lambda *_args: True)
    async with running_cluster("a", "b", plan=FAST) as cluster:
        for number in range(5):
            await loaded_at(cluster, "a", "b", model_id=f"m{number}")
        await anyio.sleep(120)
        assert told
        # A look every ten seconds; five seconds for each model would be twice as many.
        assert max(told.values()) <= 13, told


# --- second copies ------------------------------------------------------------------------------

WINDOW: dict[str, Any] = {
    "scaling": ScalingSettings(second_copy_age_min_s=4, second_copy_age_max_s=10)
}


async def test_what_is_in_recurring_use_gets_a_second_copy() -> None:
    async with running_cluster(*"abc", plan=FAST, **WINDOW) as cluster:
        await loaded_at(cluster, "a")
        for pause_s in (0, 1, 11):
            await anyio.sleep(pause_s)
            await cluster["b"].invoke("m")
            await anyio.sleep(0.9)
            assert ready(cluster) == {"a"}, pause_s
        await anyio.sleep(4.0)
        await cluster["b"].invoke("m")
        await until(lambda: len(ready(cluster)) == 2)
        await call(cluster, 1.0, 60)
        assert len(ready(cluster)) == 2
        assert count_of(cluster, "second_copies_added") == 1


async def test_a_newcomer_gets_no_second_copy_and_its_room_does_not_count() -> None:
    parameters = small_parameters(10)
    async with running_cluster("a", "b", plan=FAST, parameters=parameters, **WINDOW) as cluster:
        await loaded_at(cluster, "a")
        for each in cluster.serving:
            await fill(cluster, each, 10)
        await cluster["a"].load("m")
        await anyio.sleep(45)  # until all know how full the others are
        for number in range(5):
            newcomer = await cluster.start(f"c{number}")
            await call(cluster, 1.0, 3)
            await newcomer.stop()
        assert count_of(cluster, "second_copies_added") == 0
        await cluster.start("c")
        await call(cluster, 1.0, 15)
        assert count_of(cluster, "second_copies_added") == 1
        assert len(ready(cluster)) == 2
        assert "c" in ready(cluster)


async def test_a_second_copy_needs_room() -> None:
    parameters = small_parameters(10)
    async with running_cluster("a", "b", plan=FAST, parameters=parameters, **WINDOW) as cluster:
        await loaded_at(cluster, "a")
        for each in cluster.serving:
            await fill(cluster, each, 10)
        await cluster["a"].load("m")
        await anyio.sleep(45)  # until all know how full the others are
        await call(cluster, 1.0, 60)
        assert len(ready(cluster)) == 1
        assert count_of(cluster, "second_copies_added") == 0


# --- fewer --------------------------------------------------------------------------------------


async def full_cluster_with(cluster: Cluster, *names: str) -> None:
    """Have copies at these instances, and nowhere room for more."""
    await loaded_at(cluster, *names)
    for each in cluster.serving:
        await fill(cluster, each, 8)
    await anyio.sleep(45)


async def test_copies_too_many_go_one_by_one_and_do_not_come_back() -> None:
    parameters = small_parameters(10)
    async with running_cluster(*"abcd", plan=FAST, parameters=parameters, **SELDOM) as cluster:
        await full_cluster_with(cluster, *"abcd")
        async with anyio.create_task_group() as group:
            group.start_soon(call, cluster, 0.2, 40 * MINUTE_S)
            await anyio.sleep(28 * MINUTE_S)
            assert len(ready(cluster)) == 4
            await anyio.sleep(6 * MINUTE_S)
            assert len(ready(cluster)) == 2  # now there is room
            for name in "cd":
                await cluster[name].register(f"late-{name}")
                await cluster[name].load_here(f"late-{name}")
        assert len(ready(cluster)) == 1
        assert count_of(cluster, "copies_dropped") == 3
        assert count_of(cluster, "copies_added") == 0
        await cluster.settle()
        cluster.check()


async def test_copies_stay_while_nobody_needs_their_memory() -> None:
    async with running_cluster(*"abcd", plan=FAST, **SELDOM) as cluster:
        await loaded_at(cluster, *"abcd")
        await call(cluster, 0.1, 60 * MINUTE_S)
        assert len(ready(cluster)) == 4


async def test_the_last_copy_is_never_given_up() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        scalers = [each.node.services.scaler for each in cluster.serving]
        gone: list[bool] = []

        async def give_up(number: int) -> None:
            gone.append(await scalers[number].give_up(M))

        async with anyio.create_task_group() as group:
            for number in (0, 1):
                group.start_soon(give_up, number)
        assert sorted(gone) == [False, True]
        await cluster.settle()
        assert len(ready(cluster)) == 1
        assert not await scalers[0].give_up(M)
        assert not await scalers[1].give_up(M)
        cluster.check()


async def test_a_copy_whose_twin_cannot_be_reached_stays() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        members = cluster["a"].node.parts.members
        members.mark_unreachable(InstanceId("b"), anyio.current_time())
        assert not await cluster["a"].node.services.scaler.give_up(M)
        assert ready(cluster) == {"a", "b"}


async def test_calls_go_on_while_a_copy_is_given_up() -> None:
    async with running_cluster(
        "a", "b", plan=FAST, scaling=ScalingSettings(rpm_threshold=10**6)
    ) as cluster:
        cluster.watch_delay_s = 0.2
        await loaded_at(cluster, "a", "b")
        cluster.call_s = 0.05
        async with anyio.create_task_group() as group:
            group.start_soon(call, cluster, 100.0, 1.0)
            await anyio.sleep(0.3)
            assert await cluster["b"].node.services.scaler.give_up(M)
        await cluster.settle()
        assert ready(cluster) == {"a"}
        cluster.check()

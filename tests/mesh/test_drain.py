"""Before an instance stops, others have what it has: who waits for what, and who does not."""

from __future__ import annotations

import anyio
import pytest

from mm.core.ids import ModelId
from mm.edge.memory_store import Fault
from mm.errors import StatusCode
from mm.mesh.local_copy import LocalCopy
from mm.testing.cluster import Cluster, Instance, running_cluster, small_parameters, until
from mm.testing.fake_runtime import ModelPlan
from mm.testing.instance import DRAIN_S
from tests.mesh.calls import FAST, loaded_at, loads

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

LOAD_S = 5.0
SLOW = ModelPlan(load_s=LOAD_S, unload_s=0.01)


def holders(cluster: Cluster, model_id: str) -> set[str]:
    record = cluster.record(model_id)
    assert record is not None
    return set(record.copies)


def copies_of(instance: Instance) -> list[LocalCopy]:
    return list(instance.node.parts.copies)


async def stop_s(instance: Instance) -> float:
    """Stop it; answers how long that took."""
    began_s = anyio.current_time()
    await instance.stop()
    return anyio.current_time() - began_s


async def test_calls_never_wait_while_a_model_moves() -> None:
    async with running_cluster("a", "b", "c", plan=SLOW) as cluster:
        for number in range(6):
            await loaded_at(cluster, "a", model_id=f"m{number}")
        longest_s = 0.0
        ended = False

        async def call(entry: str, model_id: str) -> None:
            nonlocal longest_s
            while not ended:
                if cluster[entry].is_serving:
                    began_s = anyio.current_time()
                    await cluster[entry].invoke(model_id)
                    longest_s = max(longest_s, anyio.current_time() - began_s)
                await anyio.sleep(0.1)

        async with anyio.create_task_group() as group:
            for number in range(6):
                for entry in "ab":
                    group.start_soon(call, entry, f"m{number}")
            await anyio.sleep(1)
            took_s = await stop_s(cluster["a"])
            await anyio.sleep(1)
            ended = True
        assert longest_s < 0.1
        assert LOAD_S < took_s < 2.5 * LOAD_S
        assert loads(cluster) == 12, "each once there, once elsewhere"
        assert all(holders(cluster, f"m{number}") <= {"b", "c"} for number in range(6))
        cluster.check()


async def test_what_another_has_need_not_move() -> None:
    async with running_cluster("a", "b", plan=SLOW) as cluster:
        await loaded_at(cluster, "a", "b")
        assert await stop_s(cluster["a"]) < 1
        assert holders(cluster, "m") == {"b"}
        assert loads(cluster) == 2


async def test_what_another_is_loading_is_waited_for() -> None:
    async with running_cluster("a", "b", "c", plan=SLOW) as cluster:
        await loaded_at(cluster, "a")
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["b"].load_here, "m")
            await until(lambda: len(holders(cluster, "m")) == 2)
            assert LOAD_S / 2 < await stop_s(cluster["a"]) < 2 * LOAD_S
        assert holders(cluster, "m") == {"b"}
        assert loads(cluster) == 2


async def test_what_nobody_used_of_late_does_not_move() -> None:
    async with running_cluster("a", "b", plan=SLOW) as cluster:
        await loaded_at(cluster, "a", model_id="old")
        await anyio.sleep(cluster["a"].config.drain_used_within_s + 1)
        assert await stop_s(cluster["a"]) < 1
        assert holders(cluster, "old") == set()


async def test_the_last_one_stops_at_once() -> None:
    async with running_cluster("a", plan=SLOW) as cluster:
        await loaded_at(cluster, "a")
        assert await stop_s(cluster["a"]) < 1


async def test_all_stop_together_at_once() -> None:
    async with running_cluster("a", "b", "c", plan=SLOW) as cluster:
        for name in "abc":
            await loaded_at(cluster, name, model_id=f"at-{name}")
        began_s = anyio.current_time()
        async with anyio.create_task_group() as group:
            for name in "abc":
                group.start_soon(cluster[name].stop)
        assert anyio.current_time() - began_s < 3


async def test_the_hottest_go_first_and_one_time_limit_ends_it() -> None:
    parameters = small_parameters(200, loading_concurrency_max=1)
    async with running_cluster("a", "b", plan=FAST, parameters=parameters) as cluster:
        for number in range(10):
            await loaded_at(cluster, "a", model_id=f"m{number}")
            cluster["b"].runtime.plan(f"m{number}", load_s=LOAD_S)
            await anyio.sleep(1)
        with anyio.fail_after(4 * LOAD_S + 1):
            await cluster["a"].node.drain(3.5 * LOAD_S)
        assert cluster["b"].runtime.loaded == {"m9", "m8", "m7"}
        assert not any("a" in holders(cluster, f"m{number}") for number in range(10))
        record = cluster.record("m9")
        assert record is not None
        used_ms = record.last_used_ms
        assert cluster["a"].clock.now_ms() - used_ms > 3 * LOAD_S * 1000, "its true last use"


async def test_models_move_with_their_true_last_use() -> None:
    """Else all of them would be young where they go, and outlive what is called there."""
    async with running_cluster("a", "b", "c", plan=SLOW) as cluster:
        a, models = cluster["a"], [f"m{number}" for number in range(4)]
        for model_id in models:
            await loaded_at(cluster, "a", model_id=model_id)
            await anyio.sleep(300)
        await a.invoke("m1")
        await anyio.sleep(300)
        used_ms = {copy.model_id: a.node.parts.copies.last_used_ms(copy) for copy in copies_of(a)}
        async with anyio.create_task_group() as group:
            group.start_soon(a.stop)
            await anyio.sleep(LOAD_S / 2)
            called_ms = a.node.parts.copies.clock.now_ms()
            await a.invoke("m2")
        await cluster.settle()
        assert used_ms["m1"] > used_ms["m3"]
        found = {
            copy.model_id: each.node.parts.copies.last_used_ms(copy)
            for each in cluster.serving
            for copy in copies_of(each)
        }
        assert found == used_ms
        # A call meanwhile was answered here, and the record knows of it.
        told = {model_id: record.last_used_ms for model_id, record in cluster.records().items()}
        assert told == used_ms | {ModelId("m2"): called_ms}
        cluster.check()


async def test_nothing_younger_is_displaced() -> None:
    parameters = small_parameters(10)
    async with running_cluster("a", "b", plan=FAST, parameters=parameters) as cluster:
        await loaded_at(cluster, "a", model_id="cold")
        await anyio.sleep(100)
        number = 0
        while cluster["b"].node.parts.accounting.free_units >= 128:
            await loaded_at(cluster, "b", model_id=f"b{number}")
            number += 1
        assert await stop_s(cluster["a"]) < 1
        assert cluster["b"].runtime.loaded == {f"b{each}" for each in range(number)}


async def test_a_load_that_fails_is_tried_elsewhere() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster["b"].runtime.fail_loads("m", StatusCode.INTERNAL, "boom", times=1)
        cluster["c"].runtime.fail_loads("m", StatusCode.INTERNAL, "boom", times=0)
        assert await stop_s(cluster["a"]) < 20
        assert len(holders(cluster, "m")) == 1


async def test_without_a_store_it_serves_on_until_the_time_is_over() -> None:
    async with running_cluster("a", "b", plan=SLOW) as cluster:
        await loaded_at(cluster, "a")
        for each in cluster.serving:
            each.store.set_fault(Fault.SILENT)
        began_s = anyio.current_time()
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["a"].stop)
            await anyio.sleep(DRAIN_S - 5)
            await cluster["b"].invoke("m")
            await cluster["a"].wait_ended()
        assert anyio.current_time() - began_s < DRAIN_S + 10
        assert cluster["b"].runtime.loaded == set()


async def test_without_a_store_and_with_nothing_to_move_it_stops_at_once() -> None:
    async with running_cluster("a", "b", plan=SLOW) as cluster:
        cluster["a"].store.set_fault(Fault.SILENT)
        assert await stop_s(cluster["a"]) < 6


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("lost_s", [0.0, 1.0, 4.0])
async def test_a_store_that_comes_back_in_time_costs_no_call(fault: Fault, lost_s: float) -> None:
    """It goes away before the instance is told to stop, or while models move."""
    async with running_cluster("a", "b", "c", plan=SLOW) as cluster:
        models = [f"m{number}" for number in range(6)]
        for model_id in models:
            await loaded_at(cluster, "a", model_id=model_id)

        async def call(model_id: str) -> None:
            while True:
                await cluster["b"].invoke(model_id)
                await anyio.sleep(0.1)

        async with anyio.create_task_group() as group:
            for model_id in models:
                group.start_soon(call, model_id)
            if lost_s:
                group.start_soon(cluster["a"].stop)
                await anyio.sleep(lost_s)
            for each in cluster.serving:
                each.store.set_fault(fault)
            if not lost_s:
                group.start_soon(cluster["a"].stop)
            await anyio.sleep(15)
            for each in cluster.serving:
                each.store.set_fault(None)
            await cluster["a"].wait_ended()
            await anyio.sleep(5)
            group.cancel_scope.cancel()
        assert cluster["a"].node.services.drain.moved_count == len(models)


async def test_a_store_that_takes_a_second_for_everything_holds_up_nothing_but_the_drain() -> None:
    async with running_cluster("a", "b", "c", plan=SLOW) as cluster:
        models = [f"m{number}" for number in range(20)]
        for model_id in models:
            await loaded_at(cluster, "a", model_id=model_id)
        for each in cluster.serving:
            each.store._call_delay_s = each.store._watch_delay_s = 1.0
        await stop_s(cluster["a"])
        assert cluster["a"].node.services.drain.moved_count == len(models)


async def test_models_unregistered_meanwhile_are_not_waited_for() -> None:
    async with running_cluster("a", "b", plan=SLOW) as cluster:
        await loaded_at(cluster, "a")
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["a"].stop)
            await anyio.sleep(1)
            await cluster["b"].node.models.unregister(ModelId("m"))
            with anyio.fail_after(2):
                await cluster["a"].wait_ended()
        await cluster.settle()
        cluster.check()

"""Unloads: after the calls in flight, again when they fail, and given up without losing count."""

from __future__ import annotations

import logging

import anyio
import pytest

from mm.core.calls import LocalRoute, Outcome
from mm.core.ids import ModelId
from mm.errors import LoadFailedError, StatusCode
from mm.testing.cluster import Cluster, Instance, running_cluster, small_parameters, until
from mm.testing.fake_runtime import Held, ModelPlan
from tests.mesh.calls import FAST, M, call_for

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_ahead")]

MODEL_UNITS = 128


def remove(instance: Instance, model_id: str = "m") -> None:
    """Take a copy out, as an eviction does."""
    copy = instance.node.parts.copies.get(ModelId(model_id))
    assert copy is not None
    instance.node.parts.copies.remove(copy)


async def loaded(cluster: Cluster) -> Instance:
    await cluster["a"].register("m")
    await cluster["a"].invoke("m")
    await cluster.settle()
    return cluster["a"]


async def test_an_unload_waits_for_the_last_call_in_flight() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = await loaded(cluster)
        calls = [call_for() for _ in range(3)]
        routes = [await a.node.router.route(call) for call in calls]
        remove(a)
        await anyio.wait_all_tasks_blocked()
        assert a.runtime.held("m") is Held.LOADED
        assert a.node.parts.accounting.unloading_units == MODEL_UNITS
        for call, route in zip(calls, routes, strict=True):
            assert a.runtime.held("m") is Held.LOADED
            assert isinstance(route, LocalRoute)
            a.node.router.finished(call, route, Outcome.ANSWERED)
        await a.runtime.wait_for(lambda: a.runtime.held("m") is None)
        await cluster.settle()
        cluster.check()
        assert len(a.node.parts.copies.table) == 0


@pytest.mark.virtual_time
async def test_calls_that_never_end_are_not_waited_for_forever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = await loaded(cluster)
        call = call_for()
        route = await a.node.router.route(call)
        remove(a)
        await anyio.sleep(127)
        assert a.runtime.held("m") is Held.LOADED
        await anyio.sleep(1)
        assert a.runtime.held("m") is None
        assert "unloaded with 1 calls in flight after" in caplog.text
        assert a.node.router.in_flight(M) == 1
        a.node.router.finished(call, route, Outcome.ABANDONED)
        await cluster.settle()
        cluster.check()
        assert len(a.node.parts.copies.table) == 0


@pytest.mark.virtual_time
async def test_a_load_of_the_same_model_comes_after_its_unload() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=1, unload_s=5)) as cluster:
        a = await loaded(cluster)
        remove(a)
        began_s = anyio.current_time()
        assert await a.invoke("m") == "a"
        assert anyio.current_time() - began_s == pytest.approx(6, abs=0.1)
        assert a.runtime.violations == []


@pytest.mark.virtual_time
async def test_a_failed_unload_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = await loaded(cluster)
        a.runtime.fail_unloads("m", StatusCode.INTERNAL, "busy", times=5)
        remove(a)
        await anyio.sleep(1 + 3 * 10 + 5)
        assert a.runtime.held("m") is Held.LOADED
        await anyio.sleep(10)
        assert a.runtime.held("m") is None
        await cluster.settle()
        cluster.check()
        warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(warnings) == 1, "said once, not at each try"


@pytest.mark.virtual_time
async def test_an_unload_that_takes_too_long_is_tried_again() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = await loaded(cluster)
        a.runtime.plan("m", unload_s=1000)
        remove(a)
        await anyio.sleep(31)
        a.runtime.plan("m", unload_s=1)
        await cluster.settle()
        assert a.runtime.held("m") is None


@pytest.mark.virtual_time
async def test_an_unload_given_up_costs_capacity_until_it_succeeds() -> None:
    parameters = small_parameters(20)
    async with running_cluster(
        "a", plan=FAST, parameters=parameters, unload_retries_max=3
    ) as cluster:
        a = await loaded(cluster)
        capacity_units = a.node.parts.accounting.capacity_units
        for number in range(18):
            await a.register(f"n{number}")
            await a.invoke(f"n{number}")
        a.runtime.fail_unloads("m", StatusCode.INTERNAL, "stuck")
        remove(a)
        await anyio.sleep(12)
        assert a.node.parts.accounting.capacity_units == capacity_units - MODEL_UNITS
        assert (
            a.node.parts.copies.table.capacity_units == a.node.parts.accounting.table_capacity_units
        )
        a.node.parts.copies.check_invariants()
        record = cluster.instance_record("a")
        assert record is not None
        assert record.capacity_units == a.node.parts.accounting.published_capacity_units
        counters = a.node.statistics().counters
        assert (counters.unload_failures, counters.unloads) == (1, counters.evictions)
        with pytest.raises(LoadFailedError, match="Prior unload of model m failed unrecover"):
            await a.invoke("m")
        stored = cluster.record("m")
        assert stored is not None
        assert stored.failures == {}, "not the model's fault"
        a.runtime.fail_unloads("m", StatusCode.OK, times=0)
        await cluster.settle()
        assert a.node.parts.accounting.capacity_units == capacity_units
        assert await a.invoke("m") == "a"
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_a_stopped_runtime_costs_no_capacity() -> None:
    """What was being unloaded went with it."""
    async with running_cluster("a", plan=FAST, unload_retries_max=2) as cluster:
        a = await loaded(cluster)
        a.runtime.stop()
        remove(a)
        await anyio.sleep(60)
        assert a.node.parts.accounting.lost_units == 0
        assert a.node.parts.copies.unloader.count == 0
        a.runtime.start()
        await cluster.settle()
        assert a.node.parts.accounting.lost_units == 0
        cluster.check()


async def test_a_load_that_is_stopped_is_unloaded() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=30, unload_s=0.001)) as cluster:
        await cluster["a"].register("m")
        a = cluster["a"]
        async with anyio.create_task_group() as group:
            group.start_soon(a.invoke, "m")
            await until(lambda: a.runtime.held("m") is Held.LOADING)
            a.runtime.plan("m", load_s=0.001)
            remove(a)
        assert a.runtime.unloads_done[M] == 1
        assert a.runtime.loads_done[M] == 1
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("joins_s", "loaded_s"),
    [
        (1.0, 5.0),  # tried: the second try comes soon anyhow
        (4.0, 8.0),  # tried: the third comes after a short rest
        (7.0, 9.0),  # the long rest: it ends at once
    ],
)
async def test_an_unload_is_tried_again_soon_when_a_call_joins_a_load_that_nobody_waited_for(
    joins_s: float, loaded_s: float
) -> None:
    """Tries take two seconds; after the first there is one of rest, after others ten."""
    async with running_cluster("a", plan=ModelPlan(load_s=0.001, unload_s=2.0)) as cluster:
        a = await loaded(cluster)
        a.runtime.fail_unloads("m", StatusCode.INTERNAL, "busy", times=1 if joins_s < 2 else 2)
        began_s = anyio.current_time()
        remove(a)
        await anyio.sleep(0.5)
        record = cluster.record("m")
        assert record is not None
        a.node.parts.loader.ensure(M, record, awaited=False)
        await anyio.sleep(joins_s - 0.5)
        assert await a.invoke("m") == "a"
        assert anyio.current_time() - began_s == pytest.approx(loaded_s, abs=0.1)
        await cluster.settle()
        assert not a.node.parts.copies.unloader._wanted
        cluster.check()


@pytest.mark.virtual_time
async def test_when_one_unload_succeeds_those_that_failed_are_tried_again() -> None:
    """A runtime that was away for a moment does not keep memory for ten seconds more."""
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        names = [f"m{number}" for number in range(6)]
        for name in names:
            await a.register(name)
            await a.invoke(name)
            a.runtime.fail_unloads(name, StatusCode.UNAVAILABLE, "busy")
        for name in names[1:]:
            remove(a, name)
        await anyio.sleep(5)
        for name in names:
            a.runtime.fail_unloads(name, StatusCode.OK, times=0)
        began_s = anyio.current_time()
        remove(a, names[0])
        await cluster.settle()
        assert anyio.current_time() - began_s < 1
        cluster.check()


@pytest.mark.virtual_time
async def test_so_many_unloads_at_a_time_and_no_more() -> None:
    plan = ModelPlan(load_s=0.001, unload_s=1)
    async with running_cluster("a", plan=plan, unloads_at_once_max=3) as cluster:
        a = cluster["a"]
        names = [f"m{number}" for number in range(12)]
        for name in names:
            await a.register(name)
            await a.invoke(name)
        began_s, unloading_max = anyio.current_time(), 0
        for name in names:
            remove(a, name)
        while a.node.parts.copies.unloader.count:
            unloading = [name for name in names if a.runtime.held(name) is Held.UNLOADING]
            unloading_max = max(unloading_max, len(unloading))
            await anyio.sleep(0.1)
        assert unloading_max == 3
        assert anyio.current_time() - began_s == pytest.approx(4, abs=0.3)
        await cluster.settle()
        cluster.check()

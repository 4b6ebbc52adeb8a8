"""What is measured of loads, unloads, waits and evictions, in virtual time to the millisecond."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from mm.core.calls import Outcome
from mm.core.ids import ModelId
from mm.errors import StatusCode
from mm.mesh.measures import Measures
from mm.metrics_settings import MetricsSettings
from mm.testing.cluster import Cluster, running_cluster, small_parameters
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, MIB, ModelPlan
from tests.mesh.calls import M, call_for, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def measured(cluster: Cluster) -> Measures:
    return cluster["a"].node.parts.measures


def told(cluster: Cluster, name: str, model_id: str = "") -> tuple[int, float]:
    """Answer how many there were, and what they come to."""
    histogram = getattr(measured(cluster), name).table.at(ModelId(model_id))
    return histogram.count, pytest.approx(histogram.total, abs=0.5)


async def test_a_load_that_a_call_waits_for_and_its_unload() -> None:
    plan = ModelPlan(load_s=0.2, unload_s=0.05, is_size_told=False, model_size_s=0.03)
    async with running_cluster("a", plan=plan) as cluster:
        a = cluster["a"]
        await a.register("m")
        await a.invoke("m")
        await a.invoke("m")
        await cluster.settle()
        assert told(cluster, "load_ms") == (1, 200)
        assert told(cluster, "miss_ms") == (1, 200), "the second call waited for nothing"
        assert told(cluster, "sizing_ms") == (1, 30)
        assert told(cluster, "load_wait_ms") == (1, 0)
        assert told(cluster, "loaded_bytes") == (1, MIB)
        copy = a.node.parts.copies.get(M)
        assert copy is not None
        a.node.parts.copies.remove(copy)
        await cluster.settle()
        assert told(cluster, "unload_ms") == (1, 50)
        assert told(cluster, "eviction_age_ms") == (0, 0), "nobody evicted it"


async def test_a_call_that_hardly_waited_is_no_miss() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=0.005)) as cluster:
        await cluster["a"].register("m")
        await cluster["a"].invoke("m")
        assert told(cluster, "load_ms") == (1, 5)
        assert told(cluster, "miss_ms") == (0, 0)


async def test_loads_wait_for_their_turn() -> None:
    parameters = replace(DEFAULT_PARAMETERS, loading_concurrency_max=1)
    async with running_cluster("a", plan=ModelPlan(), parameters=parameters) as cluster:
        for model_id in ("m", "n", "o"):
            await cluster["a"].register(model_id)
        async with anyio.create_task_group() as group:
            for model_id in ("m", "n", "o"):
                group.start_soon(cluster["a"].invoke, model_id)
        assert told(cluster, "load_wait_ms") == (3, 0 + 200 + 400)
        assert told(cluster, "load_ms") == (3, 600)


async def test_loads_that_fail_have_no_time() -> None:
    async with running_cluster("a", plan=ModelPlan()) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", StatusCode.INTERNAL, "so")
        with pytest.raises(Exception, match="so"):
            await cluster["a"].invoke("m")
        assert told(cluster, "load_ms") == (0, 0)
        assert cluster["a"].node.statistics().counters.load_failures == 1


async def test_each_failed_try_of_an_unload_counts() -> None:
    async with running_cluster("a", plan=ModelPlan()) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].runtime.fail_unloads("m", StatusCode.INTERNAL, "busy", times=5)
        copy = cluster["a"].node.parts.copies.get(M)
        assert copy is not None
        cluster["a"].node.parts.copies.remove(copy)
        await anyio.sleep(60)
        await cluster.settle()
        assert measured(cluster).unload_tries_failed == 5
        assert told(cluster, "unload_ms") == (1, 50), "the time of the try that succeeded"


async def test_the_age_of_what_was_evicted() -> None:
    plan = ModelPlan(load_s=0.0, unload_s=0.0, size_bytes=4 * MIB, predicted_bytes=4 * MIB)
    async with running_cluster(
        "a", plan=plan, parameters=small_parameters(20), eviction="lru"
    ) as cluster:
        await cluster["a"].register("m")
        await cluster["a"].invoke("m")
        await anyio.sleep(100)
        for number in range(5):
            await cluster["a"].register(f"n{number}")
            await cluster["a"].invoke(f"n{number}")
        ages = measured(cluster).eviction_age_ms.table.at(ModelId(""))
        assert ages.count == cluster["a"].node.statistics().counters.evictions
        # From 30 s to 5 min: the first one, and it alone.
        assert (ages.counts[1], ages.sums[1]) == (1, pytest.approx(100_000, abs=1000))


async def test_waits_for_a_slot() -> None:
    parameters = replace(DEFAULT_PARAMETERS, limit_model_concurrency=True)
    plan = ModelPlan(concurrency_max=1)
    async with running_cluster("a", plan=plan, parameters=parameters) as cluster:
        await loaded_at(cluster, "a")
        router = cluster["a"].node.router
        first, second = call_for(), call_for()
        route = await router.route(first)

        async def wait() -> None:
            await router.route(second)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(0.7)
            router.finished(first, route, Outcome.ANSWERED)
        assert told(cluster, "slot_wait_ms") == (2, 700)


async def test_by_model_if_wished() -> None:
    metrics = MetricsSettings(kind="prometheus", is_per_model=True)
    async with running_cluster("a", plan=ModelPlan(), metrics=metrics) as cluster:
        for model_id in ("m", "n"):
            await cluster["a"].register(model_id)
            await cluster["a"].invoke(model_id)
        table = measured(cluster).load_ms.table
        assert {key: each.count for key, each in table.items()} == {"m": 1, "n": 1}

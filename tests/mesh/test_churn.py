"""More models in use than fit: work for the cache, and an answer for every call."""

from __future__ import annotations

import random
from dataclasses import replace

import anyio
import pytest

from mm.testing.cluster import Cluster, running_cluster, small_parameters
from mm.testing.fake_runtime import MIB, ModelPlan
from tests.mesh.calls import FAST

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

CLIENTS = 32


async def churn(cluster: Cluster, *, models: int, calls_each: int) -> tuple[float, float]:
    """Let clients call models at random; answers how long all took, and the slowest call."""
    names, rng, slowest_s = list(cluster.instances), random.Random(1), 0.0

    async def client() -> None:
        nonlocal slowest_s
        for _ in range(calls_each):
            asked_s = anyio.current_time()
            await cluster[rng.choice(names)].invoke(f"m{rng.randrange(models)}")
            slowest_s = max(slowest_s, anyio.current_time() - asked_s)

    began_s = anyio.current_time()
    async with anyio.create_task_group() as group:
        for _ in range(CLIENTS):
            group.start_soon(client)
    return anyio.current_time() - began_s, slowest_s


async def test_under_sustained_churn_all_are_answered_and_all_loading_slots_busy() -> None:
    """2,000 models, room for 200, uniform calls, 32 at once, loads of 50 ms."""
    parameters = replace(small_parameters(220), loading_concurrency_max=8)
    plan = ModelPlan(load_s=0.05, unload_s=0.02)
    async with running_cluster("a", plan=plan, parameters=parameters) as cluster:
        a = cluster["a"]
        for number in range(2000):
            await a.register(f"m{number}")
        took_s, slowest_s = await churn(cluster, models=2000, calls_each=40)
        counters = a.node.parts.counters
        assert (counters.failures, counters.load_failures) == (0, 0)
        assert counters.calls == counters.hits + counters.misses == CLIENTS * 40
        assert counters.evictions > 800
        assert counters.loading_s / took_s > 7.8, "of the eight slots"
        assert slowest_s < 0.5
        assert a.runtime.overcommitted_bytes_max == 0
        await cluster.settle()
        cluster.check()


@pytest.mark.parametrize("names", ["a", "abc"])
async def test_churn_of_large_and_small_models_with_slow_unloads_is_answered(names: str) -> None:
    """Models of up to a third of an instance, whose unloads take longer than their loads."""
    parameters = replace(small_parameters(60), loading_concurrency_max=4)
    plan = ModelPlan(load_s=0.05, unload_s=0.2)
    async with running_cluster(*names, plan=plan, parameters=parameters) as cluster:
        rng = random.Random(2)
        for number in range(300):
            await cluster["a"].register(f"m{number}")
            size_bytes = rng.choice([1, 1, 1, 2, 4, 18]) * MIB
            for each in cluster.serving:
                each.runtime.plan(f"m{number}", size_bytes=size_bytes, predicted_bytes=size_bytes)
        _, slowest_s = await churn(cluster, models=300, calls_each=12)
        for each in cluster.serving:
            counters = each.node.parts.counters
            assert (counters.failures, counters.load_failures) == (0, 0)
            assert counters.evictions > 20
            assert each.runtime.overcommitted_bytes_max == 0
        assert slowest_s < 60
        await cluster.settle()
        cluster.check()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_size_known", [True, False])
@pytest.mark.parametrize("eviction", ["lru", "cost"])
async def test_a_large_model_evicts_what_it_needs_and_no_more(
    eviction: str, seed: int, is_size_known: bool
) -> None:
    """A third of the capacity arrives at a full instance: by prediction, or as a surprise."""
    parameters = small_parameters(120)
    limits = {"parameters": parameters, "eviction": eviction}
    async with running_cluster("a", plan=FAST, **limits) as cluster:
        a, rng = cluster["a"], random.Random(seed)
        copies = a.node.parts.copies
        number = 0
        while copies.table.used_units < copies.table.capacity_units - 8 * 128:
            size_bytes = rng.randrange(MIB // 2, 8 * MIB)
            a.runtime.plan(f"m{number}", size_bytes=size_bytes, predicted_bytes=size_bytes)
            await a.register(f"m{number}")
            await a.invoke(f"m{number}")
            number += 1
            await anyio.sleep(1)
        await cluster.settle()
        before = {copy.model_id: copy.weight_units for copy in copies}
        used = dict.fromkeys(name for name, _, _ in copies.table.cached())
        free_units = copies.table.capacity_units - copies.table.used_units
        predicted_bytes = 40 * MIB if is_size_known else 0
        a.runtime.plan("large", size_bytes=40 * MIB, predicted_bytes=predicted_bytes)
        await a.register("large")
        assert await a.invoke("large") == "a"
        await cluster.settle()
        gone = before.keys() - {copy.model_id for copy in copies}
        needed_units = 40 * 128 - free_units
        evicted_units = sum(before[name] for name in gone)
        assert needed_units <= evicted_units
        assert evicted_units <= needed_units + max(before[name] for name in gone)
        if eviction == "lru":
            assert gone == set(list(used)[: len(gone)]), "those least recently used"
        cluster.check()

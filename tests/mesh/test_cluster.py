"""Several instances together: one model, many callers, forwards, eviction."""

from __future__ import annotations

from collections import Counter

import anyio
import pytest

from mm.core.ids import InstanceId
from mm.errors import ModelNotFoundError
from mm.testing.cluster import running_cluster, small_parameters
from mm.testing.fake_runtime import MIB, ModelPlan

pytestmark = pytest.mark.anyio

FAST = ModelPlan(load_s=0.005, unload_s=0.002)


async def test_a_model_is_loaded_once_for_a_hundred_callers_at_three_instances() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await cluster["a"].register("m")
        served: list[InstanceId] = []

        async def call(name: str) -> None:
            served.append(await cluster[name].invoke("m"))

        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(call, "abc"[number % 3])
        assert len(served) == 100
        assert len(set(served)) == 1
        assert sum(each.runtime.loads_begun.total() for each in cluster.serving) == 1
        await cluster.settle()
        cluster.check()
        counters = [each.node.statistics().counters for each in cluster.serving]
        assert sum(c.loads for c in counters) == 1
        assert sum(c.hits + c.misses for c in counters) == 100
        assert sum(c.calls for c in counters) == 100
        assert sum(c.failures for c in counters) == 0


async def test_what_does_not_fit_pushes_out_the_oldest() -> None:
    parameters = small_parameters(12)
    async with running_cluster("a", "b", plan=FAST, parameters=parameters) as cluster:
        names = [f"m{number}" for number in range(60)]
        for name in names:
            await cluster["a"].register(name)
        for name in names * 2:
            await cluster["ab"[len(name) % 2]].invoke(name)
        await cluster.settle()
        cluster.check()
        for each in cluster.serving:
            assert each.runtime.memory_bytes_max <= 12 * MIB
            assert each.runtime.overcommitted_bytes_max == 0
        evictions = [each.node.statistics().counters.evictions for each in cluster.serving]
        loads = [each.runtime.loads_done.total() for each in cluster.serving]
        loaded = Counter(m for each in cluster.serving for m in each.runtime.loaded)
        assert sum(loads) - sum(evictions) == loaded.total()
        assert max(loaded.values()) == 1, "one copy is enough"


async def test_an_unknown_model_is_not_found_anywhere() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        with pytest.raises(ModelNotFoundError, match="model not found"):
            await cluster["a"].invoke("nix")
        cluster.check()


@pytest.mark.virtual_time
@pytest.mark.parametrize("names", ["a", "abc"])
async def test_more_cold_models_at_once_than_fit_are_all_served_in_turn(names: str) -> None:
    """Nobody's load is evicted, or given up, because of those that wait behind it."""
    plan = ModelPlan(load_s=1, unload_s=0.2)
    async with running_cluster(*names, plan=plan, parameters=small_parameters(20)) as cluster:
        for number in range(200):
            await cluster["a"].register(f"m{number}")
        await anyio.sleep(5)
        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(cluster[names[number % len(names)]].invoke, f"m{number}")
        assert sum(each.runtime.loads_begun.total() for each in cluster.serving) == 200
        assert anyio.current_time() < 5 + 1.1 * 100
        counters = [each.node.statistics().counters for each in cluster.serving]
        assert sum(c.misses for c in counters) == 200
        assert sum(c.failures for c in counters) == 0
        await cluster.settle()
        cluster.check()

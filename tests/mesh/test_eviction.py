"""Eviction by cost in a whole instance: who goes, what that saves, and what others are told."""

from __future__ import annotations

import random

import anyio
import pytest

from mm.testing.cluster import running_cluster, small_parameters
from mm.testing.fake_runtime import MIB, ModelPlan
from tests.mesh.calls import FAST

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@pytest.mark.parametrize(("eviction", "victim"), [("lru", "m0"), ("cost", "m1")])
async def test_of_the_oldest_goes_which_loads_fastest(eviction: str, victim: str) -> None:
    async with running_cluster(
        "a",
        plan=ModelPlan(load_s=5, predicted_bytes=MIB),
        parameters=small_parameters(30),
        eviction=eviction,
    ) as cluster:
        a = cluster["a"]
        a.runtime.plan("m1", load_s=1)
        copies, number = a.node.parts.copies, 0
        while copies.table.used_units + 128 <= copies.table.capacity_units:
            await a.register(f"m{number}")
            await a.invoke(f"m{number}")
            await anyio.sleep(1)
            number += 1
        before = {copy.model_id for copy in copies}
        await a.register("new")
        await a.invoke("new")
        assert before - {copy.model_id for copy in copies} == {victim}
        await cluster.settle()
        cluster.check()


async def test_what_takes_long_to_load_is_loaded_less_often() -> None:
    """Every tenth of 60 models takes forty times as long to load; a third of all fits."""
    calls = random.Random(1).choices(range(60), k=300)
    loading_s = {}
    for eviction in ("lru", "cost"):
        async with running_cluster(
            "a",
            plan=ModelPlan(load_s=0.05, unload_s=0.02),
            parameters=small_parameters(25),
            eviction=eviction,
        ) as cluster:
            a = cluster["a"]
            for number in range(60):
                await a.register(f"m{number}")
                if number % 10 == 0:
                    a.runtime.plan(f"m{number}", load_s=2)
            for number in calls:
                await a.invoke(f"m{number}")
                await anyio.sleep(1)
            loading_s[eviction] = a.node.parts.counters.loading_s
            assert a.runtime.overcommitted_bytes_max == 0
            await cluster.settle()
            cluster.check()
    assert loading_s["cost"] < 0.85 * loading_s["lru"]


async def test_others_are_told_for_how_long_lru_would_keep_a_copy() -> None:
    async with running_cluster(
        "a", plan=FAST, parameters=small_parameters(30), eviction="cost"
    ) as cluster:
        a = cluster["a"]
        for number in range(40):
            a.runtime.plan(f"m{number}", load_s=1 + number % 7)
            await a.register(f"m{number}")
            await a.invoke(f"m{number}")
            await anyio.sleep(1)
        copies = a.node.parts.copies
        told_ms = copies.oldest_use_ms()
        last_uses_ms = [used_ms for _, _, used_ms in copies.table.cached()]
        assert min(last_uses_ms) < told_ms, "something older is kept for what its load costs"
        assert sum(used_ms >= told_ms for used_ms in last_uses_ms) > len(last_uses_ms) / 2
        cluster.check()

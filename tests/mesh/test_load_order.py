"""Guessed sizes, who goes first, and the churn guard."""

from __future__ import annotations

import logging
from dataclasses import replace

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.errors import ChurnError, LoadFailedError, NoRoomError
from mm.mesh.local_copy import Phase
from mm.testing.cluster import Instance, running_cluster, small_parameters
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, MIB, FakeRuntime, ModelPlan
from tests.mesh.calls import FAST, A, call_for

pytestmark = pytest.mark.anyio

UNITS = MIB // 8192


class Asked(FakeRuntime):
    """Notes how many predictions of sizes are asked of it."""

    count = 0
    at_once = 0
    at_once_max = 0

    async def predict_size(self, model_id: ModelId, info: ModelInfo) -> int:
        self.count += 1
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        try:
            return await super().predict_size(model_id, info)
        finally:
            self.at_once -= 1


async def call_all(instance: Instance, names: list[str]) -> None:
    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(instance.invoke, name)


@pytest.mark.virtual_time
async def test_a_crowd_of_loads_does_not_ask_the_runtime_all_at_once() -> None:
    plan = ModelPlan(load_s=1, predict_size_s=0.1, predicted_bytes=MIB)
    async with running_cluster(plan=plan) as cluster:
        runtime = Asked(DEFAULT_PARAMETERS, default_plan=plan)
        a = await cluster.start("a", runtime=runtime)
        names = [f"m{number}" for number in range(60)]
        for name in names:
            await a.register(name)
        await call_all(a, names)
        assert runtime.at_once_max <= 32 + 2, "those that came first, and those whose turn it is"
        assert runtime.count == 60
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_a_guess_is_mended_when_the_turn_comes() -> None:
    plan = ModelPlan(load_s=1, is_size_told=False, predicted_bytes=5 * MIB, size_bytes=5 * MIB)
    parameters = replace(small_parameters(300), loading_concurrency_max=1)
    async with running_cluster("a", plan=plan, parameters=parameters) as cluster:
        a, names = cluster["a"], [f"m{number}" for number in range(40)]
        for name in names:
            await a.register(name)
        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(a.invoke, name)
            await anyio.sleep(0.5)
            weights = [
                copy.weight_units for copy in a.node.parts.copies if copy.phase is Phase.QUEUED
            ]
            assert set(weights) == {UNITS, 5 * UNITS}, "the default, and as predicted"
            assert weights.count(UNITS) in (7, 8)
        await cluster.settle()
        assert {copy.weight_units for copy in a.node.parts.copies} == {5 * UNITS}
        assert a.runtime.overcommitted_bytes_max == 0
        cluster.check()


@pytest.mark.virtual_time
async def test_a_crowd_is_guessed_by_what_its_type_was() -> None:
    """Not by what is smaller than the default, once its turn comes: memory is at stake then."""
    plan = ModelPlan(load_s=0.1, size_bytes=2 * MIB)
    async with running_cluster("a", plan=plan, parameters=small_parameters(200)) as cluster:
        a = cluster["a"]
        for number in range(60):
            await a.register(f"m{number}")
        for number in range(10):
            await a.invoke(f"m{number}")
        async with anyio.create_task_group() as group:
            for number in range(10, 60):
                group.start_soon(a.invoke, f"m{number}")
            await anyio.sleep(0.05)
            weights = [
                copy.weight_units for copy in a.node.parts.copies if copy.phase is Phase.QUEUED
            ]
            assert set(weights) == {UNITS, 2 * UNITS}, "the default, and as before"
            assert 16 <= weights.count(2 * UNITS) <= 18
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_a_guess_too_large_to_be_true_is_the_runtimes_word() -> None:
    """One that was let in by a guess, and can never fit, fails alone."""
    plan = ModelPlan(load_s=1, predicted_bytes=MIB)
    parameters = replace(small_parameters(60), loading_concurrency_max=1)
    async with running_cluster("a", plan=plan, parameters=parameters) as cluster:
        a, names = cluster["a"], [f"m{number}" for number in range(41)]
        a.runtime.plan("m40", predicted_bytes=90 * MIB)
        for name in names:
            await a.register(name)
        async with anyio.create_task_group() as group:
            group.start_soon(call_all, a, names[:40])
            await anyio.sleep(0.1)
            with pytest.raises(LoadFailedError, match="Predicted size of 90"):
                await a.invoke("m40")
        assert a.runtime.loads_begun[ModelId("m40")] == 0
        await cluster.settle()
        assert a.runtime.loaded == set(map(ModelId, names[:40]))
        cluster.check()


async def test_the_size_told_by_another_copy_is_no_guess() -> None:
    async with running_cluster("a", "b", plan=replace(FAST, size_bytes=7 * MIB)) as cluster:
        await cluster["a"].register("m")
        assert (await cluster["a"].load_here("m")).status == "LOADED"
        await cluster.settle()
        b = cluster["b"]
        b.runtime.plan("m", load_s=0.05)
        async with anyio.create_task_group() as group:
            group.start_soon(b.load_here, "m")
            await b.runtime.wait_for(lambda: b.runtime.loads_at_once == 1)
            copy = b.node.parts.copies.get(ModelId("m"))
            assert copy is not None
            assert copy.weight_units == 7 * UNITS


@pytest.mark.virtual_time
async def test_measuring_holds_no_turn() -> None:
    parameters = replace(DEFAULT_PARAMETERS, loading_concurrency_max=1)
    plan = ModelPlan(load_s=1, is_size_told=False, model_size_s=20)
    async with running_cluster("a", plan=plan, parameters=parameters) as cluster:
        for name in "mn":
            await cluster["a"].register(name)
        with anyio.fail_after(2.1):
            await cluster["a"].invoke("m")
            await cluster["a"].invoke("n")
        await cluster.settle()
        cluster.check()


# --- the churn guard -----------------------------------------------------------------------------


async def fill(instance: Instance, count: int) -> None:
    for number in range(count):
        await instance.register(f"m{number}")
        await instance.invoke(f"m{number}")


@pytest.mark.virtual_time
async def test_who_asked_a_guarded_peer_hears_when_a_retry_makes_sense() -> None:
    async with running_cluster(
        "a", "b", plan=FAST, parameters=small_parameters(10), min_churn_age_ms=60_000
    ) as cluster:
        for name in ("b", "a"):
            for number in range(9):
                await cluster[name].register(f"{name}{number}")
                await cluster[name].load_here(f"{name}{number}")
            await anyio.sleep(20)
        await cluster["a"].register("new")
        await cluster.settle()
        for call in (call_for("new", excludes={A}), call_for("new")):
            with pytest.raises(NoRoomError) as caught:
                await cluster["a"].send(call)
            pause_ms = caught.value.retry_after_ms
            assert pause_ms is not None
            assert 15_000 < pause_ms <= 20_000, "b's guard, which lets go 20 s before that of a"
        with pytest.raises(NoRoomError) as caught:
            await cluster["a"].load("new")
        assert caught.value.retry_after_ms is not None
        assert 15_000 < caught.value.retry_after_ms <= 20_000


@pytest.mark.virtual_time
async def test_the_churn_guard_refuses_for_as_long_as_it_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_cluster(
        "a", plan=FAST, parameters=small_parameters(10), min_churn_age_ms=60_000
    ) as cluster:
        a = cluster["a"]
        await fill(a, 9)
        await a.register("new")
        started_s = anyio.current_time()
        with pytest.raises(ChurnError, match="Cache churn threshold exceeded") as caught:
            await a.invoke("new")
        pause_ms = caught.value.retry_after_ms
        assert pause_ms is not None
        assert 59_000 < pause_ms <= 60_000
        for _ in range(299):
            with pytest.raises(ChurnError):
                await a.invoke("new")
            await anyio.sleep(0.01)
        told = [each for each in caplog.records if "MM_MIN_CHURN_AGE_MS" in each.getMessage()]
        aloud = [each for each in told if each.levelno >= logging.INFO]
        assert len(aloud) <= 1 + anyio.current_time() - started_s
        assert a.node.parts.counters.loads_churned == 300
        record = cluster.record("new")
        assert record is not None
        assert record.failures == {}
        await anyio.sleep(pause_ms / 1000)
        assert await a.invoke("new") == "a"


@pytest.mark.parametrize("balanced", [True, False])
async def test_the_churn_guard_fails_no_call_that_another_instance_could_serve(
    balanced: bool,
) -> None:
    async with running_cluster("b", plan=FAST, parameters=small_parameters(10)) as cluster:
        a = await cluster.start("a", min_churn_age_ms=3_600_000)
        for number in range(9):
            await a.register(f"m{number}")
            await cluster.settle()
            assert (await a.load_here(f"m{number}")).status == "LOADED"
        for number in range(20):
            await a.register(f"new{number}")
            for instance in (a, cluster["b"]):
                call = call_for(f"new{number}", balanced=balanced)
                assert await instance.send(call) == "b"
        assert {f"m{number}" for number in range(9)} <= a.runtime.loaded


async def test_without_the_guard_churn_is_work() -> None:
    async with running_cluster("a", plan=FAST, parameters=small_parameters(10)) as cluster:
        await fill(cluster["a"], 30)
        assert cluster["a"].node.parts.counters.loads_churned == 0

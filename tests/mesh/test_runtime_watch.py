"""A runtime that goes and comes back, with the same memory or another (issue 9 part 8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anyio
import pytest

from mm.core.ids import UNIT_BYTES
from mm.errors import RuntimeUnavailableError
from mm.testing.cluster import Cluster, running_cluster, small_parameters, until
from tests.mesh.calls import FAST, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

MIB = 2**20


def restart(cluster: Cluster, name: str, **changes: Any) -> None:
    """Have a runtime come back that says something else of itself."""
    runtime = cluster[name].runtime
    runtime.parameters = replace(runtime.parameters, **changes)
    runtime.start()


def away(cluster: Cluster, name: str) -> bool:
    return cluster[name].node.parts.runtime_watch.is_away


async def loaded(cluster: Cluster, count: int, name: str = "a") -> None:
    for number in range(count):
        await cluster[name].register(f"m{number}")
        await cluster[name].load_here(f"m{number}")
    await cluster.settle()


async def test_what_a_runtime_had_leaves_the_records_and_is_loaded_elsewhere() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].runtime.stop()
        await until(lambda: away(cluster, "a"))
        assert len(cluster["a"].node.parts.copies) == 0
        await until(lambda: not cluster.records()["m"].copies, 2)
        assert await cluster["a"].invoke("m") == "b", "calls are passed on"
        assert cluster["a"].runtime.loads_begun["m"] == 1
        record = cluster.instance_record("a")
        assert record is not None
        await until(
            lambda: (found := cluster.instance_record("a")) is not None and found.loads_fail
        )
        await cluster["b"].register("n")
        assert await cluster["b"].invoke("n") == "b", "nobody has it load"
        assert cluster["a"].node.statistics().runtime_away
        cluster["a"].runtime.start()
        await until(lambda: not away(cluster, "a"))
        await until(
            lambda: (found := cluster.instance_record("a")) is not None and not found.loads_fail
        )
        assert (await cluster["a"].load_here("m")).status == "LOADED"
        await cluster.settle()
        cluster.check()
        assert cluster["a"].node.statistics().counters.runtime_losses == 1


async def test_without_another_instance_calls_fail_at_once_until_it_is_back() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].runtime.stop()
        await until(lambda: away(cluster, "a"))
        begun_s = anyio.current_time()
        with pytest.raises(RuntimeUnavailableError):
            await cluster["a"].invoke("m")
        assert anyio.current_time() - begun_s < 1
        cluster["a"].runtime.start()
        await until(lambda: not away(cluster, "a"))
        assert await cluster["a"].invoke("m") == "a"
        await cluster.settle()
        cluster.check()


async def test_a_larger_runtime_is_filled() -> None:
    small = small_parameters(12)
    async with running_cluster("a", plan=FAST, parameters=small) as cluster:
        await loaded(cluster, 20)
        assert len(cluster["a"].node.parts.copies) < 12
        cluster["a"].runtime.stop()
        restart(cluster, "a", capacity_bytes=64 * MIB)
        cluster["a"].runtime.stop()
        await until(lambda: away(cluster, "a"))
        cluster["a"].runtime.start()
        await until(lambda: not away(cluster, "a"))
        await loaded(cluster, 20)
        assert len(cluster["a"].node.parts.copies) == 20
        capacity = cluster["a"].node.parts.accounting.capacity_units
        assert capacity == 64 * MIB // UNIT_BYTES
        await until(
            lambda: (
                (found := cluster.instance_record("a")) is not None
                and found.capacity_units + found.used_units > 0
                and found.capacity_units > 12 * MIB // UNIT_BYTES
            )
        )
        cluster.check()


async def test_a_smaller_runtime_is_never_overrun(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", plan=FAST, parameters=small_parameters(64)) as cluster:
        await loaded(cluster, 20)
        runtime = cluster["a"].runtime
        runtime.stop()
        await until(lambda: away(cluster, "a"))
        restart(cluster, "a", capacity_bytes=12 * MIB, loading_concurrency_max=4)
        await until(lambda: not away(cluster, "a"))
        assert "capacity_bytes 67108864 -> 12582912" in caplog.text
        assert "goes by that until it is restarted: loading_concurrency_max 2 -> 4" in caplog.text
        await loaded(cluster, 20)
        assert 0 < len(cluster["a"].node.parts.copies) < 12
        assert not runtime.violations
        assert runtime.overcommitted_bytes_max <= 0
        cluster.check()


async def test_loads_that_wait_survive_a_smaller_runtime_as_far_as_they_fit() -> None:
    """Queued when the runtime goes: their turn finds it gone, or back and smaller."""
    async with running_cluster("a", plan=FAST, parameters=small_parameters(64)) as cluster:
        a = cluster["a"]
        for number in range(20):
            a.runtime.plan(f"m{number}", load_s=1.0)
            await a.register(f"m{number}")
        answers: list[str] = []

        async def call(number: int) -> None:
            try:
                answers.append(await a.invoke(f"m{number}"))
            except RuntimeUnavailableError:
                answers.append("unavailable")

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(call, number)
            await until(lambda: a.runtime.loads_at_once == 2)
            a.runtime.stop()
            await until(lambda: away(cluster, "a"))
            restart(cluster, "a", capacity_bytes=12 * MIB)
        assert len(answers) == 20
        await cluster.settle()
        assert not a.runtime.violations
        cluster.check()


async def test_a_runtime_that_says_nonsense_is_not_back(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].runtime.stop()
        await until(lambda: away(cluster, "a"))
        restart(cluster, "a", capacity_bytes=5)
        await anyio.sleep(60)
        assert away(cluster, "a")
        assert await cluster["a"].invoke("m") == "b"
        restart(cluster, "a", capacity_bytes=64 * MIB)
        await until(lambda: not away(cluster, "a"))
        assert "the model runtime is back" in caplog.text

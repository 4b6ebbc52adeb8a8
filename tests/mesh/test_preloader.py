"""Copies that nobody waits for: where they go, what they must not displace, who is asked."""

from __future__ import annotations

from functools import partial
from typing import Final

import anyio
import pytest

from mm.core.ids import InstanceId, ModelId
from mm.mesh.preloader import PreloadReason
from mm.testing.cluster import Cluster, running_cluster, small_parameters, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST, A, B, C, M, loaded_at, loads

pytestmark = pytest.mark.anyio

#: Of a model.
UNITS: Final = 128


async def request(
    cluster: Cluster,
    name: str = "a",
    *,
    model_id: ModelId = M,
    used_ms_ago: int = 0,
    exclude: frozenset[InstanceId] = frozenset(),
    reason: PreloadReason = PreloadReason.SCALE_UP,
) -> InstanceId | None:
    instance = cluster[name]
    return await instance.node.parts.preloader.request(
        model_id,
        last_used_ms=instance.clock.now_ms() - used_ms_ago,
        exclude=exclude,
        reason=reason,
    )


def holders(cluster: Cluster, model_id: str = "m") -> set[InstanceId]:
    record = cluster.record(model_id)
    return set(record.copies) if record is not None else set()


async def test_a_further_copy_goes_where_there_is_none() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        first = await request(cluster)
        assert first in (B, C)
        await cluster.settle()
        assert holders(cluster) == {A, first}
        second = await request(cluster)
        await cluster.settle()
        assert {A, first, second} == {A, B, C} == holders(cluster)
        assert await request(cluster) is None, "everybody has it"
        counters = cluster["a"].node.parts.counters
        assert (counters.preloads, counters.preloads_refused) == (2, 1)
        assert loads(cluster) == 3
        cluster.check()


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("reason", "expected"), [(PreloadReason.ROOM, None), (PreloadReason.SCALE_UP, C)]
)
async def test_one_that_somebody_else_began_unseen_will_do(
    reason: PreloadReason, expected: InstanceId | None
) -> None:
    """If it is for want of any; leaving somebody out says nothing of what he has."""
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].store._watch_delay_s = 5.0
        assert (await cluster["b"].load_here("m")).status == "LOADED"
        exclude = frozenset({A, B})
        assert await request(cluster, exclude=exclude, reason=reason) == expected
        await cluster.settle()
        assert loads(cluster) == (1 if expected is None else 2)


async def test_it_does_not_wait_for_the_load() -> None:
    async with running_cluster("a", "b", plan=ModelPlan(load_s=1000)) as cluster:
        await cluster["a"].register("m")
        with anyio.fail_after(10):
            assert await request(cluster) in (A, B)
        assert len(holders(cluster)) == 1


async def test_it_loads_here_unless_excluded() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        assert await request(cluster, exclude=frozenset({B})) == A
        await cluster.settle()
        await cluster["a"].register("n")
        assert await request(cluster, model_id=ModelId("n"), exclude=frozenset({A})) == B
        assert await request(cluster, model_id=ModelId("unknown")) is None


@pytest.mark.virtual_time
async def test_it_displaces_nothing_that_was_used_later() -> None:
    parameters = small_parameters(10)
    async with running_cluster("a", "b", plan=FAST, parameters=parameters) as cluster:
        for name in ("a", "b"):
            number = 0
            while cluster[name].node.parts.accounting.free_units >= UNITS:
                await loaded_at(cluster, name, model_id=f"{name}{number}")
                number += 1
        await anyio.sleep(100)
        await cluster["a"].register("m")
        before = loads(cluster)
        assert await request(cluster, used_ms_ago=200_000) is None
        await cluster.settle()
        assert loads(cluster) == before, "nobody was troubled"
        assert await request(cluster, used_ms_ago=50_000) in (A, B)
        await cluster.settle()
        assert len(holders(cluster)) == 1


@pytest.mark.virtual_time
async def test_many_at_once_get_what_room_there_is() -> None:
    """Each is asked for while there seems to be room for it."""
    parameters = small_parameters(10)
    plan = ModelPlan(load_s=5)
    async with running_cluster("a", plan=plan, parameters=parameters) as cluster:
        places = cluster["a"].node.parts.accounting.free_units // UNITS
        names = [f"m{number}" for number in range(places + 2)]
        for name in names:
            await cluster["a"].register(name)
        async with anyio.create_task_group() as group:
            for number, name in enumerate(names):
                ago_ms = 3_600_000 + 1000 * number
                ask = partial(request, cluster, model_id=ModelId(name), used_ms_ago=ago_ms)
                group.start_soon(ask)
        await cluster.settle()
        counts = [len(holders(cluster, name)) for name in names]
        assert sum(counts) == places, "every place is taken"
        cluster.check()


async def test_an_instance_that_is_gone_costs_one_try() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster.network.close(cluster["b"].address)
        assert await request(cluster) == C
        await until(lambda: holders(cluster) == {A, C})


@pytest.mark.virtual_time
async def test_few_are_asked_at_a_time() -> None:
    async with running_cluster("a", "b", plan=FAST, preloads_asked_at_once_max=2) as cluster:
        for number in range(6):
            await cluster["a"].register(f"m{number}")
        cluster.network.cut(cluster["a"].address, cluster["b"].address)
        exclude = frozenset({A})
        async with anyio.create_task_group() as group:
            for number in range(6):
                model_id = ModelId(f"m{number}")
                group.start_soon(partial(request, cluster, model_id=model_id, exclude=exclude))
            await anyio.sleep(0.1)
            assert len(cluster["a"].node.parts.cluster._sent) == 2
            cluster.network.heal()
        await cluster.settle()
        assert cluster["a"].node.parts.counters.preloads == 6

"""Loads before anybody calls: into new room, in place of what a crash took, and never too many."""

from __future__ import annotations

import anyio
import pytest

from mm.core.ids import ModelId
from mm.edge.memory_store import Fault
from mm.testing.cluster import Cluster, running_cluster, small_parameters, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST, loaded_at, loads

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

UNITS = 128
PARAMETERS = small_parameters(20, loading_concurrency_max=4)


async def overfill(cluster: Cluster, name: str, more: int) -> list[str]:
    """Load so many more models than fit, a second apart; answers all, the last used last."""
    models = []
    left = more
    while left:
        left -= cluster[name].node.parts.accounting.free_units < UNITS
        model_id = f"m{len(models):02}"
        await loaded_at(cluster, name, model_id=model_id)
        models.append(model_id)
        await anyio.sleep(1)
    return models


def idle(cluster: Cluster) -> set[str]:
    return {model_id for model_id, record in cluster.records().items() if not record.copies}


async def test_an_instance_that_comes_gets_what_was_used_last_of_what_had_to_go() -> None:
    async with running_cluster("a", plan=FAST, parameters=PARAMETERS) as cluster:
        models = await overfill(cluster, "a", 4)
        assert idle(cluster) == set(models[:4])
        await cluster.start("b")
        await anyio.sleep(15)
        assert idle(cluster) == set()
        assert cluster["b"].runtime.loaded == set(models[:4])
        assert loads(cluster) == len(models) + 4
        await anyio.sleep(2000)
        assert loads(cluster) == len(models) + 4, "and that was it"
        cluster.check()


async def test_models_that_nobody_ever_called_are_left_alone() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        for number in range(10):
            await cluster["a"].register(f"m{number}")
        await cluster.start("b")
        await anyio.sleep(1000)
        assert loads(cluster) == 0


async def test_part_of_the_room_stays_free() -> None:
    async with running_cluster("a", plan=FAST, parameters=PARAMETERS) as cluster:
        models = await overfill(cluster, "a", 30)
        await cluster.start("b")
        await anyio.sleep(200)
        b = cluster["b"].node.own_record()
        assert 0 < b.remaining_units < b.capacity_units / 4
        assert cluster["b"].runtime.loaded <= set(models[:30])
        newest = sorted(cluster["b"].runtime.loaded)[-1]
        assert newest == models[29], "those used last come first"


async def test_memory_that_comes_free_is_used() -> None:
    async with running_cluster("a", plan=FAST, parameters=PARAMETERS) as cluster:
        models = await overfill(cluster, "a", 5)
        await anyio.sleep(120)
        assert idle(cluster) == set(models[:5])
        for model_id in models[-8:]:
            await cluster["a"].node.models.unregister(ModelId(model_id))
        await until(lambda: not idle(cluster), 10, "they come back")
        assert loads(cluster) == len(models) + 5


@pytest.mark.parametrize("crashes", ["a", "c"])  # the leader is one of them
async def test_what_only_a_crashed_instance_had_is_loaded_again(crashes: str) -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for number in range(6):
            await loaded_at(cluster, crashes, model_id=f"m{number}")
        await loaded_at(cluster, crashes, "b", model_id="both")
        before = loads(cluster)
        await cluster[crashes].crash()
        await anyio.sleep(20 + 1)
        assert loads(cluster) == before, "it may come back"
        await anyio.sleep(20)
        for number in range(6):
            record = cluster.record(f"m{number}")
            assert record is not None
            assert len(record.copies.keys() - {crashes}) == 1
        assert loads(cluster) == before - 0 + 6
        await anyio.sleep(1500)
        assert loads(cluster) == before + 6, "none twice"
        cluster.check()


@pytest.mark.parametrize(
    "back", [(("a", 5), ("bc", 30), ("d", 30)), (("ab", 30), ("cd", 30)), (("a", 5), ("b", 30))]
)
async def test_nothing_is_loaded_for_those_who_come_back_last_after_an_outage(
    back: tuple[tuple[str, float], ...],
) -> None:
    """Half of them, too: a leader that was elected meanwhile had counted before."""
    async with running_cluster("a", "b", "c", "d", plan=FAST) as cluster:
        for name in "abcd":
            await loaded_at(cluster, name, model_id=f"of-{name}")
        await anyio.sleep(30)
        for each in cluster.serving:
            each.store.set_fault(Fault.REFUSED)
        await anyio.sleep(60)
        for names, wait_s in back:
            for name in names:
                cluster[name].store.set_fault(None)
            await anyio.sleep(wait_s)
        assert loads(cluster) == 4
        cluster.check()


async def test_half_of_the_slots_stay_free_for_who_is_called() -> None:
    plan = ModelPlan(load_s=20)
    async with running_cluster("a", plan=plan, parameters=PARAMETERS) as cluster:
        await overfill(cluster, "a", 8)
        await cluster.start("b")
        most = 0
        for _ in range(60):
            await anyio.sleep(0.5)
            most = max(most, cluster["b"].node.parts.copies.loads_in_progress)
        assert most == 2


async def test_who_comes_and_goes_is_filled_a_few_times_only() -> None:
    async with running_cluster("a", plan=FAST, parameters=PARAMETERS) as cluster:
        await overfill(cluster, "a", 5)
        count = 0
        for _ in range(60):
            b = await cluster.start("b")
            await anyio.sleep(30)
            await b.stop()
            count += b.runtime.loads_begun.total()
            await anyio.sleep(30)
        assert 5 <= count <= 5 * 12

"""Our entries in the records are kept true, and spare copies given up only if another is there."""

from __future__ import annotations

import anyio
import pytest

from mm.core.ids import ModelId
from mm.edge.memory_store import Fault
from mm.mesh.ports import Write
from mm.testing.cluster import PREFIX, Cluster, running_cluster
from tests.mesh.calls import FAST, A, B, M, loaded_at

pytestmark = pytest.mark.anyio

HOUR_S = 3600


async def give_up(cluster: Cluster, name: str, model_id: ModelId = M) -> bool:
    return await cluster[name].node.parts.janitor.give_up(model_id)


def holders(cluster: Cluster) -> set[str]:
    record = cluster.record("m")
    assert record is not None
    return set(record.copies)


# --- giving up ---


async def test_a_copy_is_given_up_if_another_is_ready() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        assert await give_up(cluster, "a")
        await cluster.settle()
        assert holders(cluster) == {B}
        assert cluster["a"].runtime.loaded == set()
        assert await cluster["a"].invoke("m") == B
        assert not await give_up(cluster, "a"), "there is none"
        assert not await give_up(cluster, "b"), "it is the last"
        cluster.check()


async def test_of_two_that_give_up_at_a_time_one_keeps_its_copy() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        done = []

        async def leave(name: str) -> None:
            done.append(await give_up(cluster, name))

        async with anyio.create_task_group() as group:
            group.start_soon(leave, "a")
            group.start_soon(leave, "b")
        await cluster.settle()
        assert sorted(done) == [False, True]
        assert len(holders(cluster)) == 1
        cluster.check()


async def test_what_the_other_instance_does_not_confirm_is_kept() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        cluster.network.close(cluster["b"].address)
        assert not await give_up(cluster, "a")
        assert holders(cluster) == {A, B}
        cluster.check()


@pytest.mark.virtual_time
async def test_without_the_store_nothing_is_given_up() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        cluster["a"].store.set_fault(Fault.REPLIES_LOST)
        assert not await give_up(cluster, "a"), "nobody knows"
        assert await cluster["a"].invoke("m") == A
        cluster["a"].store.set_fault(None)
        await cluster.settle()
        assert holders(cluster) == {A, B}, "the write had come through, and is taken back"
        cluster.check()


# --- repairs ---


@pytest.mark.virtual_time
async def test_a_full_check_repairs_what_no_event_told_of() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await loaded_at(cluster, "a")
        record = cluster.record("m")
        assert record is not None
        # Each is wrong in our own view only, or in the store, with no event to tell.
        ghost = record.with_copy(A, 1, 1)
        parts = a.node.parts
        parts.registry._listeners.clear()
        cluster.server.transact([Write(f"{PREFIX}/registry/g", ghost.encode(), if_revision=0)])
        without = record.without_copy(A, 1)
        cluster.server.transact([Write(f"{PREFIX}/registry/m", without.encode(), if_revision=None)])
        await anyio.sleep(1)
        assert holders(cluster) == set()
        await anyio.sleep(a.config.janitor_interval_s + 1)
        assert holders(cluster) == {A}
        found = cluster.record("g")
        assert found is not None
        assert not found.copies


@pytest.mark.virtual_time
async def test_a_last_use_is_told_before_it_is_a_quarter_of_a_day_old() -> None:
    async with running_cluster("a", "b", plan=FAST, demand_interval_s=60.0) as cluster:
        await loaded_at(cluster, "a")
        revision = cluster.server.revision
        for _ in range(10):
            await anyio.sleep(HOUR_S)
            await cluster["a"].invoke("m")
        record = cluster.record("m")
        assert record is not None
        assert cluster["a"].clock.now_ms() - record.last_used_ms < 7.2 * HOUR_S * 1000
        item = cluster.server.get(f"{PREFIX}/registry/m")
        assert item is not None
        assert revision < item.mod_revision
        assert item.mod_revision - revision < 40, "seldom"


@pytest.mark.virtual_time
async def test_last_uses_that_are_late_are_told_many_at_a_time() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a, models = cluster["a"], [f"m{number:02}" for number in range(32)]
        for model_id in models:
            await loaded_at(cluster, "a", model_id=model_id)
        before = cluster.records()
        a.node.parts.janitor._last_use_lag_ms = 1000
        await anyio.sleep(5)
        for model_id in models:
            await a.invoke(model_id)
        cluster.store_delay_s = 0.5
        began_s = anyio.current_time()
        await a.node.parts.janitor.check()
        assert anyio.current_time() - began_s < 5
        cluster.store_delay_s = 0.0
        told = {model_id: record.last_used_ms for model_id, record in cluster.records().items()}
        assert all(told[each] >= record.last_used_ms + 1000 for each, record in before.items())

"""A forced switch whose end nobody saw has its target loaded all the same."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.vmodel_changes import SetVModel
from mm.edge.memory_store import Fault
from mm.errors import StoreUnavailableError
from mm.mesh import doubtful_sets
from mm.testing.cluster import INFO, Cluster, Instance, running_cluster, until
from tests.mesh.calls import FAST

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def force(instance: Instance, target: str, vmodel_id: str = "v") -> None:
    request = SetVModel(vmodel_id, ModelId(target), info=INFO, force=True)
    await instance.node.vmodels.set(request)


async def served_by_m(cluster: Cluster, *vmodel_ids: str) -> Instance:
    instance = cluster.serving[0]
    for vmodel_id in vmodel_ids:
        await force(instance, "m", vmodel_id)
    await instance.load("m")
    await anyio.sleep(600)  # a new instance is filled with what was used of late
    await cluster.settle()
    return instance


def has_copies(cluster: Cluster, model_id: str) -> bool:
    record = cluster.record(model_id)
    return record is not None and bool(record.copies)


async def test_the_answer_of_the_store_is_lost() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = await served_by_m(cluster, "v")
        a.store.set_fault(Fault.REPLIES_LOST)
        with pytest.raises(StoreUnavailableError):
            await force(a, "n")
        a.store.set_fault(None)
        await until(lambda: has_copies(cluster, "n"))
        assert not a.node.vmodels._doubtful_sets


async def test_the_set_did_not_come_about() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a = await served_by_m(cluster, "v")
        a.store.set_fault(Fault.SILENT)
        with pytest.raises(StoreUnavailableError):
            await force(a, "n")
        a.store.set_fault(None)
        await force(cluster["b"], "other")
        await until(lambda: has_copies(cluster, "other"))
        await cluster.settle()
        assert cluster.record("n") is None
        assert not a.node.vmodels._doubtful_sets


async def test_whoever_asked_left_before_the_answer() -> None:
    """Method: leave after each quarter of a second of sets whose calls of the store take one."""
    names = [f"v{number}" for number in range(16)]
    async with running_cluster("a", plan=FAST) as cluster:
        a = await served_by_m(cluster, *names)
        a.store._call_delay_s = 1.0
        left = {}
        for number, name in enumerate(names):
            with anyio.move_on_after(0.25 * (number + 1)) as scope:
                await force(a, f"n{number}", name)
            if scope.cancelled_caught:
                left[name] = f"n{number}"
        a.store._call_delay_s = 0.0
        await cluster.settle()
        statuses = {name: await a.node.vmodels.status(name) for name in left}
        made = [target for name, target in left.items() if statuses[name].active_model_id == target]
        assert made
        for target in made:
            await until(partial(has_copies, cluster, target), 1.0)


async def test_whoever_made_it_for_others_left() -> None:
    """Those who leave one model are changed together, by the first of them."""
    async with running_cluster("a", plan=FAST) as cluster:
        a = await served_by_m(cluster, "u", "v", "w", "x")
        a.store._call_delay_s = 1.0
        async with anyio.create_task_group() as group:
            group.start_soon(force, a, "n1", "u")
            await anyio.sleep(0.1)
            with anyio.move_on_after(1.7):
                async with anyio.create_task_group() as hasty:
                    hasty.start_soon(force, a, "n2", "v")
                    await anyio.sleep(0.1)
                    group.start_soon(force, a, "n3", "w")
        a.store._call_delay_s = 0.0
        await until(lambda: has_copies(cluster, "n3"), 1.0)


async def test_doubts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubtful_sets, "DOUBTS_MAX", 2)
    names = ("u", "v", "w")
    async with running_cluster("a", plan=FAST) as cluster:
        a = await served_by_m(cluster, *names)
        a.store.set_fault(Fault.SILENT)
        for name in names:
            with pytest.raises(StoreUnavailableError):
                await force(a, "n", name)
        assert len(a.node.vmodels._doubtful_sets) == 2
        a.store.set_fault(None)
        for name in names:
            await force(a, "m2", name)
        assert not a.node.vmodels._doubtful_sets

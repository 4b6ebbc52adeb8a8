"""Waits for switches: what ends them, how many there may be, and who goes on when."""

from __future__ import annotations

from dataclasses import replace

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskGroup

from mm.core.ids import ModelId
from mm.core.records import VModelRecord
from mm.edge.memory_store import MemoryStore
from mm.errors import LimitError
from mm.limits import Limits
from mm.mesh.ports import Item
from mm.mesh.statistics import Counters
from mm.mesh.switch_waits import SwitchWaits
from mm.mesh.vmodels import VModels
from mm.testing.cluster import Instance, running_cluster
from tests.mesh.test_transitions import served, set_vmodel

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

M, N, OTHER = ModelId("m"), ModelId("n"), ModelId("o")
ON_ITS_WAY = VModelRecord(M, N)


class _World:
    def __init__(self, waiting_max: int = 1000) -> None:
        limits = replace(Limits(), vmodel_switches_waited_for_max=waiting_max)
        self.vmodels = VModels(MemoryStore(), "/v/", limits)
        self.counters = Counters()
        self.waits = SwitchWaits(self.vmodels, limits, self.counters)
        self.answers: list[VModelRecord | None] = []
        self._revision = 0
        self.put(ON_ITS_WAY)

    def put(self, record: VModelRecord) -> None:
        self._revision += 1
        self.vmodels.mirror.written(Item("/v/v", record.encode(), self._revision))

    def delete(self) -> None:
        self.vmodels.mirror.deleted_by_us("v", self._revision)

    async def wait(self, target_id: ModelId = N) -> None:
        self.answers.append(await self.waits.wait("v", target_id))

    async def begin(self, group: TaskGroup, count: int) -> None:
        for _ in range(count):
            group.start_soon(self.wait)
        await anyio.wait_all_tasks_blocked()


@pytest.mark.parametrize(
    "left",
    [
        VModelRecord(N, N),
        VModelRecord(M, N, failed=True),
        VModelRecord(M, OTHER),
        VModelRecord(M, M),
    ],
)
async def test_what_ends_a_wait(left: VModelRecord) -> None:
    world = _World()
    async with anyio.create_task_group() as group:
        await world.begin(group, 3)
        world.put(replace(ON_ITS_WAY, owner="somebody"))
        await anyio.wait_all_tasks_blocked()
        assert not world.answers
        world.put(left)
        world.put(ON_ITS_WAY)  # before they had their turn
    assert world.answers == [left] * 3
    assert not world.waits._waits


async def test_so_does_the_end_of_the_vmodel() -> None:
    world = _World()
    async with anyio.create_task_group() as group:
        await world.begin(group, 3)
        world.delete()
    assert world.answers == [None] * 3
    await world.wait()
    assert world.answers == [None] * 4


async def test_whoever_leaves_leaves_nothing() -> None:
    world = _World()
    async with anyio.create_task_group() as group:
        await world.begin(group, 3)
        group.cancel_scope.cancel()
    assert not world.waits._waits
    assert not world.waits._count


async def test_a_change_that_ends_no_wait_wakes_nobody() -> None:
    world = _World()
    async with anyio.create_task_group() as group:
        await world.begin(group, 1000)
        woken = world.waits._waits["v"][N]._waiting
        for number in range(10):
            world.put(replace(ON_ITS_WAY, owner=f"o{number}"))
        assert len(woken) == 1000
        assert not any(event.is_set() for event in woken)
        world.put(VModelRecord(N, N))
    assert len(world.answers) == 1000


async def test_they_go_on_a_few_at_a_time() -> None:
    world = _World()
    most = 0
    async with anyio.create_task_group() as group:
        await world.begin(group, 100)
        world.put(VModelRecord(N, N))
        while len(world.answers) < 100:
            before = len(world.answers)
            await anyio.lowlevel.checkpoint()
            most = max(most, len(world.answers) - before)
    assert most <= 6, "two of a turn, each of whom lets one go"


async def _set_and_wait(instance: Instance) -> None:
    await set_vmodel(instance, "n", sync=True)


async def test_there_is_a_bound_and_it_is_told_before_anything_is_set() -> None:
    async with running_cluster("a", vmodel_switches_waited_for_max=1) as cluster:
        a = cluster["a"]
        await served(cluster, 1)
        a.runtime.plan("n", load_s=10.0)
        async with anyio.create_task_group() as group:
            group.start_soon(_set_and_wait, a)
            await anyio.sleep(1)
            with pytest.raises(LimitError, match="1 calls wait for vmodels to switch already"):
                await set_vmodel(a, "n", "w", sync=True)
            assert a.node.parts.vmodels.get("w") is None
            assert a.node.parts.counters.vmodel_waits_refused == 1
            await set_vmodel(a, "n", "w")
        assert (await set_vmodel(a, "n", sync=True)).status == "DEFINED"

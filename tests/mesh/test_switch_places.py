"""The leader's switches stand in no line of clients, however these stand."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest
from anyio.abc import TaskGroup

from mm.config import Config
from mm.edge.memory_store import MemoryStore
from mm.testing.cluster import Cluster, Instance, running_cluster, until
from tests.mesh.calls import FAST
from tests.mesh.test_transitions import leader, pair, served, set_vmodel

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_a_switch_that_waits_for_its_vmodel_takes_no_place() -> None:
    async with running_cluster("a", "b", vmodel_switches_at_once_max=1) as cluster:
        await served(cluster, 2, "v")
        await served(cluster, 2, "w")
        # Clients are at "v", and will be for long.
        async with leader(cluster).node.vmodels.writer.locks.hold("v"):
            other = next(each for each in cluster.serving if each is not leader(cluster))
            await set_vmodel(other, "n", "v")
            await cluster.settle()
            await set_vmodel(other, "n", "w")
            await until(lambda: pair(cluster, "w")[0] == "n", 30.0)
            assert pair(cluster, "v")[0] == "m"
        await until(lambda: pair(cluster, "v")[0] == "n", 30.0)


class _SlowStore(MemoryStore):
    """Takes long for questions that clients ask: those about "asked"."""

    async def revisions(self, keys: Sequence[str]) -> Sequence[int]:
        if any(key.endswith("/vmodels/asked") for key in keys):
            await anyio.sleep(1000)
        return await super().revisions(keys)


class _SlowCluster(Cluster):
    def make_store(self, config: Config) -> MemoryStore:
        return _SlowStore(self.server)


async def test_questions_of_clients_are_not_in_the_way_of_a_switch() -> None:
    async with anyio.create_task_group() as group:
        cluster = _SlowCluster(group, plan=FAST, vmodel_status_wait_s=2000.0)
        a = await cluster.start("a")
        await served(cluster, 1)
        await set_vmodel(a, "m", "asked")
        await set_vmodel(a, "n")
        _ask(group, a)
        await until(lambda: pair(cluster)[0] == "n", 30.0)
        group.cancel_scope.cancel()


def _ask(group: TaskGroup, instance: Instance) -> None:
    for _ in range(10):
        group.start_soon(instance.node.vmodels.status, "asked")

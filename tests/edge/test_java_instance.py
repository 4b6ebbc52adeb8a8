"""Beside an instance of the Java mesh on a real etcd: leases, revisions and watches as they are
(spec core 1.4, 1.5, 1.8; issue 9 part 9). The long run of it is in ``tests.mesh``.
"""

from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from mm.core.ids import ModelId
from mm.core.vmodel_changes import SetVModel
from mm.edge.etcd_process import EtcdProcess
from mm.mesh.ports import Write
from mm.testing.cluster import PREFIX, until
from mm.testing.instance import INFO
from tests.edge.vmodel_nodes import PATIENCE_S, EtcdCluster, running_nodes
from tests.mesh.java_instance import JavaInstance

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]


async def attributes(cluster: EtcdCluster, key: str) -> dict[str, Any]:
    item = await cluster.observer.get(f"{PREFIX}/{key}")
    assert item is not None, key
    found = json.loads(item.value)
    assert isinstance(found, dict)
    return found


async def test_one_leader_one_table_and_records_that_come_back(shared_etcd: EtcdProcess) -> None:
    """Java leads, switches, and goes; ours, whose record is deleted meanwhile, leads then."""
    async with running_nodes(shared_etcd, "a") as cluster, anyio.create_task_group() as group:
        a = cluster["a"]
        leader = a.node.services.leader
        await until(lambda: leader.is_leader, PATIENCE_S)
        java = JavaInstance(cluster.observer, "j", PREFIX, a.clock.now_ms)
        await group.start(java.run)
        await until(lambda: java.leader == "a", PATIENCE_S)
        # Whoever stands anew stands behind.
        await cluster.observer.write(Write(f"{PREFIX}/leaderLatch/_a", None, None))
        await until(lambda: java.leads and leader.leader_id == "j", PATIENCE_S)
        for model_id in ("m", "n"):
            request = SetVModel("v", ModelId(model_id), info=INFO, auto_delete=True, load_now=True)
            assert (await a.node.vmodels.set(request, sync=True)).status == "DEFINED"
            await a.invoke_vmodel("v")
        assert java.switched == ["v"]
        assert (await attributes(cluster, "vmodels/v"))["amid"] == "n"
        # What of "m" is left went with its last reference; of "n" both sides have a copy.
        await until(lambda: a.node.parts.registry.get(ModelId("m")) is None, PATIENCE_S)
        assert await java.load("n")
        await java.touch("n")
        record = await attributes(cluster, "registry/n")
        assert record["instanceIds"].keys() == {"a", "j"}
        assert record["copies"].keys() == {"a"}

        before = await cluster.observer.get(f"{PREFIX}/instances/a")
        assert before is not None
        await cluster.observer.write(Write(f"{PREFIX}/instances/a", None, None))
        with anyio.fail_after(PATIENCE_S):
            while (item := await cluster.observer.get(f"{PREFIX}/instances/a")) is None:
                await anyio.lowlevel.checkpoint()
        assert item.lease_id == before.lease_id != 0

        java.stop()
        await until(lambda: leader.is_leader, PATIENCE_S)
        record = await attributes(cluster, "registry/n")
        assert record["instanceIds"].keys() == {"a"}
        names = [item.key for item in (await cluster.observer.list(f"{PREFIX}/instances/")).items]
        assert names == [f"{PREFIX}/instances/a"]

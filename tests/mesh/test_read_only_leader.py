"""A leader that may not write works on no transition: it would load what cannot take over."""

from __future__ import annotations

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.testing.cluster import INFO, running_cluster
from tests.mesh.calls import FAST
from tests.mesh.test_transitions import leader, put

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_it_loads_no_target() -> None:
    async with running_cluster(plan=FAST) as cluster:
        for model_id in ("m", "n"):
            put(cluster, "registry", model_id, ModelRecord(INFO, references=1).encode())
        put(cluster, "vmodels", "v", VModelRecord(ModelId("m"), ModelId("n")).encode())
        a = await cluster.start("a", kv_read_only=True)
        await a.load("m")
        await anyio.sleep(300)
        assert leader(cluster) is a
        assert a.node.statistics().transitions == 1
        assert not a.runtime.loads_begun["n"]
        assert await a.invoke_vmodel("v") == "m"

"""What an upgrade needs of the instances: versions, readiness, and a version that loads nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import anyio
import pytest

from mm.core.ids import InstanceId
from mm.core.placement import PlacementRequest, choose_instance
from mm.core.records import InstanceRecord
from mm.mesh.node import Node
from mm.mesh.ports import Write
from mm.testing.cluster import PREFIX, running_cluster, small_parameters, until
from tests.mesh.calls import FAST, M

pytestmark = pytest.mark.anyio


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_loads_go_to_the_newest_version_until_it_would_throw_out_what_is_in_use() -> None:
    async with running_cluster(plan=FAST, parameters=small_parameters(12)) as cluster:
        await cluster.start("old", version=1)
        await cluster.start("new", version=2)
        record = cluster.instance_record("new")
        assert record is not None
        assert record.version == 2
        for number in range(16):
            await cluster["old"].register(f"m{number}")
            await cluster["old"].invoke(f"m{number}")
            await anyio.sleep(3)  # a publication
        by_new = set(map(int, (m.removeprefix("m") for m in cluster["new"].runtime.loads_begun)))
        full = len(by_new)
        assert 8 <= full < 16
        assert by_new == set(range(full)), "the first ones, while it had room"
        # In a quarter of an hour what it has is no longer in use.
        await anyio.sleep(900)
        await cluster["old"].register("later")
        assert await cluster["old"].invoke("later") == "new"


async def test_an_instance_of_java_that_says_its_version_is_older_or_newer_alike() -> None:
    async with running_cluster(plan=FAST) as cluster:
        await cluster.start("a", version=1_775_001_600_000)
        java = InstanceRecord(
            start_time_ms=1,
            version=1_664_582_400_000,
            capacity_units=10**6,
            loading_threads=2,
            address="java:8080",
        )
        cluster.server.transact([Write(f"{PREFIX}/instances/java", java.encode(), None)])
        node = cluster["a"].node
        await until(lambda: "java" in node.parts.members)
        own, now_ms = node.own_record(), cluster["a"].clock.now_ms()
        for version, expected in ((1_664_582_400_000, "a"), (1_775_001_600_001, "java")):
            changed = replace(java, version=version)
            cluster.server.transact([Write(f"{PREFIX}/instances/java", changed.encode(), None)])
            await until(lambda v=version: _version_seen(node, own, now_ms) == v)
            view = node.parts.cluster.view(own, now_ms=now_ms, now_s=anyio.current_time())
            assert choose_instance(view, PlacementRequest(M), random.Random(1)).instance_id == (
                expected
            )


def _version_seen(node: Node, own: InstanceRecord, now_ms: int) -> int:
    view = node.parts.cluster.view(own, now_ms=now_ms, now_s=anyio.current_time())
    found = view.find(InstanceId("java"))
    return -1 if found is None else found.record.version

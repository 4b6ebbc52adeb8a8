"""Last uses in records that cannot be: they keep no copy from eviction, and are repaired."""

from __future__ import annotations

import anyio
import pytest

from mm.core.ids import NEVER_MS, ModelId
from mm.core.records import ModelRecord
from mm.mesh.ports import Write
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, small_parameters
from tests.mesh.calls import FAST

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

HOUR_MS = 3600 * 1000


def stored_ms(cluster: Cluster, model_id: str = "m") -> int:
    record = cluster.record(model_id)
    assert record is not None
    return record.last_used_ms


def put(cluster: Cluster, model_id: str, last_used_ms: int) -> None:
    value = ModelRecord(INFO, last_used_ms=last_used_ms).encode()
    cluster.server.transact([Write(f"{PREFIX}/registry/{model_id}", value, if_revision=None)])


@pytest.mark.parametrize(
    ("last_used_ms", "is_called"),
    [(NEVER_MS, True), (NEVER_MS - 1, True), (10**14, True), (10**14, False)],
)
async def test_a_use_to_come_keeps_no_copy_from_eviction(
    last_used_ms: int, is_called: bool
) -> None:
    async with running_cluster(plan=FAST, parameters=small_parameters(10)) as cluster:
        put(cluster, "m", last_used_ms)
        a = await cluster.start("a")
        if is_called:
            await a.load("m")
        await anyio.sleep(600)  # what was used lately is loaded in this time, called or not
        assert "m" in a.runtime.loaded
        copies = a.node.parts.copies
        copy = copies.get(ModelId("m"))
        assert copy is not None
        assert not copy.is_awaited or is_called
        assert copies.last_used_ms(copy) <= copies.clock.now_ms()
        for number in range(12):
            await a.register(f"s{number}")
            await a.invoke(f"s{number}")
            await anyio.sleep(1)
        assert "m" not in a.runtime.loaded
        cluster.check()


async def test_the_leader_writes_a_last_use_where_one_stands_that_cannot_be() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        key, before = f"{PREFIX}/registry/m", b'"lu":%d' % NEVER_MS
        put(cluster, "m", NEVER_MS)
        put(cluster, "other", 1)
        item = cluster.server.get(key)
        assert item is not None
        assert before in item.value
        await anyio.sleep(430)
        item = cluster.server.get(key)
        assert item is not None
        assert before not in item.value
        age_ms = cluster["a"].node.parts.copies.clock.now_ms() - stored_ms(cluster)
        assert 3 * HOUR_MS <= age_ms <= 3 * HOUR_MS + 430_000
        assert stored_ms(cluster, "other") == 1
        assert not any(each.node.parts.registry.never_used for each in cluster.serving)


async def test_a_use_is_written_also_where_one_stands_that_cannot_be() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        put(cluster, "m", NEVER_MS)
        await anyio.sleep(1)
        await cluster["a"].invoke("m")
        await cluster.settle()
        now_ms = cluster["a"].node.parts.copies.clock.now_ms()
        assert now_ms - 10_000 <= stored_ms(cluster) <= now_ms

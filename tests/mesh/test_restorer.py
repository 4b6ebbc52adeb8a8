"""A store that lost everything: who writes it back, once, and what nobody may lose by it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import anyio
import pytest

from mm.core.ids import ModelId
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Item, Write
from mm.testing.cluster import PREFIX, Cluster, running_cluster, until
from mm.testing.fake_runtime import ModelPlan

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

PLAN = ModelPlan(load_s=0.1, unload_s=0.05)
MODELS = [f"m{number:02}" for number in range(40)]
LOADED = MODELS[:6]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Write]:
    """What the server was asked to write, by anybody."""
    asked: list[Write] = []
    transact = MemoryServer.transact

    def noting(self: MemoryServer, writes: Any) -> tuple[bool, list[Item | None]]:
        asked.extend(writes)
        return transact(self, writes)

    monkeypatch.setattr(MemoryServer, "transact", noting)
    return asked


async def stocked(cluster: Cluster) -> None:
    """Have models registered, some of them loaded, and a vmodel."""
    for model_id in MODELS:
        await cluster["a"].register(model_id)
    for model_id in LOADED:
        await cluster["b"].invoke(model_id)
    cluster.server.transact([Write(f"{PREFIX}/vmodels/v", b'{"amid":"m00"}', 0)])
    await cluster.settle()
    await anyio.sleep(5)  # and published


async def wipe(cluster: Cluster, outage_s: float = 5.0) -> None:
    for each in cluster.instances.values():
        each.store.set_fault(Fault.REFUSED)
    cluster.server.wipe()
    await anyio.sleep(outage_s)
    for each in cluster.serving:
        each.store.set_fault(None)


def registry(cluster: Cluster) -> dict[str, bytes]:
    return {item.key: item.value for item in cluster.server.table(f"{PREFIX}/registry/").items}


def count(writes: list[Write], table: str) -> Counter[str]:
    prefix = f"{PREFIX}/{table}/"
    return Counter(write.key for write in writes if write.key.startswith(prefix))


async def test_everything_comes_back_once_and_nothing_is_unloaded(writes: list[Write]) -> None:
    async with running_cluster("a", "b", "c", plan=PLAN) as cluster:
        await stocked(cluster)
        before = registry(cluster)
        loads = [dict(each.runtime.loads_begun) for each in cluster.serving]
        writes.clear()

        await wipe(cluster)
        await until(lambda: registry(cluster) == before, timeout_s=1.0)
        await cluster.settle()

        assert count(writes, "registry") == dict.fromkeys(before, 1)
        assert cluster.server.get(f"{PREFIX}/vmodels/v") is not None
        await until(lambda: all(map(cluster.instance_record, "abc")))
        assert [dict(each.runtime.loads_begun) for each in cluster.serving] == loads
        assert not any(each.runtime.unloads_done for each in cluster.serving)
        for model_id in LOADED:
            await cluster["c"].invoke(model_id)
        cluster.check()


async def test_without_the_first_one_another_does_it(writes: list[Write]) -> None:
    async with running_cluster("a", "b", "c", "d", plan=PLAN) as cluster:
        await stocked(cluster)
        before = registry(cluster)
        writes.clear()
        await cluster["a"].crash()

        await wipe(cluster)
        await anyio.sleep(1)
        assert not registry(cluster), "the others wait for the first"
        await until(lambda: len(registry(cluster)) == len(before), timeout_s=4.0)
        await cluster.settle()

        restored = count(writes, "registry")
        assert set(restored) == set(before)
        assert sum(n == 1 for n in restored.values()) >= 0.8 * len(before)
        members = cluster["b"].node.parts.members
        await until(lambda: "a" not in members, timeout_s=30.0, what="the crashed one is gone")
        assert {"c", "d"} <= {name for name in "bcd" if name in members}


async def test_what_somebody_wrote_anew_stays(writes: list[Write]) -> None:
    async with running_cluster("a", "b", plan=PLAN) as cluster:
        await stocked(cluster)
        for each in cluster.serving:
            each.store.set_fault(Fault.REFUSED)
        cluster.server.wipe()
        new = b'{"type":"other"}'
        cluster.server.transact([Write(f"{PREFIX}/registry/m00", new, 0)])
        for each in cluster.serving:
            each.store.set_fault(None)
        await until(lambda: len(registry(cluster)) == len(MODELS))
        await cluster.settle()
        record = cluster.record("m00")
        assert record is not None
        assert record.info.model_type == "other"
        cluster.check()


async def test_nothing_is_unregistered_until_all_know_what_was_lost() -> None:
    """Who hears of the loss later would give back what was unregistered in between."""
    async with running_cluster("a", "b", "c", plan=PLAN) as cluster:
        await stocked(cluster)
        for each in cluster.serving:
            each.store.set_fault(Fault.REFUSED)
        cluster.server.wipe()
        for name in "ab":
            cluster[name].store.set_fault(None)
        await until(lambda: len(registry(cluster)) == len(MODELS))
        with pytest.raises(StoreUnavailableError, match=r"retry in 1\d s"):
            await cluster["b"].node.models.unregister(ModelId("m00"))
        await anyio.sleep(10)
        cluster["c"].store.set_fault(None)
        await anyio.sleep(6)
        await cluster["b"].node.models.unregister(ModelId("m00"))
        await anyio.sleep(30)
        assert cluster.record("m00") is None
        await cluster.settle()
        cluster.check()


async def test_what_is_unregistered_before_it_is_restored_does_not_come_back() -> None:
    """It is known to all as something that the new store lacks: they must see it go."""
    options = {"restore_grace_s": 0.0}
    async with running_cluster("a", "b", "c", plan=PLAN, **options) as cluster:
        await stocked(cluster)
        await cluster["a"].crash()  # so that the others wait before they write anything
        await wipe(cluster)
        for name in "bc":
            mirror = cluster[name].node.parts.registry.mirror
            await until(lambda mirror=mirror: mirror.unconfirmed_count == len(MODELS))

        await cluster["b"].node.models.unregister(ModelId("m00"))
        await anyio.sleep(30)
        await cluster.settle()

        assert len(registry(cluster)) == len(MODELS) - 1
        assert cluster.record("m00") is None
        cluster.check()


async def test_registering_again_what_is_not_restored_yet_restores_it() -> None:
    async with running_cluster("a", "b", plan=PLAN) as cluster:
        await stocked(cluster)
        await cluster["a"].crash()
        await wipe(cluster)
        mirror = cluster["b"].node.parts.registry.mirror
        await until(lambda: bool(mirror.unconfirmed()))
        await cluster["b"].register("m05")
        assert cluster.record("m05") is not None
        assert len(mirror.unconfirmed()) == len(MODELS) - 1


async def test_a_store_that_goes_away_in_the_middle_is_filled_later() -> None:
    async with running_cluster("a", "b", plan=PLAN, restore_writes_max=2) as cluster:
        await stocked(cluster)
        for each in cluster.serving:
            each.store._call_delay_s = 0.1
        await wipe(cluster)
        await until(lambda: len(registry(cluster)) > 3)
        for each in cluster.serving:
            each.store.set_fault(Fault.SILENT)
        await anyio.sleep(20)
        assert len(registry(cluster)) < len(MODELS)
        for each in cluster.serving:
            each.store.set_fault(None)
        await until(lambda: len(registry(cluster)) == len(MODELS), timeout_s=30.0)
        await cluster.settle()
        cluster.check()


async def test_a_second_loss_is_made_good_like_the_first() -> None:
    async with running_cluster("a", "b", plan=PLAN) as cluster:
        await stocked(cluster)
        before = registry(cluster)
        for _ in range(3):
            await wipe(cluster)
            await until(lambda: registry(cluster) == before)
        await cluster.settle()
        cluster.check()
        assert cluster["a"].node.statistics().counters.records_restored >= 2 * len(before)


async def test_a_store_that_is_full_holds_up_only_what_must_be_written() -> None:
    async with running_cluster("a", "b", plan=PLAN) as cluster:
        await stocked(cluster)
        cluster.server.is_full = True
        for model_id in LOADED:
            await cluster["a"].invoke(model_id)
        for call in (cluster["a"].invoke(MODELS[-1]), cluster["b"].register("new")):
            with pytest.raises(StoreUnavailableError, match="out of space"):
                await call
        holder = next(each for each in cluster.serving if LOADED[0] in each.runtime.loaded)
        holder.runtime.lose(LOADED[0])
        assert not any(each.node.statistics().store_connected is False for each in cluster.serving)
        await anyio.sleep(60)
        for each in cluster.serving:
            assert each.node.statistics().store_out_of_space, each
            assert each.node.statistics().instances == 2, "a lease is kept alive without a write"

        cluster.server.is_full = False
        await until(
            lambda: not any(e.node.statistics().store_out_of_space for e in cluster.serving),
            timeout_s=5.0,
        )
        await cluster["b"].register("new")
        await cluster["a"].invoke(MODELS[-1])
        await cluster.settle()
        cluster.check(losses_unnoticed=True)

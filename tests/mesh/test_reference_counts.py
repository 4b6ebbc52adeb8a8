"""Numbers of references that are wrong in the store are put right, and no others."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.edge.memory_store import Fault
from mm.mesh.ports import Write
from mm.mesh.reference_counts import SUSPICION_S, ReferenceCounts
from mm.mesh.vmodel_references import TOLD_MAX
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from tests.mesh.calls import FAST
from tests.mesh.test_vmodel_manager import set_vmodel

pytestmark = pytest.mark.anyio

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")


def put(cluster: Cluster, table: str, key: str, value: bytes | None) -> None:
    cluster.server.transact([Write(f"{PREFIX}/{table}/{key}", value, if_revision=None)])


def put_model(cluster: Cluster, model_id: str, references: int, **changes: Any) -> None:
    record = replace(ModelRecord(INFO, references=references), **changes)
    put(cluster, "registry", model_id, record.encode())


def counts(cluster: Cluster) -> dict[str, int]:
    return {model_id: record.references for model_id, record in cluster.records().items()}


def counter_of(cluster: Cluster, name: str) -> ReferenceCounts:
    node = cluster[name].node
    return ReferenceCounts(
        config=node._config,
        store=cluster[name].store,
        registry=node.parts.registry,
        vmodels=node.parts.vmodels,
        leader=node.services.leader,
        counters=node.parts.counters,
    )


def quiet_cluster() -> AbstractAsyncContextManager[Cluster]:
    """Run an instance that does not look by itself."""
    return running_cluster("one", plan=FAST, kv_read_only=True)


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_transitions")
async def test_wrong_numbers_are_put_right(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("one", "two", plan=FAST, reaper_interval_s=5.0) as cluster:
        put(cluster, "vmodels", "v", VModelRecord(A, B).encode())
        put(cluster, "vmodels", "w", VModelRecord(B, B).encode())
        for model_id, references in (("a", 0), ("b", 7), ("c", 2), ("right", 0)):
            put_model(cluster, model_id, references)
        put_model(cluster, "negative", -3)
        put_model(cluster, "orphan", 1, auto_delete=True)
        put_model(cluster, "other orphan", 0, auto_delete=True)
        right = {"a": 1, "b": 2, "c": 0, "negative": 0, "right": 0}
        await until(lambda: counts(cluster) == right, timeout_s=500.0)
        assert "model b had 7 references, 2 is right: put right" in caplog.text
        assert "model orphan had 1 references, 0 is right: put right, and deleted" in caplog.text
        repaired = [each.node.parts.counters.references_repaired for each in cluster.serving]
        assert sorted(repaired) == [0, 6], "the leader does it, and nobody else"


@pytest.mark.virtual_time
async def test_what_was_counted_from_an_old_mirror_is_right_in_seconds() -> None:
    """A target that was gone comes back with the number of the vmodels that name it: more than are
    made sure of one by one (``TOLD_MAX``), and fewer by now.
    """
    count = TOLD_MAX + 50
    async with running_cluster("leads", plan=FAST, reaper_interval_s=1e6) as cluster:
        for number in range(count):
            put(cluster, "vmodels", f"v{number:03}", VModelRecord(A, A).encode())
        await anyio.sleep(60)  # the look after the election is over
        cluster.watch_delay_s = 30.0
        setter = await cluster.start("sets", is_known_by_all=False)
        (leader,) = (each for each in cluster.serving if each.node.services.leader.is_leader)
        assert leader is cluster["leads"]
        references = leader.node.parts.vmodels.references
        assert references.count(A) == count
        for number in range(TOLD_MAX, count, 2):
            put(cluster, "vmodels", f"v{number:03}", None)
        await set_vmodel(setter, "a", "new")
        assert counts(cluster) == {"a": count + 1}, "a look would have to read all vmodels"
        begun_s = anyio.current_time()
        await until(lambda: counts(cluster) == {"a": count + 1 - 25}, timeout_s=60.0)
        assert anyio.current_time() - begun_s < 3 * SUSPICION_S
        assert leader.node.parts.counters.references_repaired == 1


@pytest.mark.virtual_time
async def test_changes_that_come_by_two_watches_cost_no_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_cluster("one", plan=FAST, reaper_interval_s=1e6) as cluster:
        await anyio.sleep(60)
        listed: list[str] = []
        list_table = cluster["one"].store.list

        async def list_noted(prefix: str) -> Any:
            listed.append(prefix)
            return await list_table(prefix)

        monkeypatch.setattr(cluster["one"].store, "list", list_noted)
        put_model(cluster, "a", 1)
        await cluster.settle()
        put(cluster, "vmodels", "v", VModelRecord(A, A).encode())
        await anyio.sleep(60)
        assert listed == []
        put_model(cluster, "a", 2)
        await until(lambda: counts(cluster) == {"a": 1}, timeout_s=60.0)
        assert len(listed) == 1


async def test_a_vmodel_that_cannot_be_read_may_count() -> None:
    async with quiet_cluster() as cluster:
        put(cluster, "vmodels", "v", VModelRecord(A, A).encode())
        put(cluster, "vmodels", "unreadable", b"{")
        put_model(cluster, "a", 0)
        put_model(cluster, "b", 1)
        put_model(cluster, "c", 1, auto_delete=True)
        await cluster.settle()
        await counter_of(cluster, "one").look()
        assert counts(cluster) == {"a": 1, "b": 1, "c": 1}
        put(cluster, "vmodels", "unreadable", None)
        vmodels = cluster["one"].node.parts.vmodels
        await until(lambda: vmodels.mirror.get("unreadable") is None)
        await counter_of(cluster, "one").look()
        assert counts(cluster) == {"a": 1, "b": 0}


async def test_what_only_looks_wrong_is_left_alone() -> None:
    """The mirror of vmodels does not know of the newest one; the store does."""
    async with quiet_cluster() as cluster:
        one = cluster["one"]
        put_model(cluster, "a", 1, auto_delete=True)
        await cluster.settle()
        one.store.set_fault(Fault.SILENT)
        put(cluster, "vmodels", "v", VModelRecord(A, A).encode())
        assert one.node.parts.vmodels.get("v") is None
        one.store._fault = None  # no watch is told: what it has to tell comes with the next event
        await counter_of(cluster, "one").look()
        assert counts(cluster) == {"a": 1}


async def test_a_record_of_later_is_left_to_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    async with quiet_cluster() as cluster:
        store = cluster["one"].store
        put_model(cluster, "a", 1)
        await cluster.settle()
        list_table = store.list

        async def list_then_change(prefix: str) -> Any:
            table = await list_table(prefix)
            put(cluster, "vmodels", "v", VModelRecord(A, A).encode())
            put_model(cluster, "a", 2)
            return table

        monkeypatch.setattr(store, "list", list_then_change)
        await counter_of(cluster, "one").look()
        assert counts(cluster) == {"a": 2}, "neither 0, nor 1: it was read after the table"
        monkeypatch.setattr(store, "list", list_table)
        await counter_of(cluster, "one").look()
        assert counts(cluster) == {"a": 1}


async def test_others_have_their_turn_while_many_are_counted() -> None:
    async with quiet_cluster() as cluster:
        for number in range(2000):
            record = VModelRecord(ModelId("m"), ModelId("m"))
            put(cluster, "vmodels", f"v{number}", record.encode())
        put_model(cluster, "m", 2000)
        mirror = cluster["one"].node.parts.vmodels.mirror
        await until(lambda: len(mirror) == 2000)
        turns = 0
        async with anyio.create_task_group() as group:

            async def take_turns() -> None:
                nonlocal turns
                while True:
                    await anyio.lowlevel.checkpoint()
                    turns += 1

            group.start_soon(take_turns)
            await counter_of(cluster, "one").look()
            group.cancel_scope.cancel()
        # One for each 200; which of two that are ready goes first is nobody's to say.
        assert turns >= 8

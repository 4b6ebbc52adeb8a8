"""Who is there: records published, re-published, vanished, and what is taken out afterwards."""

from __future__ import annotations

import logging

import anyio
import pytest

from mm.core.calls import Outcome
from mm.core.cluster_view import InstanceView
from mm.core.ids import NEVER_MS, InstanceId
from mm.core.records import InstanceRecord, ModelRecord
from mm.edge.memory_store import Fault
from mm.mesh.members import GONE_CALLED_S
from mm.mesh.ports import Write
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, small_parameters, until
from tests.mesh.calls import FAST, A, B, C, M, call_for, loaded_at

pytestmark = pytest.mark.anyio

D = InstanceId("d")


def published(cluster: Cluster, name: str) -> InstanceRecord:
    record = cluster.instance_record(name)
    assert record is not None
    return record


def put(cluster: Cluster, key: str, value: bytes | None) -> None:
    cluster.server.transact([Write(f"{PREFIX}/{key}", value, if_revision=None)])


def seen_by(cluster: Cluster, name: str, instance_id: InstanceId) -> InstanceView | None:
    """Answer what one instance knows of another when it places a load."""
    node, now_s = cluster[name].node, anyio.current_time()
    view = node.parts.cluster.view(
        node.own_record(), now_ms=cluster[name].clock.now_ms(), now_s=now_s
    )
    return view.find(instance_id)


# --- publishing ----------------------------------------------------------------------------------


async def test_an_instance_is_published_before_it_serves() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        record = published(cluster, "a")
        assert record.address == "a:8080"
        assert record.lru_time_ms == NEVER_MS
        assert record.capacity_units > 0
        assert not record.shutting_down
        now = cluster["a"].node.statistics()
        assert now.instances == 1
        assert now.partitions[frozenset()].capacity_units == record.capacity_units


@pytest.mark.virtual_time
async def test_changes_are_published_at_most_every_two_seconds() -> None:
    async with running_cluster("a", plan=FAST, parameters=small_parameters(10)) as cluster:
        await anyio.sleep(10)
        key = f"{PREFIX}/instances/a"
        revisions = set()
        for number in range(100):
            await cluster["a"].register(f"m{number}")
            await cluster["a"].invoke(f"m{number}")
            await anyio.sleep(0.1)
            item = cluster.server.get(key)
            assert item is not None
            revisions.add(item.mod_revision)
        assert 4 <= len(revisions) <= 8
        await anyio.sleep(5)
        record = published(cluster, "a")
        assert record.count == len(cluster["a"].node.parts.copies) > 0
        assert record.loads_in_progress == 0
        item = cluster.server.get(key)
        await anyio.sleep(35)
        assert cluster.server.get(key) == item, "nothing changed, nothing is written"


@pytest.mark.virtual_time
async def test_the_age_of_the_oldest_copy_is_published_when_it_moved() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        await cluster["a"].invoke("m")
        await anyio.sleep(100)
        used_ms = cluster["a"].node.parts.copies.oldest_use_ms()
        assert published(cluster, "a").lru_time_ms == used_ms
        await cluster["a"].invoke("m")
        await anyio.sleep(50)
        assert published(cluster, "a").lru_time_ms == used_ms + 100_000


@pytest.mark.virtual_time
async def test_calls_a_minute_are_published_when_they_moved() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        await cluster["a"].load_here("m")
        await anyio.sleep(100)
        for _ in range(50):
            await cluster["b"].invoke("m")
            await anyio.sleep(1)
        await anyio.sleep(60)
        told = published(cluster, "a").busyness_rpm
        assert 10 < told < 60
        seen = seen_by(cluster, "b", A)
        assert seen is not None
        assert seen.record.busyness_rpm == told
        await anyio.sleep(600)
        assert published(cluster, "a").busyness_rpm == 0
        assert published(cluster, "b").busyness_rpm == 0, "it only passed them on"


@pytest.mark.virtual_time
async def test_a_record_that_is_gone_is_written_again() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await anyio.sleep(60)
        record = published(cluster, "a")
        item = cluster.server.get(f"{PREFIX}/instances/a")
        assert item is not None
        cluster["a"].store.revoke_lease(item.lease_id)
        await anyio.sleep(3)
        again = cluster.server.get(f"{PREFIX}/instances/a")
        assert again is not None
        assert again.lease_id not in (0, item.lease_id)
        assert published(cluster, "a") == record
        put(cluster, "instances/a", None)
        await anyio.sleep(3)
        assert published(cluster, "a") == record


@pytest.mark.usefixtures("nothing_ahead")
@pytest.mark.virtual_time
async def test_an_outage_is_survived_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        caplog.clear()
        cluster["a"].store.set_fault(Fault.REFUSED)
        await cluster["b"].register("n")
        await anyio.sleep(300)
        assert cluster.instance_record("a") is None, "its lease ran out"
        assert A not in cluster["b"].node.parts.members
        cluster["a"].store.set_fault(None)
        await until(lambda: A in cluster["b"].node.parts.members)
        await cluster.settle()
        assert await cluster["b"].invoke("m") == "a"
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(warnings) <= 1, warnings


# --- the others ----------------------------------------------------------------------------------


async def test_a_corrupt_record_is_named_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        put(cluster, "instances/d", b"[]")
        put(cluster, "instances/e", InstanceRecord(address="e:1").encode())
        await until(lambda: InstanceId("e") in cluster["a"].node.parts.members)
        assert D not in cluster["a"].node.parts.members
        assert f"record {PREFIX}/instances/d skipped" in caplog.text


async def test_an_instance_without_an_address_is_never_called() -> None:
    """One of the Java mesh: it holds copies that we know of but cannot reach."""
    async with running_cluster("a", plan=FAST) as cluster:
        java = InstanceRecord(start_time_ms=1, capacity_units=10**9, count=1)
        put(cluster, "instances/d", java.encode())
        put(cluster, "registry/m", ModelRecord(INFO, copies={D: 1}).encode())
        await until(lambda: cluster["a"].node.parts.registry.holders() == {D})
        await until(lambda: D in cluster["a"].node.parts.members)
        assert cluster["a"].node.parts.members.handle(D) is None
        assert await cluster["a"].invoke("m") == "a"


async def test_an_instance_that_comes_back_is_reachable_at_once() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        members = cluster["a"].node.parts.members
        members.mark_unreachable(B, anyio.current_time())
        handle = members.handle_if_known(B)
        assert members.handle(B) is None
        await cluster["b"].stop()
        await until(lambda: B not in members)
        assert members.handle_if_known(B) is None
        await cluster.start("b")
        assert members.handle(B) not in (None, handle)


async def test_copies_known_before_their_holder_are_found_once_it_is_there() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        put(cluster, "registry/m", ModelRecord(INFO, copies={D: 1}).encode())
        await until(lambda: cluster["a"].node.parts.registry.holders() == {D})
        table = cluster["a"].node.parts.copies.table
        assert table.peers("m") == []
        put(cluster, "instances/d", InstanceRecord(address="d:1").encode())
        await until(lambda: D in cluster["a"].node.parts.members)
        assert table.peers("m") == [cluster["a"].node.parts.members.handle(D)]
        put(cluster, "instances/d", InstanceRecord(address="d:1", shutting_down=True).encode())
        put(cluster, "instances/d", None)
        await until(lambda: D not in cluster["a"].node.parts.members)
        assert table.peers("m") == []
        table.check_invariants()


@pytest.mark.virtual_time
async def test_an_instance_that_vanished_is_still_called_for_a_while() -> None:
    """After an outage of the store all leases have run out: nobody is gone, and nothing is lost."""
    async with running_cluster("a", plan=FAST) as cluster:
        await anyio.sleep(1)
        members, table = cluster["a"].node.parts.members, cluster["a"].node.parts.copies.table
        put(cluster, "instances/d", InstanceRecord(address="d:1").encode())
        await until(lambda: D in members)
        handle = members.handle(D)
        put(cluster, "instances/d", None)
        await until(lambda: D not in members)
        assert (members.handle(D), members.address(D)) == (handle, "d:1")
        assert seen_by(cluster, "a", D) is None, "no loads for it"
        members.mark_unreachable(D, anyio.current_time())
        assert members.handle(D) is None, "one failed call, and it is gone"
        await anyio.sleep(GONE_CALLED_S)
        assert members.handle(D) is None
        assert handle is not None
        assert table.instance_of(handle) is None, "no hit draws it any more"
        members.mark_unreachable(D, anyio.current_time())
        assert members.next_reachable_ms() is None, "nor is it remembered"


@pytest.mark.virtual_time
async def test_loads_sent_count_until_they_ended_or_the_record_tells() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        node = cluster["a"].node

        def seen() -> tuple[int, int]:
            b = seen_by(cluster, "a", B)
            assert b is not None
            return b.sent_units, b.sent_count

        await anyio.sleep(10)
        await cluster["a"].register("m")
        call = call_for(excludes={A})
        route = await node.router.route(call)
        assert seen() == (128, 1)
        node.router.finished(call, route, Outcome.ANSWERED)
        assert seen() == (128, 0), "it takes memory there still"
        put(cluster, "instances/b", published(cluster, "b").encode())
        await anyio.sleep(0.1)
        assert seen() == (128, 0), "that was on its way already"
        await anyio.sleep(1)
        put(cluster, "instances/b", published(cluster, "b").encode())
        await until(lambda: seen() == (0, 0))


# --- vanished ------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_copies_of_a_vanished_instance_are_taken_out_after_the_grace() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b", "c")
        await cluster["c"].crash()
        await anyio.sleep(590)
        record = cluster.record("m")
        assert record is not None
        assert set(record.copies) == {B, C}
        await anyio.sleep(260)
        record = cluster.record("m")
        assert record is not None
        assert set(record.copies) == {B}
        await cluster.settle()
        cluster.check()


@pytest.mark.usefixtures("nothing_ahead")
@pytest.mark.virtual_time
async def test_one_instance_takes_them_out_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for number in range(40):
            put(cluster, f"registry/m{number}", ModelRecord(INFO, copies={D: 1}).encode())
        revision = cluster.server.revision
        await anyio.sleep(420 + 600 + 160)
        assert not any(record.copies for record in cluster.records().values())
        changed = [item.mod_revision for item in cluster.server.table(f"{PREFIX}/registry/").items]
        assert min(changed) > revision
        assert cluster.server.revision - revision < 40 + 10, "nobody wrote twice"
        assert caplog.text.count("instance d is gone: 40 copies are taken out") == 1


@pytest.mark.usefixtures("nothing_ahead")
@pytest.mark.virtual_time
async def test_whoever_comes_back_in_time_keeps_its_copies() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        cluster["b"].store.set_fault(Fault.REFUSED)
        await anyio.sleep(500)
        cluster["b"].store.set_fault(None)
        await anyio.sleep(900)
        record = cluster.record("m")
        assert record is not None
        assert set(record.copies) == {B}
        assert cluster["b"].runtime.loads_begun[M] == 1


@pytest.mark.usefixtures("nothing_ahead")
@pytest.mark.virtual_time
async def test_whoever_comes_back_too_late_puts_its_copies_back() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        cluster["b"].store.set_fault(Fault.REFUSED)
        await anyio.sleep(900)
        record = cluster.record("m")
        assert record is not None
        assert record.copies == {}
        assert await cluster["b"].invoke("m") == "b", "it has served all the time"
        cluster["b"].store.set_fault(None)
        await cluster.settle()
        cluster.check()
        record = cluster.record("m")
        assert record is not None
        assert set(record.copies) == {B}

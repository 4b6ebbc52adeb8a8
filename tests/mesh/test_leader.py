"""Election: one leads, another follows when it is gone, outages change nothing (spec core 1.8)."""

from __future__ import annotations

import logging
from functools import partial

import anyio
import pytest

from mm.edge.memory_store import Fault
from mm.mesh.leader import Leader
from mm.mesh.ports import Write
from mm.testing.cluster import PREFIX, Cluster, running_cluster, until

pytestmark = pytest.mark.anyio

KEYS = f"{PREFIX}/leaderLatch/"


def leader(cluster: Cluster, name: str) -> Leader:
    return cluster[name].node.services.leader


def leads(cluster: Cluster, name: str) -> bool:
    """Whether it leads, and all who serve know."""
    serving = [leader(cluster, each.name) for each in cluster.serving]
    return all(each.leader_id == name for each in serving) and leader(cluster, name).is_leader


async def test_who_stands_first_leads_until_it_leaves() -> None:
    async with running_cluster("b", "a", "c") as cluster:
        await until(lambda: leads(cluster, "b"))
        item = cluster.server.get(f"{KEYS}_b")
        assert item is not None
        assert item.value == b"_b", "as Java writes it"
        assert item.lease_id, "it goes with its instance"
        changed = leader(cluster, "a").changed
        await cluster["b"].stop()
        assert cluster.server.get(f"{KEYS}_b") is None
        await until(lambda: leads(cluster, "a"))
        assert changed.is_set()
        assert not leader(cluster, "c").is_leader


@pytest.mark.virtual_time
async def test_of_those_who_start_together_one_alone_ever_leads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An answer to a write comes sooner than the news of who wrote before."""
    caplog.set_level(logging.INFO, "mm.mesh.leader")
    async with running_cluster() as cluster:
        cluster.store_delay_s, cluster.watch_delay_s = 0.01, 0.1
        async with anyio.create_task_group() as group:
            for name in "abc":
                group.start_soon(partial(cluster.start, name, is_known_by_all=False))
        await until(lambda: any(leads(cluster, name) for name in "abc"))
        await until(lambda: len(cluster.server.table(KEYS).items) == 3)
        await anyio.sleep(5)
    told = [record.getMessage() for record in caplog.records]
    assert len([text for text in told if text.endswith(" is the leader")]) == 1, told


@pytest.mark.virtual_time
async def test_whoever_leaves_at_once_stands_no_more() -> None:
    """Also if its watch has not told of its own key yet."""
    async with running_cluster() as cluster:
        cluster.watch_delay_s = 5.0
        await cluster.start("a", is_known_by_all=False)
        await until(lambda: cluster.server.get(f"{KEYS}_a") is not None)
        assert not leader(cluster, "a").is_leader
        await leader(cluster, "a").resign()
        assert cluster.server.get(f"{KEYS}_a") is None


@pytest.mark.virtual_time
async def test_a_leader_that_crashed_is_followed_when_its_lease_ends() -> None:
    async with running_cluster("a", "b") as cluster:
        await until(lambda: leads(cluster, "a"))
        await cluster["a"].crash()
        await anyio.sleep(cluster["b"].config.lease_ttl_s / 2)
        assert leader(cluster, "b").leader_id == "a", "its lease lives"
        await until(lambda: leads(cluster, "b"), 30)


@pytest.mark.virtual_time
async def test_an_outage_that_ends_all_leases_leaves_one_leader() -> None:
    async with running_cluster("a", "b", "c") as cluster:
        await until(lambda: leads(cluster, "a"))
        for each in cluster.serving:
            each.store.set_fault(Fault.SILENT)
        await anyio.sleep(60)
        assert leads(cluster, "a"), "nobody knows better"
        for each in reversed(cluster.serving):
            each.store.set_fault(None)
        await until(lambda: any(leads(cluster, name) for name in "abc"), 30)
        await until(lambda: len(cluster.server.table(KEYS).items) == 3, 30)


@pytest.mark.virtual_time
async def test_a_key_that_somebody_deletes_comes_back() -> None:
    async with running_cluster("a", "b") as cluster:
        await until(lambda: leads(cluster, "a"))
        cluster.server.transact([Write(f"{KEYS}_a", None, if_revision=None)])
        await until(lambda: leads(cluster, "b"), 30)
        await until(lambda: cluster.server.get(f"{KEYS}_a") is not None, 30)
        assert leads(cluster, "b"), "whoever comes back stands behind"


async def test_java_candidates_count() -> None:
    async with running_cluster("a") as cluster:
        await until(lambda: leads(cluster, "a"))
        cluster.server.transact([Write(f"{KEYS}_j", b"_j\nmore", if_revision=0)])
        cluster.server.transact([Write(f"{KEYS}_a", None, if_revision=None)])
        await until(lambda: leader(cluster, "a").leader_id == "j")
        assert not leader(cluster, "a").is_leader

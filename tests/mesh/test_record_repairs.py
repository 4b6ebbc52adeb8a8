"""What a record says of copies stays true: others take entries out, instances vanish, stores do."""

from __future__ import annotations

import json

import anyio
import pytest

from mm.core.copy_record import CopyStage
from mm.core.records import ModelRecord
from mm.mesh.local_copy import Phase
from mm.mesh.ports import Write
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from tests.mesh.calls import FAST, A, B, loaded_at
from tests.mesh.test_registrar import ME, RECORD, copy_at, running
from tests.mesh.test_registrar_states import go, paid, state

pytestmark = pytest.mark.anyio

KEY = f"{PREFIX}/registry/m"


def stored(cluster: Cluster) -> ModelRecord:
    record = cluster.record("m")
    assert record is not None
    return record


async def test_what_java_takes_out_comes_back_as_ready_as_it_is() -> None:
    """Its reaper does so when it believes us gone, and leaves what it does not know."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        before = stored(cluster)
        attributes = json.loads(before.encode())
        del attributes["instanceIds"]["a"]
        cluster.server.transact([Write(KEY, json.dumps(attributes).encode(), if_revision=None)])
        assert stored(cluster).copy_state(A) is None
        assert stored(cluster).copy_details.keys() == {A, B}
        await until(lambda: A in stored(cluster).copies)
        await cluster.settle()
        assert stored(cluster).copies == before.copies
        for instance_id in (A, B):
            assert stored(cluster).copy_state(instance_id) == before.copy_state(instance_id)
        assert [each.runtime.loads_begun.total() for each in cluster.serving] == [1, 1]
        cluster.check()


async def test_what_java_left_of_an_older_copy_means_nothing() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        left: dict[str, object] = {A: {"ts": 1, "state": "ready", "since": 2, "size": 3}}
        record = ModelRecord(INFO, copy_details=left)
        cluster.server.transact([Write(KEY, record.encode(), if_revision=None)])
        assert await cluster["a"].invoke("m") == "a"
        await cluster.settle()
        state = stored(cluster).copy_state(A)
        assert state is not None
        assert (state.enqueued_ms, state.is_ready) == (stored(cluster).copies[A], True)


@pytest.mark.virtual_time
async def test_a_restart_leaves_nothing_of_the_earlier_process() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        await cluster["a"].crash()
        await cluster.start("a")
        assert stored(cluster).copies.keys() == stored(cluster).copy_details.keys() == {B}


@pytest.mark.virtual_time
async def test_what_an_instance_left_that_is_gone_goes_with_all_it_said() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        await cluster["b"].crash()
        await anyio.sleep(cluster["a"].config.gone_after_s / 2)
        assert stored(cluster).copies.keys() == {A, B}, "it may come back"
        assert (await cluster["a"].status("m")).status == "LOADED"
        await anyio.sleep(cluster["a"].config.gone_after_s)
        assert stored(cluster).copies.keys() == stored(cluster).copy_details.keys() == {A}


async def test_a_state_is_written_anew_into_a_store_that_was_emptied() -> None:
    async with running() as world:
        copy = copy_at(10)
        await world.registrar.register(copy, RECORD)
        go(world, copy, Phase.SIZING)
        world.server.wipe()
        await until(lambda: world.registry._mirror.unconfirmed_count == 1)
        assert not world.server.table("/").items
        go(world, copy, Phase.ACTIVE, 7)
        await paid(world)
        found = state(world)
        assert found is not None
        assert (found.enqueued_ms, found.stage, found.size_units) == (10, CopyStage.READY, 7)
        assert world.copies() == {ME: 10}

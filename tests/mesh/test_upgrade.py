"""What an upgrade needs of the instances: versions, readiness, and a version that loads nothing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable
from dataclasses import replace

import anyio
import pytest

from mm.core.ids import InstanceId, ModelId
from mm.core.load_failures import FailureKind, LoadFailure
from mm.core.placement import PlacementRequest, choose_instance
from mm.core.readiness import Unready
from mm.core.records import InstanceRecord
from mm.errors import MeshError, StatusCode
from mm.mesh.node import Node
from mm.mesh.ports import Write
from mm.testing.cluster import (
    PREFIX,
    Cluster,
    Instance,
    running_cluster,
    small_parameters,
    until,
)
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


# --- readiness ------------------------------------------------------------------------------------


def put_other(cluster: Cluster, record: InstanceRecord | None) -> None:
    value = None if record is None else record.encode()
    cluster.server.transact([Write(f"{PREFIX}/instances/other", value, None)])


OTHER = InstanceRecord(start_time_ms=1, capacity_units=10**6, address="other:8080")
STOPPING = replace(OTHER, shutting_down=True)


async def test_an_instance_is_not_ready_before_all_is_there_and_when_it_stops() -> None:
    async with running_cluster(plan=FAST) as cluster:
        instance = await cluster.start("a")
        readiness = instance.node.parts.readiness
        assert instance.node.unready is None
        fresh = Node(instance.config, instance.node._ports)
        assert fresh.unready is Unready.STARTING
        assert instance.node.statistics().unready_because == ""
        changed = readiness.changed
        await instance.stop()
        assert changed.is_set()
        assert instance.node.unready is Unready.STOPPING


@pytest.mark.virtual_time
async def test_a_new_instance_waits_until_nobody_moves_models_and_only_then_for_once() -> None:
    async with running_cluster(plan=FAST) as cluster:
        put_other(cluster, STOPPING)
        instance = await cluster.start("a")
        assert instance.node.unready is Unready.OTHERS_STOP
        assert instance.node.statistics().unready_because == str(Unready.OTHERS_STOP)
        # It serves all the same whoever calls.
        await instance.register("m")
        assert await instance.invoke("m") == "a"
        await anyio.sleep(60)
        assert instance.node.unready is Unready.OTHERS_STOP
        put_other(cluster, None)
        await anyio.sleep(0.1)
        assert instance.node.unready is None
        put_other(cluster, STOPPING)
        await anyio.sleep(1)
        assert instance.node.unready is None


@pytest.mark.virtual_time
async def test_nobody_waits_for_ever_for_an_instance_that_never_stops() -> None:
    async with running_cluster(plan=FAST, others_stop_wait_s=300.0) as cluster:
        put_other(cluster, STOPPING)
        instance = await cluster.start("a")
        await anyio.sleep(299)
        assert instance.node.unready is Unready.OTHERS_STOP
        await anyio.sleep(2)
        assert instance.node.unready is None


# --- probation ------------------------------------------------------------------------------------


MODELS = ("m0", "m1", "m2")


async def broken(cluster: Cluster, models: Iterable[str] = MODELS) -> Instance:
    """Start an instance whose runtime loads nothing, and have it try models that serve at "old"."""
    return await try_all(cluster, await cluster.start("new", version=2), models)


async def try_all(cluster: Cluster, new: Instance, models: Iterable[str] = MODELS) -> Instance:
    old = cluster["old"]
    for model_id in models:
        await old.register(model_id)
        await old.load_here(model_id)
        new.runtime.fail_loads(model_id, StatusCode.INVALID_ARGUMENT, "no such format")
        await until(lambda m=model_id: m in new.node.parts.registry)
        with contextlib.suppress(MeshError):
            await new.load_here(model_id)
    await cluster.settle()
    return new


@pytest.mark.virtual_time
async def test_a_version_that_loads_nothing_is_not_ready_and_comes_back_by_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_cluster("old", plan=FAST, version=1) as cluster:
        new = await broken(cluster)
        assert new.node.unready is Unready.LOADS_FAIL
        [text] = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
        assert text.startswith(
            "the first loads fail here: 3 models, 3 of which serve elsewhere (m0, m1, m2)."
        )
        statistics = new.node.statistics()
        assert (statistics.version, statistics.first_loads_failed) == (0, 3)
        assert statistics.counters.probations_failed == 1
        # Others load what they can, though it is new and empty.
        await anyio.sleep(3)
        record = cluster.instance_record("new")
        assert record is not None
        assert (record.loads_fail, record.version) == (True, 0)
        await cluster["old"].register("other")
        for name in ("old", "new"):
            assert await cluster[name].invoke("other") == "old"
        # One model is tried in half a minute, for as long as it takes.
        tried = new.runtime.loads_begun.total()
        await anyio.sleep(600)
        assert 15 <= new.runtime.loads_begun.total() - tried <= 21
        assert new.node.unready is Unready.LOADS_FAIL
        for model_id in MODELS:
            new.runtime.fail_loads(model_id, StatusCode.OK, times=0)
        await anyio.sleep(35)
        assert new.node.unready is None
        assert set(MODELS) <= {copy.model_id for copy in new.node.parts.copies}
        await anyio.sleep(3)
        record = cluster.instance_record("new")
        assert record is not None
        assert (record.loads_fail, record.version) == (False, 2)
        assert any(each.getMessage().startswith("loads succeed again: ") for each in caplog.records)
        await cluster["old"].register("another")
        assert await cluster["old"].invoke("another") == "new"


@pytest.mark.virtual_time
async def test_models_that_are_no_longer_there_are_not_tried_for_ever() -> None:
    async with running_cluster("old", plan=FAST) as cluster:
        new = await broken(cluster)
        for model_id in MODELS:
            await cluster["old"].node.models.unregister(ModelId(model_id))
        await anyio.sleep(35)
        assert new.node.unready is None


@pytest.mark.virtual_time
async def test_if_nobody_else_is_there_it_serves_what_it_can() -> None:
    async with running_cluster("old", plan=FAST) as cluster:
        new = await broken(cluster)
        assert new.node.unready is Unready.LOADS_FAIL
        await cluster["old"].stop()
        await anyio.sleep(1)
        assert new.node.unready is None
        await new.register("other")
        assert await new.invoke("other") == "new"


async def test_a_version_that_fails_does_not_end_the_tries_of_the_others() -> None:
    """Its INVALID_ARGUMENT would be the model's own word, were the model not there to see."""
    async with running_cluster("old", plan=FAST) as cluster:
        await broken(cluster, ["m0"])
        record = cluster.record("m0")
        assert record is not None
        failure = LoadFailure.read(record, InstanceId("new"))
        assert failure.kind is FailureKind.TRANSIENT


@pytest.mark.virtual_time
@pytest.mark.parametrize(("period_ms", "after_s"), [(0, 0.0), (180_000, 181.0)])
async def test_probation_can_be_turned_off_and_ends(period_ms: int, after_s: float) -> None:
    async with running_cluster("old", plan=FAST, probation_ms=period_ms) as cluster:
        new = await cluster.start("new")
        await anyio.sleep(after_s)
        await try_all(cluster, new)
        assert new.runtime.loads_begun.total() == 3
        assert new.node.unready is None

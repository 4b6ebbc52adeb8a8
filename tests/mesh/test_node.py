"""One instance from start to end, among others, with a store and a runtime that may be gone."""

from __future__ import annotations

import logging
from dataclasses import replace

import anyio
import pytest

from mm.core.calls import Outcome
from mm.core.records import ModelRecord
from mm.edge.memory_store import Fault
from mm.errors import NoRoomError, StartupError, StoreUnavailableError
from mm.mesh.ports import RuntimeParameters, Write
from mm.testing.cluster import (
    INFO,
    PREFIX,
    Cluster,
    ConnectionLostError,
    Instance,
    running_cluster,
    until,
)
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, FakeRuntime, ModelPlan
from tests.mesh.calls import FAST, A, B, M, call_for, loaded_at, loads

pytestmark = pytest.mark.anyio


def put(cluster: Cluster, key: str, value: bytes | None) -> None:
    cluster.server.transact([Write(f"{PREFIX}/{key}", value, if_revision=None)])


def copies(cluster: Cluster, model_id: str = "m") -> set[str]:
    record = cluster.record(model_id)
    assert record is not None
    return set(record.copies)


# --- start ---------------------------------------------------------------------------------------


@pytest.mark.virtual_time
@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.SILENT])
async def test_a_store_that_is_not_there_is_said_within_the_limit(fault: Fault) -> None:
    async with running_cluster(store_start_timeout_s=20.0) as cluster:
        with pytest.raises(StartupError, match="Problem connecting to etcd: the memory store"):
            await cluster.start("a", fault=fault)
        assert 20 <= anyio.current_time() <= 24


@pytest.mark.virtual_time
async def test_a_store_that_comes_in_time_is_waited_for() -> None:
    async with running_cluster(plan=FAST) as cluster:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: cluster.start("a", fault=Fault.REFUSED))
            await anyio.sleep(15)
            cluster["a"].store.set_fault(None)
        assert cluster["a"].is_serving


@pytest.mark.virtual_time
@pytest.mark.parametrize("after_s", [1.0, 1.3, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5, 2.7])
async def test_a_store_that_goes_away_during_the_start_ends_it_with_one_error(
    after_s: float,
) -> None:
    """With 0.4 s a call the start takes some seconds: whatever it was doing, the end is plain."""
    async with running_cluster(plan=FAST) as cluster:
        put(cluster, "registry/m", ModelRecord(INFO, copies={A: 1}).encode())
        cluster.store_delay_s = 0.4
        runtime = FakeRuntime(start_s=1.0)
        async with anyio.create_task_group() as group:

            async def start() -> None:
                with pytest.raises(StartupError, match=r"etcd|lease"):
                    await cluster.start("a", runtime=runtime)

            group.start_soon(start)
            await anyio.sleep(after_s)
            cluster["a"].store.set_fault(Fault.SILENT)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"capacity_bytes": 0}, "capacityInBytes 0"),
        ({"default_model_size_bytes": 0}, "defaultModelSizeInBytes 0"),
        ({"loading_concurrency_max": 0}, "maxLoadingConcurrency 0"),
        ({"load_timeout_ms": 50}, "modelLoadingTimeoutMs 50"),
        ({"default_model_size_bytes": 2**40}, "give it more memory or state a smaller"),
    ],
)
async def test_a_runtime_that_tells_nonsense_ends_the_start(
    changes: dict[str, int], text: str
) -> None:
    parameters: RuntimeParameters = replace(DEFAULT_PARAMETERS, **changes)  # type: ignore[arg-type]
    async with running_cluster() as cluster:
        with pytest.raises(StartupError, match=text):
            await cluster.start("a", runtime=FakeRuntime(parameters))
        assert cluster.instance_record("a") is None


@pytest.mark.virtual_time
async def test_a_runtime_that_never_gets_ready_ends_the_start() -> None:
    async with running_cluster() as cluster:
        with pytest.raises(StartupError, match="not ready"):
            await cluster.start("a", runtime=FakeRuntime(start_s=1000, start_timeout_s=180))
        assert anyio.current_time() == pytest.approx(180, abs=1)


# --- ids -----------------------------------------------------------------------------------------


async def test_an_id_that_is_in_use_is_refused() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        first = cluster["a"]
        await loaded_at(cluster, "a")
        with pytest.raises(StartupError, match="instance id a is taken by the process at a:8080"):
            await cluster.start("a", address="elsewhere:1")
        assert first.is_serving
        assert copies(cluster) == {A}
        assert await first.invoke("m") == "a"


@pytest.mark.virtual_time
async def test_one_of_two_that_start_at_once_gets_the_id() -> None:
    async with running_cluster(plan=FAST) as cluster:
        cluster.store_delay_s = 0.2
        outcomes: list[str] = []

        async def start(address: str) -> None:
            try:
                await cluster.start("a", address=address)
            except StartupError as exc:
                outcomes.append(str(exc))
            else:
                outcomes.append("serves")

        async with anyio.create_task_group() as group:
            group.start_soon(start, "one:1")
            await anyio.sleep(0.01)  # start times are told in milliseconds
            group.start_soon(start, "two:2")
        assert len(outcomes) == 2
        assert sum("instance id a is taken" in outcome for outcome in outcomes) == 1
        assert outcomes.count("serves") == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize("address", ["a:8080", "elsewhere:1"])
async def test_a_restart_with_the_same_id_takes_over_at_once(address: str) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        await cluster["a"].crash()
        assert cluster.instance_record("a") is not None, "its lease still lives"
        began_s = anyio.current_time()
        await cluster.start("a", address=address)
        assert anyio.current_time() - began_s < 6
        assert copies(cluster) == set(), "the new process has loaded nothing"
        record = cluster.instance_record("a")
        assert record is not None
        assert record.address == address
        await anyio.sleep(30)
        assert cluster.instance_record("a") is not None, "it has a lease of its own"
        assert await cluster["b"].invoke("m") in ("a", "b")
        await cluster.settle()
        cluster.check()


async def test_an_unreadable_record_of_our_own_is_replaced() -> None:
    async with running_cluster(plan=FAST) as cluster:
        put(cluster, "instances/a", b"{")
        await cluster.start("a")
        assert cluster.instance_record("a") is not None


# --- crash ---------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_after_a_crash_others_serve_at_the_first_call() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for number in range(10):
            await loaded_at(cluster, "a", model_id=f"m{number}")
        await cluster["a"].crash()
        for number in range(10):
            assert await cluster["b"].invoke(f"m{number}") != "a"
        await anyio.sleep(1500)
        await cluster.settle()
        cluster.check()
        assert all(A not in record.copies for record in cluster.records().values())


async def test_calls_at_a_crashed_instance_break_and_those_through_it_do_not() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster.call_s = 0.05
        served: list[str] = []

        async def call(through: str) -> None:
            try:
                served.append(await cluster[through].invoke("m"))
            except ConnectionLostError:
                served.append("lost")

        async with anyio.create_task_group() as group:
            for through in "aabb":
                group.start_soon(call, through)
            await until(lambda: cluster["a"].node.router.in_flight(M) == 4)
            await cluster["a"].crash()
        assert served.count("lost") == 2
        assert len(served) == 4
        assert "a" not in served


# --- stop ----------------------------------------------------------------------------------------


async def test_a_draining_instance_finishes_its_calls_and_takes_no_loads() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        await cluster["a"].register("n")
        call = call_for()
        router = cluster["a"].node.router
        route = await router.route(call)
        await cluster["a"].node.drain()
        await cluster["a"].node.drain()
        record = cluster.instance_record("a")
        assert record is not None
        assert record.shutting_down
        assert copies(cluster) == set()
        assert cluster["a"].runtime.loaded == {M}, "the call in flight needs it"
        assert await cluster["a"].invoke("m") == "a", "as do those that come here yet"
        await until(lambda: not cluster["b"].node.parts.registry.holders())
        assert await cluster["a"].invoke("n") == "b"
        assert await cluster["b"].invoke("m") == "b"
        router.finished(call, route, Outcome.ANSWERED)
        assert router.routes_open == 0
        await cluster["a"].stop()
        assert cluster.instance_record("a") is None


async def test_loads_that_run_when_the_drain_begins_go_elsewhere() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.plan("m", load_s=30)
        cluster["b"].runtime.plan("m", load_s=30)
        served: list[str] = []

        async def call(instance: Instance) -> None:
            served.append(await instance.invoke("m"))

        async with anyio.create_task_group() as group:
            group.start_soon(call, cluster["a"])
            group.start_soon(call, cluster["b"])
            await until(lambda: loads(cluster) == 1)
            busy, other = ("a", "b") if cluster["a"].runtime.loads_begun.total() else ("b", "a")
            cluster[other].runtime.plan("m", load_s=0.001)
            await cluster[busy].node.drain()
        assert served == [other, other]
        assert copies(cluster) == {other}


async def test_a_stopped_instance_leaves_nothing_behind() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        for number in range(30):
            await loaded_at(cluster, "a", model_id=f"m{number}")
        await cluster["a"].stop()
        assert cluster.instance_record("a") is None
        assert all(record.copies.keys() == {B} for record in cluster.records().values())
        await until(lambda: A not in cluster["b"].node.parts.members)
        await cluster.settle()
        cluster.check()
        await cluster.start("a")
        assert B in cluster["a"].node.parts.members


@pytest.mark.virtual_time
async def test_a_stop_without_a_store_ends_in_time(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].store.set_fault(Fault.SILENT)
        began_s = anyio.current_time()
        await cluster["a"].stop()
        assert anyio.current_time() - began_s <= 6
        assert "stopping without telling the others" in caplog.text


# --- the store goes away -------------------------------------------------------------------------


@pytest.mark.virtual_time
@pytest.mark.parametrize("fault", list(Fault))
async def test_thirty_seconds_without_a_store(
    fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for name in "abc":
            await loaded_at(cluster, name, model_id=f"at-{name}")
        await cluster["a"].register("idle")
        loads_before = loads(cluster)
        caplog.clear()
        for each in cluster.serving:
            each.store.set_fault(fault)
        ends_s = anyio.current_time() + 30
        while anyio.current_time() < ends_s:
            for each in cluster.serving:
                for name in "abc":
                    with anyio.fail_after(0.1):
                        assert await each.invoke(f"at-{name}") == name
            with anyio.fail_after(4), pytest.raises(StoreUnavailableError):
                await cluster["a"].register("new")
            with anyio.fail_after(8), pytest.raises(StoreUnavailableError):
                await cluster["b"].invoke("idle")
            assert not cluster["a"].node.statistics().store_connected
            await anyio.sleep(1)
        for each in cluster.serving:
            each.store.set_fault(None)
        await cluster["a"].register("new")
        assert await cluster["b"].invoke("idle")
        assert await cluster["c"].invoke("new")
        await cluster.settle()
        cluster.check()
        assert loads(cluster) == loads_before + 2, "what was loaded stayed loaded"
        errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert errors == []
        assert len(caplog.records) < 100, "an outage does not fill the log"


@pytest.mark.virtual_time
async def test_nowhere_is_left_when_all_others_are_shutting_down() -> None:
    async with running_cluster("a", "b", plan=ModelPlan()) as cluster:
        await cluster["a"].register("m")
        for each in cluster.serving:
            await each.node.drain()
        with pytest.raises(NoRoomError):
            await cluster["a"].invoke("m")

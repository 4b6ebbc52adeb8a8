"""Loads from their decision to a copy that serves: once, in time, and whoever gives up."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.edge.memory_store import Fault
from mm.errors import (
    LoadFailedError,
    LoadTimeoutError,
    ModelNotFoundError,
    NoRoomError,
    QueueFullError,
    RuntimeUnavailableError,
    StatusCode,
    StoreUnavailableError,
)
from mm.mesh.local_copy import AWAITED, LocalCopy, Phase
from mm.mesh.models import EnsureRequest
from mm.testing.cluster import Instance, running_cluster, small_parameters, until
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, MIB, Held, ModelPlan
from tests.mesh.calls import FAST, A, M

pytestmark = pytest.mark.anyio


def copy_at(instance: Instance, model_id: str = "m") -> LocalCopy | None:
    return instance.node.parts.copies.get(ModelId(model_id))


def start_load(instance: Instance, model_id: str = "m", **options: int) -> LocalCopy:
    """Begin a load that nobody waits for."""
    record = instance.node.parts.registry.get(ModelId(model_id))
    assert record is not None
    options.setdefault("last_used_ms", instance.clock.now_ms())
    return instance.node.parts.loader.ensure(ModelId(model_id), record, awaited=False, **options)


async def test_a_caller_that_gives_up_leaves_the_load_running() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.plan("m", load_s=0.03)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(cluster["a"].invoke, "m")
                await until(lambda: cluster["a"].runtime.loads_at_once == 1)
                scope.cancel()
        assert await cluster["a"].invoke("m") == "a"
        assert cluster["a"].runtime.loads_begun.total() == 1
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_a_load_over_time_is_recorded_and_unloaded() -> None:
    parameters = replace(DEFAULT_PARAMETERS, load_timeout_ms=2000)
    async with running_cluster("a", parameters=parameters) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.plan("m", load_s=1e6)
        with pytest.raises(LoadTimeoutError):
            await cluster["a"].invoke("m")
        record = cluster.record("m")
        assert record is not None
        assert record.failure_text(A) == "Load of model m timed out after 2s"
        assert record.failures == {A: cluster["a"].clock.now_ms()}
        await cluster.settle()
        assert cluster["a"].runtime.held("m") is None
        cluster.check()


@pytest.mark.virtual_time
async def test_a_wait_for_a_load_has_an_end_of_its_own() -> None:
    """Two loads ahead, each nearly as long as allowed, and the factor is two."""
    parameters = replace(DEFAULT_PARAMETERS, load_timeout_ms=10_000, loading_concurrency_max=1)
    plan = ModelPlan(load_s=9.9)
    async with running_cluster(
        "a", parameters=parameters, plan=plan, load_wait_factor=2
    ) as cluster:
        for name in "mno":
            await cluster["a"].register(name)
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["a"].invoke, "m")
            await anyio.sleep(1)
            group.start_soon(cluster["a"].invoke, "n")
            await anyio.sleep(1)
            with anyio.fail_after(20.1):
                with pytest.raises(LoadTimeoutError, match="Timeout waiting for load of model o"):
                    await cluster["a"].invoke("o")
        assert await cluster["a"].invoke("o") == "a", "the load went on"


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("code", "message", "text"),
    [
        (StatusCode.INTERNAL, "bad file", "INTERNAL: bad file"),
        (StatusCode.UNKNOWN, "bad file", "bad file"),
        (StatusCode.UNAVAILABLE, "", "UNAVAILABLE"),
        (StatusCode.INVALID_ARGUMENT, "no such type", "INVALID_ARGUMENT: no such type"),
        (StatusCode.FAILED_PRECONDITION, "in use", "FAILED_PRECONDITION: in use"),
    ],
)
async def test_a_refused_load_is_recorded_with_the_runtimes_text_and_unloaded(
    code: StatusCode, message: str, text: str
) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", code, message)
        with pytest.raises(LoadFailedError) as caught:
            await cluster["a"].invoke("m")
        assert caught.value.message == text
        record = cluster.record("m")
        assert record is not None
        assert (record.copies, record.failure_text(A)) == ({}, text)
        assert cluster["a"].node.parts.copies.unloader.count == 1
        await cluster.settle()
        assert cluster["a"].runtime.held("m") is None
        cluster.check()


async def test_a_model_that_can_never_fit_is_refused_before_it_is_loaded() -> None:
    async with running_cluster("a", plan=FAST, parameters=small_parameters(20)) as cluster:
        await cluster["a"].register("m")
        await cluster["a"].register("n")
        cluster["a"].runtime.plan("m", predicted_bytes=19 * MIB + 1)
        await cluster["a"].invoke("n")
        # Used before everything that is here: that is not what is wrong with it.
        request = EnsureRequest(M, sync=True, last_used_ms=1)
        status = await cluster["a"].node.models.ensure_loaded(request)
        assert status.status == "LOADING_FAILED"
        assert status.errors[0].startswith("Predicted size of 19.0 MiB for model m is")
        with pytest.raises(LoadFailedError, match=r"Predicted size of 19\.0 MiB for model m is"):
            await cluster["a"].invoke("m")
        assert cluster["a"].runtime.loads_begun[M] == 0
        assert cluster["a"].runtime.loaded == {"n"}
        cluster.check()


@pytest.mark.virtual_time
@pytest.mark.parametrize("is_size_told", [True, False])
async def test_a_model_that_turns_out_too_large_goes_and_takes_none_with_it(
    is_size_told: bool,
) -> None:
    async with running_cluster("a", plan=FAST, parameters=small_parameters(20)) as cluster:
        await cluster["a"].register("m")
        await cluster["a"].register("n")
        await cluster["a"].invoke("n")
        cluster["a"].runtime.plan("m", size_bytes=30 * MIB, is_size_told=is_size_told)
        status = await cluster["a"].load("m")
        if is_size_told:
            assert status.status == "LOADING_FAILED"
            assert "is larger than total" in status.errors[0]
        await cluster.settle()
        record = cluster.record("m")
        assert record is not None
        assert "is larger than total" in record.failure_text(A)
        assert cluster["a"].runtime.loaded == {"n"}
        cluster.check()


@pytest.mark.virtual_time
async def test_a_prediction_has_half_a_second() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=1)) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.plan("m", predict_size_s=60, predicted_bytes=9 * MIB)
        began_s = anyio.current_time()
        await cluster["a"].invoke("m")
        assert anyio.current_time() - began_s == pytest.approx(1.5, abs=0.01)


@pytest.mark.virtual_time
async def test_the_size_is_measured_while_calls_are_served_already() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=1)) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.plan("m", is_size_told=False, model_size_s=20, size_bytes=5 * MIB)
        await cluster["a"].invoke("m")
        copy = copy_at(cluster["a"])
        assert copy is not None
        assert (copy.phase, copy.weight_units) == (Phase.SIZING, 128)
        await anyio.sleep(20.1)
        assert (copy.phase, copy.weight_units) == (Phase.ACTIVE, 5 * 128)
        cluster.check()


@pytest.mark.virtual_time
async def test_a_size_that_cannot_be_measured_stays_what_was_predicted() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=1)) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.plan(
            "m", is_size_told=False, model_size_s=31, predicted_bytes=2 * MIB, size_bytes=3 * MIB
        )
        await cluster["a"].invoke("m")
        await anyio.sleep(40)
        copy = copy_at(cluster["a"])
        assert copy is not None
        assert (copy.phase, copy.weight_units) == (Phase.ACTIVE, 2 * 128)


async def test_an_unregistered_model_is_not_loaded_to_the_end() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        runtime = cluster["a"].runtime
        runtime.plan("m", load_s=30)
        async with anyio.create_task_group() as group:

            async def call() -> None:
                with pytest.raises(ModelNotFoundError):
                    await cluster["a"].invoke("m")

            group.start_soon(call)
            await until(lambda: runtime.held("m") is Held.LOADING)
            await cluster["a"].node.models.unregister(M)
        await cluster.settle()
        assert runtime.held("m") is None
        cluster.check()


async def test_whoever_waits_for_a_model_that_is_registered_anew_gets_the_new_one() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        runtime = cluster["a"].runtime
        runtime.plan("m", load_s=30)
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["a"].invoke, "m")
            await until(lambda: runtime.held("m") is Held.LOADING)
            runtime.plan("m", load_s=0.001)
            other = ModelInfo("type", "another path")
            await cluster["a"].node.parts.registry.update(M, lambda r: r and replace(r, info=other))
        await cluster.settle()
        copy = copy_at(cluster["a"])
        assert copy is not None
        assert copy.info == other
        cluster.check()


async def test_a_copy_evicted_while_it_waits_is_asked_for_again() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.plan("m", load_s=0.05)
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["a"].invoke, "m")
            await until(lambda: cluster["a"].runtime.loads_at_once == 1)
            copy = copy_at(cluster["a"])
            assert copy is not None
            cluster["a"].node.parts.copies.remove(copy)  # as an eviction ends it: without a failure
        assert cluster["a"].runtime.loads_done[M] == 1
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_awaited_loads_go_first_and_are_raised_once() -> None:
    parameters = replace(DEFAULT_PARAMETERS, loading_concurrency_max=1)
    async with running_cluster("a", parameters=parameters, plan=ModelPlan(load_s=1)) as cluster:
        a = cluster["a"]
        names = ["busy", *"mnop"]
        for name in names:
            await a.register(name)
        for name in names:
            start_load(a, name)
            await anyio.sleep(0.01)
        turns = a.node.parts.loader._turns
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(a.invoke, "p")
                await anyio.sleep(0.001)
            group.start_soon(a.invoke, "o")
            await anyio.sleep(0.01)
            assert len(turns._line) == 4
        copies = [copy_at(a, name) for name in names]
        assert all(copies)
        order = sorted((c for c in copies if c), key=lambda c: c.ready_s or 1e9)
        # Those that somebody waits for, in order of arrival, before those that nobody does.
        assert [c.model_id for c in order[:3]] == ["busy", "o", "p"]
        p = copy_at(a, "p")
        assert p is not None
        assert p.priority == AWAITED


async def test_a_burst_of_loads_is_bounded() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=30), load_queue_length_max=5) as cluster:
        names = [f"m{number}" for number in range(20)]
        for name in names:
            await cluster["a"].register(name)
        started = 0
        for name in names:
            with suppress(QueueFullError):
                start_load(cluster["a"], name)
                started += 1
        assert started == 5


@pytest.mark.virtual_time
async def test_a_store_that_is_gone_stops_loads_but_is_not_held_against_the_model() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].store.set_fault(Fault.REFUSED)
        with pytest.raises(StoreUnavailableError):
            await cluster["a"].invoke("m")
        cluster["a"].store.set_fault(None)
        assert await cluster["a"].invoke("m") == "a"


@pytest.mark.virtual_time
async def test_a_runtime_that_is_gone_is_not_held_against_the_model() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.stop()
        with pytest.raises(RuntimeUnavailableError):
            await cluster["a"].invoke("m")
        await anyio.sleep(1)
        record = cluster.record("m")
        assert record is not None
        assert (record.copies, record.failures) == ({}, {})
        # Then there is room for it, and somebody tries.
        await anyio.sleep(60)
        record = cluster.record("m")
        assert record is not None
        assert record.failures == {}
        cluster["a"].runtime.start()
        with anyio.fail_after(1):
            assert await cluster["a"].invoke("m") == "a", (
                "the pending unload does not wait for long"
            )
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_memory_that_does_not_come_free_in_time_is_no_room() -> None:
    async with running_cluster(
        "a", plan=FAST, parameters=small_parameters(10), space_wait_s=20.0
    ) as cluster:
        for number in range(30):
            await cluster["a"].register(f"m{number}")
        runtime = cluster["a"].runtime
        runtime.default_plan = replace(FAST, unload_s=29)
        messages = set()
        for number in range(30):
            try:
                await cluster["a"].invoke(f"m{number}")
            except NoRoomError as exc:
                messages.add(exc.message.partition(" for model ")[0])
        assert "no memory came free" in messages
        assert runtime.overcommitted_bytes_max == 0
        await cluster.settle()
        cluster.check()


async def test_loads_log_nothing_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", plan=FAST, parameters=small_parameters(10)) as cluster:
        for number in range(20):
            await cluster["a"].register(f"m{number}")
        caplog.clear()
        caplog.set_level(logging.INFO)
        for number in range(20):
            await cluster["a"].invoke(f"m{number}")
        await cluster["a"].node.models.ensure_loaded(EnsureRequest(ModelId("m1"), sync=False))
        await cluster.settle()
        assert [record.getMessage() for record in caplog.records] == []

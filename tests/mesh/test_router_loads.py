"""What the one question answers when loads fail, take too long or are not permitted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import anyio
import pytest

from mm.core.calls import Call, Hop, LocalRoute, Outcome
from mm.core.ids import ModelId
from mm.edge.memory_store import Fault
from mm.errors import (
    LoadFailedError,
    LoadTimeoutError,
    MethodRefusedError,
    ModelNotFoundError,
    QueueFullError,
    StatusCode,
    StoreUnavailableError,
)
from mm.mesh.models import EnsureRequest
from mm.mesh.ports import RuntimeParameters
from mm.testing.cluster import running_cluster, small_parameters, until
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, MIB, FakeRuntime
from tests.mesh.calls import FAST, call_for, give_back, loaded_at, loads

pytestmark = pytest.mark.anyio


async def test_a_failed_load_is_tried_elsewhere_and_then_told() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await cluster["a"].register("m")
        for each in cluster.serving:
            each.runtime.fail_loads("m", StatusCode.INTERNAL, f"boom at {each.name}", times=1)
        with pytest.raises(LoadFailedError, match="INTERNAL: boom at") as caught:
            await cluster["a"].invoke("m")
        assert caught.value.code == StatusCode.FAILED_PRECONDITION
        assert loads(cluster) == 3
        await cluster.settle()
        for each in cluster.serving:
            with pytest.raises(LoadFailedError, match="boom at"):
                await each.invoke("m")
        assert loads(cluster) == 3, "three recent failures are enough"
        cluster.check()


async def test_a_load_that_succeeds_elsewhere_is_an_answer() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await cluster["a"].register("m")
        for name in "ab":
            cluster[name].runtime.fail_loads("m", StatusCode.UNKNOWN, "boom")
        assert await cluster["a"].invoke("m") == "c"


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("code", "kind", "longest_s"),
    [(StatusCode.INTERNAL, "transient", 10), (StatusCode.NOT_FOUND, "permanent", 450)],
)
async def test_failures_count_for_a_time_that_fits_their_kind(
    code: StatusCode, kind: str, longest_s: float
) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", code, "boom", times=1)
        for _ in range(3):
            with pytest.raises(LoadFailedError, match="boom"):
                await cluster["a"].invoke("m")
        record = cluster.record("m")
        assert record is not None
        assert record.failure_details["a"] == {"msg": f"{code.name}: boom", "kind": kind, "n": 1}
        await anyio.sleep(longest_s * 0.7)
        with pytest.raises(LoadFailedError, match="boom"):
            await cluster["a"].invoke("m")
        assert loads(cluster) == 1
        await anyio.sleep(longest_s * 0.3)
        assert await cluster["a"].invoke("m") == "a"
        await cluster.settle()
        record = cluster.record("m")
        assert record is not None
        assert record.failures == {}


@pytest.mark.virtual_time
async def test_each_failure_in_a_row_makes_the_pause_longer() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", StatusCode.UNKNOWN, "boom")
        begun_s: list[float] = []
        while anyio.current_time() < 700:
            with pytest.raises(LoadFailedError, match="boom"):
                await cluster["a"].invoke("m")
            if loads(cluster) > len(begun_s):
                begun_s.append(anyio.current_time())
            await anyio.sleep(0.4)
        pauses_s = [after - before for before, after in itertools.pairwise(begun_s)]
        assert len(pauses_s) == 6
        for number, pause_s in enumerate(pauses_s):
            assert 7.5 * 2**number <= pause_s <= 10 * 2**number + 1


async def test_a_permanent_failure_is_not_tried_on_other_instances() -> None:
    """Neither by the call that met it at a peer or here, nor by the next one anywhere."""
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for each in cluster.serving:
            each.runtime.fail_loads("m", StatusCode.INVALID_ARGUMENT, "no such type")
            each.runtime.fail_loads("n", StatusCode.INVALID_ARGUMENT, "no such type")
        for number, (model_id, balanced) in enumerate((("m", False), ("n", True)), start=1):
            await cluster["a"].register(model_id)
            with pytest.raises(LoadFailedError, match="no such type") as caught:
                await cluster["a"].send(call_for(model_id, balanced=balanced))
            assert caught.value.hop_result is None
            await cluster.settle()
            for each in cluster.serving:
                with pytest.raises(LoadFailedError, match="no such type"):
                    await each.invoke(model_id)
            assert loads(cluster) == number


@pytest.mark.parametrize(
    ("code", "word"),
    [(StatusCode.NOT_FOUND, "load-refused"), (StatusCode.INTERNAL, "load-failed")],
)
async def test_a_peer_is_told_whether_another_try_makes_sense(code: StatusCode, word: str) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", code, "boom")
        with pytest.raises(LoadFailedError) as caught:
            await cluster["a"].serve(call_for(hop=Hop.LOAD_LOCAL, hops_left=1))
        assert caught.value.hop_result == word


def runtime_of(capacity_mib: int) -> FakeRuntime:
    return FakeRuntime(small_parameters(capacity_mib), default_plan=FAST)


async def test_a_model_too_large_for_some_is_loaded_where_there_is_memory() -> None:
    async with running_cluster(plan=FAST) as cluster:
        for name in "abcd":
            await cluster.start(name, runtime=runtime_of(20))
        await cluster.start("e", runtime=runtime_of(60))
        await cluster["a"].register("m")
        for each in cluster.serving:
            each.runtime.plan("m", predicted_bytes=40 * MIB, size_bytes=40 * MIB)
        assert await cluster["a"].invoke("m") == "e"
        assert loads(cluster) == 1
        await cluster.settle()
        cluster.check()


async def test_a_model_too_large_for_all_is_not_asked_of_all() -> None:
    async with running_cluster(plan=FAST) as cluster:
        for name in "abcdef":
            await cluster.start(name, runtime=runtime_of(20))
        await cluster["a"].register("m")
        for each in cluster.serving:
            each.runtime.plan("m", predicted_bytes=40 * MIB, size_bytes=40 * MIB)
        for _ in range(2):
            with pytest.raises(LoadFailedError, match="is larger than total effective capacity"):
                await cluster["a"].invoke("m")
            await cluster.settle()
        record = cluster.record("m")
        assert record is not None
        assert len(record.failures) <= 2


@pytest.mark.virtual_time
@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
async def test_loads_that_take_too_long_end_in_deadline_exceeded(names: tuple[str, ...]) -> None:
    parameters = replace(DEFAULT_PARAMETERS, load_timeout_ms=2000)
    async with running_cluster(*names, parameters=parameters) as cluster:
        await cluster["a"].register("m")
        for each in cluster.serving:
            each.runtime.plan("m", load_s=100)
        with pytest.raises(LoadTimeoutError, match="Load of model m timed out after 2s") as caught:
            await cluster["a"].invoke("m")
        assert caught.value.hop_result is None
        assert anyio.current_time() == pytest.approx(2 * len(names), abs=0.1)
        await cluster.settle()
        cluster.check()


async def test_methods_that_are_not_permitted_are_refused() -> None:
    parameters = replace(DEFAULT_PARAMETERS, methods={"pkg.Service/Method": (1, 2)})
    async with running_cluster("a", plan=FAST, parameters=parameters) as cluster:
        await loaded_at(cluster, "a")
        for method in ("/pkg.Service/Other", "/mmesh.ModelRuntime/unloadModel"):
            with pytest.raises(MethodRefusedError, match=f"not permitted: {method[1:]}"):
                await cluster["a"].invoke("m", method)
        router, call = cluster["a"].node.router, call_for()
        route = await router.route(call)
        assert isinstance(route, LocalRoute)
        assert route.injection_path == (1, 2)
        router.finished(call, route, Outcome.ANSWERED)
        cluster.check()


@pytest.mark.parametrize(
    "parameters",
    [
        DEFAULT_PARAMETERS,
        replace(DEFAULT_PARAMETERS, methods={"x/y": ()}, allow_any_method=True),
    ],
)
async def test_the_service_that_manages_the_runtime_is_never_permitted(
    parameters: RuntimeParameters,
) -> None:
    async with running_cluster("a", plan=FAST, parameters=parameters) as cluster:
        await loaded_at(cluster, "a")
        assert await cluster["a"].invoke("m") == "a"
        for service in ("mmesh.ModelRuntime", "com.ibm.watson.tas.internal.proto.ModelServer"):
            with pytest.raises(MethodRefusedError):
                await cluster["a"].invoke("m", f"/{service}/unloadModel")


async def test_an_empty_id_is_no_model() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        with pytest.raises(ModelNotFoundError):
            await cluster["a"].invoke("")


async def test_a_full_queue_here_is_no_reason_to_refuse_if_another_takes_it() -> None:
    async with running_cluster(plan=FAST) as cluster:
        await cluster.start("a", load_queue_length_max=0)
        await cluster["a"].register("m")
        with pytest.raises(QueueFullError, match="loads wait here already") as caught:
            await cluster["a"].invoke("m")
        assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
        await cluster.start("b")
        assert await cluster["a"].send(call_for(balanced=True)) == "b"
        assert await cluster["b"].send(call_for(balanced=True)) == "b"


async def test_a_full_queue_at_a_peer_sends_the_call_elsewhere() -> None:
    async with running_cluster("b", plan=FAST) as cluster:
        await cluster.start("a", load_queue_length_max=0)
        await cluster["b"].register("m")
        with pytest.raises(QueueFullError) as caught:
            await cluster["a"].serve(call_for(hop=Hop.LOAD_LOCAL, hops_left=1))
        assert caught.value.hop_result == "stale"
        assert await cluster["b"].invoke("m") == "b"


async def test_a_peer_without_a_store_ends_no_call_that_others_can_serve() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["b"].store.set_fault(Fault.REFUSED)
        with pytest.raises(StoreUnavailableError) as caught:
            await cluster["b"].send(call_for("m", hop=Hop.LOAD_LOCAL))
        assert caught.value.hop_result == "store-away", "it cannot write that it loads: ask another"


@pytest.mark.parametrize("hop", [Hop.HIT_ONLY, Hop.LOAD_LOCAL])
async def test_a_peer_says_of_what_it_waited_for_that_it_was_unregistered(hop: Hop) -> None:
    """The word that lets the sender of a vmodel's call look where the vmodel went."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["b"].runtime.plan("m", load_s=3600)
        call = Call(ModelId("m"), hop=Hop.LOAD_LOCAL, hops_left=0)
        request = EnsureRequest(ModelId("m"), sync=False)
        await cluster["b"].node.models.ensure_loaded(request, call)

        async def unregister() -> None:
            await until(lambda: cluster["b"].node.statistics().waiting_calls == 1)
            await cluster["a"].node.models.unregister(ModelId("m"))

        async with anyio.create_task_group() as group:
            group.start_soon(unregister)
            with pytest.raises(ModelNotFoundError, match="model not found") as caught:
                await cluster["b"].node.router.route(call_for(hop=hop, hops_left=1))
            assert caught.value.hop_result == "no-model"
        with pytest.raises(ModelNotFoundError) as caught:
            await cluster["b"].node.router.route(call_for(hop=Hop.LOAD_LOCAL))
        assert caught.value.hop_result == "no-model"


async def test_a_call_whose_peer_says_so_is_over() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        call = call_for()
        assert not await give_back(cluster["a"], call, Outcome.NO_MODEL, "model not found")
        assert isinstance(call.failure, ModelNotFoundError)

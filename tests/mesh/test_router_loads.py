"""What the one question answers when loads fail, take too long or are not permitted."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from mm.core.calls import Hop, LocalRoute, Outcome
from mm.errors import (
    LoadFailedError,
    LoadTimeoutError,
    MethodRefusedError,
    ModelNotFoundError,
    QueueFullError,
    StatusCode,
)
from mm.mesh.ports import RuntimeParameters
from mm.testing.cluster import running_cluster
from mm.testing.fake_runtime import DEFAULT_PARAMETERS
from tests.mesh.calls import FAST, call_for, loaded_at, loads

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
async def test_failures_count_for_seven_and_a_half_minutes() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", StatusCode.INTERNAL, "boom", times=1)
        for _ in range(3):
            with pytest.raises(LoadFailedError, match="boom"):
                await cluster["a"].invoke("m")
        assert loads(cluster) == 1
        await anyio.sleep(7.5 * 60)
        assert await cluster["a"].invoke("m") == "a"
        await cluster.settle()
        record = cluster.record("m")
        assert record is not None
        assert record.failures == {}


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

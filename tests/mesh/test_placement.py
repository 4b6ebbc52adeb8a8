"""Where nodes have models loaded: labels, bursts, refusals; in virtual time where time matters."""

from __future__ import annotations

import random
from collections import Counter
from types import MappingProxyType

import anyio
import pytest

from mm.core.calls import REFUSALS_MAX, Call, Hop, Outcome, PeerRoute
from mm.core.constraints import TypeConstraints, constraint
from mm.core.hop_state import HopState
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelInfo
from mm.errors import LoadFailedError, NoEligibleInstanceError, NoRoomError
from mm.mesh.local_copy import LocalCopy
from mm.testing.cluster import Cluster, running_cluster, small_parameters
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST, A, B, C, M, call_for, loaded_at, loads

pytestmark = pytest.mark.anyio

D = InstanceId("d")
GPU = ModelInfo("gpu-type", "path")
TEXT = (
    "There are no running instances that meet the label requirements of type gpu-type: [gpu, tpu]"
)


def constraints(*required: str) -> TypeConstraints:
    return TypeConstraints(MappingProxyType({"gpu-type": constraint(required)}))


# --- labels ---------------------------------------------------------------------------------------


async def test_a_model_is_loaded_where_its_type_may_be_whoever_is_asked() -> None:
    async with running_cluster(plan=FAST, type_constraints=constraints("gpu")) as cluster:
        await cluster.start("a")
        await cluster.start("b", labels=("gpu",))
        await cluster.start("c")
        for number, name in enumerate("abcabc"):
            await cluster[name].register(f"m{number}", GPU)
            assert await cluster[name].invoke(f"m{number}") == "b"
        assert cluster["b"].runtime.loads_begun.total() == loads(cluster) == 6


async def test_without_a_fitting_instance_the_controller_is_told_in_its_own_words() -> None:
    rules = constraints("tpu", "gpu")
    async with running_cluster("a", "b", plan=FAST, type_constraints=rules) as cluster:
        status = await cluster["a"].register("m", GPU, load_now=True, sync=True)
        assert (status.status, status.errors, status.copies) == ("LOADING_FAILED", (TEXT,), ())
        with pytest.raises(NoEligibleInstanceError) as caught:
            await cluster["b"].invoke("m")
        assert caught.value.message == TEXT
        record = cluster.record("m")
        assert record is not None
        assert (record.failures, record.copies) == ({}, {})
        assert (await cluster["a"].status("m")).status == "NOT_LOADED"


@pytest.mark.virtual_time
async def test_the_text_comes_before_failures_of_other_days() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m", GPU)
        cluster["a"].runtime.fail_loads("m", 13, "boom", times=1)
        with pytest.raises(LoadFailedError, match="boom"):
            await cluster["a"].invoke("m")
        cluster["a"].node.set_type_constraints(constraints("gpu", "tpu"))
        await anyio.sleep(600)
        status = await cluster["a"].load("m")
        assert status.status == "LOADING_FAILED"
        assert status.errors[0] == TEXT


async def test_constraints_change_while_it_runs_and_copies_stay() -> None:
    async with running_cluster(plan=FAST) as cluster:
        await cluster.start("a")
        await cluster.start("b", labels=("gpu",))
        await cluster["a"].register("early", GPU)
        await cluster["a"].load_here("early")
        await cluster.settle()
        for each in cluster.serving:
            each.node.set_type_constraints(constraints("gpu"))
        await cluster["a"].register("late", GPU)
        assert await cluster["a"].invoke("late") == "b"
        assert await cluster["b"].invoke("early") == "a", "it serves where it is"
        await cluster["a"].register("never", GPU)
        with pytest.raises(NoRoomError, match="There are no running instances"):
            await cluster["a"].load_here("never")


async def test_whoever_knows_the_constraints_first_is_obeyed() -> None:
    """A ConfigMap reaches instances at different times: one refuses, another takes it."""
    async with running_cluster(plan=FAST) as cluster:
        await cluster.start("a")
        await cluster.start("b", labels=("gpu",))
        await cluster.start("c")
        for name in "bc":
            cluster[name].node.set_type_constraints(constraints("gpu"))
        await cluster["c"].register("m", GPU)
        call = call_for(excludes={A})
        assert await cluster["a"].send(call) == "b"


# --- copies -------------------------------------------------------------------------------------


async def test_a_second_copy_goes_to_another_zone_and_then_to_another_machine() -> None:
    async with running_cluster(plan=FAST) as cluster:
        for name, zone, node in (
            ("a", "y", "1"),
            ("b", "y", "1"),
            ("c", "y", "2"),
            ("d", "z", "3"),
        ):
            await cluster.start(name, zone=zone, location=node)
        await loaded_at(cluster, "a")
        record = cluster.record("m")
        assert record is not None
        placer, now_ms = cluster["a"].node.router._placer, cluster["a"].clock.now_ms()
        for excluded, expected in ((A, "d"), (D, "c")):
            for _ in range(5):
                call = call_for(excludes={A, excluded})
                assert placer.choose(call, record, now_ms) == expected
                route = PeerRoute(M, InstanceId(expected), "", Hop.LOAD_LOCAL)
                placer.load_ended(call, route, Outcome.STALE)


# --- bursts ---------------------------------------------------------------------------------------

NAMES = [f"i{number:02}" for number in range(16)]


@pytest.mark.virtual_time
async def test_calls_for_one_model_from_one_instance_share_a_load() -> None:
    async with running_cluster("a", "b", "c", plan=ModelPlan(load_s=1.0)) as cluster:
        cluster.network.latency_s = 0.001
        await cluster["a"].register("m")
        before = Counter(cluster.network.arrivals)
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(cluster["a"].send, call_for(excludes={A}))
        asked = cluster.network.arrivals - before
        assert loads(cluster) == 1
        assert len(asked) == 1, asked


@pytest.mark.virtual_time
async def test_a_burst_over_all_instances_is_spread_though_records_are_old() -> None:
    parameters = small_parameters(64, loading_concurrency_max=4)
    async with running_cluster(parameters=parameters, plan=ModelPlan(load_s=1.5)) as cluster:
        cluster.watch_delay_s, cluster.network.latency_s = 1.0, 0.0005
        for name in NAMES:
            await cluster.start(name)
        for number in range(50):
            await cluster["i00"].register(f"m{number}")
        await anyio.sleep(60)
        rng = random.Random(5)
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(cluster[rng.choice(NAMES)].invoke, f"m{number}")
        most = max(each.runtime.loads_begun.total() for each in cluster.serving)
        assert loads(cluster) == 50
        assert most <= 2 * 50 / 16
        refused = sum(each.node.parts.counters.loads_refused for each in cluster.serving)
        sent_back = sum(each.node.parts.counters.loads_sent_back for each in cluster.serving)
        assert 0 < refused == sent_back <= REFUSALS_MAX * 50
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_a_burst_is_published_within_seconds() -> None:
    """Deferred, not dropped: of ten loads in a row none stays invisible until the next interval."""
    async with running_cluster("a", "b", plan=ModelPlan(load_s=30.0)) as cluster:
        await anyio.sleep(60)
        for number in range(10):
            await cluster["a"].register(f"m{number}")
            call = Call(ModelId(f"m{number}"), hop=Hop.LOAD_LOCAL)
            await cluster["a"].node.router.begin(call)
            await anyio.sleep(0.15)
        gap_s = cluster["a"].config.publish_gap_s
        await anyio.sleep(gap_s + 0.1)
        record = cluster.instance_record("a")
        assert record is not None
        assert (record.loads_in_progress, record.count) == (10, 10)


# --- refusals -------------------------------------------------------------------------------------


async def _keep_busy(cluster: Cluster, name: str, count: int) -> None:
    """Have an instance load so many models."""
    for number in range(count):
        model_id = f"busy-{name}-{number}"
        await cluster[name].register(model_id)
        await cluster[name].node.router.begin(Call(ModelId(model_id), hop=Hop.LOAD_LOCAL))


def _route_to(instance_id: InstanceId) -> PeerRoute:
    return PeerRoute(M, instance_id, "", Hop.LOAD_LOCAL)


@pytest.mark.virtual_time
async def test_a_busy_instance_refuses_if_it_may_and_others_are_left() -> None:
    async with running_cluster("a", "b", "c", plan=ModelPlan(load_s=30.0)) as cluster:
        await anyio.sleep(60)
        await cluster["b"].register("m")
        await _keep_busy(cluster, "b", 6)
        router = cluster["b"].node.router
        with pytest.raises(NoRoomError, match="others can load model m better") as caught:
            await router.begin(call_for(hop=Hop.LOAD_LOCAL, may_refuse=True))
        assert caught.value.hop_result == "stale"
        state = HopState.read(caught.value.hop_state)
        assert state == HopState.of(cluster["b"].node.own_record())
        assert state is not None
        assert state.loads_in_progress == 6
        assert cluster["b"].node.parts.counters.loads_refused == 1
        alone = call_for(hop=Hop.LOAD_LOCAL, may_refuse=True, excludes={A, C})
        assert isinstance(await router.begin(alone), LocalCopy)


@pytest.mark.virtual_time
async def test_the_sender_is_no_better_place() -> None:
    """It knows itself better than its record does here, which may be seconds old."""
    async with running_cluster("a", "b", "c", plan=ModelPlan(load_s=30.0)) as cluster:
        await anyio.sleep(60)
        await cluster["b"].register("m")
        await _keep_busy(cluster, "b", 6)
        router = cluster["b"].node.router
        call = call_for(hop=Hop.LOAD_LOCAL, may_refuse=True, sender=A)
        with pytest.raises(NoRoomError, match="others can load model m better"):
            await router.begin(call)
        left = call_for(hop=Hop.LOAD_LOCAL, may_refuse=True, sender=A, excludes={C})
        assert isinstance(await router.begin(left), LocalCopy)


@pytest.mark.virtual_time
async def test_whoever_may_not_refuse_loads() -> None:
    async with running_cluster("a", "b", plan=ModelPlan(load_s=30.0)) as cluster:
        await cluster["b"].register("m")
        await _keep_busy(cluster, "b", 6)
        begun = await cluster["b"].node.router.begin(call_for(hop=Hop.LOAD_LOCAL))
        assert isinstance(begun, LocalCopy)
        again = call_for(hop=Hop.LOAD_LOCAL, may_refuse=True)
        assert await cluster["b"].node.router.begin(again) is begun, "what it loads it loads"


@pytest.mark.virtual_time
async def test_after_enough_refusals_the_best_of_those_that_refused_is_asked_again() -> None:
    async with running_cluster("a", "b", "c", "d", plan=FAST) as cluster:
        await cluster["a"].register("m")
        router = cluster["a"].node.router
        call = call_for(excludes={A})
        told = {B: "10000/10/1/3/9", C: "10000/10/1/3/4", InstanceId("d"): "10000/10/1/3/1"}
        refusing: set[InstanceId] = set()
        for number in range(REFUSALS_MAX):
            route = await router.route(call)
            assert isinstance(route, PeerRoute)
            assert (route.may_refuse, route.instance_id in refusing) == (True, False), number
            refusing.add(route.instance_id)
            router.report_state(call, route, told[route.instance_id])
            assert router.finished(call, route, Outcome.STALE)
        last = await router.route(call)
        assert isinstance(last, PeerRoute)
        assert not last.may_refuse
        least = min(refusing, key=lambda i: int(told[i].split("/")[-1]))
        assert last.instance_id == least


@pytest.mark.virtual_time
async def test_if_all_refuse_and_nobody_else_is_left_one_of_them_has_to() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        router = cluster["a"].node.router
        call = call_for(excludes={A})
        route = await router.route(call)
        assert isinstance(route, PeerRoute)
        router.report_state(call, route, "10000/9990/1/3/9")
        assert router.finished(call, route, Outcome.STALE)
        again = await router.route(call)
        assert isinstance(again, PeerRoute)
        assert (again.instance_id, again.may_refuse) == (B, False)


@pytest.mark.virtual_time
async def test_a_refusal_without_a_state_is_final() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        router = cluster["a"].node.router
        call = call_for(excludes={A})
        route = await router.route(call)
        router.report_state(call, _route_to(B), "not a state")
        assert router.finished(call, route, Outcome.STALE)
        with pytest.raises(NoRoomError, match="Nowhere available to load"):
            await router.route(call)


@pytest.mark.virtual_time
async def test_a_load_that_was_refused_is_not_counted() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        node = cluster["a"].node
        call = call_for(excludes={A})
        route = await node.router.route(call)
        assert node.parts.cluster.load_target(M) == B
        node.router.finished(call, route, Outcome.STALE)
        assert node.parts.cluster.load_target(M) is None

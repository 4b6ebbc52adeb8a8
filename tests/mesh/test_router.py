"""The one question, asked at instances whose peers and runtimes are there, gone or busy."""

from __future__ import annotations

import logging
from dataclasses import replace

import anyio
import pytest

from mm.core.calls import Hop, LocalRoute, Outcome, PeerRoute
from mm.core.ids import InstanceId, ModelId
from mm.errors import (
    LoadFailedError,
    NoRoomError,
    RuntimeUnavailableError,
    StatusCode,
)
from mm.log_settings import LogSettings
from mm.testing.cluster import RuntimeAnswerError, running_cluster, until
from tests.mesh.calls import FAST, A, B, C, M, call_for, give_back, loaded_at, loads

pytestmark = pytest.mark.anyio


async def test_a_copy_here_is_used_and_pinned() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        router = cluster["a"].node.router
        call = call_for()
        route = await router.route(call)
        assert isinstance(route, LocalRoute)
        assert (router.in_flight(M), router.routes_open) == (1, 1)
        assert not router.finished(call, route, Outcome.ANSWERED)
        assert (router.in_flight(M), router.routes_open) == (0, 0)
        assert router.in_flight(ModelId("unknown")) == 0


async def test_a_copy_elsewhere_is_forwarded_to_as_hit_only() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        router = cluster["a"].node.router
        call = call_for()
        route = await router.route(call)
        assert route == PeerRoute(M, B, "b:8080", Hop.HIT_ONLY, hops_left=1, sender=A)
        assert not router.finished(call, route, Outcome.ANSWERED)
        assert await cluster["a"].invoke("m") == "b"
        counters = cluster["b"].node.statistics().counters
        assert (counters.calls, counters.hits, counters.misses) == (1, 1, 0)


async def test_the_copy_with_fewer_calls_in_flight_is_preferred() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b", "c")
        router = cluster["a"].node.router
        for name, in_flight in ((B, 7), (C, 2)):
            router.report_load(PeerRoute(M, name, "", Hop.HIT_ONLY), in_flight)
        router.report_load(PeerRoute(M, InstanceId("gone"), "", Hop.HIT_ONLY), 1)
        for _ in range(10):
            call = call_for()
            route = await router.route(call)
            assert isinstance(route, PeerRoute)
            assert route.instance_id == C
            router.finished(call, route, Outcome.ANSWERED)


async def test_a_stale_view_costs_a_hop_and_no_more() -> None:
    """The record names a copy that is not there: it is disowned, and the model loaded."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        registrar, record = cluster["b"].node.parts.registrar, cluster.record("m")
        assert record is not None
        await cluster["a"].node.parts.registry.update(M, lambda r: r and r.with_copy(B, 1, 0))
        await cluster["a"].invoke("m")
        await cluster.settle()
        cluster.check()
        assert registrar.owed_count == 0


async def test_hit_only_never_loads_and_never_forwards() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        for hops_left in (0, 1, 2):
            call = call_for(hop=Hop.HIT_ONLY, hops_left=hops_left)
            with pytest.raises(NoRoomError) as caught:
                await cluster["a"].node.router.route(call)
            assert caught.value.hop_result == "not-here"
            with pytest.raises(NoRoomError) as caught:
                await cluster["a"].node.router.begin(replace(call, method="", attempts=0))
            assert caught.value.hop_result == "not-here"
        assert loads(cluster) == 1


async def test_hit_only_waits_for_a_load_that_is_under_way() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.plan("m", load_s=0.05)
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["a"].invoke, "m")
            await until(lambda: cluster["a"].runtime.loads_at_once == 1)
            call = call_for(hop=Hop.HIT_ONLY, hops_left=0)
            assert await cluster["a"].send(call) == "a"
        counters = cluster["a"].node.statistics().counters
        assert (counters.loads, counters.misses, counters.hits) == (1, 2, 0)


async def test_load_local_forwards_once_more_to_a_copy_that_appeared() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        router = cluster["a"].node.router
        call = call_for(hop=Hop.LOAD_LOCAL, hops_left=1)
        route = await router.route(call)
        assert isinstance(route, PeerRoute)
        assert (route.instance_id, route.hop, route.hops_left) == (B, Hop.HIT_ONLY, 0)
        router.finished(call, route, Outcome.ANSWERED)
        call = call_for(hop=Hop.LOAD_LOCAL, hops_left=0)
        assert await cluster["a"].serve(call) == "a", "no hop left: it loads"


async def test_load_local_is_refused_where_it_was_tried() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        call = call_for(hop=Hop.LOAD_LOCAL, hops_left=1, excludes={A})
        with pytest.raises(NoRoomError) as caught:
            await cluster["a"].node.router.route(call)
        assert caught.value.hop_result == "stale"


@pytest.mark.virtual_time
async def test_an_unreachable_peer_is_left_alone_and_tried_again_later() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        cluster.network.close("b:8080")
        assert await cluster["a"].invoke("m") in ("a", "c")
        members = cluster["a"].node.parts.members
        assert members.handle(B) is None
        arrivals = cluster.network.arrivals["b:8080"]
        await cluster["a"].invoke("m")
        assert cluster.network.arrivals["b:8080"] == arrivals
        await anyio.sleep(0.6)
        assert members.handle(B) is not None
        cluster.network.listen("b:8080", cluster["b"])


@pytest.mark.virtual_time
async def test_failures_in_a_row_double_the_rest_until_an_answer_comes() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        node = cluster["a"].node
        for rest_s in (0.5, 1, 2, 4, 8, 10, 10):
            assert await give_back(cluster["a"], call_for(), Outcome.UNREACHABLE, "refused")
            assert node.parts.members.next_reachable_ms() == 1000 * rest_s
            await anyio.sleep(rest_s - 0.01)
            assert node.parts.members.handle(B) is None
            await anyio.sleep(0.02)
            assert node.parts.members.handle(B) is not None
        await give_back(cluster["a"], call_for(), Outcome.NOT_HERE)
        await give_back(cluster["a"], call_for(), Outcome.UNREACHABLE, "refused")
        assert node.parts.members.next_reachable_ms() == 500


@pytest.mark.virtual_time
async def test_nowhere_to_load_tells_when_a_retry_makes_sense() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].node.parts.members.mark_unreachable(B, anyio.current_time())
        with pytest.raises(NoRoomError, match="Nowhere available to load") as caught:
            await cluster["a"].send(call_for(excludes={A}))
        assert caught.value.retry_after_ms == 500
        assert caught.value.code == StatusCode.UNAVAILABLE


async def test_a_runtime_that_says_unavailable_is_no_reason_to_load() -> None:
    for holders in (("a",), ("b",), ("a", "b")):
        async with running_cluster("a", "b", "c", plan=FAST) as cluster:
            await loaded_at(cluster, *holders)
            for name in holders:
                cluster[name].fail_predictions(StatusCode.UNAVAILABLE, "out to lunch")
            with pytest.raises(RuntimeAnswerError, match="out to lunch") as caught:
                await cluster["a"].invoke("m")
            assert caught.value.code == StatusCode.UNAVAILABLE
            assert loads(cluster) == len(holders)
            cluster.check()


async def test_another_copy_is_tried_when_a_runtime_says_unavailable() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        cluster["a"].fail_predictions(StatusCode.UNAVAILABLE, "out to lunch")
        assert await cluster["a"].invoke("m") == "b"
        await loaded_at(cluster, "b", "c", model_id="n")
        cluster["c"].fail_predictions(StatusCode.UNAVAILABLE, "out to lunch")
        assert {await cluster["a"].invoke("n") for _ in range(8)} == {"b"}
        assert loads(cluster) == 4


async def test_a_copy_that_vanishes_between_two_tries_is_no_reason_to_load_either() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b", "c")
        call = call_for()
        assert await give_back(cluster["a"], call, Outcome.RUNTIME_UNAVAILABLE, "out to lunch")
        for name in (B, C):
            cluster["a"].node.parts.members.mark_unreachable(name, anyio.current_time())
        assert await give_back(cluster["a"], call, Outcome.UNREACHABLE, "refused"), "the other one"
        with pytest.raises(RuntimeUnavailableError, match="out to lunch"):
            await cluster["a"].node.router.route(call)


@pytest.mark.virtual_time
async def test_what_cannot_be_reached_is_tried_before_a_call_fails() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        for name in ("a", "c"):
            cluster[name].runtime.fail_loads("m", StatusCode.UNAVAILABLE, "boom")

        def suspect() -> None:
            for name in ("a", "c"):
                cluster[name].node.parts.members.mark_unreachable(B, anyio.current_time())

        suspect()
        assert await cluster["a"].invoke("m") == "b", "its loads elsewhere failed"
        assert loads(cluster) == 3
        suspect()
        assert await cluster["a"].invoke("m") == "b", "nobody is asked, for they failed before"
        assert loads(cluster) == 3
        assert cluster["a"].node.parts.members.handle(B) is not None, "it answered"
        suspect()
        assert (await cluster["a"].load("m")).status == "LOADED"
        cluster.network.close("b:8080")
        suspect()
        with pytest.raises(LoadFailedError, match="boom"):
            await cluster["a"].invoke("m")
        cluster.network.listen("b:8080", cluster["b"])


@pytest.mark.virtual_time
async def test_a_copy_that_cannot_be_reached_is_no_reason_not_to_load() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        for name in ("a", "c"):  # c would pass the call on to the copy that it can reach
            cluster[name].node.parts.members.mark_unreachable(B, anyio.current_time())
        assert await cluster["a"].invoke("m") in ("a", "c")
        assert loads(cluster) == 2


@pytest.mark.parametrize("hop", [Hop.HIT_ONLY, Hop.LOAD_LOCAL])
async def test_a_peer_does_not_retry_what_its_sender_can_do_better(hop: Hop) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        call = call_for(hop=hop, hops_left=1)
        assert not await give_back(cluster["a"], call, Outcome.UNREACHABLE, "refused")
        assert call.failure is not None
        assert call.failure.hop_result == "unreachable"
        call = call_for(hop=hop, hops_left=1)
        again = await give_back(cluster["a"], call, Outcome.RUNTIME_UNAVAILABLE, "out to lunch")
        assert again is (hop is Hop.LOAD_LOCAL)


async def test_a_runtime_that_is_gone_sends_its_calls_elsewhere() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].runtime.stop()
        assert await cluster["a"].invoke("m") == "b"
        assert await cluster["b"].invoke("m") == "b"
        with pytest.raises(RuntimeUnavailableError, match="model runtime") as caught:
            await cluster["a"].serve(call_for(hop=Hop.LOAD_LOCAL, hops_left=0))
        assert caught.value.hop_result == "unreachable"
        cluster["b"].runtime.stop()
        with pytest.raises(RuntimeUnavailableError):
            await cluster["a"].invoke("m")


async def test_a_lost_model_is_loaded_again_and_nobody_notices() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].runtime.lose("m")
        await cluster["a"].invoke("m")
        await cluster.settle()
        cluster.check()
        assert loads(cluster) == 2


@pytest.mark.virtual_time
@pytest.mark.parametrize("caller", ["a", "b"])
async def test_a_model_that_says_not_found_itself_is_not_loaded_everywhere(caller: str) -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        for each in cluster.serving:
            each.fail_predictions(StatusCode.NOT_FOUND, "no such row")
        loads_seen = []
        for _ in range(6):
            with pytest.raises(RuntimeAnswerError, match="no such row"):
                await cluster[caller].invoke("m")
            loads_seen.append(loads(cluster))
        assert len(set(loads_seen[1:])) == 1, loads_seen
        assert loads_seen[-1] <= 4
        cluster.check()


async def test_a_model_that_fails_at_five_copies_is_not_tried_at_a_sixth() -> None:
    async with running_cluster(*"abcdefg", plan=FAST) as cluster:
        await loaded_at(cluster, *"bcdefg")
        call = call_for()
        for _ in range(5):
            assert await give_back(cluster["a"], call, Outcome.NOT_HERE)
        with pytest.raises(NoRoomError, match="Failed to invoke model loaded in >=5 locations"):
            await cluster["a"].node.router.route(call)


async def test_attempts_are_bounded() -> None:
    for hop in (Hop.EXTERNAL, Hop.HIT_ONLY, Hop.LOAD_LOCAL):
        async with running_cluster("a", "b", plan=FAST) as cluster:
            await cluster["a"].register("m")
            with pytest.raises(NoRoomError, match="8 retry iterations exhausted"):
                await cluster["a"].send(call_for(hop=hop, attempts=8))


async def test_calls_are_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_cluster("a", plan=FAST, logs=LogSettings(each_invoke=True)) as cluster:
        await loaded_at(cluster, "a")
        await cluster["a"].invoke("m")
        assert (
            caplog.text.count("model m: invoking model runtime gRPC method: pkg.Service/Method")
            == 1
        )

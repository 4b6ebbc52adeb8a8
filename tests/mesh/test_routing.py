"""Which copy a call goes to in a cluster: by load, state and failures; and how far it goes."""

from __future__ import annotations

import random
from collections import Counter
from contextvars import ContextVar
from dataclasses import replace

import anyio
import pytest

from mm.core.calls import Call, Hop, LocalRoute, Outcome, PeerRoute
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.edge.memory_store import Fault
from mm.errors import LoadFailedError, MeshError, NoRoomError, StatusCode
from mm.mesh.ports import Write
from mm.testing.cluster import INFO, PREFIX, Cluster, RuntimeAnswerError, running_cluster, until
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, ModelPlan
from tests.mesh.calls import FAST, A, B, C, M, call_for, loaded_at, loads

pytestmark = pytest.mark.anyio

NARROW = replace(FAST, concurrency_max=1)


def tell(cluster: Cluster, **counts: int) -> None:
    """Let a believe that these copies have so many calls in flight."""
    router = cluster["a"].node.router
    for name, count in counts.items():
        router.report_load(PeerRoute(M, InstanceId(name), "", Hop.HIT_ONLY), count)


async def routes(cluster: Cluster, count: int = 20, **values: object) -> Counter[str]:
    """Answer where calls at a would go, one after the other."""
    router, seen = cluster["a"].node.router, Counter[str]()
    for _ in range(count):
        call = call_for(**values)
        route = await router.route(call)
        seen[route.instance_id if isinstance(route, PeerRoute) else "a"] += 1
        router.finished(call, route, Outcome.ANSWERED)
    return seen


# --- by load -------------------------------------------------------------------------------------


async def test_an_idle_copy_here_takes_the_call_and_a_busy_one_shares() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        router = cluster["a"].node.router
        assert await routes(cluster) == {"a": 20}
        held = [(call := call_for(), await router.route(call)) for _ in range(2)]
        assert [type(route) for _, route in held] == [LocalRoute, PeerRoute]
        tell(cluster, b=1)
        assert await routes(cluster) == {"a": 20}, "a tie is the local copy's"
        tell(cluster, b=0)
        assert await routes(cluster) == {"b": 20}
        assert await routes(cluster, balanced=True) == {"a": 20}
        for call, route in held:
            router.finished(call, route, Outcome.ANSWERED)
        assert await routes(cluster) == {"a": 20}


async def test_balanced_means_little_where_copies_take_few_calls_at_a_time() -> None:
    parameters = replace(DEFAULT_PARAMETERS, limit_model_concurrency=True)
    async with running_cluster("a", "b", plan=FAST, parameters=parameters) as cluster:
        await loaded_at(cluster, "a", "b")
        call = call_for()
        route = await cluster["a"].node.router.route(call)
        assert await routes(cluster, balanced=True) == {"b": 20}
        cluster["a"].node.router.finished(call, route, Outcome.ANSWERED)


async def test_every_reply_tells_how_busy_the_copy_is() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b", "c")
        held = call_for(hop=Hop.HIT_ONLY, hops_left=0)
        route = await cluster["b"].node.router.route(held)
        tell(cluster, c=9)
        await cluster["a"].invoke("m")
        loads_told = cluster["a"].node.parts.copies.table.peer_loads("m")
        assert [count for _, count in loads_told] == [1, 9]
        cluster["b"].node.router.finished(held, route, Outcome.ANSWERED)


# --- one redirect --------------------------------------------------------------------------------


async def test_a_busy_copy_sends_a_call_to_another_one() -> None:
    async with running_cluster("a", "b", "c", plan=NARROW) as cluster:
        await loaded_at(cluster, "b", "c")
        tell(cluster, c=5)
        held = call_for(hop=Hop.HIT_ONLY, hops_left=0)
        route = await cluster["b"].node.router.route(held)
        assert await cluster["a"].invoke("m") == "c", "b looked idle, and was not"
        assert cluster["a"].node.statistics().counters.redirects == 1
        assert cluster.network.arrivals == {"b:8080": 1, "c:8080": 1}
        cluster["b"].node.router.finished(held, route, Outcome.ANSWERED)


@pytest.mark.virtual_time
async def test_a_sender_that_was_sent_away_hears_when_the_copy_is_free() -> None:
    async with running_cluster("a", "b", "c", plan=NARROW) as cluster:
        await loaded_at(cluster, "b", "c")
        tell(cluster, c=5)
        held = call_for(hop=Hop.HIT_ONLY, hops_left=0)
        route = await cluster["b"].node.router.route(held)
        assert await cluster["a"].invoke("m") == "c"
        table = cluster["a"].node.parts.copies.table
        assert [count for _, count in table.peer_loads("m")] == [1, 0]
        await anyio.sleep(0.5)
        cluster["b"].node.router.finished(held, route, Outcome.ANSWERED)
        await anyio.sleep(0.1)
        assert [count for _, count in table.peer_loads("m")] == [0, 0]


async def test_the_second_copy_serves_however_busy_it_is() -> None:
    async with running_cluster("a", "b", "c", plan=NARROW) as cluster:
        await loaded_at(cluster, "b", "c")
        held = []
        for name in "bc":
            call = call_for(hop=Hop.HIT_ONLY, hops_left=0)
            held.append((name, call, await cluster[name].node.router.route(call)))
        assert await cluster["a"].invoke("m") in ("b", "c")
        assert cluster["a"].node.statistics().counters.redirects == 1
        assert cluster.network.arrivals.total() == 2
        for name, call, route in held:
            cluster[name].node.router.finished(call, route, Outcome.ANSWERED)


async def test_a_call_that_was_sent_away_comes_back_if_the_others_fail() -> None:
    async with running_cluster("a", "b", "c", plan=NARROW) as cluster:
        await loaded_at(cluster, "b", "c")
        tell(cluster, c=5)
        held = call_for(hop=Hop.HIT_ONLY, hops_left=0)
        route = await cluster["b"].node.router.route(held)
        cluster["c"].fail_predictions(StatusCode.UNAVAILABLE, "out to lunch")
        assert await cluster["a"].invoke("m") == "b"
        cluster["b"].node.router.finished(held, route, Outcome.ANSWERED)


async def test_the_only_copy_is_never_too_busy() -> None:
    async with running_cluster("a", "b", plan=NARROW) as cluster:
        await loaded_at(cluster, "b")
        held = call_for(hop=Hop.HIT_ONLY, hops_left=0)
        route = await cluster["b"].node.router.route(held)
        assert await cluster["a"].invoke("m") == "b"
        assert cluster["a"].node.statistics().counters.redirects == 0
        cluster["b"].node.router.finished(held, route, Outcome.ANSWERED)


async def test_a_call_for_which_no_connection_has_room_is_counted_and_not_sent_elsewhere() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b", "c")
        router = cluster["a"].node.router
        route = await router.route(call := call_for())
        assert isinstance(route, PeerRoute)
        assert not router.finished(call, route, Outcome.CROWDED)
        assert cluster["a"].node.statistics().counters.calls_crowded == 1
        assert router.routes_open == 0
        await cluster.settle()


# --- copies on their way -------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_copies_on_their_way_are_waited_for_apart_from_hits() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["b"].runtime.plan("m", load_s=30)
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["b"].load_here, "m")
            await anyio.sleep(2)
            table = cluster["a"].node.parts.copies.table
            assert table.peers("m") == [], "it is no hit yet"
            router, call = cluster["a"].node.router, call_for()
            route = await router.route(call)
            assert isinstance(route, PeerRoute)
            assert (route.instance_id, route.hop, route.may_wait) == (B, Hop.HIT_ONLY, True)
            router.finished(call, route, Outcome.ABANDONED)
            assert await cluster["a"].invoke("m") == "b"
            assert anyio.current_time() == pytest.approx(30, abs=0.1)
        await cluster.settle()
        assert loads(cluster) == 1
        assert table.peers("m") == [cluster["a"].node.parts.members.handle(B)]
        route = await router.route(call := call_for())
        assert isinstance(route, PeerRoute)
        assert not route.may_wait
        router.finished(call, route, Outcome.ABANDONED)


@pytest.mark.virtual_time
async def test_a_ready_copy_elsewhere_is_better_than_waiting_here() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        cluster["a"].runtime.plan("m", load_s=30)
        async with anyio.create_task_group() as group:
            group.start_soon(cluster["a"].load_here, "m")
            await anyio.sleep(2)
            assert await cluster["a"].invoke("m") == "b"
            assert anyio.current_time() < 4
            group.cancel_scope.cancel()


@pytest.mark.virtual_time
async def test_copies_that_say_nothing_are_hits_once_they_had_the_time_to_load() -> None:
    """Of an older version of this mesh: it has an address, and writes no states."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        now_ms = cluster["a"].clock.now_ms()
        record = ModelRecord(INFO, copies={B: now_ms})
        cluster["b"].node.parts.registry._listeners.clear()  # b shall not say that it has none
        cluster.server.transact([Write(f"{PREFIX}/registry/m", record.encode(), if_revision=None)])
        await until(lambda: cluster["a"].node.parts.registry.holders() == {B})
        seen = []
        for _ in range(2):
            router, call = cluster["a"].node.router, call_for()
            route = await router.route(call)
            assert isinstance(route, PeerRoute)
            seen.append((route.hop, route.may_wait))
            router.finished(call, route, Outcome.ABANDONED)
            await anyio.sleep(
                cluster["a"].node.parts.runtime_watch.sizing.assumed_load_ms / 1000 + 1
            )
        assert seen == [(Hop.HIT_ONLY, True), (Hop.HIT_ONLY, False)]
        table = cluster["a"].node.parts.copies.table
        assert table.peers("m") == [cluster["a"].node.parts.members.handle(B)]


# --- after failures ------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", ["a", "b"])
async def test_resource_exhausted_is_tried_at_one_other_copy(caller: str) -> None:
    async with running_cluster("a", "b", "c", "d", plan=FAST) as cluster:
        await loaded_at(cluster, "b", "c", "d")
        for name in "bcd":
            cluster[name].fail_predictions(StatusCode.RESOURCE_EXHAUSTED, "queue full")
        with pytest.raises(RuntimeAnswerError, match="queue full") as caught:
            await cluster[caller].invoke("m")
        assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
        assert cluster.network.arrivals.total() == (2 if caller == "a" else 1)
        assert loads(cluster) == 3, "that a runtime is full is no reason to load"
        cluster["c"].fail_predictions(0, "")
        cluster["d"].fail_predictions(0, "")
        for _ in range(5):
            assert await cluster[caller].invoke("m") in ("c", "d")


async def test_resource_exhausted_at_the_only_copy_is_the_answer() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        cluster["b"].fail_predictions(StatusCode.RESOURCE_EXHAUSTED, "queue full")
        for name in "ab":
            with pytest.raises(RuntimeAnswerError, match="queue full"):
                await cluster[name].invoke("m")
        assert loads(cluster) == 1


@pytest.mark.virtual_time
async def test_failed_loads_count_before_the_records_tell_of_them() -> None:
    async with running_cluster(plan=FAST) as cluster:
        cluster.watch_delay_s = 5.0
        for name in "abcdefg":
            await cluster.start(name)
        await cluster["a"].register("m")
        await anyio.sleep(6)
        for each in cluster.serving:
            each.runtime.fail_loads("m", StatusCode.INTERNAL, f"boom at {each.name}")
        with pytest.raises(LoadFailedError, match="boom at"):
            await cluster["a"].send(call_for(excludes={A}))
        assert loads(cluster) == 3


async def test_a_model_at_fault_is_loaded_once_wherever_it_is_called() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await cluster["a"].register("m")
        for each in cluster.serving:
            each.runtime.fail_loads("m", StatusCode.INVALID_ARGUMENT, "no such format")
        with pytest.raises(LoadFailedError, match="no such format") as caught:
            await cluster["a"].send(call_for(excludes={A}))
        assert caught.value.code == StatusCode.FAILED_PRECONDITION
        assert loads(cluster) == 1


# --- how far a call goes -------------------------------------------------------------------------


@pytest.mark.virtual_time
@pytest.mark.parametrize("seed", range(20))
async def test_no_record_makes_a_call_hop_more_than_twice(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the store says of copies, a call goes at most two hops deep, and ends."""
    chance = random.Random(seed)
    depth, deepest = ContextVar("depth", default=0), [0]
    async with running_cluster(*"abcd", plan=ModelPlan(load_s=0.5)) as cluster:
        for instance in cluster.serving:
            serve = instance.serve

            async def traced(call: Call, serve: object = serve) -> InstanceId:
                token = depth.set(depth.get() + (call.hop is not Hop.EXTERNAL))
                deepest[0] = max(deepest[0], depth.get())
                try:
                    return await serve(call)  # type: ignore[operator, no-any-return]
                finally:
                    depth.reset(token)

            monkeypatch.setattr(instance, "serve", traced)
        for number in range(4):
            await cluster["a"].register(f"m{number}")
        names = [InstanceId(name) for name in "abcd"]
        outcomes = Counter[str]()

        async def lie() -> None:
            for _ in range(40):
                model_id = f"m{chance.randrange(4)}"
                now_ms = cluster["a"].clock.now_ms() - chance.choice([0, 10**6])
                holders = chance.sample(names, chance.randrange(5))
                record = ModelRecord(INFO, copies=dict.fromkeys(holders, now_ms))
                key = f"{PREFIX}/registry/{model_id}"
                cluster.server.transact([Write(key, record.encode(), if_revision=None)])
                await anyio.sleep(chance.choice([0.01, 0.2]))

        async def call(number: int) -> None:
            await anyio.sleep(0.1 + number / 20)
            try:
                await cluster[chance.choice(names)].invoke(f"m{number % 4}")
                outcomes["served"] += 1
            except (NoRoomError, MeshError) as exc:
                outcomes[type(exc).__name__] += 1

        async with anyio.create_task_group() as group:
            group.start_soon(lie)
            for number in range(100):
                group.start_soon(call, number)
        assert outcomes.total() == 100
        assert outcomes["served"] > 90, outcomes
        assert 1 <= deepest[0] <= 2


async def test_a_peer_without_hops_left_does_what_it_can_itself() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        call = replace(call_for(hop=Hop.LOAD_LOCAL, hops_left=0), model_id=ModelId("m"))
        assert await cluster["a"].serve(call) == "a"
        assert cluster.network.arrivals.total() == 0
        assert C not in cluster.instances


@pytest.mark.virtual_time
@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.SILENT])
async def test_many_others_that_cannot_load_do_not_spend_the_calls_attempts(fault: Fault) -> None:
    async with running_cluster(*"abcdefghi", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        for each in cluster.serving:
            each.store.set_fault(fault)
        cluster.network.cut("a:8080", "b:8080")
        counters = cluster["a"].node.parts.counters
        forwards = counters.forwards
        assert await cluster["a"].invoke("m") == "b"
        assert counters.forwards - forwards == 3, "b itself, a load, and b by another"
        # Where no other finds a way either, the call ends before its attempts are spent.
        for name in "cdefghi":
            cluster.network.cut(f"{name}:8080", "b:8080")
        forwards = counters.forwards
        with pytest.raises(MeshError) as caught:
            await cluster["a"].invoke("m")
        assert caught.value.code is StatusCode.UNAVAILABLE
        assert counters.forwards - forwards <= 5, "b, three loads, and b by another"


@pytest.mark.virtual_time
async def test_a_copy_beyond_a_broken_wire_is_reached_another_way_if_nobody_can_load() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        for each in cluster.serving:
            each.store.set_fault(Fault.REFUSED)
        cluster.network.cut("a:8080", "b:8080")
        assert await cluster["a"].invoke("m") == "b", "by c"
        # And where there is no other way either, the call ends.
        cluster.network.cut("c:8080", "b:8080")
        counters = cluster["a"].node.parts.counters
        forwards = counters.forwards
        with pytest.raises(MeshError) as caught:
            await cluster["a"].invoke("m")
        assert caught.value.code is StatusCode.UNAVAILABLE
        assert counters.forwards - forwards == 3, "a load at c, b itself, and b by c"

"""Calls that wait for loads: bounded, let go a few at a time, in their order, behind hits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import anyio
import pytest

from mm.core.calls import Call, Hop, Outcome, PeerRoute
from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.errors import LoadTimeoutError, NoRoomError, StatusCode, WaitersFullError
from mm.limits import Limits
from mm.mesh.local_copy import LocalCopy, Phase
from mm.mesh.statistics import Counters
from mm.mesh.waiters import BATCH_CALLS, JOIN_S, Waiters
from mm.testing.cluster import running_cluster, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import A, call_for, loaded_at

pytestmark = pytest.mark.anyio

TIMEOUT_S = 60.0


def new_copy(model_id: str = "m") -> LocalCopy:
    return LocalCopy(
        ModelId(model_id),
        ModelInfo("type", "path"),
        load_id=1,
        enqueued_ms=1,
        last_used_ms=1,
        priority=1,
    )


def serve(copy: LocalCopy) -> None:
    copy.phase = Phase.ACTIVE
    copy.settle()


@dataclass
class World:
    """Waiters and what became of the calls that waited."""

    limits: Limits = field(default_factory=Limits)
    counters: Counters = field(default_factory=Counters)
    #: Calls let go and not ended, as the test sees them.
    running: list[str] = field(default_factory=list)
    most_running: int = 0
    went_on: list[str] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)

    def __post_init__(self) -> None:
        #: Copies that came, in the order in which the last who waited for each had his turn.
        self.let_go: list[LocalCopy] = []
        self.waiters = Waiters(
            self.limits, self.counters, wait_timeout_s=TIMEOUT_S, on_let_go=self.let_go.append
        )

    async def call(
        self, name: str, copy: LocalCopy, *, answer_s: float = 0.001, request_bytes: int = 0
    ) -> None:
        """Wait, be served for a while, end."""
        call = Call(copy.model_id, method="/pkg.Service/Method", request_bytes=request_bytes)
        try:
            await self.waiters.wait(copy, call)
        except (LoadTimeoutError, WaitersFullError) as exc:
            self.errors[name] = exc
            return
        self.went_on.append(name)
        self.running.append(name)
        self.most_running = max(self.most_running, len(self.running))
        try:
            with anyio.move_on_after(answer_s):
                await anyio.sleep_forever()
        finally:
            self.running.remove(name)
            call.end_turn()


@asynccontextmanager
async def running(**limits: int | float) -> AsyncIterator[tuple[World, Callable[..., None]]]:
    """A world, and what begins a call in it and waits until it stands in line."""
    world = World(limits=Limits(**limits))  # type: ignore[arg-type]
    async with anyio.create_task_group() as group:
        group.start_soon(world.waiters.run)
        async with anyio.create_task_group() as calls:

            def begin(name: str, copy: LocalCopy, **options: float) -> None:
                call = partial(world.call, name, copy, **options)  # type: ignore[arg-type]
                calls.start_soon(call)

            yield world, begin
        await until(lambda: not world.waiters._running_count)
        assert world.waiters.calls == world.waiters.request_bytes == 0
        assert not world.waiters._ages
        assert not world.waiters._lines
        group.cancel_scope.cancel()


@pytest.mark.virtual_time
async def test_a_few_are_let_go_at_a_time_in_their_order() -> None:
    names = [f"{number:03}" for number in range(200)]
    async with running(released_calls_max=8) as (world, begin):
        copy = new_copy()
        for name in names:
            begin(name, copy)
            await anyio.sleep(0.001)
        assert world.waiters.calls == 200
        assert world.went_on == []
        serve(copy)
        await anyio.sleep(1.0)
        # Those of a batch are equals.
        batches = [sorted(world.went_on[i : i + BATCH_CALLS]) for i in range(0, 200, BATCH_CALLS)]
        assert [name for batch in batches for name in batch] == names
        assert world.most_running <= 8 + BATCH_CALLS - 1
        assert world.most_running >= 8


@pytest.mark.virtual_time
async def test_slow_calls_do_not_keep_those_behind_them() -> None:
    """Two hundred that take a minute each: eight every 20 ms, not eight a minute."""
    async with running(released_calls_max=8, release_pause_s=0.02) as (world, begin):
        copy = new_copy()
        for number in range(200):
            begin(str(number), copy, answer_s=60.0)
        await anyio.sleep(0.1)
        serve(copy)
        await anyio.sleep(0.019)
        assert len(world.running) <= 8 + BATCH_CALLS - 1
        await anyio.sleep(200 / 8 * 0.02)
        assert len(world.running) == 200


@pytest.mark.virtual_time
async def test_slow_calls_are_noticed_although_others_come_and_go() -> None:
    """Six slow ones do not leave the other hundred two places for ever."""
    async with running(released_calls_max=8, release_pause_s=0.02) as (world, begin):
        slow, quick = new_copy("slow"), new_copy("quick")
        for number in range(6):
            begin(f"slow-{number}", slow, answer_s=60.0)
        for number in range(100):
            begin(f"quick-{number}", quick, answer_s=0.01)
        await anyio.sleep(0.1)
        serve(slow)
        serve(quick)
        # Two at a time would take half a second, ten a second and a bit less than 0.2.
        await anyio.sleep(0.2)
        assert len(world.went_on) == 106


@pytest.mark.virtual_time
async def test_copies_take_turns() -> None:
    async with running(released_calls_max=4) as (world, begin):
        crowded, lonely = new_copy("crowded"), new_copy("lonely")
        for number in range(100):
            begin(f"crowded-{number}", crowded)
        begin("lonely", lonely)
        await anyio.sleep(0.1)
        serve(crowded)
        serve(lonely)
        await anyio.sleep(1.0)
        assert world.went_on.index("lonely") < 3 * BATCH_CALLS


@pytest.mark.virtual_time
async def test_a_copy_has_let_go_when_the_last_had_his_turn() -> None:
    async with running(released_calls_max=4) as (world, begin):
        crowded, short, failed = new_copy("crowded"), new_copy("short"), new_copy("failed")
        for number in range(100):
            begin(f"crowded-{number}", crowded)
        begin("short", short)
        begin("failed", failed)
        await anyio.sleep(0.1)
        failed.settle(NoRoomError("no"))
        serve(crowded)
        serve(short)
        assert crowded.is_letting_go
        assert not failed.is_letting_go, "there is nothing to keep"
        await until(lambda: bool(world.let_go))
        assert world.let_go == [short]
        await until(lambda: len(world.let_go) > 1)
        assert world.let_go == [short, crowded]
        assert len(world.went_on) >= 100
        assert not crowded.is_letting_go
        lonely = new_copy("lonely")
        serve(lonely)
        assert not lonely.is_letting_go, "nobody waited"


@pytest.mark.virtual_time
async def test_who_gives_up_is_skipped_and_costs_nobody_a_turn() -> None:
    async with running(released_calls_max=4) as (world, begin):
        copy = new_copy()
        async with anyio.create_task_group() as impatient:
            for number in range(20):
                impatient.start_soon(world.call, f"impatient-{number}", copy)
            await anyio.sleep(0.1)
            begin("patient", copy)
            await anyio.sleep(0.1)
            assert world.waiters.calls == 21
            impatient.cancel_scope.cancel()
        assert world.waiters.calls == 1
        serve(copy)
        await anyio.sleep(0.01)
        assert world.went_on == ["patient"]


async def test_a_call_cancelled_in_the_moment_it_is_let_go_gives_its_turn_back() -> None:
    async with running(released_calls_max=1) as (world, begin):
        copy = new_copy()
        async with anyio.create_task_group() as unlucky:
            unlucky.start_soon(world.call, "unlucky", copy)
            await anyio.wait_all_tasks_blocked()
            begin("next", copy)
            await anyio.wait_all_tasks_blocked()
            batch = next(iter(world.waiters._ages))
            serve(copy)
            with anyio.fail_after(5):
                while not batch.woken.is_set():
                    await anyio.lowlevel.checkpoint()
            unlucky.cancel_scope.cancel()
        await until(lambda: "next" in world.went_on)


@pytest.mark.virtual_time
async def test_every_wait_has_its_own_end() -> None:
    async with running() as (world, begin):
        copy = new_copy()
        begin("first", copy)
        await anyio.sleep(10.0)
        begin("second", copy)
        await anyio.sleep(TIMEOUT_S - 10.0 - 0.001)
        assert not world.errors
        await anyio.sleep(0.002)
        assert list(world.errors) == ["first"]
        assert isinstance(world.errors["first"], LoadTimeoutError)
        await anyio.sleep(10.0)
        assert list(world.errors) == ["first", "second"]


@pytest.mark.virtual_time
async def test_calls_that_come_together_end_together_and_none_late() -> None:
    async with running() as (world, begin):
        copy = new_copy()
        begin("first", copy)
        await anyio.sleep(JOIN_S / 2)
        begin("second", copy)
        await anyio.sleep(TIMEOUT_S - JOIN_S / 2 + 0.001)
        assert len(world.errors) == 2


async def test_too_many_are_refused_at_once_with_the_way_out() -> None:
    async with running(waiting_calls_max=3) as (world, begin):
        copy = new_copy()
        for number in range(4):
            begin(str(number), copy)
            await anyio.wait_all_tasks_blocked()
        assert list(world.errors) == ["3"]
        error = world.errors["3"]
        assert isinstance(error, WaitersFullError)
        assert error.code == StatusCode.RESOURCE_EXHAUSTED
        assert "the limit is 3 calls (waiting_calls_max)" in error.message
        assert "ensureLoaded" in error.message
        assert world.counters.waiting_refused == 1
        serve(copy)


async def test_too_many_bytes_are_refused_when_they_come_and_when_they_grow() -> None:
    async with running(waiting_bytes_max=1000) as (world, begin):
        copy = new_copy()
        begin("large", copy, request_bytes=900)
        await anyio.wait_all_tasks_blocked()
        begin("next", copy, request_bytes=101)
        await anyio.wait_all_tasks_blocked()
        assert list(world.errors) == ["next"]
        assert world.waiters.request_bytes == 900
        call = Call(copy.model_id, method="/m", request_bytes=50)
        async with anyio.create_task_group() as group:
            group.start_soon(world.waiters.wait, copy, call)
            await anyio.wait_all_tasks_blocked()
            world.waiters.grew(call, 50)
            assert world.waiters.request_bytes == 1000
            with pytest.raises(WaitersFullError, match=r"1000 request bytes \(waiting_bytes_max\)"):
                world.waiters.grew(call, 1)
            assert world.counters.waiting_refused == 2
            serve(copy)
        assert world.waiters.request_bytes <= 900
        call.end_turn()


async def test_a_failed_load_is_told_to_all_and_an_ended_node_keeps_nobody() -> None:
    world = World()
    failed, left = new_copy("failed"), new_copy("left")
    async with anyio.create_task_group() as calls:
        async with anyio.create_task_group() as node:
            node.start_soon(world.waiters.run)
            for number in range(20):
                calls.start_soon(world.call, f"failed-{number}", failed)
            calls.start_soon(world.call, "left", left)
            await anyio.wait_all_tasks_blocked()
            failed.settle(NoRoomError("no"))
            await until(lambda: len(world.went_on) == 20)
            node.cancel_scope.cancel()
    assert list(world.errors) == ["left"]


@pytest.mark.virtual_time
async def test_hits_go_on_while_a_thousand_are_let_go() -> None:
    """In a whole instance: whoever calls a loaded model meanwhile is not behind all of them."""
    async with running_cluster("a", plan=ModelPlan(load_s=3.0)) as cluster:
        a = cluster["a"]
        for model_id in ("cold", "hot"):
            await a.register(model_id)
        await a.invoke("hot")
        finished: list[str] = []

        async def invoke(model_id: str) -> None:
            await a.send(call_for(model_id))
            if not finished:
                group.start_soon(invoke, "hot")
            finished.append(model_id)

        async with anyio.create_task_group() as group:
            for _ in range(1000):
                group.start_soon(invoke, "cold")
            await anyio.sleep(1.0)
            assert a.node.statistics().waiting_calls == 1000
        assert finished.index("hot") < 100
        assert a.node.statistics().waiting_calls == 0
        assert a.runtime.loads_begun["cold"] == 1


@pytest.mark.virtual_time
async def test_who_waits_for_an_ensured_load_counts_and_who_only_asks_does_not() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=3.0)) as cluster:
        a = cluster["a"]
        await a.register("cold")
        await a.load("cold", sync=False)
        await anyio.sleep(1.0)
        assert a.node.statistics().waiting_calls == 0
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(partial(a.load, "cold", sync=True))
            await anyio.sleep(1.0)
            assert a.node.statistics().waiting_calls == 5
        assert a.node.statistics().waiting_calls == 0


# --- at a peer -----------------------------------------------------------------------------------


@pytest.mark.virtual_time
@pytest.mark.parametrize("is_loading", [True, False], ids=["a copy on its way", "a load"])
async def test_calls_that_wait_at_a_peer_count_where_they_came_in(is_loading: bool) -> None:
    async with running_cluster("b", plan=ModelPlan(load_s=10.0)) as cluster:
        a = await cluster.start("a", waiting_calls_max=3)
        await a.register("m")
        async with anyio.create_task_group() as group:
            if is_loading:
                group.start_soon(cluster["b"].load_here, "m")
                await anyio.sleep(2)
            calls = [call_for(excludes=set() if is_loading else {A}) for _ in range(4)]
            routes = [await a.node.router.route(call) for call in calls[:3]]
            hop = Hop.HIT_ONLY if is_loading else Hop.LOAD_LOCAL
            for route in routes:
                assert isinstance(route, PeerRoute)
                assert (route.hop, route.may_wait) == (hop, True)
            assert a.node.statistics().waiting_calls == 3
            with pytest.raises(WaitersFullError, match=r"the limit is 3 calls \(waiting_calls_max"):
                await a.node.router.route(calls[3])
            assert a.node.statistics().counters.waiting_refused == 1
            assert a.node.router.routes_open == 3
            # An answer that begins ends the wait, whatever comes after it; so does the end.
            a.node.router.answer_began(calls[0])
            assert a.node.statistics().waiting_calls == 2
            for call, route in zip(calls, routes, strict=False):
                a.node.router.finished(call, route, Outcome.ABANDONED)
            assert a.node.statistics().waiting_calls == 0
            group.cancel_scope.cancel()


@pytest.mark.virtual_time
async def test_request_bytes_of_those_that_wait_at_a_peer_are_bounded() -> None:
    async with running_cluster("b", plan=ModelPlan(load_s=10.0)) as cluster:
        a = await cluster.start("a", waiting_bytes_max=1000)
        await a.register("m")
        router = a.node.router
        call, other = call_for(excludes={A}, request_bytes=900), call_for(excludes={A})
        routes = [await router.route(call), await router.route(other)]
        assert a.node.statistics().waiting_bytes == 900
        with pytest.raises(WaitersFullError, match=r"1000 request bytes \(waiting_bytes_max\)"):
            router.request_grew(other, 101)
        router.request_passed_on(call)
        assert (call.request_bytes, a.node.statistics().waiting_bytes) == (0, 0)
        router.request_grew(other, 101)
        assert a.node.statistics().waiting_bytes == 101
        for each, route in zip((call, other), routes, strict=True):
            router.finished(each, route, Outcome.ABANDONED)
        assert (a.node.statistics().waiting_bytes, a.node.statistics().waiting_calls) == (0, 0)


@pytest.mark.virtual_time
async def test_hits_at_a_peer_do_not_wait() -> None:
    async with running_cluster("b", plan=ModelPlan(load_s=0.01)) as cluster:
        await loaded_at(cluster, "b")
        a = await cluster.start("a", waiting_calls_max=0)
        route = await a.node.router.route(call := call_for())
        assert isinstance(route, PeerRoute)
        assert (route.may_wait, call.waits, a.node.statistics().waiting_calls) == (False, False, 0)
        a.node.router.finished(call, route, Outcome.ANSWERED)


@pytest.mark.virtual_time
async def test_whoever_only_asks_a_peer_for_a_load_does_not_wait() -> None:
    async with running_cluster("b", plan=ModelPlan(load_s=10.0)) as cluster:
        a = await cluster.start("a", waiting_calls_max=0)
        await a.register("m")
        begun = await a.node.router.begin(call := call_for(excludes={A}, method=""))
        assert isinstance(begun, PeerRoute)
        assert a.node.statistics().waiting_calls == 0
        a.node.router.finished(call, begun, Outcome.ABANDONED)

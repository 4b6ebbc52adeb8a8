"""A few calls at a time for each copy: slots, lines, overload, and copies that leave."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest

from mm.core.calls import Call, Hop, LocalRoute, NamedBy, Outcome, PeerRoute, Route
from mm.core.ids import ModelId
from mm.core.records import ModelInfo, VModelRecord
from mm.errors import MeshError, ModelMovedError, QueueFullError, StatusCode
from mm.mesh.concurrency import CallLimits
from mm.mesh.local_copy import LocalCopy, Phase
from mm.mesh.measures import Measures
from mm.mesh.statistics import Counters
from mm.testing.cluster import Cluster, Instance, running_cluster, until
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, ModelPlan
from tests.mesh.calls import FAST, B, call_for, loaded_at
from tests.mesh.test_transitions import put

pytestmark = pytest.mark.anyio

LIMITED = replace(DEFAULT_PARAMETERS, limit_model_concurrency=True)


def copy_of(concurrency_max: int, load_id: int = 1) -> LocalCopy:
    copy = LocalCopy(
        ModelId("m"), ModelInfo("t"), load_id=load_id, enqueued_ms=1, last_used_ms=1, priority=0
    )
    copy.phase = Phase.ACTIVE
    copy.concurrency_max = concurrency_max
    return copy


class Line:
    """Calls that enter one copy, and what became of each."""

    def __init__(self, concurrency_max: int, copy_calls_max: int = 0) -> None:
        self.copy = copy_of(concurrency_max)
        self.limits = CallLimits(copy_calls_max, Counters(), Measures())
        self.entered: list[int] = []
        self.left: list[int] = []

    async def enter(self, number: int) -> None:
        has_slot = await self.limits.enter(self.copy)
        (self.entered if has_slot else self.left).append(number)


@pytest.mark.parametrize(
    ("concurrency_max", "copy_calls_max", "expected"),
    [(1, 0, 16), (2, 0, 16), (3, 0, 24), (0, 0, 16), (3, 5, 5), (7, 5, 7)],
)
async def test_a_copy_has_and_keeps_so_many_calls(
    concurrency_max: int, copy_calls_max: int, expected: int
) -> None:
    line = Line(concurrency_max, copy_calls_max)
    async with anyio.create_task_group() as group:
        for number in range(expected):
            group.start_soon(line.enter, number)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(QueueFullError, match="Model queue overload") as caught:
            await line.limits.enter(line.copy)
        assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
        assert line.limits._counters.calls_overloaded == 1
        for number in range(expected):
            await until(lambda so_far=number: len(line.entered) > so_far)  # type: ignore[misc]
            line.limits.leave(1)
    assert line.limits._slots == {}


async def test_below_nought_a_copy_keeps_any_number() -> None:
    line = Line(1, -1)
    async with anyio.create_task_group() as group:
        for number in range(500):
            group.start_soon(line.enter, number)
        await anyio.wait_all_tasks_blocked()
        assert len(line.limits._slots[1].line) == 499
        line.limits.copy_left(1)
    assert (len(line.entered), len(line.left)) == (1, 499)


async def test_calls_go_in_order_of_arrival() -> None:
    line = Line(1)
    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(line.enter, number)
            await anyio.wait_all_tasks_blocked()
        for number in range(6):
            assert line.entered == list(range(number + 1))
            line.limits.leave(1)
            await anyio.wait_all_tasks_blocked()


async def test_whoever_gives_up_leaves_no_gap() -> None:
    line = Line(1)
    async with anyio.create_task_group() as group:
        await line.enter(0)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(line.enter, 1)
                await anyio.wait_all_tasks_blocked()
                group.start_soon(line.enter, 2)
                await anyio.wait_all_tasks_blocked()
                # Granted and cancelled in the same moment.
                scope.cancel()
                line.limits.leave(1)
        await anyio.wait_all_tasks_blocked()
        assert line.entered == [0, 2]
        line.limits.leave(1)
    assert line.limits._slots == {}


async def test_whoever_waits_for_a_copy_that_leaves_looks_again() -> None:
    line = Line(2)
    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(line.enter, number)
        await anyio.wait_all_tasks_blocked()
        line.limits.leave(1)  # goes to one of the three, who has not run yet
        line.copy.phase = Phase.GONE
        line.limits.copy_left(1)
        await anyio.wait_all_tasks_blocked()
        assert (len(line.entered), len(line.left)) == (2, 3)
        line.limits.leave(1)
    assert line.limits._slots == {}, "the other slot was given back by the one who left"


async def test_whoever_waits_for_a_model_that_its_vmodel_has_left_goes_at_once() -> None:
    line = Line(1)
    moved: list[int] = []

    async def enter(number: int, vmodel_id: str) -> None:
        try:
            assert await line.limits.enter(line.copy, NamedBy(vmodel_id))
        except ModelMovedError:
            moved.append(number)

    def has_moved(named_by: NamedBy, model_id: ModelId) -> bool:
        assert (named_by.vmodel_id, model_id) == ("v", "m")
        return has_left

    async with anyio.create_task_group() as group:
        await line.enter(0)
        for number, vmodel_id in enumerate("vwvv", start=1):
            group.start_soon(enter, number, vmodel_id)
            await anyio.wait_all_tasks_blocked()
        group.start_soon(line.enter, 5)
        await anyio.wait_all_tasks_blocked()
        has_left = False
        line.limits.vmodel_changed(has_moved, "v")
        has_left = True
        line.limits.vmodel_changed(has_moved, "other")
        line.limits.leave(1)  # goes to the first, which has not run yet
        line.limits.vmodel_changed(has_moved, "v")
        await anyio.wait_all_tasks_blocked()
        assert moved == [3, 4], "the first has its slot"
        for _ in range(3):
            line.limits.leave(1)
            await anyio.wait_all_tasks_blocked()
        assert line.entered == [0, 5]
    assert line.limits._slots == {}
    assert line.limits._named == {}


async def test_a_line_that_its_vmodel_has_left_whole_is_forgotten() -> None:
    line = Line(1)
    line.limits.in_flight = lambda _: 2  # one of the wire's, and the one that asks
    async with anyio.create_task_group() as group:

        async def leave() -> None:
            await anyio.wait_all_tasks_blocked()
            line.limits.vmodel_changed(lambda _, __: True, "v")
            assert line.limits._slots == {}

        group.start_soon(leave)
        with pytest.raises(ModelMovedError):
            await line.limits.enter(line.copy, NamedBy("v"))
    assert line.limits._named == {}


# --- on nodes ------------------------------------------------------------------------------------


@asynccontextmanager
async def limited_cluster(
    *names: str, concurrency_max: int = 2, **more: int
) -> AsyncIterator[Cluster]:
    plan = replace(FAST, concurrency_max=concurrency_max)
    async with running_cluster(*names, plan=plan, parameters=LIMITED, **more) as cluster:
        yield cluster


class Calls:
    """Calls at one instance that go on until told; those that were refused are counted."""

    def __init__(self, instance: Instance) -> None:
        self.router = instance.node.router
        self.running = 0
        self.running_max = 0
        self.refused = 0
        self.end = anyio.Event()

    async def call(self) -> None:
        call = call_for()
        try:
            route = await self.router.route(call)
        except QueueFullError:
            self.refused += 1
            return
        assert isinstance(route, LocalRoute)
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            await self.end.wait()
        finally:
            self.running -= 1
            self.router.finished(call, route, Outcome.ANSWERED)


async def test_no_copy_has_more_calls_than_it_takes() -> None:
    async with limited_cluster("a") as cluster:
        await loaded_at(cluster, "a")
        calls = Calls(cluster["a"])
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(calls.call)
            await until(lambda: calls.refused == 4)
            assert calls.running == 2
            calls.end.set()
        assert (calls.running_max, calls.refused) == (2, 4)
        assert cluster["a"].node.parts.counters.calls_overloaded == 4
        await cluster.settle()
        cluster.check()


async def test_a_runtime_that_tells_no_number_gets_one_call_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with limited_cluster("a", concurrency_max=0) as cluster:
        await loaded_at(cluster, "a")
        calls = Calls(cluster["a"])
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(calls.call)
            await anyio.wait_all_tasks_blocked()
            calls.end.set()
        assert calls.running_max == 1
        assert "tells no maxConcurrency" in caplog.text


async def test_an_overloaded_copy_is_no_reason_to_refuse_if_another_has_room() -> None:
    async with limited_cluster("a", "b", concurrency_max=1, copy_calls_max=1) as cluster:
        await loaded_at(cluster, "a", "b")
        a = cluster["a"]
        held: list[tuple[Instance, Call, Route]] = []
        for instance in (a, cluster["b"]):
            # So that a's own copy looks like the better one, however many calls it has.
            handle = a.node.parts.members.handle(B)
            assert handle is not None
            a.node.parts.copies.table.report_load(handle, "m", 9)
            if held:
                assert await a.send(call_for()) == "b"
            call = call_for(hop=Hop.HIT_ONLY, hops_left=0)
            held.append((instance, call, await instance.node.router.route(call)))
        with pytest.raises(QueueFullError, match="Model queue overload"):
            await a.send(call_for())
        for instance, call, route in held:
            instance.node.router.finished(call, route, Outcome.ANSWERED)
        assert await a.send(call_for()) in "ab"
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_calls_that_wait_for_an_evicted_copy_are_served_by_the_next() -> None:
    async with limited_cluster("a", concurrency_max=1) as cluster:
        a = cluster["a"]
        await loaded_at(cluster, "a")
        calls, others = Calls(a), Calls(a)
        others.end.set()
        async with anyio.create_task_group() as group:
            group.start_soon(calls.call)
            await anyio.wait_all_tasks_blocked()
            for _ in range(5):
                group.start_soon(others.call)
            await anyio.wait_all_tasks_blocked()
            copy = a.node.parts.copies.get(ModelId("m"))
            assert copy is not None
            limits = a.node.parts.copies.call_limits
            assert limits is not None
            assert len(limits._slots[copy.load_id].line) == 5
            a.node.parts.copies.remove(copy)
            assert not limits._slots[copy.load_id].line, "they look again at once"
            await anyio.sleep(1)
            assert a.runtime.held("m") is not None, "a call is in flight"
            calls.end.set()
        assert (others.running_max, others.refused) == (1, 0)
        assert a.runtime.loads_done[ModelId("m")] == 2
        await cluster.settle()
        cluster.check()


@pytest.mark.usefixtures("no_transitions")
async def test_calls_in_line_go_where_their_vmodel_went() -> None:
    """At the instance that the client called, and at a peer."""
    async with limited_cluster("a", "b", concurrency_max=1) as cluster:
        b = cluster["b"]
        await loaded_at(cluster, "b")
        await b.register("n")
        put(cluster, "vmodels", "v", VModelRecord(ModelId("m"), ModelId("m")).encode())
        await cluster.settle()
        running, waiting = call_for(), call_for(named_by=NamedBy("v"))
        route = await b.node.router.route(running)
        there = await cluster["a"].node.router.route(call_for(named_by=NamedBy("v")))
        assert isinstance(there, PeerRoute)
        assert there.named_by is not None, "it may have to wait there, though the copy is loaded"
        from_peer = call_for(named_by=there.named_by, hop=Hop.HIT_ONLY, hops_left=0)
        moved: list[MeshError] = []

        async def wait(call: Call) -> None:
            try:
                await b.node.router.route(call)
            except ModelMovedError as exc:
                moved.append(exc)

        async with anyio.create_task_group() as group:
            for call in (waiting, from_peer):
                group.start_soon(wait, call)
            await anyio.wait_all_tasks_blocked()
            put(cluster, "vmodels", "v", VModelRecord(ModelId("n"), ModelId("n")).encode())
        assert {each.hop_result for each in moved} == {None, Outcome.MOVED.value}
        assert len(moved) == 2
        # One that comes now, from where that is not known yet.
        with pytest.raises(ModelMovedError):
            await b.node.router.route(replace(from_peer, attempts=0))
        b.node.router.finished(running, route, Outcome.ANSWERED)
        cluster["a"].node.router.finished(call_for(), there, Outcome.ABANDONED)
        await cluster.settle()
        cluster.check()


async def test_without_the_wish_there_are_no_slots() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=0, concurrency_max=1)) as cluster:
        await loaded_at(cluster, "a")
        calls = Calls(cluster["a"])
        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(calls.call)
            await until(lambda: calls.running == 40)
            calls.end.set()
        assert cluster["a"].node.parts.copies.call_limits is None


class Wire:
    """Takes slots of a copy as a thread of the wire does (``pin_below`` in mm/_lru.pxd)."""

    def __init__(self, instance: Instance, slots_max: int) -> None:
        parts = instance.node.parts
        assert parts.copies.call_limits is not None
        self.table, self.limits = parts.copies.table, parts.copies.call_limits
        self.limits.in_flight = self.table.in_flight
        self.slots_max = slots_max
        self.running = 0

    def take(self) -> bool:
        has_slot = self.table.in_flight("m") < self.slots_max and self.table.pin("m")
        self.running += has_slot
        return has_slot

    def give_back(self) -> None:
        self.running -= 1
        self.table.unpin("m")
        if self.table.in_flight("m") >= self.slots_max:
            self.limits.look()


@pytest.mark.virtual_time
@pytest.mark.parametrize("seed", range(8))
async def test_the_wire_and_the_line_share_the_slots_of_a_copy(seed: int) -> None:
    """Whatever happens in whatever order: never too many calls, nobody waits beside a free slot,
    and nobody is overtaken.
    """
    rng = random.Random(seed)
    async with limited_cluster("a", concurrency_max=2) as cluster:
        a = cluster["a"]
        await loaded_at(cluster, "a")
        wire, line = Wire(a, 2), [Waiting(a, number) for number in range(60)]
        begun: list[Waiting] = []
        async with anyio.create_task_group() as group:
            while any(not each.is_over for each in line):
                waiting = [each for each in begun if not each.is_over and not each.runs]
                running = [each for each in begun if each.runs]
                what = rng.choice("bbttgelc")
                if what == "b" and len(begun) < len(line) and len(waiting) < 10:
                    begun.append(line[len(begun)])
                    group.start_soon(begun[-1].call)
                elif what == "t":
                    assert not (wire.take() and waiting), "overtaken"
                elif what == "g" and wire.running:
                    wire.give_back()
                elif what == "e" and running:
                    rng.choice(running).end.set()
                elif what == "c" and waiting and len(begun) % 5 == 0:
                    rng.choice(waiting).scope.cancel()
                await anyio.wait_all_tasks_blocked()
                running_count = sum(each.runs for each in begun) + wire.running
                waiting = [each for each in begun if not each.is_over and not each.runs]
                assert running_count == 2 if waiting else running_count <= 2
                if waiting:
                    served = [each.number for each in begun if each.was_served]
                    assert waiting[0].number > max(served, default=-1)
        while wire.running:
            wire.give_back()
        assert wire.table.in_flight("m") == 0
        assert wire.limits._slots == {}
        await cluster.settle()
        cluster.check()


class Waiting:
    """One call through the router, which ends when told."""

    def __init__(self, instance: Instance, number: int) -> None:
        self.router = instance.node.router
        self.number = number
        self.scope = anyio.CancelScope()
        self.end = anyio.Event()
        self.runs = self.was_served = self.is_over = False

    async def call(self) -> None:
        call = call_for()
        with self.scope:
            route = await self.router.route(call)
            self.runs = self.was_served = True
            await self.end.wait()
            self.runs = False
            self.router.finished(call, route, Outcome.ANSWERED)
        self.is_over = True

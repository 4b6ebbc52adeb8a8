"""Calls that wait for a load when their vmodel goes over to another model go there, at once and at
whichever instance they wait (spec core 2.15).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import anyio
import pytest

from mm.core.calls import MOVES_MAX
from mm.core.ids import ModelId
from mm.core.vmodel_changes import SetVModel
from mm.errors import StatusCode
from mm.testing.cluster import INFO, Cluster, Instance, running_cluster, until
from mm.testing.instance import RuntimeAnswerError
from tests.mesh.test_transitions import pair

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

SLOW_S = 60.0
#: After a switch nobody is served by the old model later than that, and of it the load takes half.
OLD_S_MAX = 1.0


@dataclass
class Calls:
    """Calls of "v", and what became of them."""

    cluster: Cluster
    answers: list[tuple[ModelId, float]] = field(default_factory=list)

    async def call(self, instance: Instance) -> None:
        model_id = await instance.invoke_vmodel("v")
        self.answers.append((model_id, anyio.current_time()))


async def set_v(instance: Instance, target: str) -> None:
    """The first one creates it; the next one switches at once."""
    request = SetVModel("v", ModelId(target), info=INFO, force=True)
    await instance.node.vmodels.set(request)


def plan(cluster: Cluster, **load_s: float) -> None:
    for each in cluster.serving:
        for model_id, seconds in load_s.items():
            each.runtime.plan(model_id, load_s=seconds)


def check_nobody_waits(cluster: Cluster) -> None:
    for each in cluster.serving:
        waiters = each.node.parts.waiters
        assert (waiters.calls, waiters.request_bytes, waiters._running_count) == (0, 0, 0)
        assert not waiters._named
        assert each.node.router.routes_open == 0


@pytest.mark.parametrize("calls_count", [1, 3, 40])
async def test_all_go_where_the_vmodel_went(calls_count: int) -> None:
    async with running_cluster("a", "b", "c") as cluster:
        plan(cluster, m=SLOW_S, n=0.5)
        await set_v(cluster["a"], "m")
        calls = Calls(cluster)
        async with anyio.create_task_group() as group:
            for instance in cluster.serving:
                for _ in range(calls_count):
                    group.start_soon(calls.call, instance)
            await anyio.sleep(2)
            assert sum(each.node.parts.waiters.calls for each in cluster.serving) > calls_count
            await set_v(cluster["c"], "n")
            switched_s = anyio.current_time()
        assert {model_id for model_id, _ in calls.answers} == {"n"}
        assert len(calls.answers) == 3 * calls_count
        assert max(at_s for _, at_s in calls.answers) < switched_s + OLD_S_MAX
        check_nobody_waits(cluster)


async def test_a_load_that_nobody_waits_for_any_more_goes_on() -> None:
    async with running_cluster("a") as cluster:
        plan(cluster, m=SLOW_S, n=0.5)
        await set_v(cluster["a"], "m")
        calls = Calls(cluster)
        async with anyio.create_task_group() as group:
            group.start_soon(calls.call, cluster["a"])
            await anyio.sleep(2)
            await set_v(cluster["a"], "n")
        await anyio.sleep(SLOW_S)
        assert cluster["a"].node.parts.copies.get(ModelId("m")) is not None
        await cluster.settle()


async def test_calls_of_the_model_itself_and_of_other_vmodels_wait_on() -> None:
    async with running_cluster("a", "b") as cluster:
        plan(cluster, m=SLOW_S, n=0.5)
        a, b = cluster["a"], cluster["b"]
        await set_v(a, "m")
        await a.node.vmodels.set(SetVModel("w", ModelId("m"), info=INFO))
        served: list[str] = []

        async def call_model(instance: Instance) -> None:
            await instance.invoke("m")
            served.append("m")

        async def call_other(instance: Instance) -> None:
            served.append(await instance.invoke_vmodel("w"))

        calls = Calls(cluster)
        async with anyio.create_task_group() as group:
            for instance in (a, b, a, b):
                for each in (calls.call, call_model, call_other):
                    group.start_soon(each, instance)
            await anyio.sleep(2)
            await set_v(a, "n")
            await anyio.sleep(5)
            assert not served
        assert served == ["m"] * 8
        assert [model_id for model_id, _ in calls.answers] == ["n"] * 4
        check_nobody_waits(cluster)


async def test_a_peer_may_hear_of_it_first() -> None:
    async with running_cluster() as cluster:
        cluster.watch_delay_s = 30.0
        a = await cluster.start("a", is_known_by_all=False)
        cluster.watch_delay_s = 0.0
        b = await cluster.start("b", is_known_by_all=False)
        await set_v(b, "m")
        await anyio.sleep(40)
        plan(cluster, m=SLOW_S, n=0.5)
        calls = Calls(cluster)
        async with anyio.create_task_group() as group:
            group.start_soon(b.load_here, "m")
            await anyio.sleep(31)
            group.start_soon(calls.call, a)
            await anyio.sleep(2)
            await set_v(b, "n")
            switched_s = anyio.current_time()
            await until(lambda: bool(calls.answers))
        [(model_id, at_s)] = calls.answers
        assert model_id == "n"
        assert at_s < switched_s + OLD_S_MAX


async def test_a_peer_that_is_behind_sends_nobody_away() -> None:
    async with running_cluster() as cluster:
        a = await cluster.start("a", is_known_by_all=False)
        cluster.watch_delay_s = 10.0
        b = await cluster.start("b", is_known_by_all=False)
        await set_v(a, "m")
        await anyio.sleep(15)
        plan(cluster, m=SLOW_S, n=0.5)
        calls = Calls(cluster)
        async with anyio.create_task_group() as group:
            group.start_soon(b.load_here, "m")
            await anyio.sleep(5)
            await set_v(a, "n")
            await set_v(a, "m")
            await anyio.sleep(1)
            group.start_soon(calls.call, a)
        assert [model_id for model_id, _ in calls.answers] == ["m"]
        told = a.node.parts.counters
        assert told.forwards == 1, "it hears of a switch that was before the call"


async def test_one_that_comes_back_is_waited_for() -> None:
    async with running_cluster("a", "b") as cluster:
        plan(cluster, m=SLOW_S, n=SLOW_S)
        await set_v(cluster["a"], "m")
        calls = Calls(cluster)
        async with anyio.create_task_group() as group:
            for instance in cluster.serving:
                group.start_soon(calls.call, instance)
            for target in ("n", "m", "n", "m"):
                await anyio.sleep(2)
                await set_v(cluster["b"], target)
            assert pair(cluster)[0] == "m"
        assert [model_id for model_id, _ in calls.answers] == ["m"] * 2


async def test_however_often_it_moves_no_call_fails_for_it() -> None:
    async with running_cluster("a", "b") as cluster:
        targets = [f"m{number}" for number in range(MOVES_MAX + 3)]
        plan(cluster, **dict.fromkeys(targets, SLOW_S))
        await set_v(cluster["a"], targets[0])
        calls = Calls(cluster)
        async with anyio.create_task_group() as group:
            for instance in cluster.serving:
                group.start_soon(calls.call, instance)
            for target in targets[1:]:
                await anyio.sleep(2)
                await set_v(cluster["b"], target)
        assert {model_id for model_id, _ in calls.answers} <= set(targets)
        check_nobody_waits(cluster)


async def test_an_answer_of_the_runtime_is_the_answer() -> None:
    async with running_cluster("a") as cluster:
        await set_v(cluster["a"], "m")
        await cluster["a"].invoke_vmodel("v")
        cluster["a"].fail_predictions(StatusCode.INVALID_ARGUMENT, "no such tensor")
        with pytest.raises(RuntimeAnswerError):
            await cluster["a"].invoke_vmodel("v")

"""Instances that take calls and do not answer: left alone until they do, and not by their calls."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from mm.core.calls import Outcome, PeerRoute
from mm.testing.cluster import Cluster, running_cluster
from tests.mesh.calls import FAST, B, C, M, call_for, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

#: Two looks, and the time to answer, with room for the network.
NOTICED_S = 3.5


@asynccontextmanager
async def frozen_holder(*holders: str) -> AsyncIterator[Cluster]:
    """a calls; b, one of the holders, has just taken a call, and takes all that come."""
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, *holders)
        async with anyio.create_task_group() as group:
            cluster.network.cut("a:8080", "b:8080")
            call = call_for()
            # Whichever copy is drawn: this one is sent to b.
            call.tried.add(C)
            route = await cluster["a"].node.router.route(call)
            assert isinstance(route, PeerRoute)
            assert route.instance_id == B
            yield cluster
            cluster["a"].node.router.finished(call, route, Outcome.ABANDONED)
            group.cancel_scope.cancel()
        cluster.network.heal()


async def test_calls_go_to_another_copy_until_it_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mm.mesh.sentinel")
    async with frozen_holder("b", "c") as cluster:
        members = cluster["a"].node.parts.members
        await anyio.sleep(NOTICED_S)
        for _ in range(40):
            with anyio.fail_after(0.1):
                assert await cluster["a"].invoke("m") == "c"
            await anyio.sleep(1)
            assert members.handle(B) is None, "no pause ends it, and no call has to find out"
        assert members.next_reachable_ms() == 1000
        cluster.network.heal()
        await anyio.sleep(10)
        assert members.handle(B) is not None
        assert {await cluster["a"].invoke("m") for _ in range(40)} == {"b", "c"}
    told = [record.getMessage() for record in caplog.records]
    assert told == ["instance b does not answer: calls go elsewhere", "instance b answers again"]


async def test_the_only_copy_is_replaced_or_reached_another_way() -> None:
    async with frozen_holder("b") as cluster:
        await anyio.sleep(NOTICED_S)
        with anyio.fail_after(5):
            await cluster["a"].invoke("m")
        assert cluster.network.is_cut("a:8080", "b:8080")


async def test_a_failed_call_does_not_make_it_reachable_sooner() -> None:
    async with frozen_holder("b", "c") as cluster:
        await anyio.sleep(NOTICED_S)
        node, members = cluster["a"].node, cluster["a"].node.parts.members
        members.mark_unreachable(B, anyio.current_time())
        await anyio.sleep(5)
        assert members.handle(B) is None
        view = node.parts.cluster.view(
            node.own_record(), now_ms=cluster["a"].clock.now_ms(), now_s=anyio.current_time()
        )
        seen = view.find(B)
        assert seen is not None
        assert not seen.reachable, "nor are loads sent there"


async def test_an_answer_ends_it_at_once() -> None:
    """As when nothing but the silent copy is left to be tried."""
    async with frozen_holder("b", "c") as cluster:
        await anyio.sleep(NOTICED_S)
        node = cluster["a"].node
        members, sentinel = node.parts.members, node.parts.sentinel
        assert members.handle(B) is None
        assert node.statistics().instances_silent == 1
        sentinel.sent(B)
        sentinel.ended(B, Outcome.ANSWERED)
        assert members.handle(B) is not None
        assert node.statistics().instances_silent == 0


async def test_slow_models_are_no_reason() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        cluster.call_s = 30.0
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(cluster["a"].invoke, "m")
            for _ in range(25):
                await anyio.sleep(1)
                assert cluster["a"].node.parts.members.handle(B) is not None


async def test_one_that_is_gone_is_not_asked_for_ever() -> None:
    async with frozen_holder("b", "c") as cluster:
        await anyio.sleep(NOTICED_S)
        await cluster["b"].stop()
        await anyio.sleep(20)
        members, arrivals = cluster["a"].node.parts.members, cluster.network.arrivals["b:8080"]
        assert B not in members
        assert members.next_reachable_ms() is None
        await anyio.sleep(60)
        assert cluster.network.arrivals["b:8080"] == arrivals
        assert await cluster["a"].invoke(M) == "c"

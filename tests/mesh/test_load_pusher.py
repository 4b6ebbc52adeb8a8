"""Counts of calls in flight, pushed to the peers that call: in a cluster, in virtual time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import anyio
import pytest

from mm.core.calls import Hop, Outcome
from mm.core.ids import InstanceId, ModelId
from mm.testing.cluster import Cluster, Instance, running_cluster
from tests.mesh.calls import FAST, B, call_for, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def listen(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str, int]]:
    """Note what a is told, and when."""
    heard: list[tuple[float, str, int]] = []
    take = cluster["a"].take_loads

    def note(sender: InstanceId, loads: Mapping[ModelId, int]) -> None:
        heard.extend((anyio.current_time(), sender, count) for count in loads.values())
        take(sender, loads)

    monkeypatch.setattr(cluster["a"], "take_loads", note)
    return heard


async def hold(instance: Instance, count: int) -> list[tuple[Any, Any]]:
    """Begin calls of nobody else at an instance."""
    router = instance.node.router
    return [(call := call_for(hop=Hop.HIT_ONLY), await router.route(call)) for _ in range(count)]


async def test_a_peer_that_called_hears_of_the_calls_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b", "c")
        heard = listen(cluster, monkeypatch)
        table = cluster["a"].node.parts.copies.table
        handle = cluster["a"].node.parts.members.handle(B)
        while "b" not in {sender for _, sender, _ in heard}:
            await cluster["a"].invoke("m")
            await anyio.sleep(0.05)
        held = await hold(cluster["b"], 9)
        await anyio.sleep(0.02)
        assert dict(table.peer_loads("m"))[handle] == 9  # type: ignore[index]
        router = cluster["a"].node.router
        for _ in range(20):
            route = await router.route(call := call_for())
            assert getattr(route, "instance_id", None) == "c"
            router.finished(call, route, Outcome.ANSWERED)
        for call, route in held:
            cluster["b"].node.router.finished(call, route, Outcome.ANSWERED)
        await anyio.sleep(0.02)
        assert dict(table.peer_loads("m"))[handle] == 0  # type: ignore[index]


async def test_calls_that_nobody_tells_of_one_by_one_are_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wire's: it says now and then which peers called, and the table knows the counts."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        heard = listen(cluster, monkeypatch)
        table, pusher = (getattr(cluster["b"].node.parts, each) for each in ("copies", "pusher"))
        table = table.table
        assert not pusher.look(anyio.current_time())
        pusher.heard(ModelId("m"), InstanceId("a"), 0, 0.001)
        assert pusher.look(anyio.current_time())
        await anyio.sleep(0.1)
        assert heard == []
        for pins in (3, 7):
            for _ in range(pins):
                table.pin("m")
            assert pusher.look(anyio.current_time())
            await anyio.sleep(0.02)
        assert [count for _, _, count in heard] == [3, 10]
        for _ in range(10):
            table.unpin("m")
        pusher.look(anyio.current_time())
        await anyio.sleep(3)
        assert heard[-1][1:] == ("b", 0)
        assert not pusher.look(anyio.current_time())


async def test_pushes_come_at_most_every_5_ms_and_end_with_the_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        heard = listen(cluster, monkeypatch)
        await cluster["a"].invoke("m")
        held = []
        for _ in range(100):
            held += await hold(cluster["b"], 1)
            await anyio.sleep(0.001)
        await anyio.sleep(0.1)
        assert heard[-1][1:] == ("b", 100)
        gaps_s = [later[0] - one[0] for one, later in pairwise(heard)]
        assert min(gaps_s) >= 0.0049
        assert 15 <= len(heard) <= 22
        await anyio.sleep(3)
        count = len(heard)
        for call, route in held:
            cluster["b"].node.router.finished(call, route, Outcome.ANSWERED)
        await anyio.sleep(1)
        assert [load for *_, load in heard[count:]] == [0], "all that a may not find out by itself"


async def test_slow_calls_are_told_of_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        cluster.call_s = 0.4
        await cluster["a"].invoke("m")
        heard = listen(cluster, monkeypatch)
        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(cluster["a"].invoke, "m")
                await anyio.sleep(0.02)
        gaps_s = [later[0] - one[0] for one, later in pairwise(heard)]
        assert 0.099 <= min(gaps_s) <= 0.12


async def test_a_peer_that_takes_no_pushes_is_spared_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_cluster("a", "b", plan=FAST, load_push_rest_s=1.0) as cluster:
        await loaded_at(cluster, "b")
        heard = listen(cluster, monkeypatch)
        cluster.network.cut("b:8080", "a:8080")  # replies do not come either: a gives up
        with anyio.move_on_after(0.5):
            await cluster["a"].invoke("m")
        await anyio.sleep(1.0)
        cluster.network.heal()
        await cluster["a"].invoke("m")
        await anyio.sleep(0.1)
        counters = cluster["b"].node.statistics().counters
        assert (heard, counters.loads_pushed) == ([], 0)
        await anyio.sleep(1.0)
        await cluster["a"].invoke("m")
        await anyio.sleep(0.1)
        assert counters.loads_pushed > 0


async def test_a_call_that_nobody_forwarded_costs_no_push() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        for _ in range(10):
            await cluster["a"].invoke("m")
        await anyio.sleep(1)
        assert cluster["a"].node.statistics().counters.loads_pushed == 0
        assert len(cluster["a"].node.parts.pusher._reports) == 0

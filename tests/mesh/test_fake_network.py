"""The network that stands in for the wire between instances does what its docstrings promise.

What depends on durations runs in virtual time on trio; on asyncio they are milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping

import anyio
import pytest

from mm.core.calls import Call, Hop, Outcome, PeerRoute
from mm.core.ids import InstanceId, ModelId
from mm.errors import (
    InvalidRequestError,
    MeshError,
    ModelNotFoundError,
    NoRoomError,
    StatusCode,
    StoreUnavailableError,
)
from mm.mesh.ports import ModelStatus, PeerCallError, PeerIdentity, Peers
from mm.testing.fake_network import DEAD_WIRE_S, FakeNetwork

pytestmark = pytest.mark.anyio

M = ModelId("m")


class StubServer:
    """Answers with what it was asked; fails as told."""

    def __init__(self, name: str) -> None:
        self.name = InstanceId(name)
        self.calls: list[Call] = []
        self.loads: dict[InstanceId, dict[ModelId, int]] = {}
        self.failure: Exception | None = None
        self.waits = anyio.Event()
        self.arrived = anyio.Event()
        self.waits.set()

    def identity(self) -> PeerIdentity:
        return PeerIdentity(self.name, 7)

    async def ensure_loaded(self, call: Call, *, sync: bool) -> ModelStatus:
        await self._note(call)
        return ModelStatus("LOADED" if sync else "LOADING")

    async def model_status(self, model_id: ModelId) -> ModelStatus:
        return ModelStatus("LOADED", errors=(model_id,))

    def tell_load(self, call: Call) -> int:
        return 7

    def take_loads(self, sender: InstanceId, loads: Mapping[ModelId, int]) -> None:
        self.loads[sender] = dict(loads)

    async def serve(self, call: Call) -> InstanceId:
        await self._note(call)
        return self.name

    async def _note(self, call: Call) -> None:
        self.calls.append(call)
        self.arrived.set()
        await self.waits.wait()
        if self.failure is not None:
            raise self.failure


def route_to(address: str) -> PeerRoute:
    return PeerRoute(
        M,
        InstanceId("b"),
        address,
        Hop.LOAD_LOCAL,
        tried=frozenset({InstanceId("x")}),
        excludes=frozenset({InstanceId("y"), InstanceId("z,1")}),
        hops_left=1,
        known_size_units=9,
    )


async def failed(network: FakeNetwork, timeout_s: float = 5) -> PeerCallError:
    """Send an ensure-loaded from a to b and answer how it failed."""
    with pytest.raises(PeerCallError) as caught:
        await network.peers("a").ensure_loaded(
            route_to("b"), sync=True, last_used_ms=0, timeout_s=timeout_s
        )
    return caught.value


async def test_calls_arrive_with_what_the_route_says() -> None:
    network, server = FakeNetwork(), StubServer("b")
    network.listen("b", server)
    peers: Peers = network.peers("a")
    assert await peers.identify("b", 1) == PeerIdentity(InstanceId("b"), 7)
    answer = await peers.ensure_loaded(route_to("b"), sync=True, last_used_ms=5, timeout_s=1)
    assert answer.status == "LOADED"
    assert (await peers.model_status(route_to("b"), timeout_s=1)).errors == (M,)
    assert await network.peers("a").forward(route_to("b"), "/s/M") == "b"
    assert server.calls == [
        Call(
            M,
            hop=Hop.LOAD_LOCAL,
            tried={InstanceId("x")},
            excludes={InstanceId("y"), InstanceId("z,1")},
            hops_left=1,
            known_size_units=9,
            last_used_ms=last_used_ms,
            method=method,
        )
        for last_used_ms, method in ((5, ""), (0, "/s/M"))
    ]
    assert network.arrivals["b"] == 4


async def test_nobody_there_is_a_refusal() -> None:
    network = FakeNetwork()
    assert await network.peers("a").identify("b", 1) is None
    error = await failed(network)
    assert (error.outcome, error.message) == (Outcome.UNREACHABLE, "b: connection refused")


async def test_a_peer_that_refuses_says_how() -> None:
    network, server = FakeNetwork(), StubServer("b")
    network.listen("b", server)
    server.failure = NoRoomError("draining here")
    server.failure.hop_result = "draining"
    error = await failed(network)
    assert (error.outcome, error.message) == (Outcome.DRAINING, "draining here")
    server.failure = ModelNotFoundError()
    with pytest.raises(ModelNotFoundError):
        await network.peers("a").forward(route_to("b"), "/s/M")


async def test_of_an_answer_that_is_an_error_only_what_the_wire_tells_arrives() -> None:
    network, server = FakeNetwork(), StubServer("b")
    network.listen("b", server)
    peers = network.peers("a")

    async def ask() -> None:
        await peers.ensure_loaded(route_to("b"), sync=True, last_used_ms=0, timeout_s=1)

    server.failure = MeshError("vanished", code=StatusCode.NOT_FOUND)
    with pytest.raises(ModelNotFoundError, match="vanished"):
        await ask()
    server.failure = InvalidRequestError("empty")
    with pytest.raises(MeshError, match="empty") as caught:
        await ask()
    assert (type(caught.value), caught.value.code) == (MeshError, StatusCode.INVALID_ARGUMENT)
    server.failure = StoreUnavailableError("silent")
    error = await failed(network)
    assert (error.outcome, error.message, error.answered) == (Outcome.STALE, "silent", False)


async def test_a_crash_breaks_calls_in_progress() -> None:
    network, server = FakeNetwork(), StubServer("b")
    server.waits = anyio.Event()
    network.listen("b", server)
    errors = []

    async def send() -> None:
        errors.append(await failed(network))

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        await server.arrived.wait()
        network.close("b")
    assert [error.message for error in errors] == ["b: connection broke"]
    network.listen("b", StubServer("b"))
    assert await network.peers("a").identify("b", 1) is not None


@pytest.mark.virtual_time
async def test_a_split_swallows_both_ways_until_healed() -> None:
    network, server = FakeNetwork(latency_s=0.1), StubServer("b")
    for name in "abc":
        network.listen(name, server if name == "b" else StubServer(name))
    network.split("a", "bc")
    error = await failed(network, timeout_s=5)
    assert (error.outcome, error.message) == (Outcome.UNREACHABLE, "b: no answer in 5 s")
    assert await network.peers("b").identify("a", 1) is None
    assert await network.peers("b").identify("c", 1) is not None
    answers = []

    async def ask() -> None:
        answers.append(await network.peers("a").forward(route_to("b"), "/s/M"))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        with anyio.move_on_after(DEAD_WIRE_S - 1):
            await server.arrived.wait()
        assert server.calls == []
        network.heal()
    assert answers == ["b"]


@pytest.mark.virtual_time
async def test_a_call_may_take_long_over_a_sound_wire_and_not_over_a_dead_one() -> None:
    network, server, ended = FakeNetwork(), StubServer("b"), list[float]()
    network.listen("b", server)
    server.waits = anyio.Event()

    async def ask() -> None:
        with pytest.raises(PeerCallError, match="b: no answer to pings"):
            await network.peers("a").forward(route_to("b"), "/s/M")
        ended.append(anyio.current_time())

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        for cut_s in (DEAD_WIRE_S - 1, DEAD_WIRE_S + 1):
            await anyio.sleep(1_000)
            network.cut("b", "a")
            await anyio.sleep(cut_s)
            network.mend("b", "a")
    assert ended == [anyio.current_time() - 1]


@pytest.mark.virtual_time
async def test_a_wire_may_be_cut_one_way_so_that_only_answers_are_lost() -> None:
    network, server = FakeNetwork(), StubServer("b")
    network.listen("b", server)
    network.cut("b", "a")
    assert (await failed(network)).message == "b: no answer in 5 s"
    assert len(server.calls) == 1


@pytest.mark.virtual_time
async def test_latency_counts_both_ways() -> None:
    network = FakeNetwork(latency_s=0.25)
    network.listen("b", StubServer("b"))
    await network.peers("a").identify("b", 1)
    assert anyio.current_time() == pytest.approx(0.5)
    assert await network.peers("a").identify("b", 0.4) is None

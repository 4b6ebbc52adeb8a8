"""How busy copies are, told to peers of their own accord (docs/peer-protocol.md)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mm.core.ids import InstanceId, ModelId
from mm.core.load_report_wire import encode_report
from mm.edge.h2 import PEER_LIMITS, Channel, ChannelPool, GrpcServer, IncomingCall
from mm.edge.h2.messages import PREFIX, frame_message
from mm.edge.peers import PEER_SERVICE, GrpcPeers, PeerService
from mm.edge.unary import ServiceTable, call_raw, exchange, request_headers
from mm.errors import MethodRefusedError
from mm.mesh.ports import PeerCallError
from mm.testing.cluster import until
from tests.edge.upstream import PATIENCE_S, serve_proxy

pytestmark = pytest.mark.anyio
ME, M, N = InstanceId("me"), ModelId("m"), ModelId("n ü")


class StubNode:
    """The half of a node that hears."""

    def __init__(self) -> None:
        self.router = self
        self.heard: list[tuple[str, dict[str, int]]] = []
        self.event = asyncio.Event()

    def loads_pushed(self, sender: InstanceId, loads: Mapping[ModelId, int]) -> None:
        self.heard.append((sender, dict(loads)))
        self.event.set()

    async def wait_heard(self, count: int) -> None:
        while len(self.heard) < count:
            self.event.clear()
            await asyncio.wait_for(self.event.wait(), PATIENCE_S)


@asynccontextmanager
async def serve(table: ServiceTable, port: int = 0) -> AsyncIterator[str]:
    server = GrpcServer(table, limits=PEER_LIMITS, external=False)
    port = await server.start("127.0.0.1", port)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def calling() -> AsyncIterator[tuple[GrpcPeers, ChannelPool]]:
    pool = ChannelPool(PEER_LIMITS)
    try:
        yield GrpcPeers(pool), pool
    finally:
        await pool.close()


def services(node: Any) -> ServiceTable:
    table = ServiceTable()
    PeerService(node, InstanceId("there")).add_statistics(table)
    return table


async def refused_at_last(peers: GrpcPeers, address: str) -> PeerCallError:
    """Push, and again when the peer's answer to that is here."""
    await peers.push_loads(address, ME, {M: 1}, timeout_s=60)
    return await refused(peers, address)


async def refused(peers: GrpcPeers, address: str) -> PeerCallError:
    """Push once the stream has ended."""
    stream = peers._load_streams[address]
    await until(lambda: stream.failure is not None)
    with pytest.raises(PeerCallError) as caught:
        await peers.push_loads(address, ME, {M: 1}, timeout_s=60)
    return caught.value


async def test_pushes_arrive_in_order_on_one_stream() -> None:
    node = StubNode()
    async with serve(services(node)) as address, calling() as (peers, pool):
        await peers.push_loads(address, ME, {M: 3, N: 0}, timeout_s=60)
        for count in range(50):
            await peers.push_loads(address, ME, {M: count}, timeout_s=60)
        await node.wait_heard(51)
        assert node.heard[0] == (ME, {M: 3, N: 0})
        assert [loads[M] for _, loads in node.heard[1:]] == list(range(50))
        assert pool.get(address).open_count == 1


async def test_an_older_version_does_not_know_them_and_says_so_once() -> None:
    """Its proxy takes the call for a client's without an id; the stream ends and nothing breaks."""
    async with serve_proxy(external=False) as older, calling() as (peers, pool):
        error = await refused_at_last(peers, older.address)
        assert "must include mm-model-id header" in error.message
        assert pool.get(older.address).open_count == 0
        assert not older.router.calls


async def test_a_peer_that_refuses_is_not_asked_on() -> None:
    async def refuse(call: IncomingCall) -> None:
        raise MethodRefusedError("no such thing")

    table = ServiceTable()
    table.add(PEER_SERVICE + "pushLoads", refuse)
    async with serve(table) as address, calling() as (peers, _):
        assert "no such thing" in (await refused_at_last(peers, address)).message


async def test_a_peer_that_restarted_is_told_on_a_new_stream() -> None:
    node = StubNode()
    async with calling() as (peers, _):
        async with serve(services(node)) as address:
            await peers.push_loads(address, ME, {M: 1}, timeout_s=60)
            await node.wait_heard(1)
        await refused(peers, address)
        async with serve(services(node), int(address.rpartition(":")[2])):
            await peers.push_loads(address, ME, {M: 2}, timeout_s=60)
            await node.wait_heard(2)
            assert node.heard[-1] == (ME, {M: 2})


async def test_nobody_there() -> None:
    async with calling() as (peers, _):
        with pytest.raises(PeerCallError, match=r"127\.0\.0\.1:1"):
            await peers.push_loads("127.0.0.1:1", ME, {M: 1}, timeout_s=60)


async def test_what_a_peer_does_not_read_is_bounded() -> None:
    async def sleep(call: IncomingCall) -> None:
        await asyncio.Event().wait()

    table = ServiceTable()
    table.add(PEER_SERVICE + "pushLoads", sleep)
    async with serve(table) as address, calling() as (peers, _):
        loads = {ModelId(f"{'x' * 200}{number}"): number for number in range(100)}
        pushes_count = 0
        with contextlib.suppress(PeerCallError):
            while pushes_count < 100:
                await peers.push_loads(address, ME, loads, timeout_s=60)
                pushes_count += 1
        assert 10 < pushes_count < 40, "a window and a little more"


async def test_idle_streams_are_closed_when_another_begins() -> None:
    node = StubNode()
    async with (
        serve(services(node)) as one,
        serve(services(node)) as other,
        calling() as (peers, pool),
    ):
        await peers.push_loads(one, ME, {M: 1}, timeout_s=60)
        await node.wait_heard(1)
        peers._load_streams[one].used_s -= 61
        await peers.push_loads(other, ME, {M: 1}, timeout_s=60)
        assert pool.get(one).open_count == 0
        assert pool.get(other).open_count == 1


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (frame_message(b"\x0a\xff"), b"3", b"not a LoadReport"),
        (b"\x01\x00\x00\x00\x01x", b"3", b"load reports are sent uncompressed"),
        (
            PREFIX.pack(0, 2**20 + 1),
            b"8",
            b"a load report has at most 1048576 bytes, this one 1048577",
        ),
    ],
)
async def test_what_is_no_report_ends_the_stream(body: bytes, status: bytes, text: bytes) -> None:
    node = StubNode()
    async with serve(services(node)) as address:
        channel = Channel(address, PEER_LIMITS)
        headers = request_headers(channel, PEER_SERVICE + "pushLoads", 5)
        answer = await exchange(channel, headers, body)
        trailers = dict(answer.trailers or [])
        assert trailers[b"grpc-status"] == status
        assert text in trailers[b"grpc-message"]
        await channel.close()
    assert node.heard == []


async def test_a_stream_that_ends_is_answered() -> None:
    node = StubNode()
    async with serve(services(node)) as address:
        channel = Channel(address, PEER_LIMITS)
        report = encode_report(ME, {M: 3})
        path = PEER_SERVICE + "pushLoads"
        assert await call_raw(channel, path, report, timeout_s=60) == b""
        await channel.close()
    assert node.heard == [(ME, {M: 3})]

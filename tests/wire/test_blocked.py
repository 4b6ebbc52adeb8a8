"""Sockets that take nothing, instances that go: calls end in time, and are heard of."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

import pytest
from h2.errors import ErrorCodes
from h2.events import RequestReceived, StreamReset

from mm.core.calls import LocalRoute, Outcome
from mm.edge.h2.messages import frame_message
from mm.wire import Role, Wire, WireSettings
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import OK, begin, request
from tests.wire.stand import LOAD_ID, WireStand, serve_wire, until

pytestmark = pytest.mark.anyio
LOST = [*OK, (b"grpc-status", b"5"), (b"grpc-message", b"no such model")]


async def heard(stand: WireStand, runtime: RawPeer) -> None:
    """Wait until the wire has read something of the runtime."""
    read = stand.counts.bytes_in_runtime
    runtime.h2.ping(bytes(8))
    runtime.flush()
    await until(lambda: stand.counts.bytes_in_runtime > read)


async def fill(stand: WireStand, client: RawPeer, runtime: RawPeer) -> None:
    """Send a request without an end until the runtime's socket takes nothing more of the wire."""
    stream_id = client.begin(request())
    client.h2.send_data(stream_id, b"\0" + (2**30).to_bytes(4, "big"))
    same = 0
    while same < 5:
        while (room := client.h2.local_flow_control_window(stream_id)) > 0:
            client.h2.send_data(stream_id, bytes(min(room, 16384)))
        client.flush()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.02):
                await client.read()
        before = stand.counts.bytes_out_runtime
        for _ in range(2):
            # Its answer would leave in the turn that reads it: before the next one is read.
            await heard(stand, runtime)
        is_open = client.h2.local_flow_control_window(stream_id) > 0
        same = 0 if is_open or stand.counts.bytes_out_runtime != before else same + 1


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_call_ends_although_the_runtimes_socket_is_full(leaves: bool) -> None:
    """It would be sent again when its stream to the runtime is closed, which takes until then."""

    async def serve(peer: RawPeer) -> None:
        sock = peer.writer.get_extra_info("socket")
        # So that the kernel does not find more room for it later.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        peer.start(window_bytes=2**30)
        asked = await peer.wait_for(RequestReceived)
        assert asked.stream_id is not None
        begun.set()
        await full.wait()
        # What was sent meanwhile is not read.
        peer.h2.send_headers(asked.stream_id, LOST, end_stream=True)
        peer.flush()
        await go_on.wait()
        await peer.wait_on(StreamReset, asked.stream_id)

    begun, full, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    limits = {"message_bytes_max": 2**31 - 1}
    async with listen(serve) as (address, peers):
        port = int(address.rpartition(":")[2])
        async with (
            serve_wire(runtime_port=port, **limits) as stand,
            connect(stand.port) as client,
            connect(stand.port) as other,
        ):
            timeout = () if leaves else ((b"grpc-timeout", b"2S"),)
            stream_id = client.begin(request(b"/t.S/M", *timeout))
            client.h2.send_data(stream_id, frame_message(bytes(100))[:50])
            client.flush()
            await begun.wait()
            await fill(stand, other, peers[0])
            read = stand.counts.bytes_in_runtime
            full.set()
            await until(lambda: stand.counts.bytes_in_runtime > read)
            if not leaves:
                # Should time have been up earlier on a slow machine, there was nothing to see.
                headers, _ = await client.wait_answer(stream_id)
                assert headers[b"grpc-status"] == b"4"
            else:
                client.reset(stream_id, ErrorCodes.CANCEL)
            await other.close()
            await stand.settle(calls_open=0)
            go_on.set()
            await stand.settle(hits_open=0)
            if not leaves:
                return
            await until(lambda: bool(stand.router.tried_routes))
            route = LocalRoute("m", load_id=LOAD_ID)  # type: ignore[arg-type]
            assert stand.router.tried_routes == [(route, Outcome.LOST, "no such model")]
            assert stand.counts.replayed == 0


async def test_an_instance_that_is_gone_is_not_dialled_again() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        asked = await peer.wait_for(RequestReceived)
        assert asked.stream_id is not None
        begun.set()
        await gone.wait()
        peer.reset(asked.stream_id, ErrorCodes.REFUSED_STREAM)
        await peer.wait_closed()

    begun, gone = asyncio.Event(), asyncio.Event()
    async with listen(serve) as (address, peers), serve_wire() as here:
        async with connect(here.port) as client:
            here.table.set_state("m", 0)  # type: ignore[arg-type]
            here.add_peer("m", int(address.rpartition(":")[2]))
            stream_id = begin(client)
            await begun.wait()
            here.wire.set_peers([])
            # Another call goes by what it was told, for whatever comes first is carried out first.
            assert (await client.wait_answer(begin(client)))[1] == frame_message(b"echo:q")
            gone.set()
            assert (await client.wait_answer(stream_id))[1] == frame_message(b"echo:q")
            assert not here.router.tried_routes
            # The first was sent, and so counts as one that was tried.
            tried = {"calls_there": 1, "replayed": 1, "again_fault": 1}
            await here.settle(spliced_model=1, left_away=1, hits_open=0, **tried)
        assert len(peers) == 1


async def test_calls_that_wait_for_an_instance_that_goes_are_tier_2s_at_once() -> None:
    async def serve(_peer: RawPeer) -> None:
        # Without its settings there is no connection.
        await asyncio.Event().wait()

    async with listen(serve) as (address, peers), serve_wire() as here:
        async with connect(here.port) as client:
            here.table.set_state("m", 0)  # type: ignore[arg-type]
            here.add_peer("m", int(address.rpartition(":")[2]))
            stream_id = begin(client)
            await until(lambda: bool(peers))
            here.wire.set_peers([])
            assert (await client.wait_answer(stream_id))[1] == frame_message(b"echo:q")
            assert not here.router.tried_routes
            await here.settle(spliced_model=1, left_away=1, replayed=0, hits_open=0)
        assert len(peers) == 1


async def test_a_connection_to_tier_2_that_is_of_no_use_is_asked_for_again() -> None:
    useless: list[int] = []

    def new_tier2(_role: Role, _own: bool) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.close()
        useless.append(theirs.fileno())
        # What epoll does not take.
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, theirs.fileno())
        os.close(null)
        return theirs

    wire = Wire(1, new_tier2)
    wire.start(WireSettings())
    try:
        wire.listen(socket.create_server(("127.0.0.1", 0)), Role.EXTERNAL)
        asyncio.get_running_loop().add_reader(wire.notice_fd, wire.mend)
        await until(lambda: len(useless) >= 6)
    finally:
        asyncio.get_running_loop().remove_reader(wire.notice_fd)
        await asyncio.to_thread(wire.close)

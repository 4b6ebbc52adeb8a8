"""What goes wrong below gRPC, the same before both data planes: sockets, connections, networks."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from h2.errors import ErrorCodes
from h2.events import PingReceived, StreamReset

from mm.edge.h2.listening import (
    CLIENT_IDLE_S,
    CLIENT_PROBES,
    CLIENT_PROBES_S,
    CLIENT_UNREAD_MS,
    listening_socket,
)
from mm.edge.h2.messages import frame_message
from mm.testing.losing_proxy import losing_proxy
from mm.wire import Role
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.slow_network import slow_network
from tests.wire.frames import OK, answer, begin, request
from tests.wire.planes import PLANES, no_file_descriptor_left, serve_at, serve_on, serve_plane
from tests.wire.stand import serve_wire, until

pytestmark = pytest.mark.anyio
both_planes = pytest.mark.parametrize("kind", PLANES)
ID = (("mm-model-id", "m"),)


async def _answer_all(peer: RawPeer, body: bytes = b"a") -> None:
    peer.start()
    while True:
        answer(peer, await peer.wait_ended(), body)


async def _call(port: int, body: bytes = b"q") -> bytes:
    async with connect(port) as client:
        headers, data = await client.wait_answer(begin(client, body=body))
        assert headers[b"grpc-status"] == b"0", headers
        return data


@both_planes
async def test_without_file_descriptors_those_who_are_there_go_on_and_others_wait(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with serve_plane(kind) as plane, connect(plane.port) as client:
        assert (await client.wait_answer(begin(client)))[1] == frame_message(b"echo:q")
        with ExitStack() as stack:
            callers = [stack.enter_context(closing(socket.socket())) for _ in range(5)]
            with no_file_descriptor_left():
                for caller in callers:
                    caller.connect(("127.0.0.1", plane.port))
                for _ in range(10):
                    _, body = await client.wait_answer(begin(client))
                    assert body == frame_message(b"echo:q")
            for caller in callers:
                # SETTINGS: it was taken, by itself.
                caller.setblocking(False)
                loop = asyncio.get_running_loop()
                assert await asyncio.wait_for(loop.sock_recv(caller, 9), 60)
    told = [each for each in caplog.records if "new connections wait" in each.message]
    # The wire's own are told by `Wired`, which does not stand here.
    assert len(told) == (1 if kind == "python" else 0)
    assert not [each for each in caplog.records if each.name == "asyncio"]


@both_planes
async def test_a_call_waits_while_the_backlog_of_the_runtimes_socket_is_full(
    kind: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "runtime")
    with closing(socket.socket(socket.AF_UNIX)) as listener, ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        waiting = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
        waiting.connect(path)
        async with serve_plane(kind, runtime_path=path) as plane, connect(plane.port) as client:
            stream_id = begin(client)
            other = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
            other.setblocking(False)
            with pytest.raises(BlockingIOError):
                other.connect(path)
            if plane.wire is not None:
                await plane.wire.settle(connect_waiting=1)
            async with serve_on(listener, _answer_all):
                headers, body = await client.wait_answer(stream_id)
            assert (headers[b"grpc-status"], body) == (b"0", frame_message(b"a"))
            if plane.wire is not None:
                counts = plane.wire.counts
                assert (counts.connect_failures, counts.replayed) == (0, 0)


async def test_answers_that_came_before_their_connection_broke_are_answers(tmp_path: Path) -> None:
    """More than is read at once, from a socket that takes nothing any more. (The event loops of the
    Python data plane read nothing after a write that failed.)
    """

    async def serve(peer: RawPeer) -> None:
        peer.start()
        streams = [await peer.wait_ended() for _ in range(2)]
        peer.h2.ping(b"answer??")
        for stream_id in streams:
            peer.h2.send_headers(stream_id, OK)
            data = frame_message(large)
            for at in range(0, len(data), 16_384):
                peer.h2.send_data(stream_id, data[at : at + 16_384])
            peer.h2.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
        peer.writer.get_extra_info("socket").shutdown(socket.SHUT_RD)
        peer.flush()
        await peer.writer.drain()

    large = bytes(200_000)
    path = str(tmp_path / "runtime")
    async with serve_at(path, serve), serve_plane("wire", runtime_path=path) as plane:
        async with connect(plane.port) as client:
            client.h2.increment_flow_control_window(2**20)
            for stream_id in [begin(client) for _ in range(2)]:
                headers, body = await client.wait_answer(stream_id)
                assert (headers[b"grpc-status"], body) == (b"0", frame_message(large))


@both_planes
@pytest.mark.parametrize("code", [ErrorCodes.NO_ERROR, ErrorCodes.INTERNAL_ERROR])
async def test_an_answer_that_a_reset_follows_is_the_answer(kind: str, code: ErrorCodes) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await peer.wait_ended()
        answer(peer, stream_id)
        # h2 would not reset what is closed.
        peer.writer.write(struct.pack("!IBI", 4 << 8 | 3, 0, stream_id) + struct.pack("!I", code))
        # And the connection as a whole: RST instead of FIN.
        sock = peer.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with listen(serve) as (address, _):
        port = int(address.rpartition(":")[2])
        async with serve_plane(kind, runtime_port=port) as plane:
            assert await _call(plane.port) == frame_message(b"a")


@both_planes
async def test_calls_above_the_last_stream_of_a_goaway_are_sent_again(kind: str) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        number = len(peers)
        if number > 1:
            answer(peer, await peer.wait_ended(), b"again")
            again.set()
        else:
            first = await peer.wait_ended()
            seen.append(first)
            await peer.wait_ended()
            peer.h2.close_connection(last_stream_id=first)
            peer.flush()
            await again.wait()
            peer.h2.state_machine.state = type(peer.h2.state_machine.state).CLIENT_OPEN
            answer(peer, first, b"first")
        await peer.wait_closed()

    seen: list[int] = []
    again = asyncio.Event()
    async with listen(serve) as (address, peers):
        port = int(address.rpartition(":")[2])
        async with serve_plane(kind, runtime_port=port) as plane:
            plane.router.again = [True] * 100
            async with connect(plane.port) as client:
                one = begin(client)
                await until(lambda: bool(seen))
                two = begin(client)
                assert (await client.wait_answer(two))[1] == frame_message(b"again")
                assert (await client.wait_answer(one))[1] == frame_message(b"first")
        assert len(peers) == 2


@both_planes
async def test_a_runtime_that_takes_the_socket_of_another(kind: str, tmp_path: Path) -> None:
    """Calls go on where they went until that ends, then to whoever listens at the path."""

    async def old(peer: RawPeer) -> None:
        await _answer_all(peer, b"old")

    async def new(peer: RawPeer) -> None:
        await _answer_all(peer, b"new")

    path = str(tmp_path / "runtime")
    async with serve_at(path, old) as before, serve_plane(kind, runtime_path=path) as plane:
        assert await _call(plane.port) == frame_message(b"old")
        async with serve_at(path, new):
            assert await _call(plane.port) == frame_message(b"old")
            for peer in before:
                peer.writer.close()
            # Calls that are sent on the old connection before its end is heard of are tried again.
            plane.router.again = [True] * 1000
            assert await _call(plane.port) == frame_message(b"new")


async def test_a_peer_behind_a_slow_network() -> None:
    """Small calls take as long as it does, large ones pass whole, and time that is up is up."""
    async with serve_wire(role=Role.PEER) as there, serve_wire() as here:
        async with slow_network(there.port, delay_s=0.02, bytes_per_s=4e6) as port:
            here.table.set_state("m", 0)  # type: ignore[arg-type]
            here.add_peer("m", port)
            async with here.client() as client:
                unary = client.unary_unary("/t.S/Unary")
                body = os.urandom(400_000)
                answers = await asyncio.gather(
                    unary(body, metadata=ID), *(unary(b"%d" % n, metadata=ID) for n in range(20))
                )
                assert answers == [b"echo:" + body, *(b"echo:%d" % n for n in range(20))]
                assert here.counts.replayed == 0


@both_planes
async def test_a_deadline_ends_what_a_lost_network_does_not(kind: str) -> None:
    """Also for the runtime, once it hears of anything again."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_ended()
        arrived.set()
        await peer.wait_for(StreamReset)
        reset.set()
        await _answer_all(peer)

    arrived, reset = asyncio.Event(), asyncio.Event()
    async with listen(serve) as (address, _):
        runtime_port = int(address.rpartition(":")[2])
        async with losing_proxy("127.0.0.1", runtime_port) as lost:
            async with serve_plane(kind, runtime_port=lost.port) as plane:
                async with connect(plane.port) as client:
                    stream_id = begin(client, request(b"/t.S/Unary", (b"grpc-timeout", b"400m")))
                    await arrived.wait()
                    lost.lose()
                    headers, _ = await client.wait_answer(stream_id)
                    assert headers[b"grpc-status"] == b"4"
                    assert not reset.is_set()
                    await lost.restore()
                    await reset.wait()
                    assert (await client.wait_answer(begin(client)))[1] == frame_message(b"a")


async def test_clients_that_are_gone_without_a_word_are_noticed_by_the_kernel() -> None:
    """Half-open connections: what is accepted has the options of the listener."""
    with ExitStack() as stack:
        listener = stack.enter_context(closing(listening_socket("127.0.0.1", 0)))
        caller = stack.enter_context(closing(socket.create_connection(listener.getsockname())))
        accepted = stack.enter_context(closing(listener.accept()[0]))
        assert caller.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        values = [accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
        assert values == [CLIENT_IDLE_S, CLIENT_PROBES_S, CLIENT_PROBES, CLIENT_UNREAD_MS]


@both_planes
async def test_a_runtime_that_stops_is_given_up_without_a_deadline_too(kind: str) -> None:
    """It is asked once, and has long to answer; the call is tried again elsewhere."""

    async def serve(peer: RawPeer) -> None:
        if len(peers) > 1:
            await _answer_all(peer, b"again")
        peer.start()
        await peer.wait_ended()
        # From here on not even pings are answered: nothing is read.
        stopped.set()
        await given_up.wait()

    stopped, given_up = asyncio.Event(), asyncio.Event()
    async with listen(serve) as (address, peers):
        port = int(address.rpartition(":")[2])
        async with serve_plane(kind, runtime_port=port, quiet_s=0.05, quiet_answer_s=0.2) as plane:
            plane.router.again = [True] * 100
            async with connect(plane.port) as client:
                headers, body = await client.wait_answer(begin(client))
            assert stopped.is_set()
            assert headers[b"grpc-status"] == b"0"
            # Tier 2 of the wire's stand has a runtime of its own.
            assert body in (frame_message(b"again"), frame_message(b"echo:q"))
            given_up.set()


@both_planes
async def test_a_runtime_that_takes_long_is_asked_and_waited_for(kind: str) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await peer.wait_ended()
        # h2 answers the ping; its next one would come after five minutes.
        await peer.wait_for(PingReceived)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(peer.wait_for(PingReceived), 0.1)
        answer(peer, stream_id)
        await peer.wait_closed()

    async with listen(serve) as (address, peers):
        port = int(address.rpartition(":")[2])
        async with serve_plane(kind, runtime_port=port, quiet_s=0.02) as plane:
            assert await _call(plane.port) == frame_message(b"a")
        assert len(peers) == 1

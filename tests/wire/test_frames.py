"""The wire against raw frames: resets, GOAWAY, half answers, slow readers, hops, ids put in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RequestReceived,
    ResponseReceived,
    StreamReset,
)

from mm.core.calls import Outcome
from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from mm.wire import PeerCalls, Role
from mm.wire.addresses import Target, inet_sockaddr
from tests.edge.raw_h2 import PATIENCE_S, PeerClosedError, RawPeer, connect, listen, resets
from tests.wire.frames import OK, answer, begin, request
from tests.wire.stand import serve_wire, until

pytestmark = pytest.mark.anyio
Serve = Callable[[RawPeer], Awaitable[Any]]


async def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ErrorCodes.CANCEL, b"1"),
        (ErrorCodes.ENHANCE_YOUR_CALM, b"8"),
        (ErrorCodes.INADEQUATE_SECURITY, b"7"),
        (ErrorCodes.INTERNAL_ERROR, b"13"),
    ],
)
async def test_a_reset_of_the_runtime_becomes_a_status(code: ErrorCodes, status: bytes) -> None:
    async with listen(resets(code)) as (address, _):
        port = await port_of(address)
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            headers, _ = await client.wait_answer(begin(client))
            assert headers[b"grpc-status"] == status
            assert headers[b"grpc-message"].endswith(b"(%s)" % code.name.encode())


async def test_a_stream_that_was_refused_is_sent_again() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        peer.reset(await peer.wait_ended(), ErrorCodes.REFUSED_STREAM)
        answer(peer, await peer.wait_ended(), b"again")
        await peer.wait_closed()

    async with listen(serve) as (address, _):
        port = await port_of(address)
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            assert (await client.wait_answer(begin(client)))[1] == frame_message(b"again")


async def test_a_call_that_a_peer_refused_and_gets_again_is_counted_there() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        peer.reset(await peer.wait_ended(), ErrorCodes.REFUSED_STREAM)
        again = await peer.wait_ended()
        seen.append((here.counts.hits_open, here.wire.peer_traffic([handle])[handle]))
        answer(peer, again, b"again")
        await peer.wait_closed()

    seen: list[tuple[int, tuple[int, int]]] = []
    async with listen(serve) as (address, _), serve_wire() as here, connect(here.port) as client:
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        handle = here.add_peer("m", await port_of(address))
        assert (await client.wait_answer(begin(client)))[1] == frame_message(b"again")
        assert seen == [(1, (1, 0))]
        await here.settle(hits_open=0, calls_there=1)
        assert here.wire.peer_traffic([handle]) == {handle: (0, 1)}


async def test_after_a_goaway_calls_go_to_another_connection() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        first = await peer.wait_ended()
        if not served:
            served.append(first)
            peer.h2.close_connection(last_stream_id=first)
            peer.flush()
            await go_on.wait()
            # h2 believes the connection dead; the stream is still to be answered.
            peer.h2.state_machine.state = type(peer.h2.state_machine.state).CLIENT_OPEN
            answer(peer, first, b"first")
        else:
            answer(peer, first, b"second")
        with_more = peer.wait_closed()
        await with_more

    served: list[int] = []
    go_on = asyncio.Event()
    async with listen(serve) as (address, peers):
        port = await port_of(address)
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            one = begin(client)
            await until(lambda: bool(served))
            two = begin(client)
            assert (await client.wait_answer(two))[1] == frame_message(b"second")
            go_on.set()
            assert (await client.wait_answer(one))[1] == frame_message(b"first")
            assert len(peers) == 2


async def test_a_connection_that_breaks_before_an_answer_is_tier_2s_business() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_ended()
        peer.writer.close()

    async with listen(serve) as (address, _):
        port = await port_of(address)
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            # The fake router sends it to the runtime that works.
            assert (await client.wait_answer(begin(client)))[1] == frame_message(b"echo:q")
            assert [each[1] for each in stand.router.tried_routes] == [Outcome.UNREACHABLE]
            assert "lost" in stand.router.tried_routes[0][2]


async def test_a_connection_that_breaks_in_the_middle_is_unavailable() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await peer.wait_ended()
        peer.h2.send_headers(stream_id, OK)
        peer.h2.send_data(stream_id, frame_message(b"half")[:6])
        peer.flush()
        await half.wait()
        peer.writer.close()

    half = asyncio.Event()
    async with listen(serve) as (address, _):
        port = await port_of(address)
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            stream_id = begin(client)
            await client.wait_on(DataReceived, stream_id)
            half.set()
            headers, _ = await client.wait_answer(stream_id)
            assert headers[b"grpc-status"] == b"14"
            assert not stand.counts.replayed


@pytest.mark.parametrize(
    ("trailers", "text"),
    [
        ([], b"the response ended without a status"),
        ([(b"bad name", b"x")], b"malformed response"),
    ],
)
async def test_an_answer_that_makes_no_sense(trailers: HeaderList, text: bytes) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await peer.wait_ended()
        peer.h2.send_headers(stream_id, OK)
        if trailers:
            peer.h2.send_headers(stream_id, trailers, end_stream=True)
        else:
            peer.h2.send_data(stream_id, b"", end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _):
        port = await port_of(address)
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            headers, _ = await client.wait_answer(begin(client))
            assert (headers[b"grpc-status"], headers[b"grpc-message"]) == (b"13", text)


async def test_the_wires_own_deadline() -> None:
    """However late the request gets to the runtime: what gets there is ended there, too."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        asked = await peer.wait_for(RequestReceived)
        timeouts.append(dict(asked.headers)[b"grpc-timeout"])  # type: ignore[arg-type, index]
        reset = await peer.wait_for(StreamReset)
        resets.append(reset.error_code)
        await peer.wait_closed()

    timeouts: list[bytes] = []
    resets: list[object] = []
    async with listen(serve) as (address, _):
        port = await port_of(address)
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            timeout = (b"grpc-timeout", b"300m")
            headers, _ = await client.wait_answer(begin(client, request(b"/t.S/M", timeout)))
            assert (headers[b"grpc-status"], headers[b"grpc-message"]) == (
                b"4",
                b"deadline exceeded",
            )
            await stand.settle(deadlines=1, calls_open=0)
            await until(lambda: len(resets) == len(timeouts))
    assert all(code == ErrorCodes.CANCEL for code in resets)
    assert all(value[-1:] == b"u" and 0 < int(value[:-1]) <= 300_000 for value in timeouts)


async def test_a_slow_reader_stops_the_runtime_and_not_the_others() -> None:
    """The answer waits in the runtime, not in the wire: back-pressure from end to end."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        while True:
            stream_id = await peer.wait_ended()
            if not slow:
                slow.append(stream_id)
                peer.h2.send_headers(stream_id, OK)
                left[0] = await pour(peer, stream_id)
                continue
            answer(peer, stream_id)

    async def pour(peer: RawPeer, stream_id: int) -> int:
        """Send until the window is closed; answer how much that was."""
        sent = 0
        peer.h2.send_data(stream_id, b"\0" + (2**30).to_bytes(4, "big"))
        while (room := peer.h2.local_flow_control_window(stream_id)) > 0:
            size = min(room, 16384)
            peer.h2.send_data(stream_id, bytes(size))
            sent += size
            peer.flush()
            if sent % (64 * 1024) == 0:
                await peer.writer.drain()
        poured.set()
        return sent

    slow: list[int] = []
    left = [0]
    poured = asyncio.Event()
    async with listen(serve) as (address, _):
        port = await port_of(address)
        limits = {"message_bytes_max": 2**31 - 1}
        async with serve_wire(runtime_port=port, **limits) as stand:
            async with connect(stand.port) as client, connect(stand.port) as other:
                stream_id = begin(client)
                await client.wait_on(ResponseReceived, stream_id)
                await asyncio.wait_for(poured.wait(), PATIENCE_S)
                assert (await other.wait_answer(begin(other)))[1] == frame_message(b"a")
                # What the client's window took (64 KiB) was passed on and given back to the
                # runtime, nothing more.
                assert left[0] <= 2 * 256 * 1024
                assert stand.counts.bytes_in_client < 4 * 2**20


async def test_an_answer_before_the_request_has_ended() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        asked = await peer.wait_for(RequestReceived)
        assert asked.stream_id is not None
        head = [*OK, (b"grpc-status", b"9"), (b"grpc-message", b"enough")]
        peer.h2.send_headers(asked.stream_id, head, end_stream=True)
        peer.flush()
        reset = await peer.wait_for(StreamReset)
        resets.append(reset.error_code)
        await peer.wait_closed()

    resets: list[object] = []
    async with listen(serve) as (address, _):
        port = await port_of(address)
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            stream_id = client.begin(request())
            headers, _ = await client.wait_answer(stream_id)
            assert headers[b"grpc-message"] == b"enough"
            await stand.settle(calls_open=0)
            await until(lambda: resets == [ErrorCodes.NO_ERROR])


async def test_draining_says_goaway_twice_and_finishes_what_runs() -> None:
    async with serve_wire() as stand, connect(stand.port) as client:
        stream_id = client.begin(request())
        await stand.settle(calls_open=1)
        stand.wire.drain()
        last = await client.wait_for(ConnectionTerminated)
        assert last.last_stream_id == 2**31 - 1
        second = await client.wait_for(ConnectionTerminated)
        assert second.last_stream_id == stream_id
        client.h2.state_machine.state = type(client.h2.state_machine.state).CLIENT_OPEN
        client.send(stream_id, frame_message(b"late"), end=True)
        assert (await client.wait_answer(stream_id))[1] == frame_message(b"echo:late")
        await client.wait_closed()


async def test_one_who_resets_what_it_asks_for_is_dropped() -> None:
    async with serve_wire() as stand, connect(stand.port) as client:
        for _ in range(1500):
            stream_id = client.h2.get_next_available_stream_id()
            client.h2.send_headers(stream_id, request())
            client.h2.reset_stream(stream_id)
        # In one write, so that they come at once however busy the machine is.
        client.flush()
        with suppress(PeerClosedError, ConnectionError):
            await client.wait_closed()
        await stand.settle(resets_refused=1, calls_open=0, connections_open=0)


# --- hops -----------------------------------------------------------------------------------


async def test_a_hit_elsewhere_goes_there_with_hop_headers() -> None:
    async with serve_wire(role=Role.PEER) as there, serve_wire() as here:
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        here.add_peer("m", there.port)
        async with here.client() as client:
            call = client.unary_unary("/t.S/Unary")(b"q", metadata=(("mm-model-id", "m"),))
            assert await call == b"echo:q"
            trailers = [*await call.initial_metadata(), *await call.trailing_metadata()]
            assert not [key for key, _ in trailers if key.startswith("mm-")]
        await here.settle(calls_there=1, calls_here=0, replayed=0)
        await there.settle(calls_here=1)


async def test_a_peer_is_told_how_busy_the_copy_is() -> None:
    async with serve_wire(role=Role.PEER) as stand, connect(stand.port) as peer:
        hanging = peer.begin(request(b"/t.S/Hang", (b"mm-hop-kind", b"hit-only")))
        await stand.settle(calls_here=1)
        hop = (b"mm-hop-kind", b"hit-only")
        headers, _ = await peer.wait_answer(begin(peer, request(b"/t.S/Unary", hop)))
        assert headers[b"mm-hop-load"] == b"1"
        peer.reset(hanging)
        await stand.settle(calls_open=0)


async def test_what_peers_call_and_hear_is_told_for_the_pushes() -> None:
    hop = ((b"mm-hop-kind", b"hit-only"), (b"mm-hop-from", b"a%2Cb"))
    async with serve_wire(role=Role.PEER) as stand, connect(stand.port) as peer:
        hanging = peer.begin(request(b"/t.S/Hang", *hop))
        await stand.settle(calls_here=1, hits_open=1)
        assert stand.wire.take_reports() == [PeerCalls("a,b", "m", None, None)]
        for _ in range(2):
            await peer.wait_answer(begin(peer, request(b"/t.S/Unary", *hop)))
        await peer.wait_answer(begin(peer, request(b"/t.S/Unary", hop[0])))
        (told,) = stand.wire.take_reports()
        assert (told.sender, told.model_id, told.told) == ("a,b", "m", 1)
        assert told.service_s is not None
        assert 0 < told.service_s < PATIENCE_S
        assert stand.wire.take_reports() == []
        await peer.wait_answer(
            begin(peer, request(b"/t.S/Unary", hop[0], (b"mm-hop-from", b"\xff")))
        )
        assert [told.sender for told in stand.wire.take_reports()] == ["\ufffd"]
        peer.reset(hanging)
        await stand.settle(calls_open=0, hits_open=0)


async def test_what_a_peer_says_of_its_copy_is_known() -> None:
    def serve_busy(told: HeaderList) -> Serve:
        async def serve(peer: RawPeer) -> None:
            peer.start()
            asked = await peer.wait_for(RequestReceived)
            hops.update(dict(asked.headers))  # type: ignore[arg-type]
            assert asked.stream_id is not None
            peer.h2.send_headers(asked.stream_id, [*OK, *told], end_stream=True)
            peer.flush()
            await peer.wait_closed()

        return serve

    hops: dict[bytes, bytes] = {}
    told = [(b"grpc-status", b"0"), (b"mm-hop-load", b"17"), (b"mm-hop-load", b"17")]
    async with listen(serve_busy(told)) as (address, _), serve_wire() as here:
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        handle = here.add_peer("m", await port_of(address))
        async with connect(here.port) as client:
            headers, _ = await client.wait_answer(begin(client))
            assert not [key for key in headers if key.startswith(b"mm-")]
        assert here.table.peer_loads("m") == [(handle, 17)]
        assert hops[b"mm-hop-kind"] == b"hit-only"
        assert hops[b"mm-hop-left"] == b"1"
        assert hops[b"mm-hop-from"] == b"me"
        assert b"mm-hop-redirect" not in hops


async def test_a_peer_that_sends_a_call_back_is_weighed_by_tier_2() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        told = [
            (b"grpc-status", b"14"),
            (b"grpc-message", b"moved"),
            (b"mm-hop-result", b"not-here"),
        ]
        peer.h2.send_headers(await peer.wait_ended(), [*OK, *told], end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _), serve_wire() as here, connect(here.port) as client:
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        here.add_peer("m", await port_of(address))
        assert (await client.wait_answer(begin(client)))[1] == frame_message(b"echo:q")
        ((route, outcome, text),) = here.router.tried_routes
        assert (outcome, text) == (Outcome.NOT_HERE, "moved")
        assert route.instance_id == "peer"  # type: ignore[union-attr]


async def test_a_peer_that_is_to_be_left_alone_gets_no_call() -> None:
    async with serve_wire(role=Role.PEER) as there, serve_wire() as here:
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        handle = here.add_peer("m", there.port)
        address = inet_sockaddr("127.0.0.1", there.port)
        away = Target(f"127.0.0.1:{there.port}", address, handle, away_until_ns=2**63 - 1)
        here.wire.set_peers([away])
        async with connect(here.port) as client:
            assert (await client.wait_answer(begin(client)))[1] == frame_message(b"echo:q")
        await here.settle(calls_there=0, spliced_model=1)


async def test_copies_of_an_instance_that_is_gone_are_passed_over() -> None:
    """It has no calls under way, and so would be chosen for each."""
    async with serve_wire(role=Role.PEER) as there, serve_wire() as here:
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        lives, gone = here.table.add_instance("lives"), here.table.add_instance("gone")
        here.table.set_peers("m", [lives, gone])
        address = inet_sockaddr("127.0.0.1", there.port)
        name = f"127.0.0.1:{there.port}"
        away = Target(name, address, gone, away_until_ns=2**63 - 1)
        here.wire.set_peers([Target(name, address, lives), away])
        async with connect(here.port) as client:
            for _ in range(20):
                assert (await client.wait_answer(begin(client)))[1] == frame_message(b"echo:q")
        await here.settle(calls_there=20, spliced_model=0)

"""What may come at any moment of a call: refusals, ends, new settings, frames that come late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, HeadersFrame, WindowUpdateFrame

from mm.core.calls import Outcome
from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import OK, answer, begin, request
from tests.wire.planes import PLANES, serve_plane
from tests.wire.stand import WireStand, serve_wire, until

pytestmark = pytest.mark.anyio
Serve = Callable[[RawPeer], Awaitable[Any]]


@asynccontextmanager
async def between(
    serve: Serve, **config: Any
) -> AsyncIterator[tuple[WireStand, RawPeer, list[RawPeer]]]:
    """A wire between a runtime that does as told and a client; yields it, client, connections."""
    async with listen(serve) as (address, peers):
        port = int(address.rpartition(":")[2])
        async with serve_wire(runtime_port=port, **config) as stand, connect(stand.port) as client:
            yield stand, client, peers


@asynccontextmanager
async def on_plane(plane: str, serve: Serve) -> AsyncIterator[RawPeer]:
    """Either data plane before a runtime that does as told; yields a client."""
    async with listen(serve) as (address, _):
        port = int(address.rpartition(":")[2])
        async with serve_plane(plane, runtime_port=port) as stand, connect(stand.port) as client:
            yield client


async def asked(peer: RawPeer) -> int:
    event = await peer.wait_for(RequestReceived)
    assert event.stream_id is not None
    return event.stream_id


async def body_of(peer: RawPeer, stream_id: int) -> bytes:
    """Answer what is left of a request, once it has ended."""
    await peer.wait_on(StreamEnded, stream_id)
    pieces = [
        event
        for event in peer.events
        if isinstance(event, DataReceived) and event.stream_id == stream_id
    ]
    return b"".join(piece.data for piece in pieces)


async def test_calls_that_a_goaway_leaves_out_are_sent_again_with_all_of_their_bodies() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        if not said:
            streams = [await asked(peer) for _ in range(3)]
            for stream_id in streams:
                await peer.wait_on(DataReceived, stream_id)
            peer.h2.close_connection(last_stream_id=streams[0])
            peer.flush()
            said.append(1)
            peer.h2.state_machine.state = type(peer.h2.state_machine.state).CLIENT_OPEN
            await peer.wait_on(StreamEnded, streams[0])
            answer(peer, streams[0], b"first")
            await peer.wait_closed()
            return
        for _ in range(2):
            stream_id = await asked(peer)
            answer(peer, stream_id, (await body_of(peer, stream_id))[5:])
        await peer.wait_closed()

    said: list[int] = []
    async with between(serve) as (stand, client, peers):
        streams = []
        messages = [frame_message(bytes([65 + number]) * 15_000) for number in range(3)]
        for message in messages:
            streams.append(client.begin(request()))
            client.send(streams[-1], message[:5_000])
        await until(lambda: bool(said))
        for stream_id, message in zip(streams, messages, strict=True):
            client.send(stream_id, message[5_000:10_000])
            client.send(stream_id, message[10_000:], end=True)
        assert (await client.wait_answer(streams[0]))[1] == frame_message(b"first")
        for stream_id, message in zip(streams[1:], messages[1:], strict=True):
            headers, body = await client.wait_answer(stream_id)
            assert headers[b"grpc-status"] == b"0"
            assert body == message
        assert len(peers) == 2
        assert stand.counts.replayed == 0


async def test_a_refusal_of_what_cannot_be_sent_again_is_unavailable_and_heard_of() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await asked(peer)
        await peer.wait_on(DataReceived, stream_id)
        peer.reset(stream_id, ErrorCodes.REFUSED_STREAM)
        await peer.wait_closed()

    async with between(serve, retry_buffer_bytes_max=10) as (stand, client, _):
        headers, _ = await client.wait_answer(begin(client, body=bytes(100)))
        assert headers[b"grpc-status"] == b"14"
        await until(lambda: bool(stand.router.tried_routes))
        assert [each[1] for each in stand.router.tried_routes] == [Outcome.UNREACHABLE]


async def test_what_has_not_left_can_be_sent_again_however_large_it_is() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start(window_bytes=0)
        stream_id = await asked(peer)
        full.set()
        await refuse.wait()
        peer.reset(stream_id, ErrorCodes.REFUSED_STREAM)
        peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 60_000})
        peer.flush()
        stream_id = await asked(peer)
        answer(peer, stream_id, (await body_of(peer, stream_id))[5:])
        await peer.wait_closed()

    full, refuse = asyncio.Event(), asyncio.Event()
    async with between(serve, retry_buffer_bytes_max=10) as (stand, client, _):
        stream_id = begin(client, body=bytes(10_000))
        await full.wait()
        await until(lambda: stand.counts.bytes_in_client > 10_000)
        refuse.set()
        headers, body = await client.wait_answer(stream_id)
        assert (headers[b"grpc-status"], body) == (b"0", frame_message(bytes(10_000)))


async def test_a_refusal_after_the_answer_has_begun_is_unavailable() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await asked(peer)
        peer.h2.send_headers(stream_id, OK)
        peer.h2.send_data(stream_id, frame_message(b"x"))
        peer.reset(stream_id, ErrorCodes.REFUSED_STREAM)
        await peer.wait_closed()

    async with between(serve) as (_, client, peers):
        headers, _ = await client.wait_answer(begin(client))
        assert (headers[b"grpc-status"], len(peers)) == (b"14", 1)


async def test_one_who_refuses_all_streams_is_given_up_after_some() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        while True:
            stream_id = await asked(peer)
            refused.append(1)
            peer.reset(stream_id, ErrorCodes.REFUSED_STREAM)

    refused: list[int] = []
    async with between(serve) as (stand, client, _):
        assert (await client.wait_answer(begin(client)))[1] == frame_message(b"echo:q")
        assert len(refused) == 4
        assert [each[1] for each in stand.router.tried_routes] == [Outcome.UNREACHABLE]


@pytest.mark.parametrize("first", [b"spoilt", b"held"])
async def test_what_came_before_a_refusal_is_forgotten(first: bytes) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await asked(peer)
        head = [*OK, (b"grpc-status", b"7"), (b"bad name" if first == b"spoilt" else b"x", b"y")]
        peer.h2.send_headers(stream_id, head)
        peer.reset(stream_id, ErrorCodes.REFUSED_STREAM)
        again = await asked(peer)
        answer(peer, again)
        await peer.wait_closed()

    async with between(serve) as (_, client, _peers):
        headers, body = await client.wait_answer(begin(client))
        if first == b"spoilt":
            assert headers[b"grpc-status"] == b"13"  # malformed as soon as it is there
            return
        assert (headers[b"grpc-status"], body) == (b"0", frame_message(b"a"))
        assert b"x" not in headers


async def test_a_request_without_a_body() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        while True:
            event = await peer.wait_for(RequestReceived)
            assert event.stream_id is not None
            ended.append(event.stream_ended is not None)
            if len(ended) == 1:
                answer(peer, event.stream_id)
            else:
                lost = [*OK, (b"grpc-status", b"5"), (b"grpc-message", b"gone")]
                peer.h2.send_headers(event.stream_id, lost, end_stream=True)
                peer.flush()

    ended: list[bool] = []
    async with between(serve) as (stand, client, _):
        assert (await client.wait_answer(client.begin(request(), end=True)))[1] == frame_message(
            b"a"
        )
        headers, _ = await client.wait_answer(client.begin(request(b"/t.S/Up"), end=True))
        assert ended == [True, True]
        # Tier 2 sent it on, as it came, to a runtime that answers streams without messages.
        assert headers[b"grpc-status"] == b"0"
        await stand.settle(replayed=1)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("ends", [False, True])
async def test_headers_that_only_announce_an_answer(ends: bool, plane: str) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await asked(peer)
        for status in (b"100", b"103"):
            frame = HeadersFrame(stream_id, flags=["END_HEADERS", *["END_STREAM"] * ends])
            frame.data = peer.h2.encoder.encode([(b":status", status), (b"link", b"x")])
            peer.send_frame(frame)
            if ends:
                break
        if not ends:
            answer(peer, stream_id)
        await peer.wait_closed()

    async with on_plane(plane, serve) as client:
        headers, _ = await client.wait_answer(begin(client))
        assert headers[b":status"] == b"200"
        assert b"link" not in headers
        assert headers[b"grpc-status"] == (b"13" if ends else b"0")


@pytest.mark.parametrize(("count", "status"), [(8, b"0"), (9, b"13")])
async def test_headers_that_announce_an_answer_without_end(count: int, status: bytes) -> None:
    """The wire keeps them as long as the call, so it takes a few."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await asked(peer)
        for _ in range(count):
            frame = HeadersFrame(stream_id, flags=["END_HEADERS"])
            frame.data = peer.h2.encoder.encode([(b":status", b"103"), (b"link", b"x")])
            peer.send_frame(frame)
        answer(peer, stream_id)
        await peer.wait_closed()

    async with on_plane("wire", serve) as client:
        headers, _ = await client.wait_answer(begin(client))
        assert headers[b"grpc-status"] == status


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(
    "lists",
    [
        [[(b"x", b"y"), *OK, (b"grpc-status", b"0")]],
        [[*OK, *OK, (b"grpc-status", b"0")]],
        [[*OK[1:], (b"grpc-status", b"0")]],
        [OK[1:], [(b"grpc-status", b"0")]],
        [OK, [OK[0], (b"grpc-status", b"0")]],
    ],
)
async def test_an_answer_whose_status_of_http_is_elsewhere(
    lists: list[list[tuple[bytes, bytes]]], plane: str
) -> None:
    """Passed on it would break the client's stream, or the connection with all of its calls."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await asked(peer)
        for number, each in enumerate(lists):
            is_last = number == len(lists) - 1
            frame = HeadersFrame(stream_id, flags=["END_HEADERS", *["END_STREAM"] * is_last])
            frame.data = peer.h2.encoder.encode(each)
            peer.send_frame(frame)
        await peer.wait_closed()

    async with on_plane(plane, serve) as client:
        headers, _ = await client.wait_answer(begin(client))
        assert (headers[b":status"], headers[b"grpc-status"]) == (b"200", b"13")


async def test_fewer_streams_than_there_are_leave_those_alone_and_take_others_elsewhere() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start(streams_max=10)
        while True:
            stream_id = await asked(peer)
            if len(held) < 3:
                held.append(stream_id)
                if len(held) == 3:
                    peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
                    peer.flush()
            else:
                answer(peer, stream_id)

    held: list[int] = []
    async with between(serve) as (_, client, peers):
        streams = [begin(client) for _ in range(3)]
        await until(lambda: len(held) == 3)
        while len(peers) == 1:
            assert (await client.wait_answer(begin(client)))[1] == frame_message(b"a")
        for stream_id in held:
            answer(peers[0], stream_id, b"late")
        for stream_id in streams:
            assert (await client.wait_answer(stream_id))[1] == frame_message(b"late")


async def test_frames_for_streams_that_were_reset_harm_nothing() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await asked(peer)
        reset = await peer.wait_on(StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.CANCEL
        for _ in range(3):
            peer.send_frame(WindowUpdateFrame(stream_id, window_increment=1000))
            peer.send_frame(DataFrame(stream_id, data=bytes(1000)))
        answer(peer, await asked(peer))
        await peer.wait_closed()

    async with between(serve) as (stand, client, peers):
        stream_id = client.begin(request())
        await until(lambda: stand.counts.hits_open == 1 and bool(peers))
        client.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
        client.send_frame(WindowUpdateFrame(stream_id, window_increment=1000))
        client.send_frame(DataFrame(stream_id, data=bytes(1000)))
        assert (await client.wait_answer(begin(client)))[1] == frame_message(b"a")
        assert len(peers) == 1


async def test_what_is_not_passed_on_is_given_back_to_the_window_of_the_connection() -> None:
    """Bodies of calls that are answered before they have come, or that their clients reset."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        while True:
            stream_id = await asked(peer)
            number[0] += 1
            if number[0] % 2:
                head = [*OK, (b"grpc-status", b"9")]
                # It may be reset by now.
                with suppress(ProtocolError):
                    peer.h2.send_headers(stream_id, head, end_stream=True)
                    peer.flush()

    number = [0]
    piece = bytes(16_000)
    async with between(serve, message_bytes_max=2**31 - 1) as (stand, client, _):
        sent = 0
        while sent < 72 * 2**20:
            stream_id = client.begin(request())
            for at in range(15):
                frame = DataFrame(stream_id, data=b"\0\x40\0\0\0" + piece if at == 0 else piece)
                client.send_frame(frame)
                client.h2.outbound_flow_control_window -= len(frame.data)
                sent += len(frame.data)
            client.reset(stream_id, ErrorCodes.CANCEL)
            await client.writer.drain()
            while client.h2.outbound_flow_control_window < 300_000:
                assert await client.read()
        await stand.settle(calls_open=0)

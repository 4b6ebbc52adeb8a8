"""What becomes of attempts: tried again or passed on, and upstreams that fail."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from h2.errors import ErrorCodes
from h2.events import DataReceived, StreamEnded
from hyperframe.frame import GoAwayFrame

from mm.core.calls import Outcome
from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import PATIENCE_S, REQUEST, RawPeer, connect, listen, resets
from tests.edge.upstream import serve_proxy

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)
OK: HeaderList = [(b":status", b"200"), (b"content-type", b"application/grpc")]


async def _fail(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def _abort_times(count: int, code: grpc.StatusCode, text: str) -> Any:
    async def script(request: bytes, context: Any) -> bytes:
        nonlocal count
        count -= 1
        if count >= 0:
            await context.abort(code, text)
        return b"at last:" + request

    return script


# --- answers that may mean "again" -------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (grpc.StatusCode.NOT_FOUND, "gone", Outcome.LOST),
        (
            grpc.StatusCode.UNAVAILABLE,
            "Request for unknown model: 'm' is not found",
            Outcome.LOST,
        ),
        (grpc.StatusCode.UNAVAILABLE, "'m' has no available versions", Outcome.LOST),
        (grpc.StatusCode.INVALID_ARGUMENT, "Model m with version  not found", Outcome.LOST),
        (grpc.StatusCode.UNAVAILABLE, "busy", Outcome.RUNTIME_UNAVAILABLE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", Outcome.EXHAUSTED),
    ],
)
@pytest.mark.parametrize("again", [True, False])
async def test_a_failure_is_tried_again_or_passed_on(
    code: grpc.StatusCode, text: str, outcome: Outcome, again: bool
) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["Some"] = _abort_times(1, code, text)
        stand.router.again = [again]
        call = client.unary_unary("/t.S/Some")(b"q", metadata=ID)
        if again:
            assert await call == b"at last:q"
            assert stand.router.finishes == [(outcome, text), (Outcome.ANSWERED, "")]
        else:
            error = await _fail(call)
            assert (error.code(), error.details()) == (code, text)
            assert stand.router.finishes == [(outcome, text)]


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code.value[0] not in (0, 5, 8, 14)]
)
async def test_any_other_status_is_the_answer(code: grpc.StatusCode) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["Some"] = _abort_times(1, code, "own words … ü")
        stand.router.again = [True]
        error = await _fail(client.unary_unary("/t.S/Some")(b"q", metadata=ID))
        assert (error.code(), error.details()) == (code, "own words … ü")
        assert stand.router.outcomes == [Outcome.ANSWERED]


@pytest.mark.parametrize(("size", "again"), [(2**20 - 5, True), (2**20 - 4, False)])
async def test_what_is_kept_for_another_attempt_is_bounded(size: int, again: bool) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["Some"] = _abort_times(1, grpc.StatusCode.NOT_FOUND, "gone")
        stand.router.again = [True]
        call = client.unary_unary("/t.S/Some")(bytes(size), metadata=ID)
        if again:
            assert await call == b"at last:" + bytes(size)
        else:
            assert (await _fail(call)).code() == grpc.StatusCode.NOT_FOUND
            assert len(stand.router.calls) == 1


async def test_nothing_is_repeated_once_the_client_has_part_of_an_answer() -> None:
    async def script(request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("x-early", "1"),))
        await go_on.wait()
        await context.abort(grpc.StatusCode.NOT_FOUND, "gone")
        return b""

    go_on = asyncio.Event()
    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["Some"] = script
        stand.router.again = [True]
        call = client.unary_stream("/t.S/Some")(b"q", metadata=ID)
        assert ("x-early", "1") in tuple(await call.initial_metadata())
        go_on.set()
        assert (await _fail(call.read())).code() == grpc.StatusCode.NOT_FOUND
        assert stand.router.outcomes == [Outcome.LOST]


async def test_headers_and_trailers_in_one_piece_can_still_be_tried_again() -> None:
    """Servers that send initial headers even with a failure; grpcio itself sends trailers only."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        for status in (b"5", b"0"):
            stream_id = await peer.wait_ended()
            peer.h2.send_headers(stream_id, [*OK, (b"x-initial", b"1")])
            trailers = [(b"grpc-status", status), (b"x-trailing", b"1")]
            peer.h2.send_headers(stream_id, trailers, end_stream=True)
            peer.flush()
        await peer.wait_closed()

    for again in (True, False):
        async with listen(serve) as (address, _):
            async with serve_proxy(runtime_address=address) as stand, connect(stand.port) as peer:
                stand.router.again = [again]
                stream_id = peer.begin([*REQUEST, (b"mm-model-id", b"m")], end=True)
                headers, _ = await peer.wait_answer(stream_id)
                # Nothing of them is lost if they are the answer after all.
                assert headers[b"grpc-status"] == (b"0" if again else b"5")
                assert headers[b"x-initial"] == headers[b"x-trailing"] == b"1"


async def test_a_stream_of_requests_is_repeated_from_its_beginning() -> None:
    """The client has not ended: what it sent is repeated, what it sends next follows."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(DataReceived)
        peer.h2.send_headers(1, [*OK, (b"grpc-status", b"14")], end_stream=True)
        peer.flush()
        again = b""
        while not again.endswith(frame_message(b"two")):
            again += (await peer.wait_on(DataReceived, 3)).data
            if again == frame_message(b"one"):
                repeated.set()
        assert again == frame_message(b"one") + frame_message(b"two")
        await peer.wait_on(StreamEnded, 3)
        peer.h2.send_headers(3, [*OK, (b"grpc-status", b"0")], end_stream=True)
        peer.flush()
        await peer.wait_closed()

    repeated = asyncio.Event()
    async with listen(serve) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with connect(stand.port) as peer:
            stand.router.again = [True]
            stream_id = peer.begin([*REQUEST, (b"mm-model-id", b"m")])
            peer.send(stream_id, frame_message(b"one"))
            await asyncio.wait_for(repeated.wait(), PATIENCE_S)
            peer.send(stream_id, frame_message(b"two"), end=True)
            assert (await peer.wait_answer(stream_id))[0][b"grpc-status"] == b"0"


# --- upstreams that fail ------------------------------------------------------------------------


@pytest.mark.parametrize("again", [True, False])
async def test_nobody_at_the_address(again: bool) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.answers = [stand.peer_route("m", address="127.0.0.1:1")]
        stand.router.again = [again]
        call = client.unary_unary("/t.S/Unary")(b"q", metadata=ID)
        if again:
            assert await call == b"echo:q"
        else:
            error = await _fail(call)
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert "cannot connect to 127.0.0.1:1" in error.details()
        assert stand.router.outcomes[0] is Outcome.UNREACHABLE


async def test_an_upstream_lost_before_and_within_its_answer() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await peer.wait_ended()
        if len(peers) == 2:
            peer.h2.send_headers(stream_id, OK)
            peer.h2.send_data(stream_id, frame_message(b"half"))
            peer.flush()
            await seen.wait()
        peer.writer.transport.abort()

    seen = asyncio.Event()
    async with listen(serve) as (address, peers), serve_proxy(runtime_address=address) as stand:
        async with stand.client() as client:
            stand.router.again = [True, True]
            down = client.unary_stream("/t.S/Down")(b"1", metadata=ID)
            assert await down.read() == b"half"  # Of the second attempt.
            seen.set()
            error = await _fail(down.read())
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert "lost" in error.details()
            assert stand.router.outcomes == [Outcome.UNREACHABLE] * 2


@pytest.mark.parametrize(
    ("reset", "code"),
    [
        (ErrorCodes.CANCEL, grpc.StatusCode.CANCELLED),
        (ErrorCodes.INTERNAL_ERROR, grpc.StatusCode.INTERNAL),
        (ErrorCodes.ENHANCE_YOUR_CALM, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ErrorCodes.INADEQUATE_SECURITY, grpc.StatusCode.PERMISSION_DENIED),
        (99, grpc.StatusCode.INTERNAL),
    ],
)
async def test_resets_of_the_upstream_are_statuses(reset: int, code: grpc.StatusCode) -> None:
    async with listen(resets(reset)) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with stand.client() as client:
            error = await _fail(client.unary_unary("/t.S/Unary")(b"q", metadata=ID))
            assert error.code() == code
            assert stand.router.outcomes == [Outcome.ANSWERED]


@pytest.mark.parametrize("by_goaway", [True, False])
async def test_streams_never_looked_at_go_elsewhere_unnoticed(by_goaway: bool) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        stream_id = await peer.wait_ended()
        if not refused:
            refused.append(True)
            if by_goaway:
                peer.send_frame(GoAwayFrame(0, last_stream_id=0))
                await peer.wait_closed()
                return
            peer.reset(stream_id, ErrorCodes.REFUSED_STREAM)
            stream_id = await peer.wait_ended()
        peer.h2.send_headers(stream_id, OK)
        peer.h2.send_data(stream_id, frame_message(b"here"))
        peer.h2.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
        peer.flush()
        await peer.wait_closed()

    refused: list[bool] = []
    async with listen(serve) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with stand.client() as client:
            assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"here"
            # The router need not know: it was one attempt.
            assert stand.router.outcomes == [Outcome.ANSWERED]


async def test_an_upstream_that_refuses_for_ever() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        while True:
            # Whole requests, or the reset of one crosses its own last frame.
            stream_id = await peer.wait_ended()
            refused.append(stream_id)
            peer.reset(stream_id, ErrorCodes.REFUSED_STREAM)

    refused: list[int] = []
    async with listen(serve) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with connect(stand.port) as peer:
            stream_id = peer.begin([*REQUEST, (b"mm-model-id", b"m")], end=True)
            answer, _ = await peer.wait_answer(stream_id)
            assert answer[b"grpc-status"] == b"14"
            assert stand.router.outcomes == [Outcome.UNREACHABLE]
            assert len(refused) == 1 + 3


@pytest.mark.parametrize(
    "headers",
    [
        [*OK, (b"Upper", b"x")],
        [*OK, (b"x", b"line\nbreak")],
    ],
)
async def test_malformed_answers_do_not_reach_the_client(headers: HeaderList) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        while True:
            stream_id = await peer.wait_ended()
            peer.h2.send_headers(stream_id, headers)
            peer.flush()

    async with listen(serve) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with stand.client() as client:
            for _ in range(2):
                error = await _fail(client.unary_unary("/t.S/Unary")(b"q", metadata=ID))
                assert error.code() == grpc.StatusCode.INTERNAL
                assert "malformed response" in error.details()
            assert len(stand.server.links) == 1

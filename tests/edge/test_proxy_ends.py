"""Calls that end early: clients that leave, deadlines, answers before the request is whole."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from h2.errors import ErrorCodes
from h2.events import StreamReset

from mm.core.calls import Outcome
from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from mm.errors import NoRoomError
from tests.edge.raw_h2 import PATIENCE_S, REQUEST, connect
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


# --- time and cancellation ----------------------------------------------------------------------


async def test_a_client_that_leaves_ends_its_call_in_the_runtime() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        call = client.unary_unary("/t.S/Hang")(b"", metadata=ID)
        await asyncio.wait_for(stand.runtime.started.wait(), PATIENCE_S)
        call.cancel()
        await asyncio.wait_for(stand.runtime.cancelled.wait(), PATIENCE_S)
        await stand.router.wait_finished(1)
        assert stand.router.outcomes == [Outcome.ABANDONED]


async def test_a_client_whose_connection_breaks_ends_its_call_in_the_runtime() -> None:
    async with serve_proxy() as stand:
        async with connect(stand.port) as peer:
            path = (b":path", b"/t.S/Hang")
            headers = [path if header[0] == b":path" else header for header in REQUEST]
            stream_id = peer.begin([*headers, (b"mm-model-id", b"m")])
            peer.send(stream_id, frame_message(b""), end=True)
            await asyncio.wait_for(stand.runtime.started.wait(), PATIENCE_S)
            peer.writer.transport.abort()
        await asyncio.wait_for(stand.runtime.cancelled.wait(), PATIENCE_S)
        await stand.router.wait_finished(1)
        assert stand.router.outcomes == [Outcome.ABANDONED]


async def test_a_client_that_leaves_while_its_model_loads() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        load = asyncio.Event()
        stand.router.answers = [load]
        call = client.unary_unary("/t.S/Unary")(b"", metadata=ID)
        await stand.router.wait_waiting(1)
        call.cancel()
        await stand.router.wait_waiting(0)
        # There was no route to give back.
        assert not stand.router.finishes


async def test_a_request_larger_than_the_window_waits_for_its_route() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        load = asyncio.Event()
        stand.router.answers = [load]
        call = client.unary_unary("/t.S/Unary")(bytes(3 * 2**20), metadata=ID)
        await stand.router.wait_waiting(1)
        load.set()
        assert len(await call) == 3 * 2**20 + 5


async def test_deadlines_are_passed_on_shorter_and_kept_here() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        await client.unary_unary("/t.S/Unary")(b"", metadata=ID, timeout=30)
        await client.unary_unary("/t.S/Unary")(b"", metadata=ID)
        with_deadline, without = stand.runtime.remaining_s
        assert with_deadline is not None
        assert 20 < with_deadline < 30
        assert without is None or without > 1e6
        # A raw client that sets a deadline and then waits for ever.
        async with connect(stand.port) as peer:
            path = (b":path", b"/t.S/Hang")
            headers = [path if header[0] == b":path" else header for header in REQUEST]
            extra = [(b"mm-model-id", b"m"), (b"grpc-timeout", b"1500m")]
            stream_id = peer.begin([*headers, *extra])
            peer.send(stream_id, frame_message(b""), end=True)
            answer, _ = await peer.wait_answer(stream_id)
            assert answer[b"grpc-status"] == b"4"
            await asyncio.wait_for(stand.runtime.cancelled.wait(), PATIENCE_S)


async def test_a_deadline_that_passes_while_the_model_loads() -> None:
    async with serve_proxy() as stand, connect(stand.port) as peer:
        stand.router.answers = [asyncio.Event()]
        extra = [(b"mm-model-id", b"m"), (b"grpc-timeout", b"500m")]
        answer, _ = await peer.wait_answer(peer.begin([*REQUEST, *extra], end=True))
        assert answer[b"grpc-status"] == b"4"
        assert answer[b"grpc-message"] == b"deadline exceeded"
        assert stand.router.calls[0].deadline_s is not None
        assert not stand.router.finishes


async def test_an_answer_before_the_request_has_ended_stops_the_client() -> None:
    async with serve_proxy() as stand, connect(stand.port) as peer:
        stand.router.answers = [NoRoomError("full")]
        stream_id = peer.begin([*REQUEST, (b"mm-model-id", b"m")])
        answer, _ = await peer.wait_answer(stream_id)
        assert answer[b"grpc-message"] == b"full"
        assert (await peer.wait_on(StreamReset, stream_id)).error_code == ErrorCodes.NO_ERROR

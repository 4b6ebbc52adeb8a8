"""What calls hold of their requests while they wait for a load, and who is charged for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest

from mm.core.calls import Call, Outcome, PeerRoute
from mm.edge.h2 import EXTERNAL_LIMITS
from tests.edge.upstream import PATIENCE_S, Stand, serve_proxy

pytestmark = pytest.mark.anyio

METADATA = (("mm-model-id", "m"),)


async def waiting_call(stand: Stand, request_bytes: int) -> Call:
    """Answer the router's call once it waits with so much of its request."""
    async with asyncio.timeout(PATIENCE_S):
        while not (stand.router.waiting and stand.router.waits[-1].request_bytes == request_bytes):
            stand.router.waiting_event.clear()
            await stand.router.waiting_event.wait()
    return stand.router.waits[-1]


async def test_a_waiting_call_is_charged_for_its_request_and_takes_nothing_from_hits() -> None:
    loaded = asyncio.Event()
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.answers = [loaded]
        call = client.unary_unary("/t.S/Unary")(bytes(10_000), metadata=METADATA)
        waiting = await waiting_call(stand, 10_005)
        assert waiting.waits
        (link,) = stand.server.links
        assert link.parked_count == 1
        assert stand.server.held_bytes == 0, "the budget of calls that are being sent"
        loaded.set()
        assert await call == b"echo:" + bytes(10_000)
        assert link.parked_count == 0
        assert stand.server.held_bytes == 0


async def test_hits_pass_while_others_wait_with_all_that_may_be_held() -> None:
    limits = replace(EXTERNAL_LIMITS, held_bytes_max=20_000)
    loaded = asyncio.Event()
    async with serve_proxy(limits=limits) as stand, stand.client() as client:
        unary = client.unary_unary("/t.S/Unary")
        stand.router.answers = [loaded]
        waiting = unary(bytes(19_000), metadata=METADATA)
        await waiting_call(stand, 19_005)
        # Kept, and so sent a second time: nothing of the budget is taken.
        stand.router.answers = []
        stand.router.again = [True]
        stand.runtime.scripts["Once"] = unavailable_once()
        assert await client.unary_unary("/t.S/Once")(bytes(15_000), metadata=METADATA) == b"second"
        loaded.set()
        assert await waiting == b"echo:" + bytes(19_000)


def unavailable_once():  # type: ignore[no-untyped-def]
    times = 0

    async def script(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        nonlocal times
        times += 1
        if times == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return b"second"

    return script


async def test_one_byte_too_many_ends_a_waiting_call_at_once() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.answers = [asyncio.Event()]
        stand.router.waiting_bytes_max = 50_000
        call = client.stream_unary("/t.S/Up")(metadata=METADATA)
        await call.write(bytes(20_000))
        await waiting_call(stand, 20_005)
        await call.write(bytes(20_000))
        await waiting_call(stand, 40_010)
        await call.write(bytes(20_000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, PATIENCE_S)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "too many bytes wait"
        await stand.router.wait_waiting(0)


# --- at a peer -----------------------------------------------------------------------------------


async def test_a_call_that_waits_at_a_peer_is_charged_here_too() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.answers = [peer_that_loads(stand)]
        call = client.unary_unary("/t.S/Hang")(bytes(10_000), metadata=METADATA)
        waiting = await waiting_call(stand, 10_005)
        await asyncio.wait_for(stand.runtime.started.wait(), PATIENCE_S)
        (link,) = stand.server.links
        assert (waiting.waits, link.parked_count) == (True, 1)
        call.cancel()
        await stand.router.wait_finished(1)
        assert stand.router.outcomes == [Outcome.ABANDONED]
        await stand.router.wait_waiting(0)
        assert await client.unary_unary("/t.S/Unary")(b"q", metadata=METADATA) == b"echo:q"
        assert link.parked_count == 0


async def test_once_the_answer_begins_nobody_waits() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.answers = [peer_that_loads(stand)]
        call = client.stream_stream("/t.S/Both")(metadata=METADATA)
        waiting = await waiting_call(stand, 0)
        await call.write(b"q")
        assert await call.read() == b"re:q"
        assert not waiting.waits
        assert [link.parked_count for link in stand.server.links] == [0]
        stand.router.waiting_bytes_max = 0
        await call.write(b"more")
        assert await call.read() == b"re:more"
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF


async def test_what_is_not_kept_any_more_is_not_charged() -> None:
    """A long upload to a peer flows through; it must not be ended for what it once was."""
    async with serve_proxy(retry_buffer_bytes_max=50_000) as stand, stand.client() as client:
        stand.router.answers = [peer_that_loads(stand)]
        stand.router.waiting_bytes_max = 50_000
        call = client.stream_unary("/t.S/Up")(metadata=METADATA)
        await call.write(bytes(20_000))
        waiting = await waiting_call(stand, 20_005)
        # What comes in pieces may just reach the limit before it is passed on.
        stand.router.waiting_bytes_max = 100_000
        for _ in range(3):
            await call.write(bytes(20_000))
        await waiting_call(stand, 0)
        stand.router.waiting_bytes_max = 0
        for _ in range(17):
            await call.write(bytes(20_000))
        await call.done_writing()
        assert len(await call) == 21 * 20_000 + 20
        assert waiting.request_bytes == 0


async def test_one_byte_too_many_ends_a_call_that_waits_at_a_peer() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.answers = [peer_that_loads(stand)]
        stand.router.waiting_bytes_max = 30_000
        call = client.stream_unary("/t.S/Up")(metadata=METADATA)
        await call.write(bytes(20_000))
        await waiting_call(stand, 20_005)
        await call.write(bytes(20_000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, PATIENCE_S)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await stand.router.wait_waiting(0)
        assert stand.router.outcomes == [Outcome.ABANDONED]


def peer_that_loads(stand: Stand) -> PeerRoute:
    route = stand.peer_route("m", address=f"127.0.0.1:{stand.runtime.port}", may_wait=True)
    assert isinstance(route, PeerRoute)
    return route

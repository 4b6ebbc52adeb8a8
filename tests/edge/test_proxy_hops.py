"""Calls passed on between instances: hop headers, hop results, loads (docs/peer-protocol.md)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from h2.errors import ErrorCodes
from h2.events import PingAckReceived, RequestReceived

from mm.core.calls import Hop, NamedBy, Outcome
from mm.core.headers import HeaderList
from mm.core.ids import InstanceId
from mm.edge.h2 import RUNTIME_LIMITS, Channel
from mm.edge.h2.messages import frame_message
from mm.edge.unary import CallError, call_raw
from mm.errors import LoadFailedError, NoRoomError, StatusCode
from tests.edge.raw_h2 import REQUEST, RawPeer, connect, listen, resets
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


# --- hops ---------------------------------------------------------------------------------------


async def test_a_call_through_a_peer() -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here:
        here.router.answers = [
            here.peer_route(
                "m",
                address=there.address,
                tried=frozenset({InstanceId("a"), InstanceId("b")}),
                excludes=frozenset({InstanceId("c")}),
                hops_left=1,
                known_size_units=77,
            )
        ]
        async with here.client() as client:
            metadata = (*ID, ("x-own", "1"), ("mm-hop-kind", "load-local"))
            call = client.unary_unary("/t.S/Unary")(b"q", metadata=metadata, timeout=30)
            assert await call == b"echo:q"
            initial = dict(await call.initial_metadata())
            assert not [name for name in initial if name.startswith("mm-")]
        # The client's own hop header was nothing to us; the peer was told what we know.
        assert here.router.calls[0].hop is Hop.EXTERNAL
        (told,) = there.router.calls
        assert (told.hop, told.hops_left, told.known_size_units) == (Hop.HIT_ONLY, 1, 77)
        assert (told.tried, told.excludes) == ({"a", "b"}, {"c"})
        assert told.deadline_s is not None
        seen = dict(there.runtime.metadata[0])
        assert (seen["x-own"], seen["mm-model-id"]) == ("1", "m")
        assert not [name for name in seen if name.startswith("mm-hop")]
        assert here.router.loads == [there.router.load]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, Outcome.NOT_HERE),
        (LoadFailedError("no file"), Outcome.LOAD_FAILED),
    ],
)
async def test_what_a_peer_refuses_is_tried_elsewhere(error: Any, outcome: Outcome) -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here:
        error = error or NoRoomError("no copy of model m here")
        error.hop_result = outcome.value
        there.router.answers = [error]
        here.router.answers = [here.peer_route("m", address=there.address)]
        here.router.again = [True]
        async with here.client() as client:
            assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"echo:q"
        assert here.router.finishes[0] == (outcome, error.message)


async def test_the_runtime_of_a_peer_fails() -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here:
        there.runtime.scripts["Some"] = _abort_times(1, grpc.StatusCode.UNAVAILABLE, "busy")
        here.router.answers = [here.peer_route("m", address=there.address)]
        async with here.client() as client:
            call = client.unary_unary("/t.S/Some")(b"q", metadata=ID)
            error = await _fail(call)
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "busy")
            assert not [name for name, _ in error.trailing_metadata() or () if "hop" in name]
        assert there.router.outcomes == here.router.outcomes == [Outcome.RUNTIME_UNAVAILABLE]


async def test_the_runtime_of_a_peer_is_gone() -> None:
    async with serve_proxy(external=False, runtime_address="127.0.0.1:1") as there:
        async with serve_proxy() as here, here.client() as client:
            here.router.answers = [here.peer_route("m", address=there.address)]
            here.router.again = [True]
            assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"echo:q"
            assert here.router.outcomes == [Outcome.UNREACHABLE, Outcome.ANSWERED]


async def test_only_a_call_that_can_be_sent_again_may_be_sent_back() -> None:
    """The peer refuses before it reads; what the sender no longer has would be lost."""
    async with serve_proxy(external=False) as there, serve_proxy() as here, here.client() as client:
        route = here.peer_route(
            "m", address=there.address, may_redirect=True, sender=InstanceId("a b")
        )
        here.router.answers = [route, route, replace(route, may_redirect=False)]
        assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"echo:q"
        call = client.stream_stream("/t.S/Both")(metadata=ID)
        await call.write(b"1")
        assert await call.read() == b"re:1"
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF
        assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"echo:q"
        assert [told.may_redirect for told in there.router.calls] == [True, False, False]
        assert {told.sender for told in there.router.calls} == {InstanceId("a b")}


async def test_the_end_of_a_request_is_awaited_before_a_peer_may_send_it_back() -> None:
    """Without all of it the peer would not hear of the vmodel, and the call wait on for the model
    that the vmodel has left; a client that streams is not waited for.
    """
    named_by = NamedBy("v", 3)
    async with serve_proxy(external=False) as there, serve_proxy() as here:
        route = here.peer_route("m", address=there.address, may_wait=True, named_by=named_by)
        here.router.answers = [route, route]
        async with connect(here.port) as client:
            unary = [(n, b"/t.S/Unary" if n == b":path" else v) for n, v in REQUEST]
            stream_id = client.begin([*unary, (b"mm-model-id", b"m")])
            client.h2.ping(b"headers?")
            client.flush()
            await client.wait_for(PingAckReceived)
            client.send(stream_id, frame_message(b"q"), end=True)
            answer, _ = await client.wait_answer(stream_id)
        assert answer[b"grpc-status"] == b"0"
        async with here.client() as streaming:
            call = streaming.stream_stream("/t.S/Both")(metadata=ID)
            await call.write(b"1")
            assert await call.read() == b"re:1"
            call.cancel()
        assert [told.named_by for told in there.router.calls] == [named_by, None]


async def test_a_large_request_is_never_sent_back() -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here, here.client() as client:
        here.router.answers = [here.peer_route("m", address=there.address, may_redirect=True)]
        request = bytes(2 * 2**20)
        assert await client.unary_unary("/t.S/Unary")(request, metadata=ID) == b"echo:" + request
        assert not there.router.calls[0].may_redirect


async def test_a_call_that_was_sent_back_goes_to_another_and_the_count_is_known() -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here, here.client() as client:
        error = NoRoomError("the copy of model m here is busy")
        error.hop_result = Outcome.REDIRECT.value
        there.router.answers, there.router.load = [error], 17
        here.router.answers = [here.peer_route("m", address=there.address, may_redirect=True)]
        here.router.again = [True]
        assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"echo:q"
        assert here.router.outcomes == [Outcome.REDIRECT, Outcome.ANSWERED]
        assert here.router.loads == [17]


async def test_a_time_of_a_useful_retry_is_told() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.answers = [NoRoomError("Nowhere available to load", retry_after_ms=750)]
        error = await _fail(client.unary_unary("/t.S/Unary")(b"q", metadata=ID))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "750"


async def test_every_reply_of_a_peer_says_how_busy_the_copy_is() -> None:
    async with serve_proxy(external=False) as stand, connect(stand.port) as peer:
        stand.runtime.scripts["Some"] = _abort_times(9, grpc.StatusCode.NOT_FOUND, "gone")
        stand.router.unknown.add("nobody")
        path = (b":path", b"/t.S/Some")
        for model_id, headers in (
            (b"m", REQUEST),
            (b"m", [path if header[0] == b":path" else header for header in REQUEST]),
            (b"nobody", REQUEST),
        ):
            hop = [(b"mm-model-id", model_id), (b"mm-hop-kind", b"hit-only")]
            if headers is REQUEST:
                headers = [(b":path", b"/t.S/Unary") if h[0] == b":path" else h for h in headers]
            stream_id = peer.begin([*headers, *hop])
            peer.send(stream_id, frame_message(b"q"), end=True)
            answer, _ = await peer.wait_answer(stream_id)
            assert answer[b"mm-hop-load"] == b"3"


async def test_a_peer_hears_how_busy_the_copy_is_though_its_runtime_resets_the_stream() -> None:
    hop = [(b"mm-model-id", b"m"), (b"mm-hop-kind", b"hit-only")]
    async with (
        listen(resets(ErrorCodes.INTERNAL_ERROR)) as (address, _),
        serve_proxy(external=False, runtime_address=address) as stand,
        connect(stand.port) as peer,
    ):
        stream_id = peer.begin([*REQUEST, *hop])
        peer.send(stream_id, frame_message(b"q"), end=True)
        answer, _ = await peer.wait_answer(stream_id)
        assert (answer[b"grpc-status"], answer[b"mm-hop-load"]) == (b"13", b"3")


async def test_a_peer_hears_how_busy_the_copy_is_though_its_request_is_cut_off() -> None:
    async def serve(runtime: RawPeer) -> None:
        runtime.start()
        await runtime.wait_for(RequestReceived)
        begun.set()
        await runtime.wait_closed()

    begun = asyncio.Event()
    hop = [(b"mm-model-id", b"m"), (b"mm-hop-kind", b"hit-only")]
    async with (
        listen(serve) as (address, _),
        serve_proxy(external=False, runtime_address=address) as stand,
        connect(stand.port) as peer,
    ):
        stream_id = peer.begin([*REQUEST, *hop])
        peer.send(stream_id, frame_message(b"whole")[:-1])
        await begun.wait()
        peer.h2.end_stream(stream_id)
        peer.flush()
        answer, _ = await peer.wait_answer(stream_id)
        assert (answer[b"grpc-status"], answer[b"mm-hop-load"]) == (b"3", b"3")


async def test_a_newer_peer_is_understood() -> None:
    async with serve_proxy(external=False) as stand, connect(stand.port) as peer:
        hop = [
            (b"mm-model-id", b"m"),
            (b"mm-hop-version", b"7"),
            (b"mm-hop-kind", b"of-the-future"),
            (b"mm-hop-mood", b"good"),
        ]
        headers = [(b":path", b"/t.S/Unary") if h[0] == b":path" else h for h in REQUEST]
        stream_id = peer.begin([*headers, *hop])
        peer.send(stream_id, frame_message(b"q"), end=True)
        assert (await peer.wait_answer(stream_id))[1] == frame_message(b"echo:q")
        assert stand.router.calls[0].hop is Hop.HIT_ONLY


async def test_our_own_client_reads_statuses_of_the_proxy() -> None:
    async with serve_proxy() as stand:
        channel = Channel(stand.address, RUNTIME_LIMITS)
        with pytest.raises(CallError, match="must include mm-model-id header") as caught:
            await call_raw(channel, "/t.S/Unary", b"", timeout_s=60)
        assert caught.value.code == StatusCode.INVALID_ARGUMENT
        await channel.close()

"""Refused loads on the wire: what the refusing instance tells of itself is for the sender."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest

from mm.core.calls import Hop, Outcome, PeerRoute
from mm.core.hop_headers import HopRequest, read_hop_request
from mm.core.ids import InstanceId, ModelId
from mm.edge.h2 import PEER_LIMITS, ChannelPool, GrpcServer, IncomingCall
from mm.edge.management import SERVICE
from mm.edge.peers import GrpcPeers
from mm.edge.unary import ServiceTable
from mm.errors import LimitError, MeshError, ModelNotFoundError, NoRoomError, StatusCode
from mm.mesh.ports import ModelStatus, PeerCallError
from mm.pb import mmesh
from tests.edge.upstream import Stand, serve_proxy

pytestmark = pytest.mark.anyio
STATE = "1000/900/17/3/2"


def refusal() -> MeshError:
    error = NoRoomError("others can load model m better")
    error.hop_result = Outcome.STALE.value
    error.hop_state = STATE
    error.retry_after_ms = 750
    return error


def load_route(there: Stand) -> PeerRoute:
    route = there.peer_route("m", hop=Hop.LOAD_LOCAL, may_refuse=True)
    assert isinstance(route, PeerRoute)
    return route


@pytest.mark.parametrize("ids", [["m"], ["m", "n"]])
async def test_a_refusal_is_told_and_the_call_sent_again(ids: list[str]) -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here, here.client() as client:
        there.router.answers = [refusal()]
        here.router.answers = [load_route(there)]
        here.router.again = [True]
        metadata = [("mm-model-id", each) for each in ids]
        answer = await client.unary_unary("/t.S/Unary")(b"q", metadata=metadata)
        assert answer == b"echo:q" * len(ids)
        assert here.router.states == [STATE]
        assert here.router.outcomes[0] is Outcome.STALE
        assert [each.retry_after_ms for each in here.router.calls].count(750) == 1, "asked again"
        assert there.router.calls[0].may_refuse


async def test_a_client_never_sees_the_state() -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here, here.client() as client:
        there.router.answers = [refusal()]
        here.router.answers = [load_route(there)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.unary_unary("/t.S/Unary")(b"q", metadata=(("mm-model-id", "m"),))
        trailers = caught.value.trailing_metadata() or ()
        assert not [name for name, _ in trailers if name.startswith("mm-")]
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        here.router.answers = [refusal()]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.unary_unary("/t.S/Unary")(b"q", metadata=(("mm-model-id", "m"),))
        trailers = caught.value.trailing_metadata() or ()
        assert not [name for name, _ in trailers if name.startswith("mm-")]


async def test_what_cannot_be_sent_again_may_not_be_refused() -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here, here.client() as client:
        here.router.answers = [load_route(there), replace(load_route(there), may_refuse=False)]
        call: Any = client.stream_stream("/t.S/Both")(metadata=(("mm-model-id", "m"),))
        await call.write(b"1")
        assert await call.read() == b"re:1"
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF
        await client.unary_unary("/t.S/Unary")(b"q", metadata=(("mm-model-id", "m"),))
        assert [told.may_refuse for told in there.router.calls] == [False, False]


@asynccontextmanager
async def peer_that_fails(
    failures: Iterable[MeshError], told: list[HopRequest]
) -> AsyncIterator[Callable[[], Awaitable[ModelStatus]]]:
    """A peer that answers each ensure-loaded with the next error; yields what sends one."""
    errors = iter(failures)

    async def ensure(_: mmesh.EnsureLoadedRequest, call: IncomingCall) -> mmesh.ModelStatusInfo:
        told.append(read_hop_request(call.head.mesh))
        raise next(errors)

    services, pool = ServiceTable(), ChannelPool(PEER_LIMITS)
    services.add_unary(SERVICE + "ensureLoaded", mmesh.EnsureLoadedRequest, ensure)
    server = GrpcServer(services, limits=PEER_LIMITS, external=False)
    port = await server.start("127.0.0.1", 0)
    route = PeerRoute(
        ModelId("m"), InstanceId("i"), f"127.0.0.1:{port}", Hop.LOAD_LOCAL, may_refuse=True
    )
    try:
        yield lambda: GrpcPeers(pool).ensure_loaded(route, sync=True, last_used_ms=0, timeout_s=60)
    finally:
        await pool.close()
        await server.stop(0)


async def test_an_ensure_loaded_may_be_refused_as_well() -> None:
    told: list[HopRequest] = []
    async with peer_that_fails([refusal()], told) as ensure:
        with pytest.raises(PeerCallError) as caught:
            await ensure()
    assert (caught.value.outcome, caught.value.hop_state) == (Outcome.STALE, STATE)
    assert caught.value.retry_after_ms == 750
    assert [request.may_refuse for request in told] == [True]


async def test_an_error_that_is_the_answer_arrives_as_the_error_that_it_is() -> None:
    """That the model is gone is no failure to whoever set a vmodel; each asks for that class."""
    failures = [ModelNotFoundError(), LimitError("full", retry_after_ms=9), NoRoomError("none")]
    async with peer_that_fails(failures, []) as ensure:
        with pytest.raises(ModelNotFoundError, match="model not found"):
            await ensure()
        with pytest.raises(MeshError, match="full") as caught:
            await ensure()
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.retry_after_ms == 9
        with pytest.raises(PeerCallError, match="none") as refused:
            await ensure()
        assert (refused.value.outcome, refused.value.answered) == (Outcome.STALE, False)

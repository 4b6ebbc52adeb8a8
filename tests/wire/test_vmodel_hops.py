"""Calls of vmodels at copies of other instances that may have to wait for a slot there."""

from __future__ import annotations

from base64 import b64encode
from contextlib import AsyncExitStack

import pytest
from h2.events import RequestReceived

from mm.core.calls import Call, NamedBy, Outcome, Route
from mm.core.headers import HeaderList
from mm.core.hop_headers import read_hop_request
from mm.core.ids import ModelId
from mm.edge.h2.messages import frame_message
from mm.errors import ModelMovedError
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import OK, request
from tests.wire.stand import WireStand, serve_wire
from tests.wire.test_frames import port_of

pytestmark = pytest.mark.anyio

#: Every kind of byte.
VMODEL = "a-Z_0.9~/%ü "


class Peer:
    """An instance that answers every call in one way, and keeps what it heard."""

    def __init__(self, *trailers: tuple[bytes, bytes]) -> None:
        self._trailers = trailers
        self.asked: list[HeaderList] = []

    async def serve(self, peer: RawPeer) -> None:
        peer.start()
        while True:
            asked = await peer.wait_for(RequestReceived)
            self.asked.append([(bytes(name), bytes(value)) for name, value in asked.headers])
            stream_id = await peer.wait_ended()
            peer.h2.send_headers(stream_id, [*OK, *self._trailers], end_stream=True)
            peer.flush()


async def beside(stack: AsyncExitStack, peer: Peer) -> WireStand:
    """Answer a wire beside which the vmodel's model is at a peer."""
    address, _ = await stack.enter_async_context(listen(peer.serve))
    here = await stack.enter_async_context(serve_wire())
    here.table.set_state("m", 0)  # type: ignore[arg-type]
    here.add_peer("m", await port_of(address))
    here.table.set_alias(VMODEL, "m")
    here.router.vmodels[VMODEL] = "m"
    return here


def by_vmodel() -> HeaderList:
    """Answer a call's headers that name the model by its vmodel."""
    others = [header for header in request() if header[0] != b"mm-model-id"]
    return [*others, (b"mm-vmodel-id-bin", b64encode(VMODEL.encode()).rstrip(b"="))]


def begin_whole(client: RawPeer, headers: HeaderList) -> int:
    """Begin a call whose request comes in one piece: what is all there can be sent again."""
    stream_id = client.h2.get_next_available_stream_id()
    client.h2.send_headers(stream_id, headers)
    client.send(stream_id, frame_message(b"q"), end=True)
    return stream_id


async def test_the_peer_is_told_the_vmodel_where_there_are_slots() -> None:
    peer = Peer((b"grpc-status", b"0"))
    async with AsyncExitStack() as stack:
        here = await beside(stack, peer)
        client = await stack.enter_async_context(connect(here.port))
        for has_slots in (False, True):
            here.configure(has_slots=has_slots)
            for headers in (by_vmodel(), request()):
                await client.wait_answer(begin_whole(client, headers))
        await here.settle(calls_there=4, spliced_model=0)
    told = [read_hop_request(each).named_by for each in peer.asked]
    assert told == [None, None, NamedBy(VMODEL), None]


async def test_a_call_that_a_peer_sends_back_goes_where_its_vmodel_went() -> None:
    peer = Peer((b"grpc-status", b"14"), (b"mm-hop-result", b"moved"))
    async with AsyncExitStack() as stack:
        here = await beside(stack, peer)

        def tried(call: Call, route: Route, outcome: Outcome, message: str) -> bool:
            assert outcome is Outcome.MOVED
            call.failure = ModelMovedError(message)
            here.router.vmodels[VMODEL] = "n"
            return False

        here.router.tried = tried  # type: ignore[method-assign]
        here.configure(has_slots=True)
        client = await stack.enter_async_context(connect(here.port))
        _, body = await client.wait_answer(begin_whole(client, by_vmodel()))
        assert body == frame_message(b"echo:q")
        assert [call.model_id for call in here.router.calls] == [ModelId("n")]
        assert len(peer.asked) == 1

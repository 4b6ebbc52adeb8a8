"""Attempts of the wire that failed and whose calls cannot be sent again: tier 2 hears of them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived

from mm.core import call_texts
from mm.core.calls import LocalRoute, Outcome
from mm.core.headers import encode_message
from mm.edge.h2.messages import frame_message
from mm.wire import Role
from tests.edge.raw_h2 import RawPeer, connect, listen, resets
from tests.wire.frames import OK, begin, request
from tests.wire.stand import LOAD_ID, serve_wire, until

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)
HERE = LocalRoute("m", load_id=LOAD_ID)  # type: ignore[arg-type]
#: Nothing of which is sent as it is, but for a space and a letter.
ODD_NAME = "a é%\n\x7f€"
LOST = [*OK, (b"grpc-status", b"5"), (b"grpc-message", b"no%20such model")]


async def loses(peer: RawPeer) -> None:
    """Say of each call that there is no such model."""
    peer.start()
    while True:
        stream_id = await peer.wait_ended()
        peer.h2.send_headers(stream_id, LOST, end_stream=True)
        peer.flush()


async def test_a_model_that_a_large_call_finds_lost_is_tier_2s_to_bring_back() -> None:
    async def script(_request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return b""

    async with serve_wire() as stand, stand.client() as client:
        stand.runtime.scripts["Lost"] = script
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.unary_unary("/t.S/Lost")(bytes(2**21), metadata=ID)
        assert caught.value.details() == "no such model"
        await until(lambda: bool(stand.router.tried_routes))
        assert stand.router.tried_routes == [(HERE, Outcome.LOST, "no such model")]
        await stand.settle(failures_told=1, failures_untold=0, replayed=0)


async def test_an_answer_that_has_begun_may_end_with_a_lost_model() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        asked = await peer.wait_for(RequestReceived)
        assert asked.stream_id is not None
        peer.h2.send_headers(asked.stream_id, OK)
        peer.h2.send_data(asked.stream_id, frame_message(b"first"))
        peer.h2.send_headers(asked.stream_id, LOST[2:], end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _):
        port = int(address.rpartition(":")[2])
        async with (
            serve_wire(role=Role.PEER, runtime_port=port) as stand,
            connect(stand.port) as peer,
        ):
            headers, body = await peer.wait_answer(begin(peer))
            assert (headers[b"grpc-status"], body) == (b"5", frame_message(b"first"))
            assert headers[b"mm-hop-result"] == b"lost"
            await until(lambda: bool(stand.router.tried_routes))
            assert stand.router.tried_routes == [(HERE, Outcome.LOST, "no such model")]


async def test_an_instance_that_breaks_off_in_an_answer_is_out_of_reach() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        asked = await peer.wait_for(RequestReceived)
        assert asked.stream_id is not None
        peer.h2.send_headers(asked.stream_id, OK)
        peer.h2.send_data(asked.stream_id, frame_message(b"half")[:6])
        peer.flush()
        await go_on.wait()
        peer.writer.close()

    go_on = asyncio.Event()
    async with listen(serve) as (address, _), serve_wire() as here, connect(here.port) as client:
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        here.add_peer("m", int(address.rpartition(":")[2]))
        stream_id = begin(client)
        await client.wait_on(DataReceived, stream_id)
        go_on.set()
        headers, _ = await client.wait_answer(stream_id)
        assert headers[b"grpc-status"] == b"14"
        await until(lambda: bool(here.router.tried_routes))
        ((route, outcome, text),) = here.router.tried_routes
        assert (outcome, "lost" in text) == (Outcome.UNREACHABLE, True)
        assert route.instance_id == "peer"  # type: ignore[union-attr]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("is_here", [True, False], ids=["here", "there"])
async def test_who_did_not_answer_is_named_as_tier_2_names_it(role: Role, is_here: bool) -> None:
    whose = "the model runtime of instance me does not answer"
    if not is_here:
        whose = f"instance {ODD_NAME} is gone"
    async with listen(resets(ErrorCodes.REFUSED_STREAM)) as (address, _):
        port = int(address.rpartition(":")[2])
        # Nothing is kept to be sent again.
        async with (
            serve_wire(role=role, runtime_port=port, retry_buffer_bytes_max=0) as stand,
            connect(stand.port) as client,
        ):
            if not is_here:
                stand.table.set_state("m", 0)  # type: ignore[arg-type]
                stand.add_peer("m", port, ODD_NAME)
            headers, _ = await client.wait_answer(begin(client))
    assert headers[b"grpc-message"] == encode_message(f"{whose}: {call_texts.STREAM_REFUSED}")
    assert headers[b"grpc-status"] == b"14"
    expected = b"unreachable" if role is Role.PEER else None
    assert headers.get(b"mm-hop-result") == expected
    told = b"0" if role is Role.PEER and is_here else None
    assert headers.get(b"mm-hop-load") == told


async def test_a_peer_is_told_how_busy_the_copy_is_though_its_runtime_resets_the_stream() -> None:
    async with listen(resets(ErrorCodes.INTERNAL_ERROR)) as (address, _):
        port = int(address.rpartition(":")[2])
        async with (
            serve_wire(role=Role.PEER, runtime_port=port) as stand,
            connect(stand.port) as peer,
        ):
            hop = (b"mm-hop-kind", b"hit-only")
            headers, _ = await peer.wait_answer(begin(peer, request(b"/t.S/Unary", hop)))
            assert (headers[b"grpc-status"], headers[b"mm-hop-load"]) == (b"13", b"0")


async def test_a_peer_is_told_how_busy_the_copy_is_though_its_request_is_cut_off() -> None:
    async with serve_wire(role=Role.PEER) as stand, connect(stand.port) as peer:
        stream_id = peer.begin(request(b"/t.S/Unary", (b"mm-hop-kind", b"hit-only")))
        peer.send(stream_id, frame_message(b"whole")[:-1])
        await stand.settle(calls_here=1)
        peer.h2.end_stream(stream_id)
        peer.flush()
        headers, _ = await peer.wait_answer(stream_id)
        assert (headers[b"grpc-status"], headers[b"mm-hop-load"]) == (b"3", b"0")


async def test_no_more_failures_are_kept_than_tier_2_looks_at() -> None:
    kept = 256  # FAILURES_MAX
    async with listen(loses) as (address, _):
        port = int(address.rpartition(":")[2])
        # Nothing is kept to be sent again.
        async with (
            serve_wire(runtime_port=port, retry_buffer_bytes_max=0) as stand,
            connect(stand.port) as client,
        ):
            asyncio.get_running_loop().remove_reader(stand.wire.notice_fd)
            for _ in range(kept + 5):
                headers, _ = await client.wait_answer(begin(client))
                assert headers[b"grpc-status"] == b"5"
            await stand.settle(failures_told=kept, failures_untold=5)
            assert len(stand.wire.take_failures()) == kept
            assert stand.wire.take_failures() == []

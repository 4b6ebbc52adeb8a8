"""Calls that end before they are sent: whom they waited for is free, whatever is read."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest
from hpack import Encoder

from mm.edge.h2.messages import frame_message
from mm.wire import Method
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import begin, request
from tests.wire.hostile import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    ask_large,
    frame,
)
from tests.wire.stand import WireStand, serve_wire, until

pytestmark = pytest.mark.anyio
#: A socket that is full stays so: what waits for it is far more than the kernel still moves.
STAND: dict[str, Any] = {"message_bytes_max": 2**31 - 1, "socket_bytes": 4096}


@asynccontextmanager
async def one_who_does_not_read(stand: WireStand) -> AsyncIterator[socket.socket]:
    """A client whose socket is full of the answer to its stream 1."""
    with closing(ask_large(stand)) as caller:
        await until(lambda: stand.counts.unwritten_bytes > 0)
        yield caller
        # What has ended has not done so because somebody read.
        assert stand.counts.calls_open == 2


def laid_out(model_id: bytes, *more: tuple[bytes, bytes]) -> bytes:
    headers = request(b"/t.S/Unary", *more, model_id=model_id)
    return frame(HEADERS, Encoder().encode(headers), flags=END_HEADERS, stream_id=3)


async def test_a_refused_request_takes_no_slot_from_others() -> None:
    methods = {b"/t.S/Unary": Method(injection_path=(1,))}
    async with serve_wire(**STAND) as stand:
        stand.configure(has_slots=True, methods=methods)
        stand.put("k")
        async with one_who_does_not_read(stand) as caller:
            no_message = frame(DATA, frame_message(b"\xff\xff"), flags=END_STREAM, stream_id=3)
            # At once: it is looked at as a whole before anything is sent.
            caller.sendall(laid_out(b"k") + no_message)
            await stand.settle(calls=2)
            async with connect(stand.port) as other:
                call = begin(other, request(model_id=b"k"), b"")
                told, _ = await other.wait_answer(call)
            assert told[b"grpc-status"] == b"0"
            assert (stand.table.in_flight("k"), stand.counts.left_busy) == (0, 0)


@pytest.mark.parametrize("why", ["its time is up", "it breaks HTTP/2"])
async def test_a_call_that_ends_as_it_waits_for_a_connection_counts_there_no_more(why: str) -> None:
    async def accepts(peer: RawPeer) -> None:
        while await peer.reader.read(2**16):
            pass  # without a word

    async with listen(accepts) as (address, _), serve_wire(**STAND) as stand:
        stand.table.put("k", 1, 1)
        handle = stand.add_peer("k", int(address.rpartition(":")[2]))
        async with one_who_does_not_read(stand) as caller:
            if why == "its time is up":
                caller.sendall(laid_out(b"k", (b"grpc-timeout", b"50m")))
                await stand.settle(deadlines=1)
            else:
                caller.sendall(laid_out(b"k", (b"content-length", b"2")))
                await stand.settle(connect_waiting=1, hits_open=2)
                caller.sendall(frame(DATA, b"123", flags=END_STREAM, stream_id=3))
            # That of the large answer remains.
            await stand.settle(connect_waiting=0, hits_open=1)
            assert stand.wire.peer_traffic([handle])[handle][0] == 0

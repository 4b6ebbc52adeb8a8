"""Connections of the wire: those that nobody needs any more, those that there is no room for."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack, closing

import pytest

from mm.edge.h2.messages import frame_message
from mm.wire import Role
from tests.wire.hostile import DATA, END_STREAM, GOAWAY, PREFACE, Requests, attack, dial, frame
from tests.wire.planes import no_file_descriptor_left
from tests.wire.stand import serve_wire, until

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)
#: As the wire has it.
PAUSE_S = 0.1
#: Of 8 bytes, with the highest stream there can be.
GOAWAY_HEAD = frame(GOAWAY, b"\x7f\xff\xff\xff" + bytes(4))


async def test_a_connection_to_an_instance_ends_when_nobody_needs_it() -> None:
    async with serve_wire(role=Role.PEER) as there, serve_wire() as here:
        here.configure(upstream_idle_ms=20)
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        here.add_peer("m", there.port)
        async with here.client() as client:
            for turn in (1, 2):
                assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"echo:q"
                await here.settle(upstreams_idle=turn, calls_there=turn)
        await there.settle(connections=2, connections_open=0)
        assert here.counts.connect_failures == here.counts.replayed == 0


async def test_one_connection_to_the_runtime_stays() -> None:
    async with serve_wire() as stand, stand.client() as client:
        stand.configure(upstream_idle_ms=1)
        assert await client.unary_unary("/t.S/Unary")(b"1", metadata=ID) == b"echo:1"
        opened = stand.counts.upstreams_open_runtime
        for _ in range(20):
            await stand.settle(calls_open=0)
            assert await client.unary_unary("/t.S/Unary")(b"2", metadata=ID) == b"echo:2"
        assert (stand.counts.upstreams_open_runtime, stand.counts.upstreams_idle) == (opened, 0)


async def test_without_file_descriptors_connections_wait_and_so_does_the_wire() -> None:
    async with serve_wire(threads=2) as stand:
        with ExitStack() as stack:
            callers = [stack.enter_context(closing(socket.socket())) for _ in range(5)]
            with no_file_descriptor_left():
                for caller in callers:
                    caller.connect(("127.0.0.1", stand.port))
                await until(lambda: stand.counts.accept_pauses > 0)
                begun_s, before = time.monotonic(), stand.counts.accept_pauses
                await until(lambda: stand.counts.accept_pauses >= before + 6)
                # Two threads, each with its own pauses: three of them one after the other.
                assert time.monotonic() - begun_s >= 2 * PAUSE_S
                assert stand.counts.connections == 0
            await stand.settle(connections=len(callers), connections_open=len(callers))


async def test_a_call_on_a_connection_that_is_just_made_is_served_when_the_wire_drains() -> None:
    async with serve_wire() as stand:
        with closing(dial(stand.port)) as caller:
            await stand.settle(connections_open=1)
            stand.wire.drain()
            seen = b""
            while GOAWAY_HEAD not in seen:
                data = await asyncio.to_thread(caller.recv, 4096)
                assert data, "closed without a word"
                seen += data
            body = frame(DATA, frame_message(b"late"), flags=END_STREAM, stream_id=1)
            end = await asyncio.to_thread(attack, caller, iter([PREFACE, Requests().next(), body]))
            assert b"echo:late" in end.received
            assert end.code == 0

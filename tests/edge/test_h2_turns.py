"""Many calls at once on one connection take turns with everyone else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from mm.edge.h2.turns import CALLS_A_TURN, PARKED_MAX
from mm.edge.unary import ServiceTable
from tests.edge.h2_echo import Echo, assert_serves, serve_echo
from tests.edge.raw_h2 import REQUEST, RawPeer, connect

pytestmark = pytest.mark.anyio

BURST = 400


async def until(condition: Callable[[], bool]) -> int:
    """Return when it is so; answers the turns of the event loop that it took, at least."""
    turns = 0
    async with asyncio.timeout(60):
        while not condition():
            turns += 1
            turn = asyncio.Event()
            asyncio.get_running_loop().call_soon(turn.set)
            await turn.wait()
    return turns


def send_burst(peer: RawPeer, request: HeaderList = REQUEST) -> None:
    """Begin many calls in one write, without their messages."""
    for _ in range(BURST):
        peer.h2.send_headers(peer.h2.get_next_available_stream_id(), request)
    peer.flush()


async def test_a_burst_is_begun_a_few_calls_a_turn() -> None:
    async with serve_echo() as (server, port, echo), connect(port) as peer:
        await assert_serves(peer)
        send_burst(peer)
        await until(lambda: echo.running > 0)
        assert echo.running <= 2 * CALLS_A_TURN
        turns = await until(lambda: echo.running == BURST)
        assert turns >= BURST / CALLS_A_TURN / 4
        (link,) = server.links
        await until(lambda: not server.queue)
        assert link.transport.is_reading()
        await assert_serves(peer)


async def test_a_quiet_connection_does_not_stand_behind_bursts() -> None:
    async with (
        serve_echo() as (server, port, echo),
        connect(port) as one,
        connect(port) as two,
        connect(port) as quiet,
    ):
        for peer in (one, two, quiet):
            await assert_serves(peer)
        send_burst(one)
        send_burst(two)
        stream_id = quiet.begin()
        quiet.send(stream_id, frame_message(b"x"), end=True)
        assert (await quiet.wait_answer(stream_id))[1] == frame_message(b"x")
        assert len(server.queue) == 2
        assert echo.running < BURST, "most of both bursts comes later"
        await until(lambda: echo.running == 2 * BURST)


async def test_many_connections_with_a_few_new_calls_each_take_turns() -> None:
    """Those that have calls waiting already stand behind whoever has none."""
    async with serve_echo() as (server, port, echo), AsyncExitStack() as stack:
        crowd = [await stack.enter_async_context(connect(port)) for _ in range(12)]
        for peer in crowd:
            await assert_serves(peer)
        await until(lambda: not server.queue)
        for link in list(server.links):
            link.parked_count = PARKED_MAX + 1
            peer = next(each for each in crowd if address_of(each) == link.peer_address)
            peer.h2.send_headers(peer.h2.get_next_available_stream_id(), REQUEST)
            link.data_received(peer.h2.data_to_send())
        assert len(server.queue) == len(crowd)
        turns = await until(lambda: echo.running == len(crowd))
        assert turns >= len(crowd) / 4


async def test_those_who_manage_models_leave_calls_for_models_one_half_of_the_turns() -> None:
    """However many connections they have: else each would have as much as the quiet one."""
    async with serve_echo() as (server, port, echo), AsyncExitStack() as stack:
        managing = Echo()
        managing.gate = asyncio.Event()
        table = ServiceTable(fallback=echo)
        table.add("/manage", managing)
        server.handler = table
        peers = [await stack.enter_async_context(connect(port)) for _ in range(4)]
        for peer in peers:
            await assert_serves(peer)
        manage = [(name, b"/manage" if name == b":path" else value) for name, value in REQUEST]
        quiet = peers.pop()
        for peer in peers:
            for _ in range(PARKED_MAX + 1):
                stream_id = peer.h2.get_next_available_stream_id()
                peer.h2.send_headers(stream_id, manage)
                peer.send(stream_id, frame_message(b""), end=True)
        before = len(peers) * (PARKED_MAX + 1)
        await until(lambda: managing.running == before and not server.queue)
        for peer in peers:
            send_burst(peer, manage)
        send_burst(quiet)
        await until(lambda: echo.running == BURST)
        assert managing.running - before < 1.5 * BURST
        managing.gate.set()
        await until(lambda: managing.running == len(peers) * BURST)  # those have no message
        assert {link.own_count for link in server.links} == {0, BURST}


def address_of(peer: RawPeer) -> str:
    host, port = peer.writer.get_extra_info("sockname")[:2]
    return f"{host}:{port}"


async def test_a_connection_that_goes_leaves_the_queue() -> None:
    async with serve_echo() as (server, port, echo), connect(port) as peer:
        await assert_serves(peer)
        send_burst(peer)
        await until(lambda: len(server.queue) == 1)
        for link in server.links:
            link.connection.close()
        await until(lambda: not server.queue and not echo.running)


async def test_one_message_in_many_small_frames_comes_whole() -> None:
    async with serve_echo() as (_, port, _), connect(port) as peer:
        message = bytes(range(256)) * 8
        stream_id = peer.begin()
        framed = frame_message(message)
        for place in range(0, len(framed), 2):
            peer.h2.send_data(stream_id, framed[place : place + 2])
        peer.h2.end_stream(stream_id)
        peer.flush()
        assert (await peer.wait_answer(stream_id))[1] == framed

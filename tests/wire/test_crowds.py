"""Floods of connections: who is refused, and that nobody else is."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack, closing

import pytest

from mm.edge.h2.listening import listening_socket
from mm.wire import Role
from mm.wire.client_limits import ClientLimits
from tests.edge.raw_h2 import PATIENCE_S
from tests.wire.stand import serve_wire, until

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)


def _connect(port: int, own: str) -> socket.socket:
    caller = socket.create_connection(("127.0.0.1", port), PATIENCE_S, (own, 0))
    caller.settimeout(PATIENCE_S)
    return caller


def _read_all(caller: socket.socket) -> bytes:
    found = b""
    try:
        while data := caller.recv(4096):
            found += data
    except ConnectionResetError:
        pass
    return found


async def test_one_address_cannot_take_all_places() -> None:
    async with serve_wire(threads=2) as stand, stand.client() as client:
        assert await client.unary_unary("/t.S/Unary")(b"1", metadata=ID) == b"echo:1"
        stand.configure(clients=ClientLimits(connections_max=1000, per_address_max=5))
        with ExitStack() as stack:
            # Of 127.0.0.1 there is one already, the client's.
            callers = [
                stack.enter_context(closing(_connect(stand.port, "127.0.0.7"))) for _ in range(30)
            ]
            await stand.settle(crowded_address=25, connections_open=6)
            assert stand.wire.take_crowded_address() == "127.0.0.7"
            assert stand.wire.take_crowded_address() == ""
            texts = await asyncio.to_thread(
                lambda: [_read_all(each) for each in callers if _is_refused(each)]
            )
            assert len(texts) == 25
            assert all(text.endswith(b"\0\0\0\x0btoo many connections") for text in texts)
            assert await client.unary_unary("/t.S/Unary")(b"2", metadata=ID) == b"echo:2"
            other = stack.enter_context(closing(_connect(stand.port, "127.0.0.8")))
            await stand.settle(connections_open=7)
            assert not _is_refused(other)
        # Places come back, also those of addresses that had too many.
        await stand.settle(connections_open=1)
        with closing(_connect(stand.port, "127.0.0.7")):
            await stand.settle(connections_open=2, crowded_address=25)


def _is_refused(caller: socket.socket) -> bool:
    """Answer whether a GOAWAY is there: whom the wire takes hears SETTINGS alone."""
    caller.settimeout(PATIENCE_S)
    head = caller.recv(9, socket.MSG_PEEK)
    while len(head) < 9:
        head = caller.recv(9, socket.MSG_PEEK)
    return head == b"\0\0\0\4\0\0\0\0\0"


async def test_clients_cannot_lock_peers_out() -> None:
    async with serve_wire() as stand:
        stand.configure(
            clients=ClientLimits(connections_max=3, per_address_max=3), peer_connections_max=2
        )
        with ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(closing(_connect(stand.port, "127.0.0.1")))
            await stand.settle(crowded=7, connections_open=3)
            listener = listening_socket("127.0.0.1", 0)
            port = listener.getsockname()[1]
            stand.tier2_servers[Role.PEER] = stand.tier2_servers[Role.EXTERNAL]
            stand.wire.listen(listener, Role.PEER)
            for _ in range(4):
                stack.enter_context(closing(_connect(port, "127.0.0.1")))
            await stand.settle(crowded=7, crowded_peers=2, connections_open=5)
        await until(lambda: stand.counts.connections_open == 0)

"""What Python tells a thread of the wire is heard, however soon one word follows another."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace

import pytest

from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer
from mm.edge.h2.incoming import IncomingCall
from mm.edge.wire_words import client_of
from mm.edge.wired import Tier2
from mm.table import Table
from mm.wire import Method, MethodFlag, Role, Wire, WireSettings
from tests.edge.raw_h2 import connect
from tests.edge.upstream import PATIENCE_S
from tests.wire.frames import begin

#: Of words that come while the thread looks at others: one of a few was lost when that went wrong.
ROUNDS = 150


def test_a_thread_that_sleeps_has_heard_everything() -> None:
    # Nothing but its eventfd wakes it: nobody calls before the last command has been carried out.
    kept: list[socket.socket] = []

    def tier2(_role: Role, _own: bool) -> socket.socket:
        ours, theirs = socket.socketpair()
        kept.append(ours)
        return theirs

    for _ in range(ROUNDS):
        wire = Wire(1, tier2)
        wire.start(WireSettings())
        listener = socket.create_server(("127.0.0.1", 0))
        wire.listen(listener, Role.EXTERNAL)
        with socket.create_connection(listener.getsockname(), PATIENCE_S) as client:
            # Its SETTINGS: the listener is listened to.
            assert client.recv(9)[3] == 4
        wire.close()
        for each in kept:
            each.close()
        kept.clear()


def _no_tier2(_role: Role, _own: bool) -> socket.socket:
    return socket.socketpair()[1]


def test_a_wire_keeps_the_table_that_it_reads() -> None:
    wire = Wire(1, _no_tier2)
    wire.start(WireSettings(table=Table(10)))
    for other in (None, Table(10)):
        with pytest.raises(ValueError, match="reads one table"):
            wire.configure(WireSettings(table=other))
    wire.close()


@pytest.mark.anyio
async def test_tier_2_knows_a_client_by_one_name_from_before_there_is_a_table() -> None:
    """By it the watches of a connection are counted, and threads must not share one."""
    names: list[object] = []

    async def serve(call: IncomingCall) -> None:
        names.append(client_of(call))
        call.send_status(0)

    server = GrpcServer(serve, limits=EXTERNAL_LIMITS, external=True)
    wires = [Wire(1, Tier2({Role.EXTERNAL: server}).connect) for _ in range(2)]
    settings = WireSettings(methods={b"/t.S/Unary": Method(MethodFlag.OWN)})
    try:
        for wire in wires:
            listener = socket.create_server(("127.0.0.1", 0))
            wire.start(settings)
            wire.listen(listener, Role.EXTERNAL)
            async with connect(listener.getsockname()[1]) as client:
                await client.wait_answer(begin(client))
                wire.configure(replace(settings, table=Table(10)))
                await client.wait_answer(begin(client))
    finally:
        for wire in wires:
            await asyncio.to_thread(wire.close)
        await server.stop(0)
    first, again, other, other_again = names
    assert (first, other) == (again, other_again)
    assert first != other


def test_a_wire_that_was_closed_touches_no_file_of_others() -> None:
    wire = Wire(1, _no_tier2)
    wire.start(WireSettings())
    number = wire.notice_fd
    wire.close()
    taken = os.eventfd(0)
    try:
        assert taken == number, "another file has the same number now"
        wire.close()
        os.eventfd_write(taken, 1)
    finally:
        os.close(taken)

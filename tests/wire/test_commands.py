"""What Python tells a thread of the wire is heard, however soon one word follows another."""

from __future__ import annotations

import os
import socket

import pytest

from mm.table import Table
from mm.wire import Role, Wire, WireSettings
from tests.edge.upstream import PATIENCE_S

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

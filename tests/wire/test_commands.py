"""What Python tells a thread of the wire is heard, however soon one word follows another."""

from __future__ import annotations

import socket

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

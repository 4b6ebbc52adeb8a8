"""Turns between connections that bring many new calls at once.

A read may hold hundreds of calls. Served in one go they would keep the event loop for as long as
hundreds of calls take, and with it every other connection. So a connection with more than a few
waits in a queue, with its reading paused, and one of the queue has its turn in each turn of the
event loop: a call on a quiet connection never stands behind more than a few of others. The same
goes for connections with many calls that wait for loads: a dozen of them with one new call each
make a burst too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mm.edge.h2.server import ServerLink

#: New calls of one connection in one turn. Each takes about half a millisecond of Python, to be
#: read and to be sent on; the fewer, the more often the event loop looks around, which costs a
#: tenth of that.
CALLS_A_TURN: Final = 2
#: Calls that wait on one connection from which on its new ones always wait for their turn.
PARKED_MAX: Final = 4


class TurnQueue:
    """Connections of one server that wait for their turn, first come first served.

    Two queues, and in each turn one connection of each: those with many calls that wait for loads
    or manage models are likely to bring more of them, and leave half of the time to the others.
    Bounded by the connections of the server. One that has caught up stays for one more turn, its
    reading resumed: else many that are busy would each begin with a turn at once.
    """

    def __init__(self) -> None:
        self._quick: deque[ServerLink] = deque()
        self._patient: deque[ServerLink] = deque()
        self._is_scheduled = False

    def __len__(self) -> int:
        return len(self._quick) + len(self._patient)

    def add(self, link: ServerLink) -> None:
        """Put a connection at the end."""
        (self._patient if link.is_in_no_hurry() else self._quick).append(link)
        self._schedule()

    def _schedule(self) -> None:
        if len(self) and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_scheduled = False
        for link in [queue.popleft() for queue in (self._quick, self._patient) if queue]:
            if not link.lost and link.take_queued_turn():
                self.add(link)
        self._schedule()

"""Accepting connections: as many as there are file descriptors for, and the others in time.

The event loops' own way is of no use without descriptors: uvloop takes the connections that wait
and drops them, asyncio tries a thousand times at once. Here they wait in the listener, as they do
before the wire (``_wire_worker.pxi``); what is connected already goes on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from mm.mesh.seldom import Seldom

logger = logging.getLogger(__name__)

#: As the wire: ten looks a second find the descriptors that others give back, and cost nothing.
PAUSE_S = 0.1
#: Of one listener in a turn of the event loop.
_ACCEPTS_A_TURN = 64
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Takes the connections of a socket that listens, from ``start`` to ``close``."""

    def __init__(self, sock: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._adopting: set[asyncio.Task[None]] = set()
        self._complaints = Seldom()
        #: Times that no connection was taken for a moment, for want of file descriptors.
        self.pauses = 0

    def start(self) -> None:
        """Accept from now on."""
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more; connections that are there stay."""
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._rest(error)
                # Else a client that has gone meanwhile.
                return
            sock.setblocking(False)
            task = self._loop.create_task(self._adopt(sock))
            self._adopting.add(task)
            task.add_done_callback(self._adopting.discard)

    def _rest(self, error: OSError) -> None:
        """Leave connections where they are for a moment: asking at once would be a busy loop."""
        self.pauses += 1
        level = self._complaints.level(self._loop.time())
        logger.log(level, "new connections wait: %s (see ulimit -n)", error.strerror)
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(PAUSE_S, self.start)

    async def _adopt(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, sock)
        except OSError as error:
            sock.close()
            logger.debug("a connection was gone before it was taken: %s", error)

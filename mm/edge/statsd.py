"""Sends metrics by UDP to a StatsD server beside this instance (around 19.4).

Owns the socket and when it is sent. The lines are ``mm.core.statsd_lines``'. Nobody knows whether
anybody listens, and nobody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import Final

from mm.core.metric_families import Family
from mm.core.statsd_lines import StatsdLines, packets

HOST: Final = "127.0.0.1"
#: Fits the usual frame of a network with room for headers, as in Java.
PACKET_BYTES_MAX: Final = 1400
#: Servers add up over one to ten seconds; less often, and rates would look ragged.
SEND_INTERVAL_S: Final = 1.0


class Statsd:
    """Tells what is new, every second and at the end."""

    def __init__(
        self, families: Callable[[], Iterable[Family]], *, port: int, is_legacy: bool
    ) -> None:
        self._families = families
        self._lines = StatsdLines(is_legacy=is_legacy)
        self._port = port

    async def run(self) -> None:
        """Send until cancelled, and then once more."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect((HOST, self._port))
            try:
                while True:
                    await asyncio.sleep(SEND_INTERVAL_S)
                    self._send(sock)
            finally:
                self._send(sock)

    def _send(self, sock: socket.socket) -> None:
        for packet in packets(self._lines.take(self._families()), PACKET_BYTES_MAX):
            # Nobody listens, or the buffer is full: then it is lost, as UDP is.
            with contextlib.suppress(OSError):
                sock.send(packet)

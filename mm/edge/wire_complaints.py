"""What the log is told of the wire's troubles, aloud once a minute; the numbers are metrics."""

from __future__ import annotations

import asyncio
import logging

from mm.mesh.seldom import Seldom
from mm.wire import Wire

logger = logging.getLogger(__name__)


class WireComplaints:
    """Looks at the counters of a wire each time that ``look`` is called."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._before: dict[str, int] = {}
        self._seldom: dict[str, Seldom] = {}

    def look(self) -> None:
        """Say what is new."""
        now = self._wire.statistics()
        if self._has_risen("accept_pauses", now.accept_pauses):
            self._say("accept_pauses", "new connections wait: too many files are open (ulimit -n)")
        if self._has_risen("crowded", now.crowded):
            self._say("crowded", "refusing clients: too many connections (%d so far)", now.crowded)
        if self._has_risen("crowded_peers", now.crowded_peers):
            self._say("crowded_peers", "refusing instances: too many connections")
        if self._has_risen("crowded_address", now.crowded_address):
            address = self._wire.take_crowded_address()
            self._say("crowded_address", "refusing %s: too many connections", address)
        flood = self._wire.take_flood()
        if flood is not None:
            self._say("flood", "cut off %s: too many of %s", *flood)
        failure = self._wire.take_tls_failure()
        if failure is not None:
            role, why = failure
            self._say("tls", "no TLS at the %s port with a client: %s", role.name.lower(), why)

    def _has_risen(self, name: str, count: int) -> bool:
        before = self._before.get(name, 0)
        self._before[name] = count
        return count > before

    def _say(self, name: str, text: str, *values: object) -> None:
        level = self._seldom.setdefault(name, Seldom()).level(asyncio.get_running_loop().time())
        logger.log(level, text, *values)

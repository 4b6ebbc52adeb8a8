"""Whether a connection that says nothing, though it has calls, still has somebody at its other end.

For runtimes, whose servers do not want to be asked often; connections to instances are asked all
the time (``LinkConnection``). The twin in the wire is ``conn_ask_runtime``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm.edge.h2.link import Link

#: Between two questions that nothing was answered between: gRPC servers end connections with more
#: than one ping in five minutes, unless something was answered, or without calls.
_PING_AGAIN_S = 310.0
_PING = b"you live"


class Liveness:
    """Asks a quiet connection for a sign of life, and gives up one that gave none."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._limits = link.limits
        self._heard_s = link.loop.time()
        self._asked_s = self._heard_s - _PING_AGAIN_S
        #: It was asked, and has said nothing since.
        self._awaits = False
        self._may_ask = True
        self._look: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A call begins."""
        if self._look is None and self._limits.quiet_s:
            self._look_later()

    def heard(self) -> None:
        """Whatever it said, it lives."""
        self._heard_s = self._link.loop.time()
        self._awaits = False

    def answered(self) -> None:
        """A call has ended."""
        self._may_ask = True

    def stop(self) -> None:
        """The connection is gone."""
        if self._look is not None:
            self._look.cancel()

    def _look_later(self) -> None:
        self._look = self._link.loop.call_later(self._limits.quiet_s / 4, self._look_at_it)

    def _look_at_it(self) -> None:
        self._look = None
        link, limits = self._link, self._limits
        if link.lost or not link.streams:
            return
        now_s = link.loop.time()
        if self._awaits:
            if now_s - self._asked_s >= limits.quiet_answer_s:
                link.connection.close()
                return
        elif now_s - self._heard_s >= limits.quiet_s and (
            self._may_ask or now_s - self._asked_s >= _PING_AGAIN_S
        ):
            self._awaits, self._may_ask, self._asked_s = True, False, now_s
            link.engine.ping(_PING)
            link.request_flush()
        self._look_later()

"""Whether clients should be sent here, from the start to the end (spec core 7.1, 7.5).

Owns the facts and who is told of a change. The decision is ``core.readiness``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio

from mm.core.readiness import ReadinessFacts, Unready, unready_because
from mm.limits import Limits
from mm.mesh.first_loads import FirstLoads
from mm.mesh.members import Members

logger = logging.getLogger(__name__)


class Readiness:
    """Keeps the answer; it changes at events, not when it is asked."""

    def __init__(self, members: Members, first_loads: FirstLoads, limits: Limits) -> None:
        self._members = members
        self._first_loads = first_loads
        self._limits = limits
        self._has_started = False
        self._is_stopping = False
        self._has_been_ready = False
        self._has_waited_enough = False
        #: What keeps this instance from being ready; None: it is.
        self.unready: Unready | None = Unready.STARTING
        #: Set, and replaced, when that changes.
        self.changed = anyio.Event()

    def started(self) -> None:
        """Everything that calls need is there."""
        self._has_started = True
        self._look()

    def stopping(self) -> None:
        """This instance begins to shut down: not ready from now on."""
        self._is_stopping = True
        self._look()

    async def run(self) -> None:
        """Keep the answer true until cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow, lambda: self._members.standing_changed)
            group.start_soon(self._follow, lambda: self._first_loads.changed)
            await anyio.sleep(self._limits.others_stop_wait_s)
            self._has_waited_enough = True
            self._look()

    async def _follow(self, event: Callable[[], anyio.Event]) -> None:
        while True:
            changed = event()
            self._look()
            await changed.wait()

    def _look(self) -> None:
        before, self.unready = self.unready, unready_because(self._facts())
        if self.unready is None:
            self._has_been_ready = True
        if self.unready is before:
            return
        if self.unready is None:
            logger.info("ready for calls of clients")
        else:
            logger.info("not ready for calls of clients: %s", self.unready)
        self.changed.set()
        self.changed = anyio.Event()

    def _facts(self) -> ReadinessFacts:
        return ReadinessFacts(
            has_started=self._has_started,
            is_stopping=self._is_stopping,
            has_been_ready=self._has_been_ready,
            loads_fail=self._first_loads.fail,
            able_count=self._members.able_count,
            stopping_count=self._members.stopping_count,
            has_waited_enough=self._has_waited_enough,
        )

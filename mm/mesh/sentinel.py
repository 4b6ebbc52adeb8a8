"""Notices instances that take calls and do not answer any more: frozen, cut off, out of memory.

Owns the calls under way to each instance, and the question whether it is still there. A connection
tells nothing of that for many seconds; meanwhile its copies, idle as far as anybody heard, would
draw every call. Connections are the edge's: what is under way there ends when they do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import anyio
from anyio.abc import TaskGroup

from mm.core.calls import Outcome
from mm.core.ids import InstanceId
from mm.limits import Limits
from mm.mesh.members import Members
from mm.mesh.ports import Peers

logger = logging.getLogger(__name__)


class Sentinel:
    """Asks who it is of each instance that has calls of ours and answered none in a while.

    One that does not say is left alone like one that cannot be reached, but until it does say: no
    call has to find out. A call costs a look into a dict; instances that answer cost nothing.
    """

    def __init__(self, members: Members, peers: Peers, limits: Limits) -> None:
        self._members = members
        self._peers = peers
        self._limits = limits
        #: Calls under way, of those that have some.
        self._in_flight: dict[InstanceId, int] = {}
        #: Those that have calls which others count: the wire.
        self._elsewhere: set[InstanceId] = set()
        #: Had some at the last look, and answered none since.
        self._quiet: set[InstanceId] = set()
        #: Being asked.
        self._asked: set[InstanceId] = set()
        self._wanted = anyio.Event()

    def sent(self, instance_id: InstanceId) -> None:
        """A call goes there."""
        count = self._in_flight.get(instance_id, 0)
        self._in_flight[instance_id] = count + 1
        if count == 0 and not self._wanted.is_set():
            self._wanted.set()

    def ended(self, instance_id: InstanceId, outcome: Outcome) -> None:
        """It is over; most outcomes mean that the instance answered."""
        count = self._in_flight[instance_id] - 1
        if count:
            self._in_flight[instance_id] = count
        else:
            del self._in_flight[instance_id]
        if outcome not in (Outcome.UNREACHABLE, Outcome.ABANDONED, Outcome.CROWDED):
            self._quiet.discard(instance_id)
            self._members.mark_reachable(instance_id)

    def told(self, in_flight: Mapping[InstanceId, int], answered: Iterable[InstanceId]) -> None:
        """Hear of all calls that others count: how many are under way to whom, and which instances
        have answered some since the last time.
        """
        self._elsewhere = {name for name, count in in_flight.items() if count}
        if self._elsewhere:
            self._wanted.set()
        for instance_id in answered:
            self._quiet.discard(instance_id)
            self._members.mark_reachable(instance_id)

    async def run(self) -> None:
        """Look until cancelled; without calls under way there is nothing to look at."""
        async with anyio.create_task_group() as group:
            while True:
                if not self._in_flight and not self._elsewhere:
                    self._wanted = anyio.Event()
                    await self._wanted.wait()
                self._look(group)
                await anyio.sleep(self._limits.peer_look_s)

    def _look(self, group: TaskGroup) -> None:
        busy = {*self._in_flight, *self._elsewhere}
        for instance_id in sorted(self._quiet):  # in the same order each time: simulations repeat
            if instance_id in busy and instance_id not in self._asked:
                self._asked.add(instance_id)
                group.start_soon(self._ask, instance_id)
        self._quiet = busy

    async def _ask(self, instance_id: InstanceId) -> None:
        """Ask until it answers, or is gone."""
        try:
            pause_s = self._limits.peer_look_s
            while not await self._answers(instance_id):
                if self._members.mark_silent(instance_id):
                    logger.warning("instance %s does not answer: calls go elsewhere", instance_id)
                await anyio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._limits.peer_ask_pause_max_s)
            if self._members.mark_reachable(instance_id):
                logger.info("instance %s answers again", instance_id)
        finally:
            self._asked.discard(instance_id)

    async def _answers(self, instance_id: InstanceId) -> bool:
        """Answer whether it says who it is; one that is not there any more need not."""
        address = self._members.address_if_known(instance_id)
        if address is None:
            return True
        identity = await self._peers.identify(address, self._limits.peer_answer_timeout_s)
        return identity is not None and identity.instance_id == instance_id

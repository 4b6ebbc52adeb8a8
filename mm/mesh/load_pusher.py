"""Tells peers how busy copies here are, between the replies that tell it too (design section 4).

Owns the task that does it. What is told to whom is ``core.load_reports``'s, the wire
``ports.Peers``'s. What gets lost is corrected by the next reply, so nothing is sent twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import anyio
from anyio.abc import TaskGroup

from mm.core.calls import Call
from mm.core.ids import InstanceId, ModelId
from mm.core.load_reports import RECENT_S, LoadReports, ReportLimits
from mm.limits import Limits
from mm.mesh.members import Members
from mm.mesh.ports import PeerCallError, Peers
from mm.mesh.statistics import Counters
from mm.table import Table

logger = logging.getLogger(__name__)


class LoadPusher:
    """Hears of the calls at local copies that peers call."""

    def __init__(
        self,
        *,
        me: InstanceId,
        table: Table,
        members: Members,
        peers: Peers,
        limits: Limits,
        counters: Counters,
    ) -> None:
        self._me = me
        self._table = table
        self._members = members
        self._peers = peers
        self._limits = limits
        self._counters = counters
        self._reports = LoadReports(
            ReportLimits(limits.load_push_interval_min_s, limits.load_push_copies_max)
        )
        #: Copies that peers call. While a call's copy is not among them, and the call is no peer's,
        #: there is no need to ask us.
        self.watched = self._reports.watched
        #: Told when a peer called here, where calls begin and end that nobody tells of (``look``).
        self.on_peer_call: Callable[[], None] | None = None
        self._wanted = anyio.Event()
        #: Peers to whom a push is under way.
        self._under_way: set[InstanceId] = set()
        #: Peers that do not take pushes, until when.
        self._resting: dict[InstanceId, float] = {}
        self._swept_s = 0.0

    def began(self, call: Call) -> None:
        """A call got the copy here."""
        if self._reports.began(call.model_id, call.sender):
            call.timed_s = anyio.current_time()
        if call.sender is not None and self.on_peer_call is not None:
            self.on_peer_call()
        if self._reports.is_pending and not self._wanted.is_set():
            self._wanted.set()

    def sent_away(self, model_id: ModelId, peer: InstanceId, count: int) -> None:
        """A peer heard how busy the copy here is, in place of an answer."""
        self._reports.told(model_id, peer, count)
        self._wanted.set()
        if self.on_peer_call is not None:
            self.on_peer_call()

    def ended(self, call: Call) -> None:
        """It let the copy go."""
        self._reports.ended(call.model_id, call.sender, call.load_told)
        if call.timed_s is not None:
            self._reports.timed(call.model_id, anyio.current_time() - call.timed_s)
            call.timed_s = None
        if self._reports.is_pending and not self._wanted.is_set():
            self._wanted.set()

    def heard(
        self, model_id: ModelId, sender: InstanceId, told: int | None, service_s: float | None
    ) -> None:
        """A peer called the copy here, by the wire; ``told``: what the last reply said."""
        self._reports.heard(model_id, sender, told, service_s)

    def look(self, now_s: float) -> bool:
        """See to what changed by calls that nobody tells of; answers whether to look again soon.

        While there is nobody to be told anything, there is no need to.
        """
        if now_s - self._swept_s >= RECENT_S:
            self._swept_s = now_s
            self._reports.sweep(now_s)
        self._reports.look(self._table.in_flight)
        if self._reports.is_pending:
            self._wanted.set()
        return bool(self.watched)

    async def run(self) -> None:
        """Push until cancelled. Peers wait for nobody but themselves: one push each at a time."""
        async with anyio.create_task_group() as group:
            while True:
                if not self._reports.is_pending:
                    await self._wanted.wait()
                self._wanted = anyio.Event()
                now_s = anyio.current_time()
                count = self._push_due(group, now_s)
                if now_s - self._swept_s >= RECENT_S:
                    self._swept_s = now_s
                    self._reports.sweep(now_s)
                pause_s = count / self._limits.load_pushes_per_s_max
                await anyio.sleep(max(pause_s, self._limits.load_push_interval_min_s))

    def _push_due(self, group: TaskGroup, now_s: float) -> int:
        """Send what is due; answers how many messages that is."""
        count = 0
        for peer, loads in self._reports.due(now_s, self._table.in_flight).items():
            address = self._members.address_or_none(peer)
            if peer in self._under_way:
                self._reports.again(peer, loads)
                continue
            if address is None or self._resting.get(peer, 0.0) > now_s:
                self._reports.forget(peer, loads)
                continue
            self._under_way.add(peer)
            group.start_soon(self._push, peer, address, loads)
            count += 1
        return count

    async def _push(self, peer: InstanceId, address: str, loads: Mapping[ModelId, int]) -> None:
        try:
            await self._peers.push_loads(
                address, self._me, loads, timeout_s=self._limits.load_push_timeout_s
            )
            self._counters.loads_pushed += 1
        except PeerCallError as exc:
            # Of an older version, or gone: replies tell it what it needs.
            logger.debug("instance %s does not take pushes: %s", peer, exc.message)
            self._rest(peer)
            self._reports.forget(peer, loads)
        finally:
            self._under_way.discard(peer)

    def _rest(self, peer: InstanceId) -> None:
        now_s = anyio.current_time()
        self._resting = {
            each: until_s for each, until_s in self._resting.items() if until_s > now_s
        }
        self._resting[peer] = now_s + self._limits.load_push_rest_s

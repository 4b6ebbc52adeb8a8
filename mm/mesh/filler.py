"""Loads models before they are called: into new room, and in place of copies that were lost (spec
core 5.7, intentions of 10.3).

Owns which models, in which order, and when it is looked. The leader does it. How much room there is
says ``core.filling``; where a model goes, and that nothing younger makes way, ``preloader``.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable, Set
from typing import Final

import anyio
import anyio.lowlevel

from mm.config import Config
from mm.core.absences import Absences
from mm.core.cluster_view import ClusterView
from mm.core.filling import PATIENCE_MAX_S, Patience, free_slots, openings
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.mesh.leader import Leader
from mm.mesh.members import Members
from mm.mesh.preloader import Preloader, PreloadReason
from mm.mesh.registry import Registry
from mm.mesh.waiting import first_of

logger = logging.getLogger(__name__)

#: News come at once; between two looks there is this, in which more of them gather.
LOOK_GAP_S: Final = 1.0
#: Without news.
LOOK_S: Final = 30.0
#: Models used in this time are loaded. New ones that nobody has called count as used six hours ago,
#: and are left alone.
USED_WITHIN_MS: Final = 6 * 3600 * 1000
#: Who vanished is given this long to come back; then others load what only it had. When more are
#: gone than are there, or we are, as long as the reaper gives them.
LOST_AFTER_S: Final = 10.0
#: All models are looked through when an instance came, or as much of the cluster as this became
#: free; again after this time, as long as that finds some.
SCAN_S: Final = 60.0
SCAN_ROOM_DIVISOR: Final = 20
#: The most that one look finds, and models looked at between two turns of the event loop.
FOUND_MAX: Final = 1_000
CHUNK: Final = 1_000


class Filler:
    """Has the leader spend idle loading slots. Invariant: what it knows of instances is of those
    that are there, or have been in the last minutes.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        members: Members,
        leader: Leader,
        preloader: Preloader,
        view: Callable[[], ClusterView],
    ) -> None:
        self._registry = registry
        self._members = members
        self._leader = leader
        self._preloader = preloader
        self._view = view
        self._patience = Patience()
        #: Kept at all instances: a new leader must know who is only away for a moment.
        self._absences = Absences(config.instance_id, LOST_AFTER_S, config.gone_after_s)
        #: Since when who is there, and who was filled last when.
        self._there_s: dict[InstanceId, float] = {}
        self._filled_s: dict[InstanceId, float] = {}
        #: (last use, model), the last one first to go.
        self._wanted: list[tuple[int, ModelId]] = []
        self._lost: list[tuple[int, ModelId]] = []
        #: Somebody came whom it is too early to fill.
        self._is_unsettled = False
        self._next_scan_s = 0.0
        self._scanned: frozenset[InstanceId] = frozenset()
        self._scanned_units = 0

    async def run(self) -> None:
        """Look at every news of an instance, and now and then; until cancelled."""
        while True:
            is_leader, elected = self._leader.is_leader, self._leader.changed
            news = self._members.news if is_leader else self._members.somebody_moved
            now_s = anyio.current_time()
            # Whom nobody has seen here lost nothing that is missed: no names from records.
            moves = self._absences.look(
                self._members.present(), frozenset(), now_s, left=self._members.left()
            )
            if is_leader:
                self._note_what_is_lost(moves.lost)
                await self._look(now_s)
            await anyio.sleep(LOOK_GAP_S)
            timeout_s = self._wait_s(anyio.current_time()) if is_leader else math.inf
            await first_of(elected.wait, news.wait, timeout_s=timeout_s)

    def _wait_s(self, now_s: float) -> float:
        if self._is_unsettled or self._lost or self._wanted:
            return LOOK_GAP_S
        next_s = self._absences.next_s
        return LOOK_S if next_s is None else min(LOOK_S, max(LOOK_GAP_S, next_s - now_s))

    async def _look(self, now_s: float) -> None:
        self._note_who_is_there(now_s)
        await self._replace_lost()
        await self._fill(now_s)

    # --- who comes and goes ---

    def _note_who_is_there(self, now_s: float) -> None:
        present = {each.instance_id for each in self._view().instances}
        for instance_id in present - self._there_s.keys():
            self._there_s[instance_id] = now_s
        for instance_id in self._there_s.keys() - present:
            del self._there_s[instance_id]
            if self._filled_s.pop(instance_id, None) is not None:
                self._patience.disappointed(now_s)
        for instance_id, filled_s in list(self._filled_s.items()):
            if now_s - filled_s > PATIENCE_MAX_S:
                del self._filled_s[instance_id]

    def _note_what_is_lost(self, lost: Set[InstanceId]) -> None:
        for instance_id in sorted(lost):
            for model_id in self._registry.held_by(instance_id):
                record = self._registry.get(model_id)
                if record is not None and not self._is_held(record):
                    used_ms = max(record.last_used_ms, record.copies.get(instance_id, 0))
                    self._lost.append((used_ms, model_id))
        self._lost.sort()

    def _is_held(self, record: ModelRecord) -> bool:
        return any(self._members.stays(instance_id) for instance_id in record.copies)

    # --- loads ---

    async def _replace_lost(self) -> None:
        slots = sum(free_slots(each) for each in self._view().instances) if self._lost else 0
        while self._lost and slots > 0:
            used_ms, model_id = self._lost.pop()
            taken = await self._load(model_id, used_ms, frozenset(), PreloadReason.LOST)
            slots -= taken is not None

    async def _fill(self, now_s: float) -> None:
        view, latest_s = self._view(), now_s - self._patience.wait_s(now_s)
        self._is_unsettled = any(since_s > latest_s for since_s in self._there_s.values())
        found = openings(view.instances, lambda i: self._there_s.get(i, now_s) <= latest_s)
        units = sum(each.remaining_units for each in view.instances)
        if found and not self._wanted and self._may_scan(view, found.keys(), units, now_s):
            self._scanned = (self._scanned | found.keys()) & self._there_s.keys()
            self._scanned_units = units
            await self._scan(view.now_ms, now_s)
        # From here on any room beyond this is news.
        self._scanned_units = min(self._scanned_units, units)
        everybody = frozenset(each.instance_id for each in view.instances)
        while self._wanted and found:
            used_ms, model_id = self._wanted.pop()
            exclude = everybody - found.keys()
            taken = await self._load(model_id, used_ms, exclude, PreloadReason.ROOM)
            if taken is None or taken not in found:
                continue
            self._filled_s[taken] = now_s
            found[taken].slots -= 1
            if not found[taken].slots:
                del found[taken]

    async def _load(
        self,
        model_id: ModelId,
        used_ms: int,
        exclude: frozenset[InstanceId],
        reason: PreloadReason,
    ) -> InstanceId | None:
        record = self._registry.get(model_id)
        if record is None or record.failures or self._is_held(record):
            return None  # not worth it, or somebody called it meanwhile
        if model_id in self._registry.policies:
            return None  # ``keeper`` sees to it, and knows what came to nothing
        return await self._preloader.request(
            model_id,
            # A use to come, by another's clock, would have anything make way.
            last_used_ms=max(1, min(used_ms, self._view().now_ms)),
            exclude=exclude,
            reason=reason,
        )

    def _may_scan(
        self, view: ClusterView, there: Set[InstanceId], units: int, now_s: float
    ) -> bool:
        capacity_units = sum(each.record.capacity_units for each in view.instances)
        has_grown = units - self._scanned_units > capacity_units // SCAN_ROOM_DIVISOR
        return has_grown or not there <= self._scanned or now_s >= self._next_scan_s

    async def _scan(self, now_ms: int, now_s: float) -> None:
        """Look through all models for the ones used last that have no copy."""
        self._wanted = await self._last_used(now_ms - USED_WITHIN_MS)
        self._next_scan_s = now_s + SCAN_S if self._wanted else math.inf
        if self._wanted:
            logger.info("there is room: up to %d models are loaded again", len(self._wanted))

    async def _last_used(self, after_ms: int) -> list[tuple[int, ModelId]]:
        newest: list[tuple[int, ModelId]] = []
        for number, model_id in enumerate(list(self._registry)):
            if number % CHUNK == CHUNK - 1:
                await anyio.lowlevel.checkpoint()
            used_ms = self._registry.idle_since_ms(model_id)
            if used_ms <= after_ms:
                continue
            if len(newest) < FOUND_MAX:
                heapq.heappush(newest, (used_ms, model_id))
            else:
                heapq.heappushpop(newest, (used_ms, model_id))
        return sorted(newest)

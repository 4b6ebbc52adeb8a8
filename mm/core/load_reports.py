"""Which peers are told how busy a copy here is, and when (design section 4).

Owns what each peer believes, and the pace. A peer that sends calls hears the count with every
reply; pushes correct what changed since its last reply, because of the calls of others. Without
them a peer goes on avoiding a copy that was busy a second ago. Sending is ``mesh.load_pusher``'s.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mm.core.ids import InstanceId, ModelId

#: A peer that sent no call for this long is not told any more than what follows.
RECENT_S: Final = 1.0
#: What a new service time counts for in the mean.
SERVICE_WEIGHT: Final = 0.25
#: A push is worth while the news are fresh compared with how long a call takes.
SERVICE_PART: Final = 0.25
#: It is told when a copy has no more than this part of the calls that it believes in. It may not
#: call because of what it believes, and would go on for ever; that is a few messages at most, one
#: for each halving.
FALLEN_DIVISOR: Final = 2
#: No peer knows anything before its first reply.
_NOTHING: Final = -1


@dataclass(frozen=True, slots=True)
class ReportLimits:
    """How much may be told."""

    #: Between two pushes about one copy, at least.
    interval_min_s: float
    #: Copies whose peers are kept in mind; of others only replies tell.
    copies_max: int


class _Copy:
    """What is known of those who call one copy."""

    __slots__ = (
        "believed",
        "called_s",
        "callers",
        "is_changed",
        "is_timed",
        "pushed_s",
        "seen",
        "service_s",
    )

    def __init__(self) -> None:
        #: The count that each peer was told last.
        self.believed: dict[InstanceId, int] = {}
        #: Those that called since ``due`` looked last, and when it looked after the last calls of
        #: the others: nobody reads the clock for each call.
        self.callers: set[InstanceId] = set()
        self.called_s: dict[InstanceId, float] = {}
        self.is_changed = False
        #: The count when somebody looked last.
        self.seen = _NOTHING
        #: One of its calls is being timed.
        self.is_timed = False
        self.service_s = 0.0
        self.pushed_s = 0.0

    def is_recent(self, peer: InstanceId, now_s: float) -> bool:
        """Answer whether it called of late."""
        return now_s - self.called_s.get(peer, 0.0) <= RECENT_S

    def forget_old(self, now_s: float) -> None:
        """Drop who did not call of late, and not because it believes the copy busy."""
        for peer in self.callers:
            self.called_s[peer] = now_s
        self.callers.clear()
        for peer, believed in list(self.believed.items()):
            if believed <= 0 and not self.is_recent(peer, now_s):
                del self.believed[peer]
                self.called_s.pop(peer, None)


class LoadReports:
    """The peers of all copies here that have some. A call costs O(1), the first one after a look
    O(log n) of the copies with news; a look costs what is due.

    Invariant: a copy is in ``_changed`` once while its ``is_changed``, else not at all.
    """

    def __init__(self, limits: ReportLimits) -> None:
        self._limits = limits
        self._copies: dict[ModelId, _Copy] = {}
        #: The copies that have such peers; the object stays the same.
        self.watched: Mapping[ModelId, object] = self._copies
        #: A heap of copies with news, and when to look at them.
        self._changed: list[tuple[float, ModelId]] = []

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def is_pending(self) -> bool:
        """Whether some count changed that ``due`` has not dealt with."""
        return bool(self._changed)

    def began(self, model_id: ModelId, peer: InstanceId | None) -> bool:
        """A call for the copy began, sent by that peer; answers whether it should be timed."""
        copy = self._copies.get(model_id) or self._watch(model_id, peer)
        if copy is None:
            return False
        if peer is not None:
            copy.callers.add(peer)
            copy.believed.setdefault(peer, _NOTHING)
        self._note(model_id, copy)
        if copy.is_timed:
            return False
        copy.is_timed = True
        return True

    def told(self, model_id: ModelId, peer: InstanceId, count: int) -> None:
        """A call of that peer was sent away with this count: it will not come back by itself."""
        copy = self._copies.get(model_id) or self._watch(model_id, peer)
        if copy is not None:
            copy.callers.add(peer)
            copy.believed[peer] = count
            self._note(model_id, copy)

    def ended(self, model_id: ModelId, peer: InstanceId | None, told: int | None) -> None:
        """A call ended; ``told``: the count that its reply told the peer, None if it had none."""
        copy = self._copies.get(model_id)
        if copy is None:
            return
        if peer is not None and told is not None and peer in copy.believed:
            copy.believed[peer] = told
        self._note(model_id, copy)

    def timed(self, model_id: ModelId, service_s: float) -> None:
        """The call that ``began`` asked to time took this long."""
        copy = self._copies.get(model_id)
        if copy is not None:
            copy.is_timed = False
            self._took(copy, service_s)

    def heard(
        self, model_id: ModelId, peer: InstanceId, told: int | None, service_s: float | None
    ) -> None:
        """Calls of that peer came, and ended, that nobody told of one by one: of the wire."""
        copy = self._copies.get(model_id) or self._watch(model_id, peer)
        if copy is None:
            return
        copy.callers.add(peer)
        copy.believed.setdefault(peer, _NOTHING)
        if told is not None:
            copy.believed[peer] = told
        if service_s is not None:
            self._took(copy, service_s)
        self._note(model_id, copy)

    def look(self, count_of: Callable[[ModelId], int]) -> None:
        """Find out which counts have changed, where nobody tells of each call."""
        for model_id, copy in self._copies.items():
            count = count_of(model_id)
            if count != copy.seen:
                copy.seen = count
                self._note(model_id, copy)

    def due(
        self, now_s: float, count_of: Callable[[ModelId], int]
    ) -> Mapping[InstanceId, Mapping[ModelId, int]]:
        """Answer what to tell to whom now; from here on they believe it."""
        batches: dict[InstanceId, dict[ModelId, int]] = {}
        while self._changed and self._changed[0][0] <= now_s:
            model_id = self._changed[0][1]
            copy = self._copies[model_id]
            # Its calls may take longer than they seemed to when it got here.
            due_s = copy.pushed_s + self.interval_s(model_id)
            if due_s > now_s:
                heapq.heapreplace(self._changed, (due_s, model_id))
                continue
            heapq.heappop(self._changed)
            copy.is_changed = False
            copy.forget_old(now_s)
            if not copy.believed:
                del self._copies[model_id]
                continue
            count = count_of(model_id)
            for peer, believed in copy.believed.items():
                has_fallen = count <= believed // FALLEN_DIVISOR
                if believed != count and (has_fallen or copy.is_recent(peer, now_s)):
                    copy.pushed_s = now_s
                    copy.believed[peer] = count
                    batches.setdefault(peer, {})[model_id] = count
        return batches

    def forget(self, peer: InstanceId, models: Mapping[ModelId, int]) -> None:
        """The peer did not take what ``due`` said of these models: its next call begins anew."""
        for model_id in models:
            copy = self._copies.get(model_id)
            if copy is not None:
                copy.believed.pop(peer, None)
                copy.called_s.pop(peer, None)

    def again(self, peer: InstanceId, models: Mapping[ModelId, int]) -> None:
        """What ``due`` said of these models was not sent: it is due again."""
        for model_id in models:
            copy = self._copies.get(model_id)
            if copy is not None and peer in copy.believed:
                copy.believed[peer] = _NOTHING
                self._note(model_id, copy)

    def interval_s(self, model_id: ModelId) -> float:
        """Answer the time between two pushes about the copy."""
        return max(self._limits.interval_min_s, SERVICE_PART * self._copies[model_id].service_s)

    def sweep(self, now_s: float) -> None:
        """Forget copies that nobody calls any more; those with news go in ``due``."""
        for model_id, copy in list(self._copies.items()):
            if not copy.is_changed:
                copy.forget_old(now_s)
                if not copy.believed:
                    del self._copies[model_id]

    def _watch(self, model_id: ModelId, peer: InstanceId | None) -> _Copy | None:
        if peer is None or len(self._copies) >= self._limits.copies_max:
            return None
        copy = self._copies[model_id] = _Copy()
        return copy

    def _took(self, copy: _Copy, service_s: float) -> None:
        known_s = copy.service_s or service_s
        copy.service_s = known_s + SERVICE_WEIGHT * (service_s - known_s)

    def _note(self, model_id: ModelId, copy: _Copy) -> None:
        if not copy.is_changed:
            copy.is_changed = True
            due_s = copy.pushed_s + self.interval_s(model_id)
            heapq.heappush(self._changed, (due_s, model_id))

"""Copies of one model that were asked for, until the record tells of them (spec core 5.3).

Owns when to count them as on their way, and how long to ask for no more after one that came to
nothing: a model that cannot be loaded must not be asked for at every look.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from mm.core.ids import InstanceId

#: An accepted load is in the record before the answer comes, and here a watch later.
SEEN_AFTER_S: Final = 10.0
#: After a copy that came to nothing, or found no place; doubled for each in a row.
PAUSE_MIN_S: Final = 10.0
PAUSE_MAX_S: Final = 600.0


class AskedCopies:
    """What became of the copies asked for of late."""

    __slots__ = (
        "_asked",
        "_is_asking",
        "_kept_s",
        "_pause_max_s",
        "_pause_min_s",
        "_pause_s",
        "_seen",
        "_until_s",
        "_young",
    )

    def __init__(
        self,
        pause_min_s: float = PAUSE_MIN_S,
        pause_max_s: float = PAUSE_MAX_S,
        kept_s: float = 0.0,
    ) -> None:
        #: A copy that goes sooner after it was ready came to nothing, too.
        self._kept_s = kept_s
        self._pause_min_s = pause_min_s
        self._pause_max_s = pause_max_s
        #: instance -> when its load was accepted; those that no record has told of.
        self._asked: dict[InstanceId, float] = {}
        #: Those that the record told of, and that were not ready then.
        self._seen: set[InstanceId] = set()
        #: instance -> when its copy was ready; those of late.
        self._young: dict[InstanceId, float] = {}
        self._until_s = 0.0
        self._pause_s = 0.0
        self._is_asking = False

    @property
    def unseen(self) -> frozenset[InstanceId]:
        """Where copies are on their way that the record does not tell of."""
        return frozenset(self._asked)

    @property
    def is_forgettable(self) -> bool:
        """Whether nothing is under way and nothing went wrong."""
        return not (self._is_under_way or self._pause_s)

    @property
    def is_asking(self) -> bool:
        """Whether somebody asks at this moment."""
        return self._is_asking

    def is_stale(self, now_s: float) -> bool:
        """Whether nothing is under way, and what went wrong did so long ago: a pause after its end
        the next one need not be longer.
        """
        return not self._is_under_way and now_s >= self._until_s + self._pause_s

    @property
    def _is_under_way(self) -> bool:
        return bool(self._asked or self._seen or self._young or self._is_asking)

    def may_ask(self, now_s: float) -> bool:
        """Answer whether more copies may be asked for now."""
        return not self._is_asking and now_s >= self._until_s

    def forgive(self) -> None:
        """There is news for which what went wrong may go well now."""
        self._until_s = 0.0

    def begin(self) -> None:
        """Somebody begins to ask."""
        self._is_asking = True

    def end(self) -> None:
        """Nobody asks any more."""
        self._is_asking = False

    def accepted(self, instance_id: InstanceId, now_s: float) -> None:
        """A load was accepted there."""
        self._asked[instance_id] = now_s

    def refused(self, now_s: float) -> None:
        """There was no place for it, or it came to nothing."""
        self._pause_s = min(self._pause_max_s, max(self._pause_min_s, 2 * self._pause_s))
        self._until_s = now_s + self._pause_s

    def look(
        self, holders: Collection[InstanceId], ready: Collection[InstanceId], now_s: float
    ) -> None:
        """Compare with what the record says now."""
        for instance_id, asked_s in list(self._asked.items()):
            if instance_id in holders:
                del self._asked[instance_id]
                self._seen.add(instance_id)
            elif now_s - asked_s > SEEN_AFTER_S:
                del self._asked[instance_id]
                self.refused(now_s)
        for instance_id in list(self._seen):
            if instance_id in ready:
                self._seen.discard(instance_id)
                self._young[instance_id] = now_s
            elif instance_id not in holders:
                self._seen.discard(instance_id)
                self.refused(now_s)
        for instance_id, ready_s in list(self._young.items()):
            is_kept = now_s - ready_s >= self._kept_s
            if is_kept:
                self._pause_s = 0.0
            elif instance_id not in holders:
                self.refused(now_s)
            if is_kept or instance_id not in holders:
                del self._young[instance_id]

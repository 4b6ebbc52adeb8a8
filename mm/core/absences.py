"""Who vanished, and how long it is given to come back (spec core 5.6, 5.7).

Owns the grace. An instance that died is replaced at once; when the store was away, all leases ran
out, and those that still serve come back one after the other: none of them is lost.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from mm.core.ids import InstanceId


@dataclass(frozen=True, slots=True)
class Moves:
    """What a look found since the one before."""

    has_come: bool
    #: Those whose time to come back ended.
    lost: frozenset[InstanceId]


class Absences:
    """Invariant: nobody is both there and gone.

    ``grace_s`` is for one that vanished, ``long_s`` where that may be the store's doing.
    """

    def __init__(self, me: InstanceId, grace_s: float, long_s: float) -> None:
        self._me = me
        self._grace_s = grace_s
        self._long_s = long_s
        self._present: frozenset[InstanceId] = frozenset()
        #: Who is gone, since when and until when that is nothing.
        self._gone_s: dict[InstanceId, tuple[float, float]] = {}
        #: Those that did not come back in time, as long as records name them.
        self.late: frozenset[InstanceId] = frozenset()

    def __contains__(self, instance_id: object) -> bool:
        """Answer whether its copies count: it is there, or has still time to come back."""
        return instance_id in self._present or instance_id in self._gone_s

    @property
    def next_s(self) -> float | None:
        """When the next grace ends; None: nobody is gone."""
        return min((due_s for _, due_s in self._gone_s.values()), default=None)

    def look(
        self,
        present: frozenset[InstanceId],
        named: Set[InstanceId],
        now_s: float,
        *,
        left: Set[InstanceId] = frozenset(),
    ) -> Moves:
        """Note who is there, whom records name, and who left in order: that one does not come back.
        One that is named and nobody has seen yet may be about to.

        While more are gone than are there, or we are, it is the store's doing, or ours. Those who
        are gone then have the long grace, also when the others are back.
        """
        before, self._present = self._present, present
        for instance_id in present & self._gone_s.keys():
            del self._gone_s[instance_id]
        # Whoever's time was over before this look says nothing about the store: the look before may
        # be hours ago.
        lost = {each for each, (_, due_s) in self._gone_s.items() if due_s <= now_s}
        lost |= ((before | self._gone_s.keys()) - present) & left
        for instance_id in before - present:
            self._gone_s[instance_id] = (now_s, now_s + self._grace_s)
        for instance_id in lost:
            self._gone_s.pop(instance_id, None)
        if len(self._gone_s) > len(present) or self._me in self._gone_s:
            for instance_id, (since_s, _) in self._gone_s.items():
                self._gone_s[instance_id] = (since_s, since_s + self._long_s)
        self.late = (self.late | lost) & named - present
        for instance_id in named - present - self.late - self._gone_s.keys():
            self._gone_s[instance_id] = (now_s, now_s + self._long_s)
        return Moves(has_come=not present <= before, lost=frozenset(lost))

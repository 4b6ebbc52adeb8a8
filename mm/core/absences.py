"""Who vanished, and how long it is given to come back (spec core 5.6, 5.7).

Owns the grace. An instance that died is replaced at once; when the store was away, all leases ran
out, and those that still serve come back one after the other: none of them is lost.
"""

from __future__ import annotations

from collections.abc import Set

from mm.core.ids import InstanceId


class Absences:
    """Invariant: nobody is both there and gone."""

    def __init__(self, me: InstanceId, grace_s: float, long_s: float) -> None:
        self._me = me
        self._grace_s = grace_s
        self._long_s = long_s
        self._present: frozenset[InstanceId] = frozenset()
        #: Who is gone, since when and until when that is nothing.
        self._gone_s: dict[InstanceId, tuple[float, float]] = {}
        #: Those that did not come back in time, as long as records name them.
        self._late: set[InstanceId] = set()

    def __contains__(self, instance_id: object) -> bool:
        """Answer whether its copies count: it is there, or has still time to come back."""
        return instance_id in self._present or instance_id in self._gone_s

    @property
    def next_s(self) -> float | None:
        """When the next grace ends; None: nobody is gone."""
        return min((due_s for _, due_s in self._gone_s.values()), default=None)

    def look(self, present: frozenset[InstanceId], now_s: float) -> bool:
        """Note who is there; answers whether somebody came, or went and is not back in time.

        While more are gone than are there, or we are, it is the store's doing, or ours. Those who
        are gone then have the long grace, also when the others are back.
        """
        before, self._present = self._present, present
        for instance_id in before - present:
            self._gone_s[instance_id] = (now_s, now_s + self._grace_s)
        for instance_id in present & self._gone_s.keys():
            del self._gone_s[instance_id]
        if len(self._gone_s) > len(present) or self._me in self._gone_s:
            for instance_id, (since_s, _) in self._gone_s.items():
                self._gone_s[instance_id] = (since_s, since_s + self._long_s)
        late = {each for each, (_, due_s) in self._gone_s.items() if due_s <= now_s}
        for instance_id in late:
            del self._gone_s[instance_id]
        self._late = (self._late | late) - present
        return bool(late) or not present <= before

    def note_named(self, named: Set[InstanceId], now_s: float) -> None:
        """Whom records name, and we have never seen, may be about to come back."""
        self._late &= named
        for instance_id in named - self._present - self._late:
            if instance_id not in self._gone_s:
                self._gone_s[instance_id] = (now_s, now_s + self._long_s)

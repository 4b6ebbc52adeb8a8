"""Which of the other instances can be reached, as far as calls have shown (spec core 2.7).

Owns the back-off of those that refused a connection and the set of those that take calls and do
not answer. Who is there at all is ``members``'.
"""

from __future__ import annotations

import math
from typing import Final

import anyio

from mm.core.cluster_state import ClusterState
from mm.core.ids import InstanceId

#: A peer that could not be reached is left out of routing this long, doubled for each failure in a
#: row: long enough not to meet every call with a failed connection, short enough to notice its
#: return.
UNREACHABLE_MIN_S: Final = 0.5
UNREACHABLE_MAX_S: Final = 10.0


#: What a client is told to wait when nobody but a silent instance could have served it: it is asked
#: again all the time.
SILENT_RETRY_S: Final = 1.0


class Reach:
    """Who is left alone for now; tells the cluster state of each change."""

    def __init__(self, cluster: ClusterState) -> None:
        self._cluster = cluster
        #: instance -> (until, current back-off), on the clock of anyio.
        self._unreachable: dict[InstanceId, tuple[float, float]] = {}
        #: Takes calls and does not answer, as far as ``sentinel`` knows: unreachable without end.
        self._silent: set[InstanceId] = set()

    @property
    def silent_count(self) -> int:
        """How many take calls and do not answer."""
        return len(self._silent)

    def away_until_s(self, instance_id: InstanceId) -> float:
        """Answer until when to leave an instance alone, on the clock of anyio."""
        if instance_id in self._silent:
            return math.inf
        return self._unreachable.get(instance_id, (0.0, 0.0))[0]

    def is_away(self, instance_id: InstanceId) -> bool:
        """Answer whether an instance is to be left alone now."""
        if instance_id in self._silent:
            return True
        entry = self._unreachable.get(instance_id)
        return entry is not None and entry[0] > anyio.current_time()

    def failed(self, instance_id: InstanceId, now_s: float) -> bool:
        """A connection failed: leave the instance alone for a while. False if that is no news."""
        until_s, backoff_s = self._unreachable.get(instance_id, (0.0, UNREACHABLE_MIN_S / 2))
        if until_s > now_s:
            return False
        backoff_s = min(2 * backoff_s, UNREACHABLE_MAX_S)
        self._unreachable[instance_id] = (now_s + backoff_s, backoff_s)
        if instance_id not in self._silent:
            self._cluster.set_away(instance_id, now_s + backoff_s)
        return True

    def fell_silent(self, instance_id: InstanceId) -> bool:
        """It takes calls and does not answer; False if that is no news."""
        if instance_id in self._silent:
            return False
        self._silent.add(instance_id)
        self._cluster.set_away(instance_id, math.inf)
        return True

    def answered(self, instance_id: InstanceId) -> bool:
        """It answered; False if that is no news."""
        if self._unreachable.pop(instance_id, None) is None and instance_id not in self._silent:
            return False
        self._silent.discard(instance_id)
        self._cluster.set_back(instance_id)
        return True

    def is_silent(self, instance_id: InstanceId) -> bool:
        """Answer whether it takes calls and does not answer."""
        return instance_id in self._silent

    def next_ms(self) -> int | None:
        """Answer in how long one that cannot be reached now is tried again; None if all can be."""
        now_s = anyio.current_time()
        waits_s = [until_s - now_s for until_s, _ in self._unreachable.values() if until_s > now_s]
        waits_s += [SILENT_RETRY_S] * bool(self._silent)
        return max(1, round(1000 * min(waits_s))) if waits_s else None

    def forget(self, instance_id: InstanceId) -> None:
        """It is gone for good."""
        self._unreachable.pop(instance_id, None)
        self._silent.discard(instance_id)

"""Who left in order of late: their absence is no loss, and nobody waits for them to come back.

Owns how long and how many are remembered. Who is there is ``members``'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mm.core.ids import InstanceId

#: Until everybody has looked at who is there, which all do at once;
LEFT_KEPT_S: Final = 60.0
#: and of a scale-down the last so many.
LEFT_MAX: Final = 1_000


class Departures:
    """Instances that were shutting down when their record went, the last one last."""

    def __init__(self) -> None:
        self._left_s: dict[InstanceId, float] = {}

    def __iter__(self) -> Iterator[InstanceId]:
        return iter(self._left_s)

    def note(self, instance_id: InstanceId, now_s: float) -> None:
        """One left."""
        self._left_s[instance_id] = now_s
        for first, left_s in list(self._left_s.items()):
            if len(self._left_s) <= LEFT_MAX and now_s - left_s <= LEFT_KEPT_S:
                break
            del self._left_s[first]

    def forget(self, instance_id: InstanceId) -> None:
        """It is back."""
        self._left_s.pop(instance_id, None)

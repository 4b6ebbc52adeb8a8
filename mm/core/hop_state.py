"""What an instance tells of itself when it refuses a load: trailer ``mm-hop-state``
(docs/peer-protocol.md).

Five numbers with a slash between them: ``cap/used/lru/count/loads``, as in the instance record but
of this very moment. Reading is forgiving: what cannot be read was not said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Self

from mm.core.records import InstanceRecord

_STATE: Final = re.compile(
    r"(\d{1,19})/(\d{1,19})/(\d{1,19})/(\d{1,9})/(\d{1,9})(?:/.*)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class HopState:
    """The part of an instance record that decides on placement and moves with every load."""

    capacity_units: int
    used_units: int
    lru_time_ms: int
    count: int
    loads_in_progress: int

    @classmethod
    def of(cls, record: InstanceRecord) -> Self:
        """Answer the state that a record tells of."""
        return cls(
            record.capacity_units,
            record.used_units,
            record.lru_time_ms,
            record.count,
            record.loads_in_progress,
        )

    @classmethod
    def read(cls, text: str | None) -> Self | None:
        """Read it; None if there is none that can be read. More parts may follow in later times."""
        match = _STATE.fullmatch(text or "")
        return cls(*(int(part) for part in match.groups())) if match else None

    def write(self) -> str:
        """Answer the value of the trailer."""
        numbers = (
            self.capacity_units,
            self.used_units,
            self.lru_time_ms,
            self.count,
            self.loads_in_progress,
        )
        return "/".join(str(max(0, number)) for number in numbers)

    def update(self, record: InstanceRecord) -> InstanceRecord:
        """Answer the record with these numbers in place of its own."""
        return replace(
            record,
            capacity_units=self.capacity_units,
            used_units=self.used_units,
            lru_time_ms=self.lru_time_ms,
            count=self.count,
            loads_in_progress=self.loads_in_progress,
        )

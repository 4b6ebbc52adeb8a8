"""What a model record says of one copy: its entry in ``copies`` (design section 6).

``instanceIds`` names the copies, as Java knows them; ``copies`` adds, for each, how far it is. Java
keeps the attribute as it was while it removes a copy, so an entry counts only while ``instanceIds``
has the same instance with the same time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_INT64_MAX: Final = 2**63 - 1


class CopyStage(enum.Enum):
    """How far a registered copy is, as far as others need to know."""

    QUEUED = "queued"
    LOADING = "loading"
    READY = "ready"


_STAGES: Final = {stage.value: stage for stage in CopyStage}


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """One entry: which registration it is of, how far the copy is, since when, and its size."""

    #: The value of ``instanceIds``.
    enqueued_ms: int
    stage: CopyStage
    since_ms: int
    #: 0 while it is not known.
    size_units: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether calls to the copy are served at once."""
        return self.stage is CopyStage.READY

    @classmethod
    def read(cls, entry: object) -> CopyRecord | None:
        """Answer what an entry says; None for what another version or program left there."""
        if not isinstance(entry, dict):
            return None
        stage = entry.get("state")
        numbers = (_integer(entry.get(name)) for name in ("ts", "since", "size"))
        enqueued_ms, since_ms, size_units = numbers
        if not isinstance(stage, str) or stage not in _STAGES:
            return None
        if enqueued_ms is None or since_ms is None or size_units is None or size_units < 0:
            return None
        return cls(enqueued_ms, _STAGES[stage], since_ms, size_units)

    def written(self, present: object) -> Mapping[str, object]:
        """Answer the entry to store in place of ``present``, whose unknown attributes are kept if
        it is of the same registration.
        """
        known: dict[str, object] = {
            "ts": self.enqueued_ms,
            "state": self.stage.value,
            "since": self.since_ms,
        }
        if self.size_units:
            known["size"] = self.size_units
        if isinstance(present, dict) and _integer(present.get("ts")) == self.enqueued_ms:
            kept = {name: value for name, value in present.items() if name != "size"}
            return {**kept, **known}
        return known


def _integer(value: object) -> int | None:
    """Answer a whole number of 64 bits, 0 for absence (spec core 1.3), None for anything else."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if -_INT64_MAX - 1 <= value <= _INT64_MAX else None

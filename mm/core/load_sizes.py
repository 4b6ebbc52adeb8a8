"""How large models of a type are, for guesses when there are too many to ask about (spec core 3.5).

Owns the averages. Asking the runtime is ``mesh.loader``'s; what it answers counts for more.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

#: Below this many models of a type an average says too little.
SAMPLES_MIN: Final = 10
#: An average follows the latest so many models: what a type holds changes over the months.
SAMPLES_MAX: Final = 100
#: Loads under way of which the runtime is asked for the size: as many at a time as it may well have
#: questions in hand, and some rounds of its loading slots.
ASKED_MIN: Final = 32
ASKED_FOR_EACH_TURN: Final = 4
#: Types are named by clients. Past this the one that was loaded longest ago is forgotten.
TYPES_MAX: Final = 1000


@dataclass(slots=True)
class _Type:
    count: int = 0
    mean_units: float = 0.0


class LoadSizes:
    """The mean measured size of the models of each type that were loaded here."""

    __slots__ = ("_types",)

    def __init__(self) -> None:
        self._types: OrderedDict[str, _Type] = OrderedDict()

    def add(self, model_type: str, size_units: int) -> None:
        """Take the measured size of a loaded model into account."""
        known = self._types.pop(model_type, None) or _Type()
        known.count = min(known.count + 1, SAMPLES_MAX)
        known.mean_units += (size_units - known.mean_units) / known.count
        self._types[model_type] = known
        if len(self._types) > TYPES_MAX:
            self._types.popitem(last=False)

    def guess(self, model_type: str) -> int:
        """Answer the units to expect for a model of a type, 0 if too few were seen."""
        known = self._types.get(model_type)
        if known is None or known.count < SAMPLES_MIN:
            return 0
        return math.ceil(known.mean_units)


def is_crowded(loads_in_progress: int, loading_concurrency: int) -> bool:
    """Answer whether to guess sizes rather than ask: the runtime has enough to do, and the guess
    only says how much to evict before this load's turn comes, when the runtime is asked after all.

    Java guesses from a third more loads than threads on, because a question keeps a thread waiting.
    Here it keeps nobody, and a guess that is too large evicts for nothing: so only a real crowd.
    """
    return loads_in_progress > max(ASKED_MIN, ASKED_FOR_EACH_TURN * loading_concurrency)

"""How long loads take here, for each type of model (spec core 3.15).

What it is for: a Java instance writes that it has a copy, but not whether that is loaded. After
the time that nearly all loads of the type have taken here, it is assumed to be. Nothing of it is
shared, and copies that tell their state need none of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

#: Types are named by clients. Past this the one whose last load is longest ago is forgotten: it
#: begins anew from the default.
TYPES_MAX: Final = 1000
#: From its fourth load on the statistic of a type is drawn every so many loads.
STRIDE: Final = 4
#: Standard deviations above the mean: many while few loads are known.
DEVIATIONS_FEW: Final = 5
DEVIATIONS_MANY: Final = 3
SAMPLES_FEW_MAX: Final = 20


@dataclass(slots=True)
class _Type:
    assumed_ms: float
    count: int = 0
    mean_ms: float = 0.0
    #: Sum of the squared distances from the mean, as Welford keeps it.
    squares: float = 0.0

    def add(self, duration_ms: float) -> None:
        self.count += 1
        distance_ms = duration_ms - self.mean_ms
        self.mean_ms += distance_ms / self.count
        self.squares += distance_ms * (duration_ms - self.mean_ms)
        if self.count < STRIDE:
            self.assumed_ms = (2 * self.assumed_ms + self.mean_ms) / 3
        elif self.count % STRIDE == 0:
            deviations = DEVIATIONS_FEW if self.count <= SAMPLES_FEW_MAX else DEVIATIONS_MANY
            self.assumed_ms = self.mean_ms + deviations * math.sqrt(self.squares / self.count)


class LoadTimes:
    """The time after which a load that says nothing counts as done, by type."""

    def __init__(self, default_ms: int) -> None:
        self._default_ms = default_ms
        self._types: OrderedDict[str, _Type] = OrderedDict()

    def add(self, model_type: str, duration_ms: float) -> None:
        """Take a load of ours into account: from the call of the runtime to its answer."""
        known = self._types.pop(model_type, None) or _Type(self._default_ms)
        known.add(max(0.0, duration_ms))
        self._types[model_type] = known
        if len(self._types) > TYPES_MAX:
            self._types.popitem(last=False)

    def mean_ms(self, model_type: str) -> float:
        """Answer how long loads of the type take, the default while none is known."""
        known = self._types.get(model_type)
        return self._default_ms if known is None else known.mean_ms

    def assumed_ms(self, model_type: str) -> int:
        """Answer how long ago a load must have been enqueued to count as done."""
        known = self._types.get(model_type)
        return self._default_ms if known is None else math.ceil(known.assumed_ms)

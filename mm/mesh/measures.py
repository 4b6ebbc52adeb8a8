"""What is measured of loads, unloads and waits: the histograms of the Java mesh (around 19.2).

Plain counts are ``statistics``'; calls are measured by whoever moves their bytes
(``mm.core.call_meter``).
"""

from __future__ import annotations

from mm.core.histograms import AGE_MS, MODEL_BYTES, TIME_MS, HistogramTable
from mm.core.ids import ModelId

#: A call that waited for its load no longer than this met no cold model (around 19.2).
MISS_MIN_MS = 10.0


class Measure:
    """One series, by model if that is wished."""

    def __init__(self, table: HistogramTable[ModelId], *, by_model: bool) -> None:
        self.table = table
        self._by_model = by_model
        if not by_model:
            table.at(ModelId(""))  # so that it is shown before anything happens

    def observe(self, value: float, model_id: ModelId, times: int = 1) -> None:
        """Count a value, once or as often as it was met."""
        self.table.at(model_id if self._by_model else ModelId("")).observe(value, times)


class Measures:
    """All of one instance since its start. ``models_max``: see ``CallMeter``."""

    def __init__(self, models_max: int = 0) -> None:
        def times() -> Measure:
            return Measure(HistogramTable(TIME_MS, models_max), by_model=models_max > 0)

        #: Waits of calls for loads, those above ``MISS_MIN_MS``.
        self.miss_ms = times()
        #: Of the runtime alone: loads and unloads that succeeded, and sizes that were asked for.
        self.load_ms = times()
        self.unload_ms = times()
        self.sizing_ms = times()
        #: Waits of calls for a slot of a copy that takes few at a time.
        self.slot_wait_ms = times()
        #: Waits of loads for their turn.
        self.load_wait_ms = times()
        #: Since the last use, of what was evicted.
        self.eviction_age_ms = Measure(HistogramTable(AGE_MS, models_max), by_model=models_max > 0)
        #: Of models that were loaded.
        self.loaded_bytes = Measure(
            HistogramTable(MODEL_BYTES, models_max), by_model=models_max > 0
        )
        #: Unloads that the runtime refused, or did not answer, each time.
        self.unload_tries_failed = 0

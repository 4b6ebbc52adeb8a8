"""What the wire measured of calls, as the histograms that both tiers add up to (around 19.2).

Owns the translation between the wire's rows and ``mm.core.call_meter``; the wire knows nothing of
the latter. What the calls were counted by is in ``mm/wire/_wire_statistics.pxi``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mm.config import Config
from mm.core.call_meter import OTHER_METHODS, CallKey, CallSeries
from mm.core.histograms import MESSAGE_BYTES, TIME_MS, Bounds, Histogram
from mm.wire import CallNumbers, Measured, Measures

_US_A_MS = 1000


def measures_of(config: Config) -> Measures | None:
    """Answer how the wire is to measure calls; None if nobody wants to know."""
    if config.metrics.kind == "disabled":
        return None
    return Measures(
        tuple(int(bound * _US_A_MS) for bound in TIME_MS),
        tuple(map(int, MESSAGE_BYTES)),
        config.metrics.models_max(config),
    )


class WireCalls:
    """The wire as a ``CallSource``: those calls that it served by itself."""

    def __init__(self, read: Callable[[], Iterable[CallNumbers]]) -> None:
        self._read = read

    def call_histograms(self) -> Iterator[tuple[CallSeries, CallKey, Histogram]]:
        """See ``CallSource``."""
        for row in self._read():
            key = CallKey(row.path or OTHER_METHODS, row.status, row.model_id, row.vmodel_id)
            for series, measured, bounds, unit in (
                (CallSeries.INVOKED_MS, row.invoked_us, TIME_MS, _US_A_MS),
                (CallSeries.ANSWERED_MS, row.answered_us, TIME_MS, _US_A_MS),
                (CallSeries.REQUEST_BYTES, row.request_bytes, MESSAGE_BYTES, 1),
                (CallSeries.RESPONSE_BYTES, row.response_bytes, MESSAGE_BYTES, 1),
            ):
                if any(measured.counts):
                    yield series, key, _histogram(bounds, measured, unit)


def _histogram(bounds: Bounds, measured: Measured, unit: int) -> Histogram:
    found = Histogram(bounds)
    found.counts = list(measured.counts)
    found.sums = [each / unit for each in measured.sums]
    return found

"""What calls are measured by: times and sizes by method and code (around 19.2).

Owns the four series of calls, and the seam between data planes: each yields what it counted as
``CallSource``, and who shows them adds them up.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from mm.core.histograms import MESSAGE_BYTES, TIME_MS, Bounds, Histogram, HistogramTable
from mm.errors import StatusCode

#: Of methods beyond the bound; whoever calls here may make up as many as he likes.
OTHER_METHODS: Final = "/other"


class CallSeries(enum.Enum):
    """What is measured of calls."""

    #: Sent to the runtime here, until its answer or its failure.
    INVOKED_MS = "invoked"
    #: Of clients, until their answer.
    ANSWERED_MS = "answered"
    #: Messages of these.
    REQUEST_BYTES = "request"
    RESPONSE_BYTES = "response"

    @property
    def bounds(self) -> Bounds:
        """The bounds of its histograms."""
        is_time = self in (CallSeries.INVOKED_MS, CallSeries.ANSWERED_MS)
        return TIME_MS if is_time else MESSAGE_BYTES


class CallKey(NamedTuple):
    """What a histogram of calls is about. Models are empty where nobody asked for them."""

    #: Full path, "/pkg.Service/Method".
    method: str
    code: int
    model_id: str = ""
    vmodel_id: str = ""


class CallSource(Protocol):
    """A data plane that counts its calls."""

    def call_histograms(self) -> Iterable[tuple[CallSeries, CallKey, Histogram]]:
        """Answer what was counted since the start; nothing may be changed in it."""


def add_up(sources: Iterable[CallSource]) -> dict[CallSeries, dict[CallKey, Histogram]]:
    """Answer what all sources counted, by series and key."""
    sums: dict[CallSeries, dict[CallKey, Histogram]] = {series: {} for series in CallSeries}
    for source in sources:
        for series, key, counted in source.call_histograms():
            known = sums[series].get(key)
            if known is None:
                sums[series][key] = counted.copy()
            else:
                known.add(counted)
    return sums


class CallMeter:
    """Counts the calls of the data plane in Python; each costs a few additions.

    ``models_max``: by model as well, for so many keys of each series; 0: not by model.
    """

    def __init__(self, *, methods_max: int, models_max: int = 0) -> None:
        self._methods_max = methods_max
        self._by_model = models_max > 0
        self._methods: set[str] = set()
        self._tables: dict[CallSeries, HistogramTable[CallKey]] = {
            series: HistogramTable(series.bounds, models_max) for series in CallSeries
        }
        self._invoked = self._tables[CallSeries.INVOKED_MS]
        self._answered = self._tables[CallSeries.ANSWERED_MS]
        self._requests = self._tables[CallSeries.REQUEST_BYTES]
        self._responses = self._tables[CallSeries.RESPONSE_BYTES]

    def invoked(
        self, method: str, code: int, taken_s: float, model_id: str, vmodel_id: str
    ) -> None:
        """The runtime answered a call, or failed to."""
        self._invoked.at(self._key(method, code, model_id, vmodel_id)).observe(1000 * taken_s)

    def answered(
        self,
        method: str,
        code: int,
        taken_s: float,
        request_bytes: int,
        response_bytes: int,
        model_id: str,
        vmodel_id: str,
    ) -> None:
        """A client has its answer, whatever it is, or will not have one."""
        key = self._key(method, code, model_id, vmodel_id)
        self._answered.at(key).observe(1000 * taken_s)
        self._requests.at(key).observe(request_bytes)
        if code == StatusCode.OK:
            self._responses.at(key).observe(response_bytes)

    def call_histograms(self) -> Iterator[tuple[CallSeries, CallKey, Histogram]]:
        """See ``CallSource``."""
        for series, table in self._tables.items():
            for key, counted in table.items():
                yield series, key, counted

    def _key(self, method: str, code: int, model_id: str, vmodel_id: str) -> CallKey:
        if method not in self._methods:
            if len(self._methods) < self._methods_max:
                self._methods.add(method)
            else:
                method = OTHER_METHODS
        if not 0 <= code <= StatusCode.UNAUTHENTICATED:
            code = StatusCode.UNKNOWN
        if self._by_model:
            return CallKey(method, code, model_id, vmodel_id)
        return CallKey(method, code)

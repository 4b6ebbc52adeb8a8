"""What calls are measured by: times and sizes by method and code (around 19.2).

Owns the four series of calls, and the seam between data planes: each yields what it counted as
``CallSource``, and who shows them adds them up.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from mm.core.histograms import MESSAGE_BYTES, TIME_MS, Histogram
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


#: Of one key: the four series, in the order of ``CallSeries``.
_Row = tuple[Histogram, Histogram, Histogram, Histogram]


class CallMeter:
    """Counts the calls of the data plane in Python; each costs some microseconds.

    ``models_max``: by model as well, for so many keys, of which those go that were not called the
    longest; 0: not by model.
    """

    def __init__(self, *, methods_max: int, models_max: int = 0) -> None:
        self._methods_max = methods_max
        self._models_max = models_max
        self._methods: set[str] = set()
        #: By the parts of a ``CallKey``, without the models where nobody wants them.
        self._rows: OrderedDict[tuple[str, int] | tuple[str, int, str, str], _Row] = OrderedDict()

    def invoked(
        self, method: str, code: int, taken_s: float, model_id: str, vmodel_id: str
    ) -> None:
        """The runtime answered a call, or failed to."""
        self._row(method, code, model_id, vmodel_id)[0].observe(1000 * taken_s)

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
        _, times, requests, responses = self._row(method, code, model_id, vmodel_id)
        times.observe(1000 * taken_s)
        requests.observe(request_bytes)
        if code == StatusCode.OK:
            responses.observe(response_bytes)

    def call_histograms(self) -> Iterator[tuple[CallSeries, CallKey, Histogram]]:
        """See ``CallSource``."""
        for parts, row in self._rows.items():
            key = CallKey(*parts)
            for series, counted in zip(CallSeries, row, strict=True):
                if counted.count:
                    yield series, key, counted

    def _row(self, method: str, code: int, model_id: str, vmodel_id: str) -> _Row:
        if self._models_max:
            row = self._rows.get((method, code, model_id, vmodel_id))
            if row is not None:
                self._rows.move_to_end((method, code, model_id, vmodel_id))
        else:
            row = self._rows.get((method, code))
        return row or self._new_row(method, code, model_id, vmodel_id)

    def _new_row(self, method: str, code: int, model_id: str, vmodel_id: str) -> _Row:
        """Make a row, under a key that is as bounded as keys have to be."""
        if method not in self._methods:
            if len(self._methods) < self._methods_max:
                self._methods.add(method)
            else:
                method = OTHER_METHODS
        if not 0 <= code <= StatusCode.UNAUTHENTICATED:
            code = StatusCode.UNKNOWN
        by_model = (method, int(code), model_id, vmodel_id)
        key = by_model if self._models_max else by_model[:2]
        row = self._rows.get(key)
        if row is None:
            times, sizes = (TIME_MS, TIME_MS), (MESSAGE_BYTES, MESSAGE_BYTES)
            first, second, third, fourth = map(Histogram, (*times, *sizes))
            row = self._rows[key] = (first, second, third, fourth)
            if self._models_max and len(self._rows) > self._models_max:
                self._rows.popitem(last=False)
        return row

"""StatsD: what changed since the last time, as lines (around 19.4).

Owns names and the form of the lines, in both flavours of the Java mesh. Java sends a packet for
each event; here counts are sent as sums, and times and sizes once for each bucket with its mean and
a sample rate, so that what is sent is bounded whatever the traffic is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from mm.core.histograms import Histogram
from mm.core.ids import UNIT_BYTES
from mm.core.metric_families import Family, Labels, Sample

#: Plain counts that only StatsD has, one for each value of a histogram.
_COUNTED: Final = {
    "modelmesh_invoke_model_milliseconds": "modelmesh_invoke_model",
    "modelmesh_api_request_milliseconds": "modelmesh_api_request",
    "modelmesh_cache_miss_milliseconds": "modelmesh_cache_miss",
    "modelmesh_loadmodel_milliseconds": "modelmesh_loadmodel",
    "modelmesh_unloadmodel_milliseconds": "modelmesh_unloadmodel",
    "modelmesh_age_at_eviction_milliseconds": "modelmesh_model_evicted",
}
#: Times of calls are told of those that succeeded.
_ONLY_OK: Final = frozenset(
    ("modelmesh_invoke_model_milliseconds", "modelmesh_api_request_milliseconds")
)

_LEGACY_PREFIX: Final = "model-mesh."
#: Of the legacy flavour, by the name in Prometheus; those of calls end with the method.
_LEGACY_CALLS: Final = {
    "modelmesh_invoke_model_milliseconds": "invoke-",
    "modelmesh_api_request_milliseconds": "api-",
    "modelmesh_request_size_bytes": "reqSize-",
    "modelmesh_response_size_bytes": "respSize-",
    "modelmesh_invoke_model": "invoke-",
    "modelmesh_api_request": "api-",
}
_LEGACY: Final = {
    "modelmesh_cache_miss_milliseconds": "cacheMiss",
    "modelmesh_loadmodel_milliseconds": "loadModel",
    "modelmesh_loadmodel_failure": "loadModel-failed",
    "modelmesh_unloadmodel_milliseconds": "unloadModel",
    "modelmesh_unloadmodel_failure": "unloadModel-failure",
    "modelmesh_unloadmodel_attempt_failure": "unloadModel-attemptFailed",
    "modelmesh_req_queue_delay_milliseconds": "queueDelay",
    "modelmesh_loading_queue_delay_milliseconds": "loadModelQueueDelay",
    "modelmesh_model_sizing_milliseconds": "sizeModel",
    "modelmesh_age_at_eviction_milliseconds": "cache_evictModel",
    "modelmesh_loaded_model_size_bytes": "mmModelSizeBytes",
    "modelmesh_models_loaded_total": "modelsLoaded",
    "modelmesh_models_with_failure_total": "modelsWithLoadFailure",
    "modelmesh_models_managed_total": "modelsManaged",
    "modelmesh_instance_lru_seconds": "localLruTimestamp",
    "modelmesh_instance_lru_age_seconds": "localLruAge",
    "modelmesh_instance_capacity_bytes": "totalCapacity",
    "modelmesh_instance_used_bytes": "totalUsed",
    "modelmesh_instance_used_bps": "capacityUsage",
    "modelmesh_instance_models_total": "modelCount",
}
#: In the legacy flavour these are in units of 8 KiB.
_LEGACY_UNITS: Final = frozenset(
    ("modelmesh_instance_capacity_bytes", "modelmesh_instance_used_bytes")
)


class StatsdLines:
    """Remembers what was told, and answers what is new."""

    def __init__(self, *, is_legacy: bool) -> None:
        self._is_legacy = is_legacy
        self._told: dict[tuple[str, Labels], float | Histogram] = {}

    def take(self, families: Iterable[Family]) -> Iterator[str]:
        """Answer the lines for what came since the last call, each with its end of line."""
        for family in families:
            for sample in family.samples:
                if isinstance(sample.value, Histogram):
                    yield from self._histogram(family.name, sample, sample.value)
                elif family.kind == "gauge":
                    yield from self._gauge(family.name, sample, sample.value)
                else:
                    yield from self._counter(family.name, sample, sample.value)

    def _histogram(self, name: str, sample: Sample, now: Histogram) -> Iterator[str]:
        key = (name, sample.labels)
        told = self._told.get(key)
        before = told if isinstance(told, Histogram) else Histogram(now.bounds)
        news = [
            (count - old, total - old_total)
            for count, old, total, old_total in zip(
                now.counts, before.counts, now.sums, before.sums, strict=True
            )
        ]
        self._told[key] = now.copy()
        count = sum(each for each, _ in news)
        if not count:
            return
        if name in _COUNTED:
            yield from self._line(_COUNTED[name], sample.labels, f"{count}|c")
        is_ok = dict(sample.labels).get("code", "OK") == "OK"
        if name in _ONLY_OK and not is_ok:
            return
        for each, total in news:
            if each:
                rate = "" if each == 1 else f"|@{1 / each!r}"
                yield from self._line(name, sample.labels, f"{_number(total / each)}|ms{rate}")

    def _counter(self, name: str, sample: Sample, now: float) -> Iterator[str]:
        key = (name, sample.labels)
        told = self._told.get(key, 0)
        assert not isinstance(told, Histogram)
        self._told[key] = now
        if now != told:
            yield from self._line(name, sample.labels, f"{_number(now - told)}|c")

    def _gauge(self, name: str, sample: Sample, now: float) -> Iterator[str]:
        if self._is_legacy and name in _LEGACY_UNITS:
            now = now // UNIT_BYTES
        yield from self._line(name, sample.labels, f"{_number(now)}|g")

    def _line(self, name: str, labels: Labels, rest: str) -> Iterator[str]:
        if self._is_legacy:
            legacy = self._legacy_name(name, dict(labels))
            if legacy is not None:
                yield f"{_LEGACY_PREFIX}{legacy}:{rest}\n"
            return
        # As Java writes them: the last label first.
        tags = ",".join(f"{label}={text.replace('/', '.')}" for label, text in reversed(labels))
        yield f"{name}_statsd{'#' + tags if tags else ''}:{rest}\n"

    def _legacy_name(self, name: str, labels: dict[str, str]) -> str | None:
        prefix = _LEGACY_CALLS.get(name)
        if prefix is None:
            return _LEGACY.get(name)
        method = labels["method"].replace("/", ".")
        has_code = name not in _ONLY_OK
        return prefix + method + (f".{labels['code']}" if has_code else "")


def packets(lines: Iterable[str], bytes_max: int) -> Iterator[bytes]:
    """Gather lines in packets of at most so many bytes; a longer line is left out."""
    packet = b""
    for line in lines:
        data = line.encode()
        if len(data) > bytes_max:
            continue
        if len(packet) + len(data) > bytes_max:
            yield packet
            packet = b""
        packet += data
    if packet:
        yield packet


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)

"""The metrics of the Java mesh, by name, labels, unit and buckets (around 19.2, interop 3.7).

Owns the table that dashboards and alerts were written against: counters lack ``_total`` and gauges
have it, and that stays so. Metrics of our own are ``own_series``'. Gauges are as of now, where Java
shows what it published last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from mm.core.call_meter import CallKey, CallSeries, CallSource, add_up
from mm.core.histograms import Histogram
from mm.core.ids import NEVER_MS, UNIT_BYTES
from mm.core.metric_families import Family, Labels, Sample
from mm.errors import StatusCode
from mm.mesh.measures import Measure, Measures
from mm.mesh.node import Node
from mm.metrics_settings import MetricsSettings

#: Of calls, with the labels `method` and `code`.
CALLS: Final[tuple[tuple[str, CallSeries, str], ...]] = (
    (
        "modelmesh_invoke_model_milliseconds",
        CallSeries.INVOKED_MS,
        "Internal model server inference request time",
    ),
    (
        "modelmesh_api_request_milliseconds",
        CallSeries.ANSWERED_MS,
        "External inference request time",
    ),
    (
        "modelmesh_request_size_bytes",
        CallSeries.REQUEST_BYTES,
        "Inference request payload size",
    ),
    (
        "modelmesh_response_size_bytes",
        CallSeries.RESPONSE_BYTES,
        "Inference response payload size",
    ),
)

#: Of what the mesh does, without labels.
MEASURES: Final[tuple[tuple[str, str, str], ...]] = (
    ("modelmesh_cache_miss_milliseconds", "miss_ms", "Wait of an inference for a model's load"),
    ("modelmesh_loadmodel_milliseconds", "load_ms", "Time of a load in the model server"),
    ("modelmesh_unloadmodel_milliseconds", "unload_ms", "Time of an unload in the model server"),
    (
        "modelmesh_req_queue_delay_milliseconds",
        "slot_wait_ms",
        "Wait of an inference for its turn at a copy that takes few at a time",
    ),
    (
        "modelmesh_loading_queue_delay_milliseconds",
        "load_wait_ms",
        "Wait of a load for its turn",
    ),
    ("modelmesh_model_sizing_milliseconds", "sizing_ms", "Time of measuring a loaded model"),
    (
        "modelmesh_age_at_eviction_milliseconds",
        "eviction_age_ms",
        "Time since its last use of a model that was evicted",
    ),
    ("modelmesh_loaded_model_size_bytes", "loaded_bytes", "Size of a loaded model"),
)


@dataclass(frozen=True, slots=True)
class JavaSeries:
    """What is read for them."""

    node: Node
    settings: MetricsSettings
    sources: tuple[CallSource, ...]

    def families(self) -> Iterator[Family]:
        """Answer all, as of now."""
        measures, counters = self.node.parts.measures, self.node.parts.counters
        yield from self._calls()
        yield from self._measures(measures)
        yield _counter("modelmesh_loadmodel_failure", "Failed loads", counters.load_failures)
        yield _counter(
            "modelmesh_unloadmodel_failure", "Unloads given up", counters.unload_failures
        )
        yield _counter(
            "modelmesh_unloadmodel_attempt_failure",
            "Failed tries of unloads",
            measures.unload_tries_failed,
        )
        yield from self._cluster()
        yield from self._instance()

    def _calls(self) -> Iterator[Family]:
        sums = add_up(self.sources)
        for name, series, text in CALLS:
            by_labels: dict[Labels, Histogram] = {}
            for key, counted in sums[series].items():
                labels = self._call_labels(key)
                if labels in by_labels:  # the same short name in two services
                    by_labels[labels].add(counted)
                else:
                    by_labels[labels] = counted
            yield _histogram(name, text, by_labels.items())

    def _call_labels(self, key: CallKey) -> Labels:
        method = key.method.removeprefix("/")
        if not self.settings.has_full_names:
            method = method.rpartition("/")[2]
        labels = (("method", method), ("code", StatusCode(key.code).name))
        if not self.settings.is_per_model:
            return labels
        return (*labels, ("modelId", key.model_id), ("vModelId", key.vmodel_id))

    def _measures(self, measures: Measures) -> Iterator[Family]:
        for name, attribute, text in MEASURES:
            measure: Measure = getattr(measures, attribute)
            yield _histogram(
                name,
                text,
                (
                    (
                        (("modelId", model_id), ("vModelId", ""))
                        if self.settings.is_per_model
                        else (),
                        counted,
                    )
                    for model_id, counted in measure.table.items()
                ),
            )

    def _cluster(self) -> Iterator[Family]:
        """What only the leader shows, so that a sum over instances is right."""
        if not self.node.services.leader.is_leader:
            return
        registry = self.node.parts.registry
        yield _gauge(
            "modelmesh_models_loaded_total",
            "Models of the cluster with at least one copy",
            registry.held_count,
        )
        yield _gauge(
            "modelmesh_models_with_failure_total",
            "Models of the cluster with a recent failure to load",
            registry.failed_count,
        )
        yield _gauge(
            "modelmesh_models_managed_total", "Models registered in the cluster", len(registry)
        )

    def _instance(self) -> Iterator[Family]:
        own = self.node.own_record()
        is_empty = own.lru_time_ms == NEVER_MS
        now_ms = self.node.parts.copies.clock.now_ms()
        age_ms = 0 if is_empty else max(0, now_ms - own.lru_time_ms)
        yield _gauge(
            "modelmesh_instance_lru_seconds",
            "Last use of the model that was not used the longest, seconds since the epoch",
            own.lru_time_ms // 1000,
        )
        yield _gauge(
            "modelmesh_instance_lru_age_seconds",
            "Time since the last use of the model that was not used the longest",
            age_ms // 1000,
        )
        yield _gauge(
            "modelmesh_instance_capacity_bytes",
            "Memory of this instance for models",
            own.capacity_units * UNIT_BYTES,
        )
        yield _gauge(
            "modelmesh_instance_used_bytes",
            "Memory of this instance that models take",
            own.used_units * UNIT_BYTES,
        )
        yield _gauge(
            "modelmesh_instance_used_bps",
            "Used part of the memory for models in basis points, 10000 for all",
            own.used_units * 10_000 // max(1, own.capacity_units),
        )
        yield _gauge("modelmesh_instance_models_total", "Copies in this instance", own.count)


def _histogram(name: str, text: str, samples: Iterable[tuple[Labels, Histogram]]) -> Family:
    return Family(
        name, "histogram", text, tuple(Sample(counted, labels) for labels, counted in samples)
    )


def _counter(name: str, text: str, value: float) -> Family:
    return Family(name, "counter", text, (Sample(value),))


def _gauge(name: str, text: str, value: float) -> Family:
    return Family(name, "gauge", text, (Sample(value),))

"""Instances and views for tests of placement."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mm.core.cluster_view import ClusterView, InstanceView
from mm.core.constraints import TypeConstraints, constraint
from mm.core.ids import InstanceId
from mm.core.label_groups import LabelGroups
from mm.core.records import InstanceRecord

NOW_MS = 1_700_000_000_000
SECOND_MS, MINUTE_MS, HOUR_MS = 1000, 60_000, 3_600_000
MIN_SPACE = 100
SATURATED_MS = 10 * MINUTE_MS
ME = InstanceId("me")


def instance(
    name: str, *, free: int = 500, age_ms: int = HOUR_MS, labels: str = "", **changes: Any
) -> InstanceView:
    view = {
        key: changes.pop(key)
        for key in ("reachable", "sent_units", "sent_count", "replica_set")
        if key in changes
    }
    record = InstanceRecord(
        capacity_units=1000,
        used_units=1000 - free,
        lru_time_ms=NOW_MS - age_ms,
        loading_threads=4,
        count=5,
        labels=tuple(labels.split()),
    )
    return InstanceView(InstanceId(name), replace(record, **changes), **view)


def cluster(
    *instances: InstanceView, types: dict[str, tuple[str, str]] | None = None, **changes: Any
) -> ClusterView:
    """Answer a view with type constraints: type -> (required, preferred)."""
    labels = sorted({each.record.labels for each in instances})
    groups = {number: frozenset(each) for number, each in enumerate(labels)}
    entries = {
        name: constraint(required.split(), preferred.split())
        for name, (required, preferred) in (types or {}).items()
    }
    numbered = [replace(each, label_group=labels.index(each.record.labels)) for each in instances]
    made = ClusterView(
        tuple(numbered),
        ME,
        NOW_MS,
        MIN_SPACE,
        saturated_age_ms=SATURATED_MS,
        label_groups=LabelGroups(TypeConstraints(MappingProxyType(entries)), groups),
    )
    return replace(made, **changes)

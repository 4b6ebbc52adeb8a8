"""Metrics of our own, their documentation and the dashboard: every name is one that is exposed."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from mm.core.metric_families import Family
from mm.edge.java_series import CALLS, MEASURES
from mm.edge.own_series import (
    COUNTERS,
    GAUGES,
    PREFIX,
    STATISTICS_COUNTERS,
    TLS_COUNTERS,
    TLS_GAUGES,
    WIRE_COUNTERS,
    WIRE_GAUGES,
    WIRE_SIDED,
    own_families,
)
from mm.edge.tls import TlsStatistics
from mm.wire import WireStatistics
from tests.edge.test_peer_statistics import statistics

ROOT = Path(__file__).parents[2]
#: Of the Java mesh's, those that are no histograms.
JAVA_NUMBERS = frozenset(
    (
        *("modelmesh_loadmodel_failure", "modelmesh_unloadmodel_failure"),
        *("modelmesh_unloadmodel_attempt_failure", "modelmesh_models_loaded_total"),
        *("modelmesh_models_with_failure_total", "modelmesh_models_managed_total"),
        *("modelmesh_instance_lru_seconds", "modelmesh_instance_lru_age_seconds"),
        *("modelmesh_instance_capacity_bytes", "modelmesh_instance_used_bytes"),
        *("modelmesh_instance_used_bps", "modelmesh_instance_models_total"),
    )
)


def families() -> dict[str, Family]:
    """Every number of the statistics another one."""
    wire = WireStatistics(*range(5001, 5001 + len(fields(WireStatistics))))
    tls = TlsStatistics(*range(6001, 6001 + len(fields(TlsStatistics))))
    return {family.name: family for family in own_families(statistics(), wire, tls)}


def exposed() -> set[str]:
    """Answer the names of all series that an instance may expose."""
    histograms = {name for name, *_ in (*CALLS, *MEASURES)}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    return parts | JAVA_NUMBERS | set(families())


def test_all_that_is_known_of_the_wire_is_told() -> None:
    sided = {f"{name}_{side}" for name, _, _, sides in WIRE_SIDED for side in sides}
    of_tls = {"handshakes", "handshakes_failed", "handshakes_late"}
    of_access = {"unauthenticated", "denied"}
    told = [*WIRE_GAUGES, *WIRE_COUNTERS, *sided, *of_tls, *of_access]
    assert sorted(told) == sorted(field.name for field in fields(WireStatistics))


def test_bytes_of_the_wire_are_told_by_who_is_at_the_other_end() -> None:
    names = [field.name for field in fields(WireStatistics)]
    first = 5001 + names.index("bytes_in_client")
    samples = families()["mm_wire_bytes_in_total"].samples
    assert [(each.labels, each.value) for each in samples] == [
        ((("side", side),), first + number)
        for number, side in enumerate(("client", "peer", "runtime", "tier2"))
    ]


def test_all_that_is_known_of_tls_is_told() -> None:
    assert {*TLS_GAUGES, *TLS_COUNTERS} == {field.name for field in fields(TlsStatistics)}


def test_values_and_units() -> None:
    told, made = families(), statistics()

    def value(name: str) -> Any:
        (sample,) = told[name].samples
        return sample.value

    assert value("mm_loads_total") == made.counters.loads
    assert value("mm_used_bytes") == made.used_units * 8192
    assert value("mm_uptime_seconds") == made.uptime_ms / 1000
    assert value("mm_loading_seconds_total") == made.counters.loading_s
    assert value("mm_eviction_saved_seconds_total") == made.eviction_saved_s
    assert value("mm_store_connected") == 1
    assert value("mm_wire_connections_total") == 5001
    assert told["mm_instance_info"].samples[0].labels == (("instance", "i"), ("unready", "so"))


def test_names_follow_todays_rules() -> None:
    for name, family in families().items():
        assert re.fullmatch(r"(mm|process)_[a-z_]+", name), name
        assert name.endswith("_total") == (family.kind == "counter"), name
        assert not re.search(r"_(ms|s|units|milliseconds)(_total)?$", name), name
        assert family.help, name


def test_the_tables_do_not_overlap() -> None:
    told = [*GAUGES, *STATISTICS_COUNTERS, *COUNTERS]
    assert len(told) == len(set(told))
    of_parts = (*WIRE_GAUGES, *WIRE_COUNTERS, *WIRE_SIDED, *TLS_GAUGES, *TLS_COUNTERS)
    assert len(families()) == 1 + len(told) + len(of_parts) + 4


def test_the_documentation_names_what_is_exposed_and_nothing_else() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    named = set(re.findall(rf"`((?:modelmesh_|process_|{PREFIX})[a-z_]+)`", text))
    java = {name for name, *_ in (*CALLS, *MEASURES)} | JAVA_NUMBERS
    only_statsd = {
        *("modelmesh_invoke_model", "modelmesh_api_request", "modelmesh_cache_miss"),
        *("modelmesh_loadmodel", "modelmesh_unloadmodel", "modelmesh_model_evicted"),
    }
    assert named == java | only_statsd | set(families())


def test_the_dashboard_asks_for_what_is_exposed() -> None:
    board = json.loads((ROOT / "config/dashboards/mm.json").read_text())
    asked: set[str] = set()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            names = set(re.findall(r"\b(?:modelmesh|mm|process)_\w+", target["expr"]))
            assert names, target
            asked |= names
    assert asked <= exposed(), asked - exposed()
    # Of everything that an operator looks for first.
    for needed in (
        *("modelmesh_api_request_milliseconds_bucket", "modelmesh_cache_miss_milliseconds_bucket"),
        *("modelmesh_loadmodel_milliseconds_bucket", "modelmesh_loadmodel_failure"),
        *("mm_evictions_total", "modelmesh_instance_models_total", "mm_copies_added_total"),
        *("modelmesh_instance_used_bytes", "mm_hits_total", "mm_wire_calls_here_total"),
    ):
        assert needed in asked, needed
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))

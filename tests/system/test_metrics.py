"""Metrics of a real instance, scraped as Prometheus does, after calls that are known one by one.

The table of the Java mesh's series is written out here, not taken from the code (around 19.2).
"""

from __future__ import annotations

import gzip
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.system.meshes import Instance, Mesh, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = [pytest.mark.system, pytest.mark.etcd]

CALLS = ("method", "code")
T = "0.5 1.0 2.0 5.0 10.0 20.0 50.0 75.0 100.0 200.0 500.0 1000.0 2000.0 5000.0 10000.0 20000.0"
T += " 60000.0 120000.0 300000.0 +Inf"
A = "30000.0 300000.0 900000.0 3600000.0 1.44E7 4.32E7 8.64E7 6.048E8 2.592E9 7.776E9 +Inf"
M = "262144.0 1048576.0 4194304.0 1.6777216E7 6.7108864E7 2.68435456E8 1.073741824E9"
M += " 4.294967296E9 +Inf"
S = "128.0 512.0 2048.0 8192.0 32768.0 131072.0 524288.0 2097152.0 +Inf"

#: Name, type, labels, bounds of the buckets.
JAVA_SERIES = [
    ("modelmesh_invoke_model_milliseconds", "histogram", CALLS, T),
    ("modelmesh_api_request_milliseconds", "histogram", CALLS, T),
    ("modelmesh_request_size_bytes", "histogram", CALLS, S),
    ("modelmesh_response_size_bytes", "histogram", CALLS, S),
    ("modelmesh_cache_miss_milliseconds", "histogram", (), T),
    ("modelmesh_loadmodel_milliseconds", "histogram", (), T),
    ("modelmesh_unloadmodel_milliseconds", "histogram", (), T),
    ("modelmesh_req_queue_delay_milliseconds", "histogram", (), T),
    ("modelmesh_loading_queue_delay_milliseconds", "histogram", (), T),
    ("modelmesh_model_sizing_milliseconds", "histogram", (), T),
    ("modelmesh_age_at_eviction_milliseconds", "histogram", (), A),
    ("modelmesh_loaded_model_size_bytes", "histogram", (), M),
    ("modelmesh_loadmodel_failure", "counter", (), ""),
    ("modelmesh_unloadmodel_failure", "counter", (), ""),
    ("modelmesh_unloadmodel_attempt_failure", "counter", (), ""),
    ("modelmesh_models_loaded_total", "gauge", (), ""),
    ("modelmesh_models_with_failure_total", "gauge", (), ""),
    ("modelmesh_models_managed_total", "gauge", (), ""),
    ("modelmesh_instance_lru_seconds", "gauge", (), ""),
    ("modelmesh_instance_lru_age_seconds", "gauge", (), ""),
    ("modelmesh_instance_capacity_bytes", "gauge", (), ""),
    ("modelmesh_instance_used_bytes", "gauge", (), ""),
    ("modelmesh_instance_used_bps", "gauge", (), ""),
    ("modelmesh_instance_models_total", "gauge", (), ""),
]
#: As written, labels and all, to the value.
Page = dict[str, float]


def page_of(text: str) -> Page:
    """Answer every series by the very text of its name and labels."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    page = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
    assert len(page) == len(lines), "a series twice"
    return page


class Scraper:
    """Asks one instance for its page."""

    def __init__(self, instance: Instance, scheme: str = "http") -> None:
        port = instance.serve.wait_line(rf"metrics for Prometheus: {scheme}, port (\d+)")[1]
        self.url = f"{scheme}://127.0.0.1:{port}"

    def ask(self, path: str = "/metrics", **headers: str) -> tuple[dict[str, str], bytes]:
        context = None
        if self.url.startswith("https"):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            assert answer.status == 200
            return dict(answer.headers), answer.read()

    def text(self, path: str = "/metrics") -> str:
        return self.ask(path)[1].decode()

    def page(self, path: str = "/metrics") -> Page:
        return page_of(self.text(path))

    def wait_for(self, series: str, value: float) -> None:
        eventually(lambda: self.page().get(series) == value, what=f"{series} = {value}")


@contextmanager
def measured(kv_store: str, service_name: str, metrics: str, **settings: str) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_METRICS": metrics, **settings}, service_name) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def called(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[tuple[Instance, Scraper]]:
    """One instance after these calls: 30 small predicts of one model and 10 large ones, 2 of a
    model that is not registered, a load that fails, an unload.
    """
    metrics, plane = "prometheus:port=0;scheme=http", {"MM_DATAPLANE": dataplane}
    with measured(kv_store, new_service_name(), metrics, **plane) as mesh:
        instance = mesh.add("i-1")
        scraper = Scraper(instance)
        instance.register("m", "SIZE_100000000_30_0")
        for _ in range(30):
            instance.predict("m", "small")
        for _ in range(10):
            instance.predict("m", "x" * 1_000_000)
        for _ in range(2):
            status, _ = refusal(lambda: instance.predict("unknown"))
            assert status == grpc.StatusCode.NOT_FOUND
        status, _ = refusal(lambda: instance.predict("", metadata=()))
        assert status == grpc.StatusCode.INVALID_ARGUMENT, "before it is known for whom it is"
        instance.register("bad", "FAIL_so", load_now=True, sync=True)
        instance.register("gone", "SIZE_1000000_0_0", load_now=True, sync=True)
        scraper.wait_for("modelmesh_loaded_model_size_bytes_count", 2)
        instance.unregister("gone")
        scraper.wait_for("modelmesh_unloadmodel_milliseconds_count", 2)
        scraper.wait_for("modelmesh_models_managed_total", 2)
        # The wire counts a call as its last byte leaves.
        scraper.wait_for(predicts("modelmesh_api_request_milliseconds", "count"), 40)
        yield instance, scraper


def predicts(name: str, suffix: str, **labels: str) -> str:
    """Answer a series of the predictor's calls as it is written."""
    given = {"method": "predict", "code": "OK", **labels}
    return f"{name}_{suffix}{{" + "".join(f'{k}="{v}",' for k, v in given.items()) + "}"


def test_exactly_the_series_of_the_java_mesh(called: tuple[Instance, Scraper]) -> None:
    text = called[1].text()
    kinds = dict(re.findall(r"# TYPE (modelmesh_\S+) (\S+)", text))
    assert kinds == {name: kind for name, kind, _, _ in JAVA_SERIES}
    page = page_of(text)
    for name, kind, labels, bounds in JAVA_SERIES:
        given = "".join(f'{label}="[^"]*",' for label in labels)
        patterns = {
            "": rf"{name}_(?:count|sum)(?:{{{given}}})?" if kind == "histogram" else name,
            "_bucket": rf'{name}_bucket{{{given}le="([^"]+)",}}',
        }
        ours = [each for each in page if re.match(rf"{name}(_bucket|_count|_sum)?(\{{|$)", each)]
        assert ours, name
        for series in ours:
            pattern = patterns["_bucket" if "_bucket" in series else ""]
            assert re.fullmatch(pattern, series), series
        found = [re.fullmatch(patterns["_bucket"], each) for each in ours]
        told = [match[1] for match in found if match is not None]
        assert told == bounds.split() * (len(told) // max(1, len(bounds.split()))), name


def test_counts_are_exact(called: tuple[Instance, Scraper]) -> None:
    page = called[1].page()
    api, invoke = "modelmesh_api_request_milliseconds", "modelmesh_invoke_model_milliseconds"
    request, response = "modelmesh_request_size_bytes", "modelmesh_response_size_bytes"
    for name in (api, invoke, request, response):
        assert page[predicts(name, "count")] == 40, name
        assert page[predicts(name, "bucket", le="+Inf")] == 40, name
    assert page[predicts(request, "bucket", le="128.0")] == 30
    assert page[predicts(request, "bucket", le="524288.0")] == 30
    assert page[predicts(request, "bucket", le="2097152.0")] == 40
    assert page[predicts(api, "count", code="NOT_FOUND")] == 2
    assert predicts(response, "count", code="NOT_FOUND") not in page
    assert not any("INVALID_ARGUMENT" in series for series in page)
    # A request has its text and the two bytes or four before it.
    assert page[predicts(request, "sum")] == 30 * (5 + 2) + 10 * (1_000_000 + 4)
    assert page["modelmesh_loadmodel_milliseconds_count"] == 2
    assert page["modelmesh_loading_queue_delay_milliseconds_count"] == 3
    assert page["modelmesh_loaded_model_size_bytes_sum"] == 101_000_000
    assert page['modelmesh_loaded_model_size_bytes_bucket{le="6.7108864E7",}'] == 1
    assert page['modelmesh_loaded_model_size_bytes_bucket{le="2.68435456E8",}'] == 2
    assert page["modelmesh_cache_miss_milliseconds_count"] == 1
    assert page['modelmesh_cache_miss_milliseconds_bucket{le="20.0",}'] == 0
    assert page["modelmesh_model_sizing_milliseconds_count"] == 2
    assert page["modelmesh_loadmodel_failure"] == 1
    assert page["modelmesh_models_with_failure_total"] == 1
    assert page["modelmesh_instance_models_total"] == 1
    assert page["modelmesh_models_managed_total"] == 2
    assert page["modelmesh_models_loaded_total"] == 1
    used, capacity = (page[f"modelmesh_instance_{each}_bytes"] for each in ("used", "capacity"))
    assert page["modelmesh_instance_used_bps"] == used * 10_000 // capacity
    assert 0 <= page["modelmesh_instance_lru_age_seconds"] < 600
    # What is ours says the same of the same calls.
    assert page["mm_hits_total"] + page["mm_misses_total"] == 40


def test_prometheus_reads_it(called: tuple[Instance, Scraper]) -> None:
    headers, body = called[1].ask("/metrics")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(body.decode()))
    assert {"modelmesh_loadmodel_failure", "mm_loads", "process_cpu_seconds"} <= {
        family.name for family in families
    }
    for family in families:
        if family.name.startswith("mm_"):
            is_total = all(sample.name.endswith("_total") for sample in family.samples)
            assert is_total == (family.type == "counter"), family


def test_paths_filters_and_compression(called: tuple[Instance, Scraper]) -> None:
    scraper = called[1]
    names = "modelmesh_instance_models_total", "modelmesh_cache_miss_milliseconds_count"
    query = "&".join(f"name[]={name}" for name in names)
    assert set(scraper.page(f"/?{query}")) == set(names)
    assert set(scraper.page(f"/metrics/?{query}")) == set(names)
    headers, body = scraper.ask("/metrics", **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert "modelmesh_instance_models_total" in page_of(gzip.decompress(body).decode())
    with pytest.raises(urllib.error.HTTPError) as caught:
        scraper.ask("/other")
    with caught.value as refused:
        assert refused.code == 404


def test_statsd_by_udp(kv_store: str, new_service_name: Callable[[], str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(60)
        metrics = f"statsd:port={sock.getsockname()[1]}"
        with measured(kv_store, new_service_name(), metrics) as mesh:
            instance = mesh.add("i-1")
            instance.register("m")
            for _ in range(20):
                instance.predict("m")
            status, _ = refusal(lambda: instance.predict("unknown"))
            assert status == grpc.StatusCode.NOT_FOUND
            counts: Counter[str] = Counter()
            gauges: dict[str, str] = {}
            call = "modelmesh_api_request_statsd#code={},method=predict"
            copies = "modelmesh_instance_models_total_statsd"
            # The gauge is the last line of what is sent in one second, in one packet or several.
            while counts[call.format("NOT_FOUND")] == 0 or copies not in gauges:
                packet = sock.recv(65536)
                assert len(packet) <= 1400
                assert packet.endswith(b"\n")
                for line in packet.decode().splitlines():
                    name, _, rest = line.rpartition(":")
                    value, kind, *_ = rest.split("|")
                    if kind == "c":
                        counts[name] += int(value)
                        gauges.pop(copies, None)
                    elif kind == "g":
                        gauges[name] = value
    assert counts[call.format("OK")] == 20
    assert counts[call.format("NOT_FOUND")] == 1
    assert counts["modelmesh_invoke_model_statsd#code=OK,method=predict"] == 20
    assert counts["modelmesh_loadmodel_statsd"] == 1
    assert gauges["modelmesh_instance_used_bytes_statsd"] != "0"
    assert gauges[copies] == "1"


def test_https_by_model_and_the_info_metric(
    kv_store: str, new_service_name: Callable[[], str]
) -> None:
    settings = {"MM_INFO_METRICS": "mesh_info;slot=SLOT,group=GROUP", "SLOT": "7", "GROUP": 'a"b'}
    metrics = "prometheus:port=0;scheme=https;per_model_metrics=true;fq_names=true"
    with measured(kv_store, new_service_name(), metrics, **settings) as mesh:
        instance = mesh.add("i-1")
        instance.register("m")
        for _ in range(3):
            instance.predict("m")
        page = Scraper(instance, "https").page()
    given = {
        "method": "mmesh.ExamplePredictor/predict",
        "code": "OK",
        "modelId": "m",
        "vModelId": "",
    }
    assert page[predicts("modelmesh_api_request_milliseconds", "count", **given)] == 3
    assert page[predicts("modelmesh_invoke_model_milliseconds", "count", **given)] == 3
    assert page['modelmesh_loadmodel_milliseconds_count{modelId="m",vModelId="",}'] == 1
    assert page['mesh_info{slot="7",group="a\\"b",}'] == 1
    assert page["modelmesh_instance_models_total"] == 1


def test_the_wire_is_told_of(kv_store: str, new_service_name: Callable[[], str]) -> None:
    metrics = "prometheus:port=0;scheme=http"
    with measured(kv_store, new_service_name(), metrics, MM_DATAPLANE="wire") as mesh:
        instance = mesh.add("i-1")
        instance.register("m", load_now=True, sync=True)
        for _ in range(5):
            instance.predict("m")
        page = Scraper(instance).page()
    assert page["mm_wire_calls_total"] >= 5
    assert page["mm_wire_calls_here_total"] + page["mm_wire_spliced_model_total"] == 5
    assert page["mm_hits_total"] == 5, "whoever carried them"
    assert page["mm_wire_connections_open"] >= 1
    for side in ("client", "runtime", "tier2"):
        assert page[f'mm_wire_bytes_in_total{{side="{side}",}}'] > 0
        assert page[f'mm_wire_bytes_out_total{{side="{side}",}}'] > 0
    assert page['mm_wire_upstreams_open{side="runtime",}'] >= 1
    assert page['mm_wire_upstreams_open{side="peer",}'] == 0

"""StatsD lines, in both flavours of the Java mesh: names, tags, kinds, and what is sent when."""

from __future__ import annotations

from mm.core.histograms import Histogram
from mm.core.metric_families import Family, Labels, Sample
from mm.core.statsd_lines import StatsdLines, packets

OK: Labels = (("method", "pkg.S/predict"), ("code", "OK"))
BAD: Labels = (("method", "pkg.S/predict"), ("code", "INTERNAL"))


def calls(*values: float, labels: Labels = OK, name: str = "api_request_milliseconds") -> Family:
    histogram = Histogram((10.0, 100.0))
    for value in values:
        histogram.observe(value)
    return Family(f"modelmesh_{name}", "histogram", "", (Sample(histogram, labels),))


def test_counts_of_all_calls_and_times_of_those_that_succeeded() -> None:
    lines = StatsdLines(is_legacy=False)
    assert list(lines.take([calls(7.5), calls(5, labels=BAD)])) == [
        "modelmesh_api_request_statsd#code=OK,method=pkg.S.predict:1|c\n",
        "modelmesh_api_request_milliseconds_statsd#code=OK,method=pkg.S.predict:7.5|ms\n",
        "modelmesh_api_request_statsd#code=INTERNAL,method=pkg.S.predict:1|c\n",
    ]


def test_many_times_are_one_line_a_bucket_with_their_mean() -> None:
    lines = StatsdLines(is_legacy=False)
    list(lines.take([calls(1)]))
    news = list(lines.take([calls(1, 2, 4, 50, 60, 70, 80)]))
    assert news == [
        "modelmesh_api_request_statsd#code=OK,method=pkg.S.predict:6|c\n",
        "modelmesh_api_request_milliseconds_statsd#code=OK,method=pkg.S.predict:3|ms|@0.5\n",
        "modelmesh_api_request_milliseconds_statsd#code=OK,method=pkg.S.predict:65|ms|@0.25\n",
    ]
    assert list(lines.take([calls(1, 2, 4, 50, 60, 70, 80)])) == []


def test_sizes_are_told_of_all_calls() -> None:
    lines = StatsdLines(is_legacy=False)
    assert list(lines.take([calls(5, labels=BAD, name="request_size_bytes")])) == [
        "modelmesh_request_size_bytes_statsd#code=INTERNAL,method=pkg.S.predict:5|ms\n"
    ]


def test_counters_are_told_as_they_rise_and_gauges_always() -> None:
    lines = StatsdLines(is_legacy=False)

    def told(failures: float, copies: float) -> list[str]:
        counter = Family("modelmesh_loadmodel_failure", "counter", "", (Sample(failures),))
        gauge = Family("modelmesh_instance_models_total", "gauge", "", (Sample(copies),))
        return list(lines.take([counter, gauge]))

    gauge = "modelmesh_instance_models_total_statsd:2|g\n"
    assert told(0, 2) == [gauge]
    assert told(3, 2) == ["modelmesh_loadmodel_failure_statsd:3|c\n", gauge]
    assert told(3, 2) == [gauge]


def test_the_legacy_flavour() -> None:
    lines = StatsdLines(is_legacy=True)
    families = [
        calls(7.5),
        calls(5, labels=BAD),
        calls(5, name="invoke_model_milliseconds"),
        calls(5, labels=BAD, name="request_size_bytes"),
        calls(20, labels=(), name="loadmodel_milliseconds"),
        Family("modelmesh_instance_capacity_bytes", "gauge", "", (Sample(81920),)),
        Family("modelmesh_instance_used_bps", "gauge", "", (Sample(2500),)),
        Family("modelmesh_unloadmodel_attempt_failure", "counter", "", (Sample(2),)),
    ]
    assert "".join(lines.take(families)).splitlines() == [
        "model-mesh.api-pkg.S.predict.OK:1|c",
        "model-mesh.api-pkg.S.predict:7.5|ms",
        "model-mesh.api-pkg.S.predict.INTERNAL:1|c",
        "model-mesh.invoke-pkg.S.predict.OK:1|c",
        "model-mesh.invoke-pkg.S.predict:5|ms",
        "model-mesh.reqSize-pkg.S.predict.INTERNAL:5|ms",
        "model-mesh.loadModel:20|ms",
        "model-mesh.totalCapacity:10|g",
        "model-mesh.capacityUsage:2500|g",
        "model-mesh.unloadModel-attemptFailed:2|c",
    ]


def test_packets_hold_whole_lines() -> None:
    assert list(packets(["aaa\n", "bbb\n", "c\n"], 8)) == [b"aaa\nbbb\n", b"c\n"]
    assert list(packets(["too long for one\n", "c\n"], 8)) == [b"c\n"]
    assert list(packets([], 8)) == []

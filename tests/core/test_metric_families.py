"""The text that Prometheus reads, as the Java mesh writes it."""

from __future__ import annotations

import math

import pytest

from mm.core.histograms import AGE_MS, MESSAGE_BYTES, MODEL_BYTES, TIME_MS, Histogram
from mm.core.metric_families import Family, Sample, java_number, write_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0"),
        (0.5, "0.5"),
        (-2, "-2.0"),
        (2000, "2000.0"),
        (300_000, "300000.0"),
        (9_999_999, "9999999.0"),
        (10_000_000, "1.0E7"),
        (67_108_864, "6.7108864E7"),
        (0.001, "0.001"),
        (0.00025, "2.5E-4"),
        (-1.5e300, "-1.5E300"),
        ((2**63 - 1) // 1000, "9.223372036854776E15"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_look_as_in_java(value: float, text: str) -> None:
    assert java_number(value) == text


def test_the_bounds_of_the_java_mesh() -> None:
    assert (
        *(0.5, 1, 2, 5, 10, 20, 50, 75, 100, 200, 500, 1000, 2000, 5000),
        *(10000, 20000, 60000, 120000, 300000),
    ) == TIME_MS
    minute, day = 60_000, 86_400_000
    hours = tuple(60 * minute * hour for hour in (1, 4, 12))
    assert (
        *(30_000, 5 * minute, 15 * minute, *hours),
        *(day, 7 * day, 30 * day, 90 * day),
    ) == AGE_MS
    assert (MODEL_BYTES[0], MODEL_BYTES[-1], len(MODEL_BYTES)) == (256 * 1024, 4 * 2**30, 8)
    assert (MESSAGE_BYTES[0], MESSAGE_BYTES[-1], len(MESSAGE_BYTES)) == (128, 2 * 2**20, 8)


def test_a_histogram_is_cumulative_and_its_labels_end_with_a_comma() -> None:
    histogram = Histogram((0.5, 2000.0))
    for value in (0.1, 30, 1e9):
        histogram.observe(value)
    labels = (("method", 'a"b\\c\nd'), ("code", "OK"))
    text = write_text([Family("x_ms", "histogram", "two\nlines", (Sample(histogram, labels),))])
    given = 'method="a\\"b\\\\c\\nd",code="OK",'
    assert text.decode().splitlines() == [
        "# HELP x_ms two\\nlines",
        "# TYPE x_ms histogram",
        f'x_ms_bucket{{{given}le="0.5",}} 1.0',
        f'x_ms_bucket{{{given}le="2000.0",}} 2.0',
        f'x_ms_bucket{{{given}le="+Inf",}} 3.0',
        f"x_ms_count{{{given}}} 3.0",
        f"x_ms_sum{{{given}}} 1.0000000301E9",
    ]
    assert text.endswith(b"\n")


def test_only_what_was_asked_for() -> None:
    histogram = Histogram((1.0,))
    families = [
        Family("h", "histogram", "", (Sample(histogram),)),
        Family("g", "gauge", "", (Sample(1),)),
    ]
    assert [line.split()[0] for line in _series(families, "h_sum", "g")] == ["h_sum", "g"]
    assert len(_series(families, "h")) == 4
    assert _series(families, "other") == []


def _series(families: list[Family], *names: str) -> list[str]:
    lines = write_text(families, names).decode().splitlines()
    return [line for line in lines if not line.startswith("#")]

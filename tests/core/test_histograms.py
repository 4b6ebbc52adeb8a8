"""Histograms: which bucket a value is in, sums by bucket, and tables that forget."""

from __future__ import annotations

from mm.core.call_meter import OTHER_METHODS, CallKey, CallMeter, CallSeries, add_up
from mm.core.histograms import TIME_MS, Histogram, HistogramTable


def test_a_value_at_a_bound_belongs_below_it() -> None:
    histogram = Histogram((1.0, 10.0))
    for value in (0.0, 1.0, 1.5, 10.0, 10.1):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.sums == [1.0, 11.5, 10.1]
    assert (histogram.count, histogram.total) == (5, 22.6)


def test_a_copy_stays_as_it_is() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(3)
    before = histogram.copy()
    histogram.add(before)
    assert (histogram.counts, histogram.sums) == ([0, 2], [0.0, 6.0])
    assert (before.counts, before.sums) == ([0, 1], [0.0, 3.0])


def test_a_table_forgets_what_was_not_asked_for_the_longest() -> None:
    table: HistogramTable[str] = HistogramTable(TIME_MS, keys_max=2)
    for key in ("a", "b", "a", "c"):
        table.at(key).observe(1)
    assert [key for key, _ in table.items()] == ["a", "c"]
    assert table.at("a").count == 2


def test_calls_are_counted_by_method_and_code() -> None:
    meter = CallMeter(methods_max=10)
    meter.answered("/s/A", 0, 0.002, 100, 200, "m", "")
    meter.answered("/s/A", 0, 0.004, 100, 200, "other", "v")
    meter.answered("/s/A", 13, 0.5, 100, 0, "m", "")
    meter.invoked("/s/A", 0, 0.001, "m", "")
    sums = add_up([meter])
    good, bad = CallKey("/s/A", 0), CallKey("/s/A", 13)
    times = sums[CallSeries.ANSWERED_MS]
    assert {key: (each.count, each.total) for key, each in times.items()} == {
        good: (2, 6.0),
        bad: (1, 500.0),
    }
    assert sums[CallSeries.REQUEST_BYTES][bad].total == 100
    # What an error weighs says nothing of answers.
    assert list(sums[CallSeries.RESPONSE_BYTES]) == [good]
    assert sums[CallSeries.INVOKED_MS][good].count == 1


def test_two_data_planes_add_up_and_stay_what_they_are() -> None:
    python, wire = CallMeter(methods_max=10), CallMeter(methods_max=10)
    python.invoked("/s/A", 0, 0.001, "m", "")
    for _ in range(3):
        wire.invoked("/s/A", 0, 0.003, "m", "")
    for _ in range(2):  # reading changes nothing
        found = add_up([python, wire])[CallSeries.INVOKED_MS][CallKey("/s/A", 0)]
        assert (found.count, found.total) == (4, 10.0)


def test_made_up_methods_and_codes_take_no_memory() -> None:
    meter = CallMeter(methods_max=2)
    for number in range(100):
        meter.invoked(f"/s/M{number}", number - 50, 0.001, "m", "")
    keys = set(add_up([meter])[CallSeries.INVOKED_MS])
    assert {key.method for key in keys} == {"/s/M0", "/s/M1", OTHER_METHODS}
    assert {key.code for key in keys} == set(range(17))


def test_by_model_if_wished_and_so_many_only() -> None:
    meter = CallMeter(methods_max=2, models_max=2)
    for model_id in ("a", "b", "a", "c"):
        meter.invoked("/s/A", 0, 0.001, model_id, "v")
    keys = add_up([meter])[CallSeries.INVOKED_MS]
    assert {key.model_id: counted.count for key, counted in keys.items()} == {"a": 2, "c": 1}
    assert all(key.vmodel_id == "v" for key in keys)

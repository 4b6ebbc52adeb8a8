"""What the demo counts, and when it says OK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from mm.demo.statistics import Counts, Reading
from mm.demo.summary import Outage, Outcome, problems, rows, table, verdict_lines
from mm.demo.tally import EXAMPLES_MAX, Tally


def good() -> Outcome:
    tally = Tally()
    for latency_ms in range(1, 101):
        tally.record_answer("alpha", float(latency_ms), None)
    tally.record_loss("bravo: x: Connection lost")
    return Outcome(
        tally=tally,
        readings=(
            Reading("alpha", counts=Counts(loads=40, evictions=30, calls=60, hits=50, misses=10)),
            Reading("bravo", counts=Counts(loads=50, evictions=40, calls=40, hits=30, misses=10)),
        ),
        outage=Outage("bravo", killed_s=15.0, back_s=19.5, answered_since=40),
        model_count=60,
        model_bytes=160 * 2**20,
        instance_count=3,
        capacity_bytes=14 * 2**20,
        traffic_s=30.0,
        total_s=55.0,
    )


def test_a_good_run() -> None:
    assert problems(good()) == ()
    (line,) = verdict_lines(good())
    assert line.startswith("OK: every one of 100 answers equals")
    assert "1 were in flight on bravo" in line


def _wrong(outcome: Outcome) -> Outcome:
    outcome.tally.record_answer("alpha", 1.0, "x: scikit-learn says [1], the mesh [2]")
    return outcome


def _failed(outcome: Outcome) -> Outcome:
    outcome.tally.record_failure("alpha: x: UNAVAILABLE: no room")
    return outcome


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_wrong, "1 of 101 answers differ from scikit-learn's"),
        (_failed, "1 calls failed that were not in flight"),
        (lambda o: replace(o, tally=Tally()), "no answer was checked"),
        (
            lambda o: replace(o, readings=(Reading("a", counts=Counts(evictions=49)),)),
            "only 49 evictions, 50 are expected",
        ),
        (lambda o: replace(o, outage=None), "no instance was killed"),
        (lambda o: replace(o, outage=Outage("bravo", 15.0)), "bravo did not come back"),
        (lambda o: replace(o, outage=Outage("bravo", 15.0, 19.0, 0)), "bravo answered nothing"),
    ],
)
def test_each_shortcoming_fails_the_run(
    spoil: Callable[[Outcome], Outcome], complaint: str
) -> None:
    outcome = spoil(good())
    (problem,) = problems(outcome)
    assert problem.startswith(complaint)
    assert any(line.startswith("FAILED: ") for line in verdict_lines(outcome))


def test_examples_are_shown_and_bounded() -> None:
    outcome = good()
    for number in range(EXAMPLES_MAX + 5):
        outcome.tally.record_failure(f"failure {number}")
    shown = [line for line in verdict_lines(outcome) if line.startswith("  failed:")]
    assert shown == [f"  failed: failure {number}" for number in range(EXAMPLES_MAX)]
    assert outcome.tally.failed == EXAMPLES_MAX + 5


def test_the_summary_shows_the_figures() -> None:
    figures = dict(rows(good()))
    assert figures["evictions"] == "70"
    assert figures["hit ratio"] == "80%"
    assert figures["balance"] == "alpha 60 / bravo 40 calls, 40 / 50 loads"
    assert figures["latency p50, p99"] == "50.0 ms, 99 ms"
    assert figures["memory"] == "3 × 14.0 MiB, 26% of all models"  # noqa: RUF001
    assert figures["instance killed"] == ("bravo at 15 s, back after 4.5 s, 40 answers since")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(good()))
    console.file.close()
    assert "evictions" in console.export_text()


def test_percentiles() -> None:
    tally = Tally()
    assert tally.percentile_ms(50) == 0.0
    for latency_ms in (5.0, 1.0, 3.0, 2.0, 4.0):
        tally.record_answer("a", latency_ms, None)
    assert tally.percentile_ms(50) == 3.0
    assert tally.percentile_ms(99) == 5.0
    assert tally.percentile_ms(1) == 1.0
    assert (tally.ended, tally.checked, tally.answered_by["a"]) == (5, 5, 5)

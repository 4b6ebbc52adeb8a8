"""The verdict of the demo, and the table that it ends with.

Pure but for rendering: ``problems`` decides, and the exit code follows from it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm.demo.limits import EVICTIONS_MIN
from mm.demo.statistics import Counts, Reading, hit_ratio, total, wire_ratio
from mm.demo.tally import Tally
from mm.demo.zoo import MIB

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Outage:
    """The kill of one instance, in seconds since the start of the traffic.

    ``back_s`` is None while it is down. ``answered_since`` counts its answers since it is back.
    """

    name: str
    killed_s: float
    back_s: float | None = None
    answered_since: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that the verdict depends on and the summary shows."""

    tally: Tally
    readings: tuple[Reading, ...]
    outage: Outage | None
    model_count: int
    model_bytes: int
    instance_count: int
    capacity_bytes: int
    traffic_s: float
    total_s: float
    evictions_min: int = EVICTIONS_MIN

    @property
    def counts(self) -> Counts:
        """All counters of all instances."""
        return total(self.readings)


def problems(outcome: Outcome) -> tuple[str, ...]:
    """Answer why the demo failed; nothing if it did what it should."""
    tally, found = outcome.tally, []
    if tally.wrong:
        found.append(f"{tally.wrong} of {tally.checked} answers differ from scikit-learn's")
    if tally.failed:
        found.append(f"{tally.failed} calls failed that were not in flight on a killed instance")
    if not tally.checked:
        found.append("no answer was checked")
    if outcome.counts.evictions < outcome.evictions_min:
        found.append(
            f"only {outcome.counts.evictions} evictions, {outcome.evictions_min} are expected"
        )
    outage = outcome.outage
    if outage is None:
        found.append("no instance was killed")
    elif outage.back_s is None:
        found.append(f"{outage.name} did not come back after it was killed")
    elif not outage.answered_since:
        found.append(f"{outage.name} answered nothing after it had come back")
    return tuple(found)


def rows(outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """Answer the figures of the summary, label and value."""
    tally, counts, outage = outcome.tally, outcome.counts, outcome.outage
    total_capacity = outcome.capacity_bytes * outcome.instance_count
    killed = "none"
    if outage is not None:
        back = "did not come back"
        if outage.back_s is not None:
            back = (
                f"back after {outage.back_s - outage.killed_s:.1f} s, "
                f"{outage.answered_since} answers since"
            )
        killed = f"{outage.name} at {outage.killed_s:.0f} s, {back}"
    return (
        ("models", f"{outcome.model_count} of scikit-learn, {_mib(outcome.model_bytes)}"),
        (
            "memory",
            f"{outcome.instance_count} × {_mib(outcome.capacity_bytes)}, "  # noqa: RUF001
            f"{total_capacity / outcome.model_bytes:.0%} of all models",
        ),
        (
            "answers checked",
            f"{tally.checked}, {tally.wrong} differ from scikit-learn's",
        ),
        ("calls failed", f"{tally.failed}"),
        ("lost in flight on the killed one", f"{tally.lost}"),
        ("sent elsewhere meanwhile", f"{tally.moved}"),
        ("instance killed", killed),
        (
            "calls a second",
            f"{tally.ended / outcome.traffic_s:.0f}" if outcome.traffic_s > 0 else "0",
        ),
        (
            "latency p50, p99",
            f"{tally.percentile_ms(50):.1f} ms, {tally.percentile_ms(99):.0f} ms",
        ),
        ("hit ratio", f"{hit_ratio(counts):.0%}"),
        ("loads", f"{counts.loads}, {counts.load_failures} failed"),
        ("evictions", f"{counts.evictions}"),
        ("forwarded between instances", f"{counts.forwards}"),
        ("carried by the wire", _carried(counts)),
        ("balance", _balance(outcome.readings)),
        ("time", f"{outcome.total_s:.0f} s, {outcome.traffic_s:.0f} s of them traffic"),
    )


def _carried(counts: Counts) -> str:
    attempts = counts.calls + counts.forwards
    return f"{wire_ratio(counts):.0%} of {attempts} calls to runtimes and between instances"


def _balance(readings: tuple[Reading, ...]) -> str:
    calls = " / ".join(f"{each.name} {each.counts.calls}" for each in readings)
    return f"{calls} calls, {' / '.join(str(each.counts.loads) for each in readings)} loads"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f} MiB"


def table(outcome: Outcome) -> Table:
    """Render the summary."""
    from rich.table import Table

    table = Table(title="mm demo", show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, value in rows(outcome):
        table.add_row(label, value)
    return table


def verdict_lines(outcome: Outcome) -> tuple[str, ...]:
    """Answer what to print under the table: the verdict, and examples of what went wrong."""
    found = problems(outcome)
    tally = outcome.tally
    if not found:
        lost = f" ({tally.lost} were in flight on {outcome.outage.name})" if outcome.outage else ""
        return (
            f"OK: every one of {tally.checked} answers equals what scikit-learn says, and no call "
            f"failed but those in flight on the killed instance{lost}.",
        )
    lines = [f"FAILED: {problem}" for problem in found]
    lines += [f"  wrong: {example}" for example in tally.wrong_examples]
    lines += [f"  failed: {example}" for example in tally.failed_examples]
    return tuple(lines)

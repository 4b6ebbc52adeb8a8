"""What a person sees while the demo runs: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import anyio

from mm.demo.statistics import Reading, Statistics, hit_ratio, wire_ratio
from mm.demo.tally import Tally
from mm.demo.zoo import MIB

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_REFRESH_S: Final = 0.5
_LINE_S: Final = 3.0


#: Told how many parts of a step are done.
Progress = Callable[[int], None]


@dataclass(slots=True)
class View:
    """Shows steps, events and traffic. ``is_plain``: lines only, for logs and pipes."""

    console: Console
    is_plain: bool
    _started_s: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Tell of something that happened; on a terminal it scrolls above the live table."""
        line = f"[{time.monotonic() - self._started_s:5.1f} s] {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, text: str, count: int) -> Iterator[Progress]:
        """Show a step of ``count`` parts while the block runs."""
        if self.is_plain:
            self.say(f"{text} ...")
            yield lambda done: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Bar(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(text, total=count)
            yield lambda done: bar.update(task, completed=done)

    async def follow(self, tally: Tally, statistics: Statistics) -> None:
        """Show the traffic until cancelled."""
        if self.is_plain:
            while True:
                await anyio.sleep(_LINE_S)
                self.say(traffic_line(tally, statistics))
        from rich.live import Live

        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(_picture(tally, statistics), refresh=True)
                await anyio.sleep(_REFRESH_S)


def traffic_line(tally: Tally, statistics: Statistics) -> str:
    """Answer the state of the traffic in one line."""
    total = statistics.total
    instances = ", ".join(
        f"{reading.name} {reading.models_loaded} models"
        if reading.is_up
        else f"{reading.name} DOWN"
        for reading in statistics.readings
    )
    return (
        f"{tally.checked} answers checked, {tally.wrong} wrong, {tally.failed} failed, "
        f"{tally.lost} lost; hit ratio {hit_ratio(total):.0%}, p50 {tally.percentile_ms(50):.1f} "
        f"ms, p99 {tally.percentile_ms(99):.0f} ms; by the wire {wire_ratio(total):.0%}; "
        f"{total.evictions} evictions; {instances}"
    )


def _picture(tally: Tally, statistics: Statistics) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=False)
    table.add_column("instance")
    for name in (*("models", "memory used", "free", "loads", "evictions", "forwards", "calls/s"),):
        table.add_column(name, justify="right")
    for reading in statistics.readings:
        table.add_row(*_cells(reading), style=None if reading.is_up else "red")
    total = statistics.total
    overall = (
        f"hit ratio {hit_ratio(total):.0%}   wire {wire_ratio(total):.0%}   "
        f"p50 {tally.percentile_ms(50):.1f} ms   p99 {tally.percentile_ms(99):.0f} ms   "
        f"answers checked {tally.checked}   wrong {tally.wrong}   failed {tally.failed}   "
        f"lost with the killed {tally.lost}"
    )
    return Group(table, Text(overall))


def _cells(reading: Reading) -> tuple[str, ...]:
    counts = reading.counts
    rising = (str(counts.loads), str(counts.evictions), str(counts.forwards))
    if not reading.is_up:
        return (reading.name, "DOWN", "", "", *rising, "")
    loading = f" +{reading.models_loading}" if reading.models_loading else ""
    return (
        reading.name,
        f"{reading.models_loaded}{loading}",
        f"{reading.used_bytes / MIB:.1f} MiB",
        f"{reading.free_bytes / MIB:.1f} MiB",
        *rising,
        f"{reading.calls_per_s:.0f}",
    )

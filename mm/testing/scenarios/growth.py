"""Whether what an instance remembers grows: sizes noted again and again, judged in the end.

Owns what counts as growth, and the figure that says so. What is measured is ``table_sizes``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Final
from unittest import mock

from mm.mesh import backups
from mm.testing.scenarios.report import Figure

#: The middle size of the second half may by chance be above that of the first; this much is no
#: chance. What grows by an entry each time that something comes and goes exceeds it in a day, or
#: in an hour in which it is all that happens.
GROWTH_MAX: Final = 1.25
GROWTH_ENTRIES: Final = 6
#: In a few hours a heap that is made anew when it is twice as long as needed may be short at first
#: and long at last.
GROWTH_ENTRIES_SHORT: Final = 20
#: Changes of records that an instance remembers: what comes in minutes here.
PAST_MAX: Final = 10


@contextmanager
def filled_soon() -> Iterator[None]:
    """What may hold thousands of entries must have as many as it may before it is looked at."""
    with mock.patch.object(backups, "PAST_MAX", PAST_MAX):
        yield


def growing_tables(sizes: list[Counter[str]], entries: int = GROWTH_ENTRIES) -> list[str]:
    """Answer what is larger in the second half than chance explains."""
    half = len(sizes) // 2
    names = sorted(set().union(*sizes))
    return [
        name
        for name in names
        if median(each[name] for each in sizes[half:])
        > GROWTH_MAX * median(each[name] for each in sizes[:half]) + entries
    ]


def growth_figure(sizes: list[Counter[str]], when: str, entries: int = GROWTH_ENTRIES) -> Figure:
    """Answer the figure: how many tables grow, and which."""
    growing = growing_tables(sizes, entries)
    names = f" ({', '.join(growing)})" if growing else ""
    return Figure(
        f"tables of two instances that grow in {when}, of {len(sizes[-1])}",
        "0",
        f"{len(growing)}{names}",
        not growing,
    )

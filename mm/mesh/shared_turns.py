"""Turns by name that those who wait share: what many want to do to one thing is done at one go.

Owns who waits for which name, and who does the work for all. What the work is, its user says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

import anyio

Job = TypeVar("Job")


@dataclass(eq=False, slots=True)
class _Place(Generic[Job]):
    """One job in line; woken when it is done, or when whoever brought it is to do the next ones."""

    job: Job
    is_done: bool = False
    woken: anyio.Event = field(default_factory=anyio.Event)


class SharedTurns(Generic[Job]):
    """One turn at a time for each name, first come, first served.

    ``work`` does up to ``jobs_max`` jobs of one name. Who brings a job when nobody is at work for
    its name works; those who come meanwhile are in the next turn, which the first of them takes.

    Invariant: while jobs wait for a name somebody works for it. If whoever works gives up, the jobs
    of the turn are done anew: work must bear that.
    """

    def __init__(
        self, work: Callable[[str, Sequence[Job]], Awaitable[None]], *, jobs_max: int
    ) -> None:
        self._work = work
        self._jobs_max = jobs_max
        #: The names that are worked for, and who waits.
        self._lines: dict[str, dict[_Place[Job], None]] = {}

    def __len__(self) -> int:
        return len(self._lines)

    async def do(self, name: str, job: Job) -> None:
        """Return when the job is done. Raises what ``work`` raises, if this caller does it."""
        place = _Place(job)
        line = self._lines.get(name)
        if line is not None:
            line[place] = None
            try:
                await place.woken.wait()
            except BaseException:
                if not place.is_done:
                    is_first = place.woken.is_set()
                    del line[place]
                    if is_first:
                        self._pass_on(name)
                raise
            if place.is_done:
                return
        else:
            self._lines[name] = {place: None}
        await self._take_turn(name)

    async def _take_turn(self, name: str) -> None:
        line = self._lines[name]
        places = list(islice(line, self._jobs_max))
        try:
            await self._work(name, [each.job for each in places])
            for each in places:
                each.is_done = True
        finally:
            for each in places:
                if each.is_done:
                    line.pop(each, None)
                    each.woken.set()
            # The first of the line is its own, if it gave up.
            line.pop(places[0], None)
            self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        line = self._lines[name]
        if line:
            next(iter(line)).woken.set()
        else:
            del self._lines[name]

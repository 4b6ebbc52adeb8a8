"""Runs a coroutine on trio in virtual time, with every choice of the scheduler from a seed.

Owns the clock, sleep as long as that clock runs, and the two private switches of trio that this
needs, and nothing else of it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar
from unittest import mock

import trio
from trio._core import _run as trio_run

T = TypeVar("T")


def run_in_virtual_time(main: Callable[[], Awaitable[T]], seed: object) -> T:
    """Answer what ``main`` answers; waits cost no time, and one seed means one order of events.

    Trio shuffles the tasks that could run; the switch is the one that it has for hypothesis.
    """
    with mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True), cheap_sleep():
        trio_run._r.seed(f"{seed}")
        try:
            return trio.run(main, clock=JumpingClock())
        except BaseExceptionGroup as group:
            # Ctrl-C is raised in whichever task runs, and comes out wrapped by its task groups.
            if group.subgroup(KeyboardInterrupt) is not None:
                raise KeyboardInterrupt from None
            raise


@contextmanager
def cheap_sleep() -> Iterator[None]:
    """Have whoever sleeps under a ``JumpingClock`` be woken by it.

    Trio makes a scope for each sleep and cancels it, which took a fifth of a run.
    """
    with mock.patch.object(trio, "sleep", _sleep):
        yield


class JumpingClock(trio.abc.Clock):
    """Time that passes only when nothing else can happen, and then at once.

    ``trio.testing.MockClock`` does the same in two turns of the event loop for each wait, and asks
    for the statistics of the loop in between: a tenth of a run.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        #: Who sleeps, by when: a number tells apart those that wake at once, and None is in the
        #: place of who was cancelled.
        self._sleepers: list[tuple[float, int, list[trio.lowlevel.Task | None]]] = []
        self._sleeps_count = 0

    def start_clock(self) -> None:
        """Begin at nought."""

    def current_time(self) -> float:
        """Answer the seconds that passed."""
        return self._now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Have it be the next deadline: trio asks only when no task can run until then."""
        sleepers = self._sleepers
        while sleepers and sleepers[0][2][0] is None:
            heapq.heappop(sleepers)
        # Who sleeps as long as he may at all is cancelled, as by trio itself.
        if not sleepers or deadline <= sleepers[0][0]:
            if deadline == math.inf:
                return deadline
            self._now_s = max(self._now_s, deadline)
            return 0.0
        self._now_s = max(self._now_s, sleepers[0][0])
        while sleepers and sleepers[0][0] <= self._now_s:
            [task] = heapq.heappop(sleepers)[2]
            if task is not None:
                trio.lowlevel.reschedule(task)
        return 0.0

    async def sleep(self, seconds: float) -> None:
        """Be woken by ``deadline_to_sleep_time``."""
        sleeper: list[trio.lowlevel.Task | None] = [trio.lowlevel.current_task()]
        self._sleeps_count += 1
        heapq.heappush(self._sleepers, (self._now_s + seconds, self._sleeps_count, sleeper))

        def abort(_: object) -> trio.lowlevel.Abort:
            sleeper[0] = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)


_trio_sleep: Final = trio.sleep


async def _sleep(seconds: float) -> None:
    clock = trio.lowlevel.current_clock()
    if isinstance(clock, JumpingClock) and 0 < seconds < math.inf:
        await clock.sleep(seconds)
    else:
        await _trio_sleep(seconds)

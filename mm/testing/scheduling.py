"""Runs a coroutine on trio in virtual time, with every choice of the scheduler from a seed.

Owns the clock, and the two private switches of trio that this needs, and nothing else of it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar
from unittest import mock

import trio
from trio._core import _run as trio_run

T = TypeVar("T")


def run_in_virtual_time(main: Callable[[], Awaitable[T]], seed: object) -> T:
    """Answer what ``main`` answers; waits cost no time, and one seed means one order of events.

    Trio shuffles the tasks that could run; the switch is the one that it has for hypothesis.
    """
    with mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
        trio_run._r.seed(f"{seed}")
        try:
            return trio.run(main, clock=_JumpingClock())
        except BaseExceptionGroup as group:
            # Ctrl-C is raised in whichever task runs, and comes out wrapped by its task groups.
            if group.subgroup(KeyboardInterrupt) is not None:
                raise KeyboardInterrupt from None
            raise


class _JumpingClock(trio.abc.Clock):
    """Time that passes only when nothing else can happen, and then at once.

    ``trio.testing.MockClock`` does the same in two turns of the event loop for each wait, and asks
    for the statistics of the loop in between: a tenth of a run.
    """

    def __init__(self) -> None:
        self._now_s = 0.0

    def start_clock(self) -> None:
        """Begin at nought."""

    def current_time(self) -> float:
        """Answer the seconds that passed."""
        return self._now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Have it be the next deadline: trio asks only when no task can run until then."""
        if deadline == math.inf:
            return deadline
        self._now_s = max(self._now_s, deadline)
        return 0.0

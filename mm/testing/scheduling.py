"""Runs a coroutine on trio in virtual time, with every choice of the scheduler from a seed.

Owns the two private switches of trio that this needs, and nothing else of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar
from unittest import mock

import trio
from trio._core import _run as trio_run
from trio.testing import MockClock

T = TypeVar("T")


def run_in_virtual_time(main: Callable[[], Awaitable[T]], seed: object) -> T:
    """Answer what ``main`` answers; waits cost no time, and one seed means one order of events.

    Trio shuffles the tasks that could run; the switch is the one that it has for hypothesis.
    """
    with mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
        trio_run._r.seed(f"{seed}")
        try:
            return trio.run(main, clock=MockClock(autojump_threshold=0))
        except BaseExceptionGroup as group:
            # Ctrl-C is raised in whichever task runs, and comes out wrapped by its task groups.
            if group.subgroup(KeyboardInterrupt) is not None:
                raise KeyboardInterrupt from None
            raise

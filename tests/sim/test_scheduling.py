"""Virtual time: who sleeps wakes in order, when it is time, and as under trio's own clock."""

from __future__ import annotations

import anyio
import pytest
import trio
import trio.testing

from mm.testing.scheduling import cheap_sleep, run_in_virtual_time

pytestmark = pytest.mark.virtual_time


def test_sleepers_wake_at_their_time_in_order() -> None:
    woken: list[tuple[float, float]] = []

    async def sleep(seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append((seconds, anyio.current_time()))

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for seconds in (3.0, 1.0, 0.0, 2.0):
                group.start_soon(sleep, seconds)

    run_in_virtual_time(main, 1)
    assert woken == [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


def test_a_sleeper_that_is_cancelled_is_not_woken_later() -> None:
    async def main() -> list[float]:
        times_s: list[float] = []
        with anyio.move_on_after(1.0):
            await anyio.sleep(2.0)
        times_s.append(anyio.current_time())
        # Would it be woken at 2 s, this were the one.
        await anyio.sleep(5.0)
        times_s.append(anyio.current_time())
        return times_s

    assert run_in_virtual_time(main, 1) == [1.0, 6.0]


def test_a_sleep_as_long_as_its_limit_is_cancelled_as_under_trio() -> None:
    async def main() -> bool:
        with anyio.move_on_after(1.0) as scope:
            await anyio.sleep(1.0)
        return scope.cancelled_caught

    assert run_in_virtual_time(main, 1)
    assert trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_under_another_clock_sleep_is_as_ever() -> None:
    with cheap_sleep():
        trio.run(anyio.sleep, 3600, clock=trio.testing.MockClock(autojump_threshold=0))

"""Turns at loading: who is next, and what becomes of a turn whose holder is cancelled."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from mm.mesh.turns import LoadTurns

pytestmark = pytest.mark.anyio


class Crowd:
    """Waiters that note when their turn came, and end it when told."""

    def __init__(self, concurrency_max: int) -> None:
        self.turns = LoadTurns(concurrency_max)
        self.had: list[str] = []
        self._ends: dict[str, anyio.Event] = {}

    async def take(self, name: str, priority: int) -> None:
        self._ends[name] = anyio.Event()
        async with self.turns.turn(name, lambda: priority):
            self.had.append(name)
            await self._ends[name].wait()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await anyio.wait_all_tasks_blocked()


@pytest.mark.parametrize("concurrency_max", [1, 3])
async def test_no_more_at_a_time_than_allowed(concurrency_max: int) -> None:
    crowd = Crowd(concurrency_max)
    async with anyio.create_task_group() as group:
        for name in "abcde":
            group.start_soon(crowd.take, name, 0)
        await anyio.wait_all_tasks_blocked()
        assert len(crowd.had) == crowd.turns.running_count == concurrency_max
        assert len(crowd.turns._line) == 5 - concurrency_max
        for _ in "abcde":
            await crowd.end(crowd.had[-1])
            for name in list(crowd.had):
                await crowd.end(name)
    assert sorted(crowd.had) == list("abcde")
    assert crowd.turns.running_count == len(crowd.turns._line) == 0


async def run_in_order(crowd: Crowd, change: Callable[[], None] = lambda: None) -> list[str]:
    """Let "first" hold the only turn while b, c, d wait; then let them go one by one."""
    async with anyio.create_task_group() as group:
        group.start_soon(crowd.take, "first", 0)
        await anyio.wait_all_tasks_blocked()
        for name, priority in (("b", 1), ("c", 3), ("d", 1)):
            group.start_soon(crowd.take, name, priority)
            await anyio.wait_all_tasks_blocked()
        change()
        for _ in range(4):
            await crowd.end(crowd.had[-1])
    return crowd.had[1:]


async def test_larger_priorities_first_then_in_order_of_arrival() -> None:
    assert await run_in_order(Crowd(1)) == ["c", "b", "d"]


async def test_a_waiter_can_be_raised_but_not_lowered() -> None:
    crowd = Crowd(1)

    def change() -> None:
        crowd.turns.raise_priority("d", 5)
        crowd.turns.raise_priority("c", 0)
        crowd.turns.raise_priority("nobody", 9)

    assert await run_in_order(crowd, change) == ["d", "c", "b"]


async def test_a_raised_waiter_keeps_its_place_among_equals() -> None:
    crowd = Crowd(1)

    def change() -> None:
        crowd.turns.raise_priority("d", 3)
        crowd.turns.raise_priority("b", 3)

    assert await run_in_order(crowd, change) == ["b", "c", "d"]


async def test_a_waiter_that_is_cancelled_leaves_no_gap() -> None:
    crowd = Crowd(1)
    async with anyio.create_task_group() as group:
        group.start_soon(crowd.take, "a", 0)
        await anyio.wait_all_tasks_blocked()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(crowd.take, "b", 9)
                await anyio.wait_all_tasks_blocked()
                crowd.turns.raise_priority("b", 10)
                scope.cancel()
        assert len(crowd.turns._line) == 0
        group.start_soon(crowd.take, "c", 0)
        await anyio.wait_all_tasks_blocked()
        await crowd.end("a")
        assert crowd.had == ["a", "c"]
        await crowd.end("c")
    assert crowd.turns.running_count == 0


async def test_a_turn_granted_to_one_that_is_cancelled_in_the_same_moment_goes_on() -> None:
    crowd = Crowd(1)
    async with anyio.create_task_group() as group:
        group.start_soon(crowd.take, "a", 0)
        await anyio.wait_all_tasks_blocked()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(crowd.take, "b", 9)
                group.start_soon(crowd.take, "c", 0)
                await anyio.wait_all_tasks_blocked()
                # No checkpoint between the grant and the cancellation.
                scope.cancel()
                crowd._ends["a"].set()
        await anyio.wait_all_tasks_blocked()
        assert crowd.had[-1] == "c"
        await crowd.end("c")
    assert crowd.turns.running_count == 0


async def test_a_holder_that_fails_gives_its_turn_back() -> None:
    turns = LoadTurns(1)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            async with turns.turn("a", lambda: 0):
                raise RuntimeError
    assert turns.running_count == 0

"""Turns that those who wait for the same name share."""

from __future__ import annotations

import random
from collections.abc import Sequence

import anyio
import pytest

from mm.mesh.shared_turns import SharedTurns

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


class _World:
    def __init__(self, jobs_max: int = 3) -> None:
        self.done: list[tuple[str, list[int]]] = []
        self.at_work: set[str] = set()
        self.turns: SharedTurns[int] = SharedTurns(self._work, jobs_max=jobs_max)

    async def _work(self, name: str, jobs: Sequence[int]) -> None:
        assert name not in self.at_work
        self.at_work.add(name)
        try:
            await anyio.sleep(1)
            self.done.append((name, list(jobs)))
        finally:
            self.at_work.discard(name)


async def test_who_comes_meanwhile_is_in_the_next_turn_with_all_others() -> None:
    world = _World()
    async with anyio.create_task_group() as group:
        for job in range(6):
            group.start_soon(world.turns.do, "a", job)
            await anyio.sleep(0.1)
        group.start_soon(world.turns.do, "b", 7)
    assert world.done == [("a", [0]), ("b", [7]), ("a", [1, 2, 3]), ("a", [4, 5])]
    assert not len(world.turns)


async def test_names_do_not_wait_for_each_other() -> None:
    world = _World()
    began_s = anyio.current_time()
    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(world.turns.do, f"n{number}", number)
    assert anyio.current_time() - began_s == pytest.approx(1)


@pytest.mark.parametrize("seed", range(10))
async def test_whoever_gives_up_leaves_the_rest_to_others(seed: int) -> None:
    world, rng = _World(), random.Random(seed)
    patient: set[int] = set()
    returned: set[int] = set()

    async def do(job: int, patience_s: float) -> None:
        with anyio.move_on_after(patience_s):
            await world.turns.do("a", job)
            returned.add(job)

    async with anyio.create_task_group() as group:
        for job in range(30):
            patience_s = rng.uniform(0.1, 6) if rng.random() < 0.5 else 1000.0
            patient |= {job} if patience_s == 1000.0 else set()
            group.start_soon(do, job, patience_s)
            await anyio.sleep(rng.uniform(0, 0.3))
    assert patient <= returned
    assert {job for _, jobs in world.done for job in jobs} >= returned
    assert not len(world.turns)


async def test_a_bug_goes_up_and_leaves_nothing() -> None:
    async def fail(_name: str, _jobs: Sequence[int]) -> None:
        await anyio.sleep(1)
        raise RuntimeError("a bug")

    turns: SharedTurns[int] = SharedTurns(fail, jobs_max=3)
    with pytest.raises(RuntimeError, match="a bug"):
        await turns.do("a", 1)
    assert not len(turns)

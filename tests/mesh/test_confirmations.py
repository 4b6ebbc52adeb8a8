"""One question to the store for all who ask whether what is mirrored is so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import anyio.lowlevel
import pytest

from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import LimitError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.confirmations import Confirmations
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Write
from mm.mesh.statistics import Counters

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

PREFIX = "/t/"


class _Store(MemoryStore):
    """Tells what it was asked for, and the most that it was asked at a time."""

    def __init__(self, delay_s: float = 1.0) -> None:
        super().__init__(call_delay_s=delay_s)
        self.asked: list[int] = []
        self._under_way = 0
        self.most = 0
        self.answered = anyio.Event()

    async def revisions(self, keys: Sequence[str]) -> Sequence[int]:
        self.asked.append(len(keys))
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        try:
            return await super().revisions(keys)
        finally:
            self._under_way -= 1
            self.answered.set()


class _World:
    def __init__(self, limits: Limits | None = None, delay_s: float = 1.0) -> None:
        self.store = _Store(delay_s)
        self.mirror = Mirror(self.store, PREFIX, lambda key_id, item: None)
        self.counters = Counters()
        self.confirmations = Confirmations(self.store, limits or Limits(), self.counters)

    @classmethod
    @asynccontextmanager
    async def running(
        cls, limits: Limits | None = None, delay_s: float = 1.0
    ) -> AsyncIterator[_World]:
        world = cls(limits, delay_s)
        async with anyio.create_task_group() as group:
            group.start_soon(world.confirmations.run)
            await anyio.wait_all_tasks_blocked()
            yield world
            group.cancel_scope.cancel()

    async def is_current(self, key_id: str) -> bool:
        return not await self.confirmations.outdated([(self.mirror, key_id)])

    def put(self, key_id: str, *, is_told: bool = True) -> None:
        write = Write(PREFIX + key_id, b"1", if_revision=None)
        _, [item] = self.store.server.transact([write])
        assert item is not None
        if is_told:
            self.mirror.written(item)


async def test_what_is_mirrored_is_compared_with_the_store() -> None:
    async with _World.running() as world:
        for key_id in ("same", "changed", "deleted"):
            world.put(key_id)
        world.put("changed", is_told=False)
        world.put("new", is_told=False)
        world.store.server.transact([Write(PREFIX + "deleted", None, if_revision=None)])
        told: dict[str, bool] = {}

        async def ask(key_id: str) -> None:
            told[key_id] = await world.is_current(key_id)

        async with anyio.create_task_group() as group:
            for key_id in ("same", "changed", "deleted", "new", "none", "same"):
                group.start_soon(ask, key_id)
        assert told == {
            "same": True,
            "changed": False,
            "deleted": False,
            "new": False,
            "none": True,
        }


async def test_several_are_asked_about_at_once() -> None:
    async with _World.running() as world:
        for key_id in ("same", "changed"):
            world.put(key_id)
        world.put("changed", is_told=False)
        entries = [(world.mirror, key_id) for key_id in ("same", "changed", "none")]
        assert await world.confirmations.outdated(entries) == [(world.mirror, "changed")]
        assert world.store.asked == [3]


async def test_all_that_ask_meanwhile_share_a_read() -> None:
    async with _World.running() as world:
        for number in range(300):
            world.put(f"k{number}")
        told: list[bool] = []

        async def ask(number: int) -> None:
            told.append(await world.is_current(f"k{number % 300}"))

        async with anyio.create_task_group() as group:
            group.start_soon(ask, 0)
            await anyio.sleep(0.1)
            for number in range(900):
                group.start_soon(ask, number)
        assert told == [True] * 901
        assert world.store.most == 1
        assert world.store.asked[0] == 1
        assert max(world.store.asked) <= 128
        assert len(world.store.asked) == world.counters.vmodel_confirmations <= 9


async def test_nobody_is_told_what_was_read_before_the_question() -> None:
    async with _World.running() as world:
        world.put("k")
        told: list[bool] = []

        async def ask() -> None:
            told.append(await world.is_current("k"))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.sleep(0.7)  # the store has read it, the answer is on its way
            world.put("k", is_told=False)
            group.start_soon(ask)
        assert told == [True, False]


async def test_whoever_asked_first_may_give_up() -> None:
    async with _World.running() as world:
        world.put("k")
        told: list[bool] = []

        async def ask() -> None:
            told.append(await world.is_current("k"))

        async with anyio.create_task_group() as group:
            with anyio.move_on_after(0.3):
                async with anyio.create_task_group() as hasty:
                    hasty.start_soon(ask)
                    await anyio.sleep(0.1)
                    hasty.start_soon(ask)  # the first of the next group
                    await anyio.sleep(0.1)
                    group.start_soon(ask)
                    group.start_soon(ask)
        assert told == [True, True]


async def test_without_a_store_nobody_waits_in_line() -> None:
    async with _World.running() as world:
        world.store.set_fault(Fault.SILENT)
        failed_s: list[float] = []

        async def ask() -> None:
            with pytest.raises(StoreUnavailableError):
                await world.is_current("k")
            failed_s.append(anyio.current_time() - began_s)

        began_s = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(ask)
        assert max(failed_s) < 4, "one time limit, however many ask"
        world.store.set_fault(None)
        assert await world.is_current("k")


async def test_there_is_a_bound() -> None:
    async with _World.running(replace(Limits(), vmodel_changes_waiting_max=2)) as world:
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(world.is_current, "k")
            await anyio.sleep(0.1)
            with pytest.raises(LimitError, match="2 calls wait for the store already"):
                await world.is_current("k")


@pytest.mark.parametrize("gives_up", [False, True])
async def test_those_of_a_group_go_on_one_after_the_other(gives_up: bool) -> None:
    async with _World.running() as world:
        world.put("k")
        runs = [0]  # how many went on since the event loop looked around

        async def ask(scope: anyio.CancelScope) -> None:
            with scope:
                await world.is_current("k")
                runs[-1] += 1

        async def look_around() -> None:
            await world.store.answered.wait()
            for _ in range(100):
                runs.append(0)
                await anyio.lowlevel.checkpoint()

        scopes = [anyio.CancelScope() for _ in range(30)]
        hasty = scopes[10:20] if gives_up else []
        async with anyio.create_task_group() as group:
            for scope in scopes:
                group.start_soon(ask, scope)
            await anyio.sleep(0.5)
            for scope in hasty:
                scope.cancel()
            group.start_soon(look_around)
        assert sum(runs) == 30 - len(hasty)
        assert max(runs) <= 4, "two of a turn, each of whom lets one go"


async def test_a_quick_store_is_not_asked_for_each_few_of_a_storm() -> None:
    async with _World.running(delay_s=0.001) as world:
        world.put("k")

        async def ask_again_and_again() -> None:
            for _ in range(100):
                assert await world.is_current("k")
                await anyio.sleep(0.002)

        began_s = anyio.current_time()
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(ask_again_and_again)
                await anyio.sleep(0.0001 * number)
        took_s = anyio.current_time() - began_s
        assert took_s < 2, "ten milliseconds an answer, and what the store takes"
        assert len(world.store.asked) < 1.1 * took_s / 0.01


async def test_who_asks_alone_is_not_held_up() -> None:
    async with _World.running(delay_s=0.001) as world:
        world.put("k")
        began_s = anyio.current_time()
        for _ in range(100):
            assert await world.is_current("k")
        assert anyio.current_time() - began_s < 0.15


async def test_those_whose_time_is_short_keep_nobody_waiting() -> None:
    async with _World.running(delay_s=0.01) as world:
        world.put("k")
        told_s: list[float] = []

        async def be_short_of_time() -> None:
            with anyio.move_on_after(0.009):
                await world.is_current("k")

        async def be_many() -> None:
            while True:
                group.start_soon(be_short_of_time)
                await anyio.sleep(0.003)

        async with anyio.create_task_group() as group:
            group.start_soon(be_many)
            await anyio.sleep(0.1)
            for _ in range(5):
                began_s = anyio.current_time()
                with anyio.fail_after(10):
                    assert await world.is_current("k")
                told_s.append(anyio.current_time() - began_s)
            group.cancel_scope.cancel()
        assert max(told_s) < 0.05, "one read under way, and the next, whoever leaves"


async def test_nobody_asks_for_those_who_left() -> None:
    async with _World.running() as world:
        async with anyio.create_task_group() as group:
            group.start_soon(world.is_current, "k")
            await anyio.sleep(0.1)
            with anyio.move_on_after(0.1):
                await world.is_current("k")
        await anyio.sleep(5)
        assert len(world.store.asked) == 1


async def test_an_instance_that_stops_says_so() -> None:
    failed = 0

    async def ask() -> None:
        nonlocal failed
        with pytest.raises(StoreUnavailableError, match="stops"):
            await world.is_current("k")
        failed += 1

    async with anyio.create_task_group() as group:
        async with _World.running() as world:
            group.start_soon(ask)
            await anyio.sleep(0.1)
            group.start_soon(ask)  # in the next group
            await anyio.sleep(0.1)
        await ask()
    assert failed == 3

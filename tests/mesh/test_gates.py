"""The gates that loads pass: a place in the cache, and memory that is really free."""

from __future__ import annotations

import anyio
import pytest

from mm.core.accounting import UnloadAccounting
from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.mesh.gates import AdmissionGate, SpaceGate
from mm.mesh.local_copy import LocalCopy, Phase

pytestmark = pytest.mark.anyio


def copy_of(name: str, weight_units: int = 1, priority: int = 0) -> LocalCopy:
    copy = LocalCopy(
        ModelId(name), ModelInfo("t"), load_id=1, enqueued_ms=1, last_used_ms=1, priority=priority
    )
    copy.weight_units = weight_units
    return copy


class Admission:
    """A gate of a cache of 100 units, and who has passed it."""

    def __init__(self, used_units: int) -> None:
        self.used_units = used_units
        self.gate = AdmissionGate(lambda: 100, lambda: self.used_units)
        self.passed: list[str] = []

    async def admit(self, copy: LocalCopy) -> None:
        await self.gate.admit(copy, copy.weight_units)
        self.passed.append(copy.model_id)


async def test_loads_that_evict_take_half_of_the_cache_at_most() -> None:
    world = Admission(used_units=100)
    copies = [copy_of(name, 20) for name in "abc"]
    async with anyio.create_task_group() as group:
        for copy in copies:
            group.start_soon(world.admit, copy)
            await anyio.wait_all_tasks_blocked()
        assert world.passed == ["a", "b"]
        assert len(world.gate._line) == 1
        world.gate.inserted(copies[0])
        await anyio.wait_all_tasks_blocked()
        assert world.passed == ["a", "b"], "the table counts it, but it is still under way"
        world.gate.leave(copies[0])
        await anyio.wait_all_tasks_blocked()
        assert world.passed == ["a", "b", "c"]


async def test_what_fits_without_evicting_is_admitted_at_once() -> None:
    world = Admission(used_units=0)
    async with anyio.create_task_group() as group:
        for name in "abcd":
            group.start_soon(world.admit, copy_of(name, 25))
        await anyio.wait_all_tasks_blocked()
        assert sorted(world.passed) == list("abcd")


async def test_the_most_urgent_comes_first_and_may_be_raised() -> None:
    world = Admission(used_units=100)
    first, *others = (
        copy_of(name, 40, priority) for name, priority in (("a", 0), ("b", 1), ("c", 2))
    )
    async with anyio.create_task_group() as group:
        for copy in (first, *others):
            group.start_soon(world.admit, copy)
            await anyio.wait_all_tasks_blocked()
        others[0].priority = 3
        world.gate.raise_priority(others[0])
        world.gate.leave(first)
        await anyio.wait_all_tasks_blocked()
        assert world.passed == ["a", "b"]
        world.gate.leave(others[0])


async def test_a_large_load_is_not_overtaken_by_small_ones_that_would_fit() -> None:
    world = Admission(used_units=100)
    first, large = copy_of("first", 30), copy_of("large", 40)
    async with anyio.create_task_group() as group:
        for copy in (first, large, *(copy_of(f"small{number}", 1) for number in range(3))):
            group.start_soon(world.admit, copy)
            await anyio.wait_all_tasks_blocked()
        assert world.passed == ["first"]
        assert len(world.gate._line) == 4
        world.gate.leave(first)
        await anyio.wait_all_tasks_blocked()
        assert sorted(world.passed) == ["first", "large", "small0", "small1", "small2"]
        world.gate.check_invariants()


async def test_a_guess_that_was_too_small_counts_once_it_is_known() -> None:
    world = Admission(used_units=100)
    copies = [copy_of("grows", 10), copy_of("waits", 30)]
    async with anyio.create_task_group() as group:
        group.start_soon(world.admit, copies[0])
        await anyio.wait_all_tasks_blocked()
        world.gate.grown(copies[0], 20)
        group.start_soon(world.admit, copies[1])
        await anyio.wait_all_tasks_blocked()
        assert world.passed == ["grows"]
        world.gate.check_invariants()
        world.gate.leave(copies[0])
        world.gate.grown(copies[0], 5)
        await anyio.wait_all_tasks_blocked()
        assert world.passed == ["grows", "waits"]
        world.gate.check_invariants()


async def test_a_load_larger_than_the_half_goes_alone() -> None:
    world = Admission(used_units=100)
    large, small = copy_of("large", 90), copy_of("small", 5)
    async with anyio.create_task_group() as group:
        group.start_soon(world.admit, large)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(world.admit, small)
        await anyio.wait_all_tasks_blocked()
        assert world.passed == ["large"]
        world.gate.leave(large)


async def test_whoever_gives_up_makes_way() -> None:
    world = Admission(used_units=100)
    first = copy_of("a", 50)
    async with anyio.create_task_group() as group:
        group.start_soon(world.admit, first)
        await anyio.wait_all_tasks_blocked()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(world.admit, copy_of("b", 50, priority=9))
                group.start_soon(world.admit, copy_of("c", 1))
                await anyio.wait_all_tasks_blocked()
                # Granted and cancelled in the same moment.
                scope.cancel()
                world.gate.leave(first)
        await anyio.wait_all_tasks_blocked()
        assert world.passed == ["a", "c"]
        assert [copy.model_id for copy in world.gate._admitted] == ["c"]


class Space:
    """A gate over an accounting of 100 units without a reserve."""

    def __init__(self) -> None:
        self.accounting = UnloadAccounting(100, 0)
        self.gate = SpaceGate(self.accounting)
        self.claimed: list[str] = []

    def waiting(self, name: str, weight_units: int, priority: int = 0) -> LocalCopy:
        self.accounting.inserted(weight_units)
        copy = copy_of(name, weight_units, priority)
        copy.enter(Phase.WAITING)
        return copy

    async def claim(self, copy: LocalCopy) -> None:
        await self.gate.claim(copy)
        self.claimed.append(copy.model_id)
        assert copy.phase is Phase.LOADING

    def evict(self, copy: LocalCopy) -> None:
        """A loaded copy leaves; its memory is free once ``unload_completed``."""
        self.accounting.left(copy.weight_units, claimed=True)


async def test_memory_goes_to_the_first_in_line_even_if_a_later_one_would_fit() -> None:
    world = Space()
    async with anyio.create_task_group() as group:
        old = world.waiting("old", 90)
        await world.claim(old)
        world.evict(old)
        group.start_soon(world.claim, world.waiting("large", 50))
        await anyio.wait_all_tasks_blocked()
        group.start_soon(world.claim, world.waiting("small", 5))
        await anyio.wait_all_tasks_blocked()
        assert world.claimed == ["old"]
        world.accounting.unload_completed(90)
        world.gate.wake()
        await anyio.wait_all_tasks_blocked()
        assert set(world.claimed) == {"old", "large", "small"}
        assert len(world.gate._queue) == 0


async def test_a_raised_copy_overtakes() -> None:
    world = Space()
    async with anyio.create_task_group() as group:
        old = world.waiting("old", 100)
        await world.claim(old)
        world.evict(old)
        copies = [world.waiting(name, 60) for name in "ab"]
        for copy in copies:
            group.start_soon(world.claim, copy)
            await anyio.wait_all_tasks_blocked()
        copies[1].priority = 5
        world.gate.raise_priority(copies[1])
        world.accounting.unload_completed(100)
        world.gate.wake()
        await anyio.wait_all_tasks_blocked()
        assert world.claimed == ["old", "b"]
        world.evict(copies[1])
        world.accounting.unload_completed(60)
        world.gate.wake()


async def test_a_waiter_that_gives_up_is_forgotten_and_others_go_on() -> None:
    world = Space()
    async with anyio.create_task_group() as group:
        old = world.waiting("old", 60)
        await world.claim(old)
        world.evict(old)
        head = world.waiting("head", 90)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as inner:
                inner.start_soon(world.claim, head)
                await anyio.wait_all_tasks_blocked()
                group.start_soon(world.claim, world.waiting("small", 5))
                await anyio.wait_all_tasks_blocked()
                assert len(world.gate._queue) == 2
                scope.cancel()
        world.accounting.left(90, claimed=False)
        world.gate.wake()
        await anyio.wait_all_tasks_blocked()
        assert world.claimed == ["old", "small"]
        assert not world.gate.discard(head)

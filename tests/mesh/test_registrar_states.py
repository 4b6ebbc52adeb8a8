"""How far copies are, as others read it: how many writes that costs, and what outages do to it."""

from __future__ import annotations

import anyio
import pytest

from mm.core.copy_record import CopyRecord, CopyStage
from mm.core.ids import ModelId
from mm.core.jitter import SPREAD
from mm.core.records import ModelInfo, ModelRecord
from mm.edge.memory_store import Fault
from mm.mesh.local_copy import LocalCopy, Phase
from mm.mesh.ports import Write, WriteResult
from mm.mesh.registrar import COALESCE_S, RETRY_S, WRITES_IN_FLIGHT_MAX
from mm.testing.cluster import until
from tests.mesh.test_registrar import INFO, ME, OTHER, PREFIX, RECORD, M, World, copy_at, running

pytestmark = pytest.mark.anyio

START_MS = 1_700_000_000_000


def now_ms() -> int:
    return START_MS + round(1000 * anyio.current_time())


def state(world: World) -> CopyRecord | None:
    record = world.record()
    assert record is not None
    return record.copy_state(ME)


def go(world: World, copy: LocalCopy, phase: Phase, weight_units: int = 0) -> None:
    """Do as the loader does."""
    copy.enter(phase)
    copy.weight_units = weight_units
    world.registrar.progressed(copy)


async def registered(world: World, enqueued_ms: int = 10) -> LocalCopy:
    copy = copy_at(enqueued_ms)
    await world.registrar.register(copy, RECORD)
    return copy


async def paid(world: World) -> None:
    await until(lambda: world.registrar.owed_count == 0)


async def test_a_fast_load_is_two_writes() -> None:
    async with running() as world:
        revision = world.server.revision
        copy = await registered(world)
        assert state(world) == CopyRecord(10, CopyStage.QUEUED, 10)
        assert world.server.revision == revision + 1
        go(world, copy, Phase.LOADING)
        await anyio.wait_all_tasks_blocked()
        go(world, copy, Phase.SIZING)
        go(world, copy, Phase.ACTIVE, 7)
        await paid(world)
        found = state(world)
        assert found is not None
        assert (found.enqueued_ms, found.stage, found.size_units) == (10, CopyStage.READY, 7)
        assert world.server.revision == revision + 2


@pytest.mark.virtual_time
async def test_a_slow_load_is_told_once_when_it_is_known_to_be_slow() -> None:
    async with running() as world:
        copy = await registered(world)
        revision = world.server.revision
        go(world, copy, Phase.LOADING)
        loading_ms = now_ms()
        await anyio.sleep(COALESCE_S - 0.01)
        assert world.server.revision == revision
        await anyio.sleep(0.02)
        assert state(world) == CopyRecord(10, CopyStage.LOADING, loading_ms)
        await anyio.sleep(5)
        go(world, copy, Phase.SIZING)
        ready_ms = now_ms()
        await anyio.sleep(0.1)
        assert world.server.revision == revision + 1
        go(world, copy, Phase.ACTIVE, 7)
        await anyio.sleep(0.001)
        assert state(world) == CopyRecord(10, CopyStage.READY, ready_ms, 7)
        await anyio.sleep(5)
        assert world.server.revision == revision + 2


@pytest.mark.virtual_time
async def test_a_copy_that_takes_long_to_measure_is_ready_before() -> None:
    async with running() as world:
        copy = await registered(world)
        go(world, copy, Phase.SIZING)
        ready_ms = now_ms()
        await anyio.sleep(COALESCE_S + 0.01)
        assert state(world) == CopyRecord(10, CopyStage.READY, ready_ms)
        go(world, copy, Phase.ACTIVE, 7)
        await paid(world)
        assert state(world) == CopyRecord(10, CopyStage.READY, ready_ms, 7)


async def test_what_left_before_it_was_told_is_only_taken_out() -> None:
    async with running() as world:
        copy = await registered(world)
        revision = world.server.revision
        go(world, copy, Phase.SIZING)
        go(world, copy, Phase.ACTIVE, 7)
        world.registrar.deregister(copy)
        await paid(world)
        assert world.copies() == {}
        assert world.server.revision == revision + 1


async def test_taking_out_and_registering_anew_is_one_write() -> None:
    async with running() as world:
        first = await registered(world)
        revision = world.server.revision
        first.last_used_ms = 77
        world.registrar.deregister(first)
        second = copy_at(20)
        basis = world.record()
        assert basis is not None
        # All that may be written at a time is: what is owed has to wait.
        others = {ModelId(f"o{number}") for number in range(WRITES_IN_FLIGHT_MAX)}
        world.registrar._in_flight.update(others)
        await world.registrar.register(second, basis)
        world.registrar._in_flight.clear()
        await paid(world)
        assert state(world) == CopyRecord(20, CopyStage.QUEUED, 20)
        assert world.registry.get(M).last_used_ms == 77  # type: ignore[union-attr]
        assert world.server.revision == revision + 1


async def test_of_an_older_copy_nothing_is_told() -> None:
    async with running() as world:
        first = await registered(world)
        world.registrar.deregister(first)
        await registered(world, 20)
        first.registered = True
        go(world, first, Phase.SIZING)
        go(world, first, Phase.ACTIVE, 7)
        await paid(world)
        assert state(world) == CopyRecord(20, CopyStage.QUEUED, 20)


async def test_nothing_is_told_of_a_model_that_was_registered_anew() -> None:
    async with running() as world:
        copy = await registered(world)
        other = ModelRecord(ModelInfo("type", "another path"), copies={ME: 10})
        await world.known(other)
        go(world, copy, Phase.SIZING)
        go(world, copy, Phase.ACTIVE, 7)
        await paid(world)
        found = world.record()
        assert found is not None
        assert (found.info, found.copies, found.copy_details) == (other.info, {}, {})


@pytest.mark.virtual_time
@pytest.mark.parametrize("fault", list(Fault))
async def test_without_a_store_states_are_owed_and_the_last_is_told(fault: Fault) -> None:
    async with running() as world:
        copy = await registered(world)
        world.store.set_fault(fault)
        go(world, copy, Phase.LOADING)
        await anyio.sleep(60)
        go(world, copy, Phase.SIZING)
        await anyio.sleep(60)
        go(world, copy, Phase.ACTIVE, 7)
        ready_ms = now_ms() - 60_000
        await anyio.sleep(60)
        assert world.registrar.owed_count == 1
        revision = world.server.revision
        world.store.set_fault(None)
        await anyio.sleep((1 + SPREAD) * RETRY_S + 3.5)
        assert state(world) == CopyRecord(10, CopyStage.READY, ready_ms, 7)
        assert world.registrar.owed_count == 0
        assert world.server.revision == revision + 1


class SlowStore:
    """Stands before a store: keeps writes until let go, and knows how many there are."""

    def __init__(self, world: World) -> None:
        self.keys: list[str] = []
        self.is_open = anyio.Event()
        self._write = world.store.write
        world.store.write = self.write  # type: ignore[method-assign]

    async def write(self, write: Write) -> WriteResult:
        self.keys.append(write.key)
        await self.is_open.wait()
        return await self._write(write)


async def test_one_write_of_a_model_at_a_time_and_the_latest_wins() -> None:
    async with running() as world:
        copy = await registered(world)
        slow = SlowStore(world)
        go(world, copy, Phase.SIZING)
        go(world, copy, Phase.ACTIVE, 7)
        await until(lambda: len(slow.keys) == 1)
        for weight_units in (8, 9, 10):
            go(world, copy, Phase.ACTIVE, weight_units)
            await anyio.wait_all_tasks_blocked()
        assert len(slow.keys) == 1
        slow.is_open.set()
        await paid(world)
        found = state(world)
        assert found is not None
        assert found.size_units == 10
        assert len(slow.keys) == 2


async def test_many_models_are_written_at_once_and_no_more_than_the_limit() -> None:
    async with running() as world:
        copies = []
        for number in range(WRITES_IN_FLIGHT_MAX + 20):
            copy = copy_at(10)
            copy.model_id = ModelId(f"m{number}")
            world.put(RECORD, copy.model_id)
            copies.append(copy)
        await until(lambda: len(world.registry) == len(copies) + 1)
        for copy in copies:
            await world.registrar.register(copy, RECORD)
        slow = SlowStore(world)
        for copy in copies:
            go(world, copy, Phase.SIZING)
            go(world, copy, Phase.ACTIVE, 7)
        await until(lambda: len(slow.keys) == WRITES_IN_FLIGHT_MAX)
        await anyio.wait_all_tasks_blocked()
        first = {PREFIX + copy.model_id for copy in copies[:WRITES_IN_FLIGHT_MAX]}
        assert set(slow.keys) == first
        slow.is_open.set()
        await paid(world)
        assert len(slow.keys) == len(copies)


async def test_what_others_took_out_comes_back_with_its_state() -> None:
    """As Java takes it out, which leaves the attribute, and as we do."""
    async with running() as world:
        copy = await registered(world)
        go(world, copy, Phase.SIZING)
        go(world, copy, Phase.ACTIVE, 7)
        await paid(world)
        before = world.record()
        assert before is not None
        left: dict[str, object] = {ME: before.copy_details[ME], OTHER: {"ts": 1}}
        for removed in (RECORD, ModelRecord(INFO, copy_details=left, last_used_ms=5)):
            await world.known(removed)
            world.registrar.restore(copy)
            await paid(world)
            after = world.record()
            assert after is not None
            assert (after.copies, after.copy_state(ME)) == ({ME: 10}, before.copy_state(ME))
            assert set(after.copy_details) == {ME}


async def test_a_copy_whose_registration_is_under_way_is_not_put_back() -> None:
    """Another instance may have taken the model: only registering itself asks."""
    async with running() as world:
        slow = SlowStore(world)
        copy = copy_at(10)
        async with anyio.create_task_group() as group:
            group.start_soon(world.registrar.register, copy, RECORD)
            await until(lambda: len(slow.keys) == 1)
            world.registrar.restore(copy)
            await paid(world)
            assert len(slow.keys) == 1
            slow.is_open.set()
        assert world.copies() == {ME: 10}

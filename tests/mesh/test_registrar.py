"""What an instance writes about its own copies: races with others, stores that are away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from mm.core.ids import InstanceId, ModelId
from mm.core.load_failures import FailureKind, FailureRules, LoadFailure
from mm.core.records import ModelInfo, ModelRecord
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import ContendedError, ModelNotFoundError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.local_copy import LocalCopy
from mm.mesh.ports import Write
from mm.mesh.record_updates import update_all
from mm.mesh.registrar import CopyElsewhereError, Registrar
from mm.mesh.registry import Change, Registry
from mm.testing.cluster import until
from mm.testing.fake_clock import FakeClock

pytestmark = pytest.mark.anyio

PREFIX = "/r/"
M = ModelId("m")
ME, OTHER = InstanceId("me"), InstanceId("other")
INFO = ModelInfo("type", "path")
RECORD = ModelRecord(INFO, last_used_ms=5)
FAILURE = LoadFailure(ME, 1, "out of luck", FailureKind.TRANSIENT, 2)
RULES = FailureRules(900_000, 10_000, 3)


def copy_at(enqueued_ms: int, last_used_ms: int = 0, info: ModelInfo = INFO) -> LocalCopy:
    return LocalCopy(
        M, info, load_id=1, enqueued_ms=enqueued_ms, last_used_ms=last_used_ms, priority=0
    )


class World:
    def __init__(self) -> None:
        self.server = MemoryServer()
        self.store = MemoryStore(self.server, timeout_s=3.5)
        self.registry = Registry(self.store, PREFIX, Limits())
        self.registrar = Registrar(self.registry, ME, FakeClock())

    def put(self, record: ModelRecord | None, model_id: str = "m") -> None:
        """Write behind the mirror's back; it hears of it at the next checkpoint."""
        value = None if record is None else record.encode()
        self.server.transact([Write(PREFIX + model_id, value, if_revision=None)])

    def record(self, model_id: str = "m") -> ModelRecord | None:
        found = self.server.get(PREFIX + model_id)
        return None if found is None else ModelRecord.decode(found.value)

    def copies(self, model_id: str = "m") -> dict[InstanceId, int]:
        found = self.record(model_id)
        assert found is not None
        return dict(found.copies)

    async def known(self, record: ModelRecord) -> None:
        self.put(record)
        await until(lambda: self.registry.get(M) == record)


@asynccontextmanager
async def running(record: ModelRecord = RECORD) -> AsyncIterator[World]:
    world = World()
    async with anyio.create_task_group() as group:
        await group.start(world.registry.run)
        group.start_soon(world.registrar.run)
        await world.known(record)
        yield world
        group.cancel_scope.cancel()


async def test_a_copy_is_registered_and_taken_out_with_its_last_use() -> None:
    async with running(RECORD.with_failure(ME, 1, "old")) as world:
        copy = copy_at(10, 20)
        await world.registrar.register(copy, RECORD)
        stored = world.record()
        assert stored is not None
        assert (stored.copies, stored.failures, stored.last_used_ms) == ({ME: 10}, {}, 20)
        copy.last_used_ms = 30
        world.registrar.deregister(copy)
        world.registrar.deregister(copy)
        await until(lambda: world.registrar.owed_count == 0)
        stored = world.record()
        assert stored is not None
        assert (stored.copies, stored.last_used_ms) == ({}, 30)


async def test_a_race_is_lost_to_whoever_registered_first() -> None:
    async with running() as world:
        world.put(RECORD.with_copy(OTHER, 7, 0))
        copy = copy_at(10)
        with pytest.raises(CopyElsewhereError):
            await world.registrar.register(copy, RECORD)
        world.registrar.deregister(copy)
        await until(lambda: world.registrar.owed_count == 0)
        assert world.copies() == {OTHER: 7}


async def test_copies_that_were_known_when_it_was_decided_are_no_race() -> None:
    basis = RECORD.with_copy(OTHER, 7, 0)
    async with running(basis) as world:
        await world.registrar.register(copy_at(10), basis)
        assert world.copies() == {OTHER: 7, ME: 10}


async def test_a_copy_that_was_asked_for_before_this_one_is_no_race() -> None:
    """One instance asks several for copies: the second may not have heard of the first."""
    async with running(RECORD.with_copy(OTHER, 7, 0)) as world:
        copy = LocalCopy(
            M,
            INFO,
            load_id=1,
            enqueued_ms=10,
            last_used_ms=0,
            priority=0,
            twins=frozenset({OTHER}),
        )
        await world.registrar.register(copy, RECORD)
        assert world.copies() == {OTHER: 7, ME: 10}


async def test_a_copy_that_left_meanwhile_is_no_race() -> None:
    async with running() as world:
        await world.registrar.register(copy_at(10), RECORD.with_copy(OTHER, 7, 0))
        assert world.copies() == {ME: 10}


async def test_a_copy_that_was_loaded_anew_elsewhere_is_a_race() -> None:
    async with running(RECORD.with_copy(OTHER, 8, 0)) as world:
        with pytest.raises(CopyElsewhereError):
            await world.registrar.register(copy_at(10), RECORD.with_copy(OTHER, 7, 0))


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (None, ModelNotFoundError),
        # Whoever waits is to look again, at the new one.
        (ModelRecord(ModelInfo("type", "another path")), CopyElsewhereError),
    ],
)
async def test_a_model_that_is_not_the_same_any_more_is_not_loaded(
    record: ModelRecord | None, error: type[Exception]
) -> None:
    async with running() as world:
        world.put(record)
        copy = copy_at(10)
        with pytest.raises(error):
            await world.registrar.register(copy, RECORD)
        assert world.record() == record


async def test_a_record_that_became_unreadable_is_not_found() -> None:
    async with running() as world:
        world.server.transact([Write(PREFIX + "m", b"{", if_revision=None)])
        with pytest.raises(ModelNotFoundError):
            await world.registrar.register(copy_at(10), RECORD)


@pytest.mark.virtual_time
async def test_what_is_owed_is_paid_after_an_outage() -> None:
    async with running() as world:
        copy = copy_at(10)
        await world.registrar.register(copy, RECORD)
        world.store.set_fault(Fault.SILENT)
        world.registrar.deregister(copy)
        await anyio.sleep(60)
        assert world.registrar.owed_count == 1
        world.store.set_fault(None)
        await until(lambda: world.registrar.owed_count == 0)
        assert world.copies() == {}


@pytest.mark.virtual_time
async def test_a_registration_whose_answer_was_lost_is_taken_out() -> None:
    async with running() as world:
        copy = copy_at(10)
        world.store.set_fault(Fault.REPLIES_LOST)
        with pytest.raises(StoreUnavailableError):
            await world.registrar.register(copy, RECORD)
        assert world.copies() == {ME: 10}
        world.registrar.deregister(copy)
        world.store.set_fault(None)
        await until(lambda: world.copies() == {})


@pytest.mark.virtual_time
@pytest.mark.parametrize("fault", [None, Fault.REFUSED])
async def test_an_old_entry_goes_although_a_new_copy_was_tried(fault: Fault | None) -> None:
    """The first copy's entry could not be taken out; the second one's did not come to be."""
    async with running() as world:
        first, second = copy_at(10), copy_at(20)
        await world.registrar.register(first, RECORD)
        basis = world.record()
        assert basis is not None
        world.store.set_fault(Fault.REFUSED)
        world.registrar.deregister(first)
        await anyio.sleep(1)
        world.put(basis.with_copy(OTHER, 15, 0))
        world.store.set_fault(fault)
        with pytest.raises((CopyElsewhereError, StoreUnavailableError)):
            await world.registrar.register(second, basis)
        world.registrar.deregister(second)
        world.store.set_fault(None)
        await until(lambda: world.registrar.owed_count == 0)
        assert world.copies() == {OTHER: 15}


@pytest.mark.virtual_time
async def test_what_is_owed_does_not_touch_the_next_copy() -> None:
    async with running() as world:
        first, second = copy_at(10), copy_at(20)
        await world.registrar.register(first, RECORD)
        world.store.set_fault(Fault.REFUSED)
        world.registrar.deregister(first)
        await anyio.sleep(0.5)
        world.store.set_fault(None)
        await world.registrar.register(second, RECORD)
        await until(lambda: world.registrar.owed_count == 0)
        assert world.copies() == {ME: 20}


async def test_an_entry_for_a_model_that_is_not_here_is_disowned() -> None:
    async with running(RECORD.with_copy(ME, 3, 0).with_copy(OTHER, 4, 0)) as world:
        world.registrar.disown(M)
        await until(lambda: world.copies() == {OTHER: 4})
        world.registrar.disown(M)
        assert world.registrar.owed_count == 0


async def test_disowning_spares_the_copy_that_is_about_to_be() -> None:
    async with running() as world:
        copy = copy_at(10)
        await world.registrar.register(copy, RECORD)
        world.registrar.disown(M)
        await until(lambda: world.registrar.owed_count == 0)
        assert world.copies() == {ME: 10}


async def test_a_failure_takes_the_place_of_the_copy() -> None:
    async with running() as world:
        copy = copy_at(10)
        await world.registrar.register(copy, RECORD)
        await world.registrar.record_failure(copy, FAILURE, RULES)
        stored = world.record()
        assert stored is not None
        assert stored.copies == {}
        assert stored.failure_details == {ME: {"msg": "out of luck", "kind": "transient", "n": 2}}
        assert stored.failures[ME] > 1
        assert not copy.registered


@pytest.mark.virtual_time
async def test_a_failure_that_cannot_be_recorded_is_at_least_a_copy_less() -> None:
    async with running() as world:
        copy = copy_at(10)
        await world.registrar.register(copy, RECORD)
        world.store.set_fault(Fault.REFUSED)
        await world.registrar.record_failure(copy, FAILURE, RULES)
        world.registrar.deregister(copy)  # as for every copy that ends
        world.store.set_fault(None)
        await until(lambda: world.copies() == {})


async def test_a_failure_is_not_held_against_another_model_of_the_same_id() -> None:
    async with running() as world:
        copy = copy_at(10)
        await world.registrar.register(copy, RECORD)
        other = ModelRecord(ModelInfo("type", "another path"))
        world.put(other)
        await world.registrar.record_failure(copy, FAILURE, RULES)
        assert world.record() == other


async def test_everything_is_forgotten_at_the_start_and_at_the_end() -> None:
    async with running(RECORD.with_copy(ME, 3, 0)) as world:
        for number in range(100):
            world.put(RECORD.with_copy(ME, number, 0).with_copy(OTHER, 4, 0), f"m{number}")
        await until(lambda: len(world.registry.held_by(ME)) == 101)
        assert await world.registrar.forget_all() == 101
        assert world.registry.held_by(ME) == frozenset()
        assert world.copies("m7") == {OTHER: 4}
        assert world.copies("m") == {}


@pytest.mark.virtual_time
async def test_forgetting_fails_with_one_plain_error() -> None:
    async with running(RECORD.with_copy(ME, 3, 0)) as world:
        for number in range(100):
            world.put(RECORD.with_copy(ME, number, 0), f"m{number}")
        await until(lambda: len(world.registry.held_by(ME)) == 101)
        world.store.set_fault(Fault.SILENT)
        with anyio.fail_after(4), pytest.raises(StoreUnavailableError):
            await world.registrar.forget_all()
        world.store.set_fault(None)
        await until(lambda: world.registry.held_by(ME) == frozenset())


@pytest.mark.virtual_time
@pytest.mark.virtual_time
async def test_a_record_that_others_keep_changing_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as world:
        world.put(RECORD, "other")
        await until(lambda: world.registry.get(ModelId("other")) is not None)
        update, contended = world.registry.update, True

        async def contend(
            model_id: ModelId, change: Change, *, fresh: bool = False
        ) -> ModelRecord | None:
            if model_id == M and contended:
                raise ContendedError("changed too often")
            return await update(model_id, change, fresh=fresh)

        copy = copy_at(100)
        await world.registrar.register(copy, RECORD)
        another = LocalCopy(
            ModelId("other"), INFO, load_id=2, enqueued_ms=7, last_used_ms=0, priority=0
        )
        await world.registrar.register(another, RECORD)
        monkeypatch.setattr(world.registry, "update", contend)
        world.registrar.deregister(copy)
        await anyio.sleep(0.01)
        world.registrar.deregister(another)
        await until(lambda: not world.copies("other"), timeout_s=0.5)
        assert world.copies() == {ME: 100}
        assert world.registrar.owed_count == 1
        contended = False
        await until(lambda: not world.copies(), timeout_s=0.5)
        assert world.registrar.owed_count == 0


@pytest.mark.virtual_time
@pytest.mark.parametrize("at_the_end", [True, False], ids=["forget_all", "update_all"])
async def test_one_that_others_keep_changing_leaves_no_other_uncleaned(
    monkeypatch: pytest.MonkeyPatch, at_the_end: bool
) -> None:
    async with running(RECORD.with_copy(ME, 3, 0)) as world:
        for number in range(40):
            world.put(RECORD.with_copy(ME, number, 0), f"m{number}")
        await until(lambda: len(world.registry.held_by(ME)) == 41)
        update, is_contended = world.registry.update, True

        async def contend(
            model_id: ModelId, change: Change, *, fresh: bool = False
        ) -> ModelRecord | None:
            if model_id == M and is_contended:
                raise ContendedError("changed too often")
            return await update(model_id, change, fresh=fresh)

        def without(record: ModelRecord | None) -> ModelRecord | None:
            return None if record is None else record.without_copy(ME, 0)

        monkeypatch.setattr(world.registry, "update", contend)
        if at_the_end:
            with pytest.raises(ContendedError):
                await world.registrar.forget_all()
        else:
            await update_all(world.registry, dict.fromkeys(world.registry.held_by(ME), without))
        assert world.registry.held_by(ME) == {M}
        is_contended = False
        if at_the_end:
            await until(lambda: not world.registry.held_by(ME))


async def test_a_copy_is_put_back() -> None:
    async with running() as world:
        copy = copy_at(10)
        await world.registrar.register(copy, RECORD)
        await world.known(RECORD)
        world.registrar.restore(copy)
        await until(lambda: world.copies() == {ME: 10})
        revision = world.server.revision
        world.registrar.restore(copy)
        await until(lambda: world.registrar.owed_count == 0)
        assert world.server.revision == revision

"""The registry: compare-and-set against others, corrupt records, what is not understood."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import anyio.lowlevel
import pytest

from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelInfo, ModelRecord, RecordError
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import InvalidRequestError, ModelExistsError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.ports import Write
from mm.mesh.registry import CAS_TRIES_MAX, Registry
from mm.table import ID_BYTES_MAX
from mm.testing.cluster import until

pytestmark = pytest.mark.anyio

PREFIX = "/r/"
M, N = ModelId("m"), ModelId("n")
A, B = InstanceId("a"), InstanceId("b")
RECORD = ModelRecord(ModelInfo("type", "path"), last_used_ms=5)


class World:
    """A registry that runs, and the store behind its back."""

    def __init__(self) -> None:
        self.server = MemoryServer()
        self.store = MemoryStore(self.server, timeout_s=3.5)
        self.others = MemoryStore(self.server)
        self.registry = Registry(self.store, PREFIX, Limits())
        self.heard: list[tuple[ModelId, ModelRecord | None]] = []
        self.registry.listen(lambda model_id, record: self.heard.append((model_id, record)))

    async def put(self, model_id: str, value: ModelRecord | bytes | None) -> None:
        encoded = value.encode() if isinstance(value, ModelRecord) else value
        await self.others.write(Write(PREFIX + model_id, encoded, if_revision=None))

    def stored(self, model_id: str) -> bytes | None:
        found = self.server.get(PREFIX + model_id)
        return None if found is None else found.value


@asynccontextmanager
async def running() -> AsyncIterator[World]:
    world = World()
    async with anyio.create_task_group() as group:
        await group.start(world.registry.run)
        yield world
        group.cancel_scope.cancel()


async def test_a_change_that_loses_is_asked_again_with_what_stands_there() -> None:
    async with running() as world:
        await world.put("m", RECORD)
        seen = []

        def change(record: ModelRecord | None) -> ModelRecord:
            assert record is not None
            seen.append(dict(record.copies))
            return record.with_copy(A, 10, 0)

        await until(lambda: M in list(world.registry))
        # The mirror has not heard of this one yet: no checkpoint in between.
        world.server.transact(
            [Write(PREFIX + "m", RECORD.with_copy(B, 7, 0).encode(), if_revision=None)]
        )
        answer = await world.registry.update(M, change)
        assert seen == [{}, {B: 7}]
        assert answer is not None
        assert answer.copies == {B: 7, A: 10}
        assert world.registry.get(M) == answer, "visible at once"


async def test_a_change_that_loses_for_ever_gives_up() -> None:
    async with running() as world:
        await world.put("m", RECORD)
        tries = 0

        def change(record: ModelRecord | None) -> ModelRecord:
            nonlocal tries
            tries += 1
            world.server.transact(
                [Write(PREFIX + "m", RECORD.used(10 + tries).encode(), if_revision=None)]
            )
            return RECORD.with_copy(A, tries, 0)

        with pytest.raises(StoreUnavailableError, match="changed 64 times"):
            await world.registry.update(M, change)
        assert tries == CAS_TRIES_MAX


async def test_a_change_may_refuse_and_may_leave_things_as_they_are() -> None:
    async with running() as world:
        await world.put("m", RECORD)
        revision = world.server.revision

        def refuse(_record: ModelRecord | None) -> ModelRecord:
            raise ModelExistsError("no")

        with pytest.raises(ModelExistsError):
            await world.registry.update(M, refuse)
        assert await world.registry.update(M, lambda record: record, fresh=True) == RECORD
        assert await world.registry.update(N, lambda record: record) is None
        assert world.server.revision == revision


async def test_creation_and_deletion() -> None:
    async with running() as world:
        assert await world.registry.update(M, lambda _record: RECORD) == RECORD
        assert len(world.registry) == 1
        assert await world.registry.update(M, lambda _record: None) is None
        assert world.stored("m") is None
        assert world.registry.get(M) is None


async def test_what_we_wrote_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as world:
        await world.put("m", RECORD)
        await until(lambda: world.registry.get(M) == RECORD)
        monkeypatch.setattr(ModelRecord, "decode", None)
        written = await world.registry.update(M, lambda r: r and r.with_copy(A, 1, 0))
        assert world.registry.get(M) is written
        monkeypatch.undo()
        assert ModelRecord.decode(world.stored("m") or b"") == written


async def test_a_fresh_change_also_teaches_the_mirror() -> None:
    async with running() as world:
        world.store.set_fault(Fault.REFUSED)
        await world.put("m", RECORD)
        world.store.set_fault(None)
        world.server.forget_history()
        assert world.registry.get(M) is None
        await world.registry.update(M, lambda record: record, fresh=True)
        assert world.registry.get(M) == RECORD


async def test_attributes_that_are_not_understood_survive_a_change() -> None:
    async with running() as world:
        failures = {"x": {"msg": "e", "at": 3}}
        attributes = {"type": "t", "new": {"deep": [1, None]}, "fails": failures}
        await world.put("m", json.dumps({**attributes, "failedIn": {"x": 9}}).encode())
        await world.registry.update(
            M, lambda record: record and record.with_copy(A, 1, 0), fresh=True
        )
        stored = json.loads(world.stored("m") or b"")
        assert stored["new"] == {"deep": [1, None]}
        assert stored["fails"] == failures
        assert stored["instanceIds"] == {"a": 1}


async def test_the_index_of_holders_follows() -> None:
    async with running() as world:
        await world.put("m", RECORD.with_copy(A, 1, 0).with_copy(B, 2, 0))
        await world.put("n", RECORD.with_copy(A, 1, 0))
        await until(lambda: len(world.registry) == 2)
        assert world.registry.held_by(A) == {M, N}
        assert world.registry.held_by(B) == {M}
        await world.put("m", RECORD.with_copy(B, 2, 0))
        await world.put("n", None)
        await until(lambda: world.registry.holders() == {B})
        assert world.registry.held_by(A) == frozenset()
        await world.put("m", RECORD)
        await until(lambda: not world.registry.holders())


async def test_a_corrupt_record_is_named_once_and_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    async with running() as world:
        await world.put("m", b'{"type": 5')
        await world.put("n", RECORD)
        await until(lambda: world.registry.get(N) is not None)
        assert world.registry.get(M) is None
        assert await world.registry.find(M) is None
        assert world.registry.corrupt_count == 1
        assert [r.getMessage() for r in caplog.records if "/r/m" in r.getMessage()] == [
            r.getMessage() for r in caplog.records
        ]
        assert len(caplog.records) == 1
        with pytest.raises(RecordError, match="record of model m is unreadable"):
            await world.registry.update(M, lambda _record: RECORD)
        assert await world.registry.delete_corrupt(M)
        assert not await world.registry.delete_corrupt(M)
        assert world.registry.corrupt_count == 0
        assert world.stored("m") is None


async def test_a_record_that_becomes_corrupt_has_no_holders() -> None:
    async with running() as world:
        await world.put("m", RECORD.with_copy(A, 1, 0))
        await until(lambda: bool(world.registry.holders()))
        await world.put("m", b'{"instanceIds": 7}')
        await until(lambda: not world.registry.holders())
        assert world.heard[-1] == (M, None)


async def test_listeners_hear_of_copies_and_of_ends_only() -> None:
    async with running() as world:
        await world.put("m", RECORD)
        await world.put("m", RECORD.used(99))
        copied = RECORD.with_copy(A, 1, 0)
        await world.put("m", copied)
        await world.put("m", RECORD)
        await world.put("m", None)
        await until(lambda: len(world.heard) == 3)
        assert world.heard == [(M, copied), (M, RECORD), (M, None)]


async def test_a_record_without_an_id_is_ignored() -> None:
    async with running() as world:
        await world.put("", RECORD.with_copy(A, 1, 0))
        await world.put("n", RECORD.with_copy(A, 1, 0))
        await until(lambda: bool(world.heard))
        assert [model_id for model_id, _ in world.heard] == [N]
        assert world.registry.held_by(A) == {N}


async def test_a_record_with_an_id_that_the_table_cannot_hold_is_ignored() -> None:
    async with running() as world:
        long = "x" * (ID_BYTES_MAX + 1)
        await world.put(long, RECORD.with_copy(A, 1, 0))
        await world.put("n", RECORD.with_copy(A, 1, 0))
        await until(lambda: bool(world.heard))
        assert [model_id for model_id, _ in world.heard] == [N]
        assert world.registry.held_by(A) == {N}
        assert world.registry.get(ModelId(long)) is None
        with pytest.raises(InvalidRequestError):
            await world.registry.find(ModelId(long))


async def test_an_unknown_model_is_asked_for_and_then_known() -> None:
    async with running() as world:
        world.store.set_fault(Fault.REFUSED)
        await world.put("m", replace(RECORD, references=2))
        with pytest.raises(StoreUnavailableError):
            await world.registry.find(M)
        world.store.set_fault(None)
        found = await world.registry.find(M)
        assert found is not None
        assert found.references == 2
        assert await world.registry.find(N) is None


@pytest.mark.virtual_time
@pytest.mark.parametrize("is_sudden", [False, True])
async def test_a_flood_of_unknown_ids_does_not_queue_up_behind_a_store_that_is_gone(
    is_sudden: bool,
) -> None:
    async with running() as world:
        failures = 0

        async def ask(number: int) -> None:
            nonlocal failures
            with pytest.raises(StoreUnavailableError):
                await world.registry.find(ModelId(f"x{number}"))
            failures += 1

        with anyio.fail_after(8):
            async with anyio.create_task_group() as group:
                if not is_sudden:
                    world.store.set_fault(Fault.SILENT)
                for number in range(10 * Limits().look_ups_in_flight_max):
                    group.start_soon(ask, number)
                await anyio.lowlevel.checkpoint()
                world.store.set_fault(Fault.SILENT)
        assert failures == 10 * Limits().look_ups_in_flight_max

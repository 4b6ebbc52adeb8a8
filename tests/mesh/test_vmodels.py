"""Which model a vmodel stands for, from the mirror or, unknown there, from the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import VModelRecord
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import ModelNotFoundError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.ports import Write
from mm.mesh.vmodels import VModels
from mm.testing.cluster import until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def running(store: MemoryStore) -> AsyncIterator[VModels]:
    vmodels = VModels(store, "/v/", Limits())
    async with anyio.create_task_group() as group:
        await group.start(vmodels.run)
        yield vmodels
        group.cancel_scope.cancel()


def put(store: MemoryStore, value: bytes | None) -> None:
    store.server.transact([Write("/v/vm", value, if_revision=None)])


async def test_the_active_model_is_found_and_changes_are_followed() -> None:
    store = MemoryStore()
    put(store, VModelRecord(ModelId("m1"), ModelId("m2")).encode())
    async with running(store) as vmodels:
        store.set_fault(Fault.REFUSED)
        assert await vmodels.resolve("vm") == "m1", "the store is not asked"
        store.set_fault(None)
        put(store, VModelRecord(ModelId("m2"), ModelId("m2")).encode())
        await until(lambda: vmodels.mirror.revision == store.server.revision)
        assert await vmodels.resolve("vm") == "m2"


async def test_one_that_is_unknown_is_asked_for() -> None:
    store = MemoryStore()
    async with running(store) as vmodels:
        with pytest.raises(ModelNotFoundError, match="vmodel not found"):
            await vmodels.resolve("one that stays unknown")
        put(store, VModelRecord(ModelId("m"), ModelId("m")).encode())
        assert await vmodels.resolve("vm") == "m", "before its event came"
        store.set_fault(Fault.REFUSED)
        with pytest.raises(StoreUnavailableError):
            await vmodels.resolve("other")


@pytest.mark.parametrize("value", [b"{", b"{}", b'{"amid": 3}'])
async def test_an_unreadable_record_is_no_vmodel(
    value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    put(store, value)
    async with running(store) as vmodels:
        with pytest.raises(ModelNotFoundError):
            await vmodels.resolve("vm")
        assert "record /v/vm skipped" in caplog.text

"""Which model a vmodel stands for, from the mirror or, unknown there, from the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import VModelRecord
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import MeshError, ModelNotFoundError, StatusCode, StoreUnavailableError
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
        for _ in range(3):
            with pytest.raises(ModelNotFoundError):
                await vmodels.resolve("vm")
        assert caplog.text.count("record /v/vm skipped") == 1, "not at every call"
        assert vmodels.corrupt_count == 1
        put(store, VModelRecord(ModelId("m"), ModelId("m")).encode())
        await until(lambda: vmodels.corrupt_count == 0)
        assert await vmodels.resolve("vm") == "m"


async def test_a_record_is_not_parsed_at_every_call() -> None:
    store = MemoryStore()
    put(store, VModelRecord(ModelId("m"), ModelId("m")).encode())
    async with running(store) as vmodels:
        assert await vmodels.resolve("vm") == "m"
        assert vmodels.get("vm") is vmodels.get("vm")


# --- when the model that it stood for is missing -------------------------------------------------


def record(active: str, target: str) -> bytes:
    return VModelRecord(ModelId(active), ModelId(target)).encode()


GONE = (ModelId("gone"),)


@pytest.mark.parametrize(
    ("value", "model_id"),
    [
        (record("new", "newest"), "new"),
        (record("gone", "target"), "target"),
        (record("other", "gone"), "other"),
    ],
)
async def test_where_the_model_is_missing_the_store_says_what_it_is_now(
    value: bytes, model_id: str
) -> None:
    store = MemoryStore()
    put(store, record("gone", "gone"))
    async with running(store) as vmodels:
        assert await vmodels.resolve("vm") == "gone"
        put(store, value)
        assert await vmodels.resolve("vm", GONE) == model_id, "before its event came"


async def test_one_that_was_deleted_with_its_model_is_not_found() -> None:
    store = MemoryStore()
    put(store, record("gone", "gone"))
    async with running(store) as vmodels:
        put(store, None)
        with pytest.raises(ModelNotFoundError, match="vmodel not found"):
            await vmodels.resolve("vm", GONE)
        put(store, record("gone", "gone"))
        store.set_fault(Fault.REFUSED)
        with pytest.raises(StoreUnavailableError):
            await vmodels.resolve("vm", GONE)


@pytest.mark.virtual_time
async def test_a_broken_one_is_asked_for_once_a_second_and_can_be_mended() -> None:
    store = MemoryStore()
    put(store, record("old", "gone"))
    text = "^Target model gone of vmodel vm not found$"
    both = (*GONE, ModelId("old"))
    async with running(store) as vmodels:
        with pytest.raises(MeshError, match=text) as caught:
            await vmodels.resolve("vm", both)
        assert caught.value.code == StatusCode.INTERNAL
        store.set_fault(Fault.REFUSED)
        for _ in range(100):
            with pytest.raises(MeshError, match=text):
                await vmodels.resolve("vm", both)
        store.set_fault(None)
        put(store, record("old", "mended"))
        await anyio.sleep(1.1)
        assert await vmodels.resolve("vm", both) == "mended"
        # Another model than the one that was missing a moment ago is asked for at once.
        put(store, record("mended", "mended"))
        with pytest.raises(MeshError, match="Target model mended of"):
            await vmodels.resolve("vm", (ModelId("mended"),))
        put(store, record("next", "next"))
        assert await vmodels.resolve("vm", (ModelId("yet another"),)) == "next"


async def test_what_is_kept_of_broken_ones_is_bounded() -> None:
    store = MemoryStore()
    async with running(store) as vmodels:
        for number in range(1100):
            vmodel_id = f"v{number}"
            store.server.transact(
                [Write(f"/v/{vmodel_id}", record("gone", "gone"), if_revision=None)]
            )
            with pytest.raises(MeshError, match=f"of vmodel {vmodel_id} not"):
                await vmodels.resolve(vmodel_id, GONE)
        assert len(vmodels._broken) == Limits().look_ups_per_s_max

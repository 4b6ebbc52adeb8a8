"""Reading tables in pages at one revision, against a real etcd."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aetcd.rpc
import pytest

from mm.edge import etcd_store
from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import EtcdTarget
from mm.mesh.ports import Write

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]


@pytest.fixture
async def store(shared_etcd: EtcdProcess) -> AsyncIterator[EtcdStore]:
    target = EtcdTarget((shared_etcd.endpoint,), root_prefix=uuid.uuid4().hex)
    async with EtcdStore(target, timeout_s=10) as store:
        yield store


async def _fill(store: EtcdStore, count: int, value: bytes) -> None:
    for start in range(0, count, 64):
        keys = range(start, min(start + 64, count))
        await store.transact([Write(f"/t/{i:06}", value, 0) for i in keys])


def _between_pages(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch, step: Callable[[int], Awaitable[None]]
) -> list[int]:
    """Have ``step`` run after each page; answers the list of pages' sizes, filled as they come."""
    call = store._connector.call
    sizes: list[int] = []

    async def and_then(method: Any, request: Any, **options: Any) -> Any:
        answer = await call(method, request, **options)
        if isinstance(request, aetcd.rpc.RangeRequest):
            sizes.append(len(answer[0].kvs))
            await step(len(sizes))
        return answer

    monkeypatch.setattr(store._connector, "call", and_then)
    return sizes


async def _nothing(page: int) -> None:
    pass


async def test_twenty_thousand_records(store: EtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    value = b"v" * 300
    await _fill(store, 20_000, value)
    sizes = _between_pages(store, monkeypatch, _nothing)

    table = await store.list("/t/")

    assert [item.key for item in table.items] == [f"/t/{i:06}" for i in range(20_000)]
    assert all(item.value == value for item in table.items)
    assert table.revision >= max(item.mod_revision for item in table.items)
    assert len(sizes) > 3
    assert max(sizes) * 300 <= etcd_store.PAGE_BYTES


async def test_pages_beyond_grpcs_default_limit(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_store, "PAGE_ITEMS_FIRST", 100)
    for i in range(20):
        await store.write(Write(f"/t/{i:02}", b"x" * 500_000, 0))
    sizes = _between_pages(store, monkeypatch, _nothing)
    assert len((await store.list("/t/")).items) == 20
    assert sizes == [20]


async def test_all_pages_are_of_one_revision(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_store, "PAGE_ITEMS_FIRST", 10)
    monkeypatch.setattr(etcd_store, "PAGE_ITEMS_MAX", 10)
    await _fill(store, 40, b"old")

    async def change_everything(page: int) -> None:
        if page == 2:
            await store.transact([Write(f"/t/{i:06}", b"new", None) for i in range(30)])
            await store.transact([Write(f"/t/{i:06}", None, None) for i in range(30, 40)])

    sizes = _between_pages(store, monkeypatch, change_everything)
    before = await store.list("/t/")
    after = await store.list("/t/")

    assert sizes == [10] * 7
    assert [item.value for item in before.items] == [b"old"] * 40
    assert [item.value for item in after.items] == [b"new"] * 30
    assert before.revision < after.revision


async def test_compaction_between_pages_begins_again(
    store: EtcdStore, shared_etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_store, "PAGE_ITEMS_FIRST", 10)
    await _fill(store, 20, b"old")

    async def compact(page: int) -> None:
        if page == 1:
            result = await store.write(Write("/t/000019", b"new", None))
            assert result.item is not None
            channel = aetcd.rpc.insecure_channel(str(shared_etcd.endpoint))
            request = aetcd.rpc.CompactionRequest(revision=result.item.mod_revision, physical=True)
            await aetcd.rpc.KVStub(channel).Compact(request)
            await channel.close()

    sizes = _between_pages(store, monkeypatch, compact)
    table = await store.list("/t/")

    assert sizes == [10, 10, 10]
    assert len(table.items) == 20
    assert table.items[-1].value == b"new"

"""What only the memory store does: faults on command, in virtual time. The rest is the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import anyio
import pytest

from mm.edge.memory_server import PENDING_EVENTS_MAX, MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Delete, Item, Put, Resync, WatchEvent, Write

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def _put(store: MemoryStore, key: str, value: bytes = b"1", lease_id: int = 0) -> Item:
    result = await store.write(Write(key, value, None, lease_id))
    assert result.succeeded
    assert result.item is not None
    return result.item


async def _next(batches: AsyncIterator[Sequence[WatchEvent]]) -> Sequence[WatchEvent]:
    with anyio.fail_after(1000):
        return await anext(batches)


@pytest.mark.parametrize(("fault", "after_s"), [(Fault.REFUSED, 0), (Fault.SILENT, 3.5)])
async def test_faults_fail_every_call_in_their_time(fault: Fault, after_s: float) -> None:
    store = MemoryStore()
    store.set_fault(fault)
    assert not store.connected
    calls = [
        store.check,
        lambda: store.get("/a"),
        lambda: store.list("/"),
        lambda: store.write(Write("/a", b"", None)),
        lambda: store.transact([Write("/a", b"", None)]),
        lambda: store.session(10).__aenter__(),
    ]
    for call in calls:
        start_s = anyio.current_time()
        with pytest.raises(StoreUnavailableError):
            await call()
        assert anyio.current_time() - start_s == after_s

    store.set_fault(None)
    assert store.connected
    assert (await store.list("/")).items == []


async def test_a_lost_reply_has_its_effect() -> None:
    store = MemoryStore()
    store.set_fault(Fault.REPLIES_LOST)
    with pytest.raises(StoreUnavailableError):
        await store.write(Write("/a", b"1", 0))
    store.set_fault(None)
    item = await store.get("/a")
    assert item is not None
    assert item.value == b"1"


async def test_a_fault_that_comes_during_a_call_fails_it() -> None:
    store = MemoryStore(call_delay_s=1.0)
    failed = []

    async def write() -> None:
        with pytest.raises(StoreUnavailableError):
            await store.write(Write("/a", b"1", 0))
        failed.append(anyio.current_time())

    async with anyio.create_task_group() as tg:
        start_s = anyio.current_time()
        tg.start_soon(write)
        await anyio.sleep(0.25)
        store.set_fault(Fault.SILENT)
    assert failed == [start_s + 0.5 + 3.5]
    assert store.server.get("/a") is None


async def test_a_watch_is_silent_during_a_fault_and_catches_up() -> None:
    server = MemoryServer()
    store, other = MemoryStore(server), MemoryStore(server)
    async with store.watch("/t/") as batches:
        assert await _next(batches) == [Resync([], 1)]
        store.set_fault(Fault.SILENT)
        first = await _put(other, "/t/a", b"1")
        second = await _put(other, "/t/a", b"2")
        await other.write(Write("/t/a", None, None))
        with anyio.move_on_after(3600) as scope:
            await anext(batches)
        assert scope.cancelled_caught

        store.set_fault(None)
        assert await _next(batches) == [
            Put(first),
            Put(second),
            Delete("/t/a", second.mod_revision + 1),
        ]


async def test_a_watch_catches_up_by_resync_after_compaction_or_too_many_events() -> None:
    server = MemoryServer()
    store, other = MemoryStore(server), MemoryStore(server)
    async with store.watch("/t/") as batches:
        await _next(batches)
        store.set_fault(Fault.REFUSED)
        await _put(other, "/t/a")
        server.forget_history()
        item = await _put(other, "/t/b")
        store.set_fault(None)
        [resync] = await _next(batches)
        assert isinstance(resync, Resync)
        assert [i.key for i in resync.items] == ["/t/a", "/t/b"]
        assert resync.revision == item.mod_revision

        for _ in range(PENDING_EVENTS_MAX + 1):
            server.transact([Write("/t/c", b"", None)])
        [resync] = await _next(batches)
        assert isinstance(resync, Resync)


async def test_a_silent_holder_loses_its_lease_after_the_ttl_and_others_see_it() -> None:
    server = MemoryServer()
    store, other = MemoryStore(server), MemoryStore(server)
    async with store.session(20) as session:
        first = session.lease_id
        await _put(store, "/i/a", lease_id=first)
        async with other.watch("/i/") as batches:
            await _next(batches)
            await anyio.sleep(3600)  # in contact: the lease holds
            assert server.is_alive(first)

            start_s = anyio.current_time()
            store.set_fault(Fault.SILENT)
            [event] = await _next(batches)
            assert isinstance(event, Delete)
            assert event.key == "/i/a"
            assert anyio.current_time() == start_s + 20

        store.set_fault(None)
        assert await session.wait_change(first) == session.lease_id != first
        assert server.is_alive(session.lease_id)
        with pytest.raises(StoreUnavailableError, match="lease"):
            await _put(store, "/i/a", lease_id=first)


async def test_a_short_silence_keeps_the_lease() -> None:
    store = MemoryStore()
    async with store.session(20) as session:
        first = session.lease_id
        store.set_fault(Fault.REFUSED)
        await anyio.sleep(19)
        store.set_fault(None)
        await anyio.sleep(100)
        assert session.lease_id == first
        assert store.server.is_alive(first)


async def test_a_crash_leaves_the_lease_to_run_out_and_a_stop_revokes_it() -> None:
    server = MemoryServer()
    crashing, stopping, reader = MemoryStore(server), MemoryStore(server), MemoryStore(server)
    async with crashing.session(20) as session:
        await _put(crashing, "/i/crashing", lease_id=session.lease_id)
        crashing.set_fault(Fault.REFUSED)
    crashing.set_fault(None)  # the same client, a new life: the old lease is nobody's
    async with stopping.session(20) as session:
        await _put(stopping, "/i/stopping", lease_id=session.lease_id)

    assert [i.key for i in (await reader.list("/i/")).items] == ["/i/crashing"]
    await anyio.sleep(20)
    assert (await reader.list("/i/")).items == []


async def test_delays_are_spent() -> None:
    store = MemoryStore(call_delay_s=2, watch_delay_s=5)
    start_s = anyio.current_time()
    await store.get("/a")
    assert anyio.current_time() == start_s + 2
    async with store.watch("/") as batches:
        await _next(batches)
    assert anyio.current_time() == start_s + 7

"""One contract for every store that turns out to be another one: emptied, and as far or not.

What is not there must never look as if it had been deleted. Each kind of store in turn, the real
etcd with its data directory removed; then what only etcd has: backups that are restored.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio
import anyio.lowlevel
import pytest

from mm.edge.embedded_etcd import EmbeddedEtcd, embedded_etcd
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Delete, Item, Put, Resync, Store
from mm.testing.losing_proxy import losing_proxy
from mm.testing.simulated_store import SimulatedStore
from tests.edge.store_world import MEMORY_TIMEOUT_S, PATIENCE_S, Batches, next_batch, put, until

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Replaceable:
    """A store with two clients, the second one with no watch, and a way to have it emptied."""

    store: Store
    other: Store
    #: Stop the store, empty it, have ``other`` write so many transactions, let ``store`` back.
    replace: Callable[[int], Awaitable[None]]


def memory(store: MemoryStore) -> Replaceable:
    other = MemoryStore(store.server)

    async def replace(writes_count: int) -> None:
        store.set_fault(Fault.REFUSED)
        store.server.wipe()
        for number in range(writes_count):
            await put(other, f"/other/{number}")
        store.set_fault(None)

    return Replaceable(store, other, replace)


async def etcd_replaceable(etcd: EmbeddedEtcd, stack: AsyncExitStack) -> Replaceable:
    endpoint = etcd.endpoint
    proxy = await stack.enter_async_context(losing_proxy(endpoint.host, endpoint.port))
    target = EtcdTarget((Endpoint(proxy.host, proxy.port),))
    store = await stack.enter_async_context(EtcdStore(target, timeout_s=2.0, silence_s=1.2))
    other = await stack.enter_async_context(EtcdStore(etcd.target))

    async def replace(writes_count: int) -> None:
        proxy.lose()
        await etcd.stop()
        await etcd.wipe()
        await etcd.start()
        for number in range(writes_count):
            await put(other, f"/other/{number}")
        await proxy.restore()

    return Replaceable(store, other, replace)


@pytest.fixture(params=["memory", "simulated", pytest.param("etcd", marks=pytest.mark.etcd)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[Replaceable]:
    """Each kind of store in turn."""
    match request.param:
        case "memory":
            yield memory(MemoryStore(timeout_s=MEMORY_TIMEOUT_S))
        case "simulated":
            rng = random.Random(1)
            store = SimulatedStore(
                MemoryServer(), rng, lambda key, text: None, timeout_s=MEMORY_TIMEOUT_S
            )
            store.way_s_max = store.late_s_max = 0.01
            yield memory(store)
        case _:
            async with embedded_etcd() as etcd, AsyncExitStack() as stack:
                yield await etcd_replaceable(etcd, stack)


async def table_of_other_store(batches: Batches) -> Resync:
    """Answer the first table that is said to be another store's; nothing is deleted before."""
    with anyio.fail_after(PATIENCE_S):
        async for batch in batches:
            for event in batch:
                assert not isinstance(event, Delete)
                if isinstance(event, Resync) and event.is_of_other_store:
                    return event
    raise AssertionError("the watch ended")


async def answer(store: Store, key: str) -> Item | None:
    """Read as soon as the store lets us."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            try:
                return await store.get(key)
            except StoreUnavailableError:
                await anyio.lowlevel.checkpoint()


async def test_a_watch_tells_that_the_table_is_another_stores(world: Replaceable) -> None:
    async with world.store.watch("/t/") as batches:
        await next_batch(batches)
        last = [await put(world.store, f"/t/{number}") for number in range(20)][-1]
        await until(batches, Put(last))

        await world.replace(1)

        table = await table_of_other_store(batches)
        assert list(table.items) == []
        assert table.revision < last.mod_revision
        new = await put(world.store, "/t/new")
        assert await until(batches, Put(new)) == [Put(new)]
        assert await answer(world.store, "/t/1") is None


async def test_a_store_that_came_further_meanwhile_is_another_one_too(world: Replaceable) -> None:
    async with world.store.watch("/t/") as batches, world.store.watch("/empty/") as empty:
        await next_batch(batches)
        await next_batch(empty)
        last = await put(world.store, "/t/a")
        await until(batches, Put(last))

        await world.replace(last.mod_revision + 20)

        table = await table_of_other_store(batches)
        assert list(table.items) == []
        assert table.revision > last.mod_revision
        assert (await table_of_other_store(empty)).items == []


@pytest.mark.parametrize("writes_count", [1, 50])
async def test_nothing_is_answered_before_the_tables_are_read_anew(
    world: Replaceable, writes_count: int
) -> None:
    """Else "there is none" would be a deletion to whoever asks; also by one that came further."""
    async with world.store.watch("/t/") as batches:
        await next_batch(batches)
        last = [await put(world.store, f"/t/{number}") for number in range(20)][-1]
        await until(batches, Put(last))
        told = anyio.Event()

        async def ask() -> None:
            with anyio.fail_after(PATIENCE_S):
                while not told.is_set():
                    try:
                        item = await world.store.get("/t/1")
                    except StoreUnavailableError:
                        await anyio.lowlevel.checkpoint()
                    else:
                        assert item is not None or told.is_set()

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await world.replace(writes_count)
            await table_of_other_store(batches)
            told.set()


async def test_another_store_knows_no_lease(world: Replaceable) -> None:
    async with world.store.session(60) as session, world.store.watch("/t/") as batches:
        lease_id = session.lease_id
        await next_batch(batches)
        last = await put(world.store, "/t/me", lease_id=lease_id)
        await until(batches, Put(last))

        await world.replace(1)

        with anyio.fail_after(PATIENCE_S):
            new_id = await session.wait_change(lease_id)
            assert new_id not in (0, lease_id)
        await table_of_other_store(batches)
        again = await put(world.store, "/t/me", lease_id=new_id)
        assert await answer(world.other, "/t/me") == again

"""One contract for every store: what the mesh may rely on (spec core 1.4, design section 6).

Runs against the memory store and against a real etcd behind a proxy that loses connectivity.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aetcd.rpc
import anyio
import anyio.lowlevel
import pytest

from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Delete, Item, Put, Resync, Store, WatchEvent, Write
from mm.testing.losing_proxy import losing_proxy

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class World:
    """A store, another client of the same data, and control over the first one's connection."""

    store: Store
    other: Store
    timeout_s: float
    lose: Callable[[], None]
    restore: Callable[[], Awaitable[None]]
    revoke: Callable[[int], Awaitable[None]]


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
def etcd(request: pytest.FixtureRequest) -> EtcdProcess | None:
    return request.getfixturevalue("shared_etcd") if request.param == "etcd" else None


@pytest.fixture
async def world(etcd: EtcdProcess | None) -> AsyncIterator[World]:
    if etcd is None:
        yield _memory_world()
        return
    root_prefix = uuid.uuid4().hex
    direct = EtcdTarget((etcd.endpoint,), root_prefix=root_prefix)

    async def revoke(lease_id: int) -> None:
        channel = aetcd.rpc.insecure_channel(str(etcd.endpoint))
        await aetcd.rpc.LeaseStub(channel).LeaseRevoke(aetcd.rpc.LeaseRevokeRequest(ID=lease_id))
        await channel.close()

    async with AsyncExitStack() as stack:
        endpoint = etcd.endpoint
        proxy = await stack.enter_async_context(losing_proxy(endpoint.host, endpoint.port))
        target = EtcdTarget((Endpoint(proxy.host, proxy.port),), root_prefix=root_prefix)
        timeout_s = 0.8
        store = await stack.enter_async_context(
            EtcdStore(target, timeout_s=timeout_s, silence_s=0.6)
        )
        other = await stack.enter_async_context(EtcdStore(direct))
        yield World(store, other, timeout_s, proxy.lose, proxy.restore, revoke)


def _memory_world() -> World:
    store = MemoryStore(timeout_s=0.1)

    async def restore() -> None:
        store.set_fault(None)

    async def revoke(lease_id: int) -> None:
        store.revoke_lease(lease_id)

    def lose() -> None:
        store.set_fault(Fault.SILENT)

    return World(store, MemoryStore(store.server), 0.1, lose, restore, revoke)


async def _put(store: Store, key: str, value: bytes = b"1", lease_id: int = 0) -> Item:
    result = await store.write(Write(key, value, None, lease_id))
    assert result.succeeded
    assert result.item is not None
    return result.item


async def _next(batches: AsyncIterator[Sequence[WatchEvent]]) -> Sequence[WatchEvent]:
    with anyio.fail_after(5):
        batch = await anext(batches)
    assert batch
    return batch


async def _until(
    batches: AsyncIterator[Sequence[WatchEvent]], last: WatchEvent
) -> list[WatchEvent]:
    events: list[WatchEvent] = []
    while last not in events:
        events += await _next(batches)
    return events


# --- reading and writing ---


async def test_a_key_lives_from_create_to_delete(world: World) -> None:
    store = world.store
    assert await store.get("/t/a") is None

    created = await store.write(Write("/t/a", b"one", if_revision=0))
    assert created.succeeded
    assert created.item is not None
    assert created.item == Item(
        "/t/a", b"one", created.item.mod_revision, created.item.mod_revision
    )
    assert await store.get("/t/a") == created.item

    refused = await store.write(Write("/t/a", b"again", if_revision=0))
    assert not refused.succeeded
    assert refused.item == created.item

    updated = await store.write(Write("/t/a", b"two", if_revision=created.item.mod_revision))
    assert updated.succeeded
    assert updated.item is not None
    assert updated.item.mod_revision > created.item.mod_revision
    assert updated.item.create_revision == created.item.create_revision
    assert await world.other.get("/t/a") == updated.item

    stale = await store.write(Write("/t/a", b"x", if_revision=created.item.mod_revision))
    assert not stale.succeeded
    assert stale.item == updated.item

    forced = await _put(store, "/t/a", b"three")
    assert forced.create_revision == created.item.create_revision
    assert await store.get("/t/a") == forced

    stale_delete = await store.write(Write("/t/a", None, if_revision=created.item.mod_revision))
    assert not stale_delete.succeeded
    assert stale_delete.item == forced

    deleted = await store.write(Write("/t/a", None, if_revision=forced.mod_revision))
    assert deleted.succeeded
    assert deleted.item is None
    assert await store.get("/t/a") is None


async def test_writes_to_a_key_that_is_not_there(world: World) -> None:
    store = world.store
    for condition in (None, 0):
        gone = await store.write(Write("/t/a", None, if_revision=condition))
        assert gone.succeeded
        assert gone.item is None
    for value in (None, b"x"):
        refused = await store.write(Write("/t/a", value, if_revision=7))
        assert not refused.succeeded
        assert refused.item is None


async def test_keys_and_values_are_taken_as_they_are(world: World) -> None:
    keys = ["/t/plain", "/t/with/slash", "/t/", "/t/ünï", "/t/raw\udcff", "/t/" + "k" * 500]
    values = [b"", b"\x00\xff", b'{"a":1}', b"x" * 100_000, b"e", b"f"]
    for key, value in zip(keys, values, strict=True):
        item = await _put(world.store, key, value)
        assert await world.other.get(key) == item
        assert item.value == value
    table = await world.store.list("/t/")
    assert {item.key: item.value for item in table.items} == dict(zip(keys, values, strict=True))


async def test_a_table_is_what_is_below_its_prefix(world: World) -> None:
    empty = await world.store.list("/t/")
    assert empty.items == []
    inside = [await _put(world.store, key) for key in ("/t/b", "/t/a", "/t/a/c")]
    for key in ("/t", "/t0", "/s/z"):
        await _put(world.store, key)

    table = await world.store.list("/t/")

    assert list(table.items) == sorted(inside, key=lambda item: item.key)
    assert table.revision >= max(item.mod_revision for item in inside) > empty.revision


async def test_transactions_are_all_or_nothing(world: World) -> None:
    store = world.store
    first = await _put(store, "/t/first", b"1")
    second = await _put(store, "/t/second", b"1")
    writes = [
        Write("/t/second", None, second.mod_revision),
        Write("/t/first", b"2", first.mod_revision),
        Write("/t/third", b"3", 0),
    ]

    refused, items = await store.transact([*writes, Write("/t/fourth", b"", 99)])
    assert not refused
    assert items == [second, first, None, None]

    succeeded, items = await store.transact(writes)
    assert succeeded
    [gone, changed, created] = items
    assert gone is None
    assert changed is not None
    assert created is not None
    assert changed.mod_revision == created.mod_revision == created.create_revision
    assert changed.create_revision == first.create_revision
    assert list((await store.list("/t/")).items) == [changed, created]

    again, items = await store.transact(writes)
    assert not again
    assert items == [None, changed, created]


async def test_a_transaction_may_not_name_a_key_twice(world: World) -> None:
    with pytest.raises(ValueError, match="twice"):
        await world.store.transact([Write("/t/a", b"1", None), Write("/t/a", b"2", None)])


async def test_concurrent_writes_each_get_their_own_result(world: World) -> None:
    taken = {f"/t/{i:03}": await _put(world.store, f"/t/{i:03}", b"old") for i in range(0, 200, 3)}
    results = {}

    async def create(key: str) -> None:
        results[key] = await world.store.write(Write(key, key.encode(), 0))

    async with anyio.create_task_group() as tg:
        for i in range(200):
            tg.start_soon(create, f"/t/{i:03}")

    stored = {item.key: item for item in (await world.store.list("/t/")).items}
    assert len(stored) == len(results) == 200
    for key, result in results.items():
        assert result.succeeded == (key not in taken)
        assert result.item == stored[key]
        assert stored[key].value == (b"old" if key in taken else key.encode())


async def test_one_of_many_creators_wins_and_the_others_see_it(world: World) -> None:
    results = []

    async def create(name: bytes) -> None:
        results.append((name, await world.store.write(Write("/t/a", name, 0))))

    async with anyio.create_task_group() as tg:
        for i in range(64):
            tg.start_soon(create, b"%d" % i)

    [winner] = [name for name, result in results if result.succeeded]
    stored = await world.store.get("/t/a")
    assert stored is not None
    assert stored.value == winner
    assert all(result.item == stored for _, result in results)


async def test_concurrent_compare_and_set_loses_no_update(world: World) -> None:
    async def increment() -> None:
        item = None
        for _ in range(100):
            value = int(item.value) + 1 if item else 1
            revision = item.mod_revision if item else 0
            result = await world.store.write(Write("/t/n", b"%d" % value, revision))
            if result.succeeded:
                return
            item = result.item
        raise AssertionError("never succeeded")

    async with anyio.create_task_group() as tg:
        for _ in range(20):
            tg.start_soon(increment)
    stored = await world.store.get("/t/n")
    assert stored is not None
    assert stored.value == b"20"


# --- watching ---


async def test_a_watch_begins_with_the_table_and_goes_on_with_changes(world: World) -> None:
    there = await _put(world.store, "/t/a", b"1")
    async with world.store.watch("/t/") as batches:
        [resync] = await _next(batches)
        assert isinstance(resync, Resync)
        assert list(resync.items) == [there]
        assert resync.revision >= there.mod_revision

        changed = await _put(world.other, "/t/a", b"2")
        await _put(world.other, "/other/a")
        created = await _put(world.store, "/t/b", b"3")
        await world.store.write(Write("/t/a", None, None))
        last = await _put(world.store, "/t/last")

        events = await _until(batches, Put(last))
    deleted_at = last.mod_revision - 1
    assert events == [Put(changed), Put(created), Delete("/t/a", deleted_at), Put(last)]


async def test_a_new_watch_gets_nothing_of_an_ended_one(world: World) -> None:
    async with world.store.watch("/t/") as batches:
        await _next(batches)
        await _put(world.store, "/t/a")
    async with world.store.watch("/s/") as batches:
        assert [event.items for event in await _next(batches) if isinstance(event, Resync)] == [[]]
        item = await _put(world.store, "/s/a")
        assert await _next(batches) == [Put(item)]


async def test_watches_of_one_table_are_independent(world: World) -> None:
    async with world.store.watch("/t/") as first:
        await _next(first)
        one = await _put(world.store, "/t/a", b"1")
        async with world.store.watch("/t/") as second:
            [resync] = await _next(second)
            assert isinstance(resync, Resync)
            assert list(resync.items) == [one]
            two = await _put(world.store, "/t/a", b"2")
            assert await _next(second) == [Put(two)]
        assert await _until(first, Put(two)) == [Put(one), Put(two)]


async def test_a_watch_survives_an_outage(world: World) -> None:
    async with world.store.watch("/t/") as batches:
        await _next(batches)
        first = await _put(world.other, "/t/a", b"1")
        seen = await _until(batches, Put(first))

        world.lose()
        await _put(world.other, "/t/b", b"2")
        third = await _put(world.other, "/t/a", b"3")
        await world.other.write(Write("/t/b", None, None))
        await _assert_lost(world.store)
        await world.restore()
        last = await _put(world.other, "/t/last")

        seen += await _until(batches, Put(last))
    puts = [event for event in seen if isinstance(event, Put)]
    assert len({(put.item.key, put.item.mod_revision) for put in puts}) == len(puts)
    assert _fold(seen) == {"/t/a": third, "/t/last": last}


def _fold(events: Sequence[WatchEvent]) -> dict[str, Item]:
    table: dict[str, Item] = {}
    for event in events:
        if isinstance(event, Resync):
            table = {item.key: item for item in event.items}
        elif isinstance(event, Put):
            table[event.item.key] = event.item
        else:
            table.pop(event.key, None)
    return table


async def _assert_lost(store: Store) -> None:
    """Return when the store says that it is not connected; calls fail until then, and after."""
    with anyio.fail_after(10):
        while store.connected:
            with pytest.raises(StoreUnavailableError):
                await store.get("/t/a")


# --- faults ---


async def test_calls_fail_in_time_while_the_store_is_away_and_work_afterwards(world: World) -> None:
    store = world.store
    await store.check()
    assert store.connected
    world.lose()
    calls: list[Callable[[], Awaitable[object]]] = [
        store.check,
        lambda: store.get("/t/a"),
        lambda: store.list("/t/"),
        lambda: store.write(Write("/t/a", b"", None)),
        lambda: store.transact([Write("/t/a", b"", None)]),
        lambda: store.session(10).__aenter__(),
    ]
    for call in calls:
        start_s = anyio.current_time()
        with pytest.raises(StoreUnavailableError) as caught:
            await call()
        assert anyio.current_time() - start_s < world.timeout_s + 0.6
        assert str(caught.value)
    assert not store.connected

    await world.restore()
    with anyio.fail_after(5):
        while not store.connected:
            try:
                await store.check()
            except StoreUnavailableError:
                await anyio.sleep(0.01)
    await _put(store, "/t/a", b"back")


# --- sessions ---


async def test_a_session_holds_a_lease_and_gives_it_back(world: World) -> None:
    async with world.store.session(10) as session:
        assert session.lease_id != 0
        assert await session.wait_change(0) == session.lease_id
        item = await _put(world.store, "/i/a", lease_id=session.lease_id)
        assert item.lease_id == session.lease_id
        assert await world.other.get("/i/a") == item
        with anyio.move_on_after(0.05) as scope:
            await session.wait_change(session.lease_id)
        assert scope.cancelled_caught
    assert await world.other.get("/i/a") is None


async def test_a_plain_put_takes_a_key_off_its_lease(world: World) -> None:
    async with world.store.session(10) as session:
        await _put(world.store, "/i/a", lease_id=session.lease_id)
        item = await _put(world.store, "/i/a", lease_id=0)
    assert await world.other.get("/i/a") == item


async def test_a_lost_lease_is_replaced(world: World) -> None:
    async with world.store.session(1) as session:
        first = session.lease_id
        await _put(world.store, "/i/a", lease_id=first)
        await world.revoke(first)
        assert await world.other.get("/i/a") is None

        with pytest.raises(StoreUnavailableError, match="lease"):
            await _put(world.store, "/i/a", lease_id=first)
        with anyio.fail_after(5):
            second = await session.wait_change(first)
        assert second == session.lease_id
        assert second not in (0, first)
        await _put(world.store, "/i/a", lease_id=second)
    assert await world.other.get("/i/a") is None


async def test_the_keys_of_a_silent_holder_vanish_and_it_gets_another_lease(world: World) -> None:
    async with world.store.session(1) as session, world.other.watch("/i/") as batches:
        await _next(batches)
        first = session.lease_id
        item = await _put(world.store, "/i/a", lease_id=first)
        assert await _next(batches) == [Put(item)]
        world.lose()
        [event] = await _next(batches)
        assert isinstance(event, Delete)
        assert event.key == "/i/a"

        await world.restore()
        with anyio.fail_after(5):
            second = await session.wait_change(first)
        assert second not in (0, first)
        await _put(world.store, "/i/a", lease_id=second)


# --- cancellation ---


async def _watch_a_little(store: Store) -> None:
    async with store.watch("/t/") as batches:
        await anext(batches)
        await anext(batches)


async def _hold_a_session(store: Store) -> None:
    async with store.session(10) as session:
        await session.wait_change(session.lease_id)


async def test_cancelling_any_call_is_seen_by_its_own_scope_only(world: World) -> None:
    """Goal: a cancel leaves nothing behind. Method: cancel each method at 0 to 2 ms, in all 200."""
    store = world.store
    calls: list[Callable[[], Awaitable[object]]] = [
        store.check,
        lambda: store.get("/t/a"),
        lambda: store.list("/t/"),
        lambda: store.write(Write("/t/a", b"x", None)),
        lambda: store.transact([Write("/t/a", b"x", None), Write("/t/b", b"x", None)]),
        lambda: _watch_a_little(store),
        lambda: _hold_a_session(store),
    ]
    went_on = []

    async def cancel_in_time(number: int) -> None:
        done = False
        with anyio.CancelScope() as outer:
            with anyio.move_on_after(number % 9 * 0.00025) as scope:
                await calls[number % len(calls)]()
                done = True
            assert done != scope.cancelled_caught
            await anyio.lowlevel.checkpoint()  # a cancellation that was not the scope's comes up
        assert not outer.cancelled_caught
        went_on.append(number)

    for number in range(100):
        await cancel_in_time(number)
    async with anyio.create_task_group() as tg:
        for number in range(100, 200):
            tg.start_soon(cancel_in_time, number)
    assert sorted(went_on) == list(range(200))

    item = await _put(store, "/t/a", b"still works")
    async with store.watch("/t/") as batches, store.session(10):
        [resync] = await _next(batches)
        assert isinstance(resync, Resync)
        assert item in resync.items

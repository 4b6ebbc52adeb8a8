"""One contract for every store: reading, writing, watching (spec core 1.4, design section 6).

What the mesh may rely on. Runs against the memory store and against a real etcd behind a proxy that
loses connectivity. Outages, sessions and cancellation are in ``test_store_faults``.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from mm.errors import StoreUnavailableError
from mm.mesh.ports import REVISIONS_MAX, Check, Delete, Item, Put, Resync, Store, WatchEvent, Write
from tests.edge.store_world import World, next_batch, put, until

pytestmark = pytest.mark.anyio


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

    forced = await put(store, "/t/a", b"three")
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
        item = await put(world.store, key, value)
        assert await world.other.get(key) == item
        assert item.value == value
    table = await world.store.list("/t/")
    assert {item.key: item.value for item in table.items} == dict(zip(keys, values, strict=True))


async def test_a_table_is_what_is_below_its_prefix(world: World) -> None:
    empty = await world.store.list("/t/")
    assert empty.items == []
    inside = [await put(world.store, key) for key in ("/t/b", "/t/a", "/t/a/c")]
    for key in ("/t", "/t0", "/s/z"):
        await put(world.store, key)

    table = await world.store.list("/t/")

    assert list(table.items) == sorted(inside, key=lambda item: item.key)
    assert table.revision >= max(item.mod_revision for item in inside) > empty.revision


async def test_revisions_of_many_keys(world: World) -> None:
    first, second = await put(world.other, "/t/first"), await put(world.other, "/t/ünï")
    second = await put(world.other, second.key, b"again")
    keys = [second.key, "/t/none", first.key, "/t/first/below", first.key]
    expected = [second.mod_revision, 0, first.mod_revision, 0, first.mod_revision]
    assert await world.store.revisions(keys) == expected
    assert await world.store.revisions([]) == []
    many = [f"/t/{number}" for number in range(REVISIONS_MAX)]
    assert await world.store.revisions(many) == [0] * REVISIONS_MAX
    with pytest.raises(ValueError, match="129 keys at once; at most 128"):
        await world.store.revisions([*many, "/t/more"])
    assert (await world.store.list("/t/")).revision == second.mod_revision, "nothing is written"
    world.lose()
    with pytest.raises(StoreUnavailableError):
        await world.store.revisions(keys)


async def test_transactions_are_all_or_nothing(world: World) -> None:
    store = world.store
    first = await put(store, "/t/first", b"1")
    second = await put(store, "/t/second", b"1")
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


async def test_transactions_may_depend_on_what_they_do_not_write(world: World) -> None:
    store = world.store
    first = await put(store, "/t/first", b"1")
    checks = [Check("/t/first", first.mod_revision), Check("/t/none", 0)]
    succeeded, items = await store.transact([checks[0], Write("/t/new", b"1", 0), checks[1]])
    assert succeeded
    [seen, new, none] = items
    assert (seen, none) == (first, None)
    assert new is not None
    assert list((await store.list("/t/")).items) == [first, new]

    changed = await put(world.other, "/t/first", b"2")
    gone = [Write("/t/new", None, new.mod_revision)]
    for check, stored in ((checks[0], changed), (Check("/t/new2", 5), None)):
        assert await store.transact([*gone, check]) == (False, [new, stored])
    assert list((await store.list("/t/")).items) == [changed, new]
    assert await store.transact(checks[1:]) == (True, [None])


async def test_a_transaction_may_not_name_a_key_twice(world: World) -> None:
    with pytest.raises(ValueError, match="twice"):
        await world.store.transact([Write("/t/a", b"1", None), Write("/t/a", b"2", None)])


async def test_concurrent_writes_each_get_their_own_result(world: World) -> None:
    taken = {f"/t/{i:03}": await put(world.store, f"/t/{i:03}", b"old") for i in range(0, 200, 3)}
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
    there = await put(world.store, "/t/a", b"1")
    async with world.store.watch("/t/") as batches:
        [resync] = await next_batch(batches)
        assert isinstance(resync, Resync)
        assert list(resync.items) == [there]
        assert resync.revision >= there.mod_revision

        changed = await put(world.other, "/t/a", b"2")
        await put(world.other, "/other/a")
        created = await put(world.store, "/t/b", b"3")
        await world.store.write(Write("/t/a", None, None))
        last = await put(world.store, "/t/last")

        events = await until(batches, Put(last))
    deleted_at = last.mod_revision - 1
    assert events == [Put(changed), Put(created), Delete("/t/a", deleted_at), Put(last)]


async def test_a_new_watch_gets_nothing_of_an_ended_one(world: World) -> None:
    async with world.store.watch("/t/") as batches:
        await next_batch(batches)
        await put(world.store, "/t/a")
    async with world.store.watch("/s/") as batches:
        assert [
            event.items for event in await next_batch(batches) if isinstance(event, Resync)
        ] == [[]]
        item = await put(world.store, "/s/a")
        assert await next_batch(batches) == [Put(item)]


async def test_watches_of_one_table_are_independent(world: World) -> None:
    async with world.store.watch("/t/") as first:
        await next_batch(first)
        one = await put(world.store, "/t/a", b"1")
        async with world.store.watch("/t/") as second:
            [resync] = await next_batch(second)
            assert isinstance(resync, Resync)
            assert list(resync.items) == [one]
            two = await put(world.store, "/t/a", b"2")
            assert await next_batch(second) == [Put(two)]
        assert await until(first, Put(two)) == [Put(one), Put(two)]


async def test_a_watch_survives_an_outage(world: World) -> None:
    async with world.store.watch("/t/") as batches:
        await next_batch(batches)
        first = await put(world.other, "/t/a", b"1")
        seen = await until(batches, Put(first))

        world.lose()
        await put(world.other, "/t/b", b"2")
        third = await put(world.other, "/t/a", b"3")
        await world.other.write(Write("/t/b", None, None))
        await _assert_lost(world.store)
        await world.restore()
        last = await put(world.other, "/t/last")

        seen += await until(batches, Put(last))
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
    with anyio.fail_after(60):
        while store.connected:
            with pytest.raises(StoreUnavailableError):
                await store.get("/t/a")

"""One contract for every store: outages, sessions, cancellation (design section 6)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.lowlevel
import pytest

from mm.errors import StoreUnavailableError
from mm.mesh.ports import Delete, Put, Resync, Store, Write
from tests.edge.store_world import World, next_batch, put, wait_answers

pytestmark = pytest.mark.anyio


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
        assert anyio.current_time() - start_s < 3 * world.timeout_s + 2
        assert str(caught.value)
    assert not store.connected

    await world.restore()
    await wait_answers(store)
    assert store.connected
    await put(store, "/t/a", b"back")


# --- sessions ---


async def test_a_session_holds_a_lease_and_gives_it_back(world: World) -> None:
    async with world.store.session(10) as session:
        assert session.lease_id != 0
        assert await session.wait_change(0) == session.lease_id
        item = await put(world.store, "/i/a", lease_id=session.lease_id)
        assert item.lease_id == session.lease_id
        assert await world.other.get("/i/a") == item
        with anyio.move_on_after(0.05) as scope:
            await session.wait_change(session.lease_id)
        assert scope.cancelled_caught
    assert await world.other.get("/i/a") is None


async def test_a_plain_put_takes_a_key_off_its_lease(world: World) -> None:
    async with world.store.session(10) as session:
        await put(world.store, "/i/a", lease_id=session.lease_id)
        item = await put(world.store, "/i/a", lease_id=0)
    assert await world.other.get("/i/a") == item


async def test_a_lost_lease_is_replaced(world: World) -> None:
    async with world.store.session(1) as session:
        first = session.lease_id
        await put(world.store, "/i/a", lease_id=first)
        await world.revoke(first)
        assert await world.other.get("/i/a") is None

        with pytest.raises(StoreUnavailableError, match="lease"):
            await put(world.store, "/i/a", lease_id=first)
        with anyio.fail_after(60):
            second = await session.wait_change(first)
        assert second == session.lease_id
        assert second not in (0, first)
        await put(world.store, "/i/a", lease_id=second)
    assert await world.other.get("/i/a") is None


async def test_the_keys_of_a_silent_holder_vanish_and_it_gets_another_lease(world: World) -> None:
    async with world.store.session(1) as session, world.other.watch("/i/") as batches:
        await next_batch(batches)
        first = session.lease_id
        item = await put(world.store, "/i/a", lease_id=first)
        assert await next_batch(batches) == [Put(item)]
        world.lose()
        [event] = await next_batch(batches)
        assert isinstance(event, Delete)
        assert event.key == "/i/a"

        await world.restore()
        with anyio.fail_after(60):
            second = await session.wait_change(first)
        assert second not in (0, first)
        await put(world.store, "/i/a", lease_id=second)


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

    # Under a key of its own: a write that was cancelled on its way may come later than this one.
    item = await put(store, "/t/c", b"still works")
    async with store.watch("/t/") as batches, store.session(10):
        [resync] = await next_batch(batches)
        assert isinstance(resync, Resync)
        assert item in resync.items

"""A store that is full refuses writes and goes on with all else; it works again by itself.

The memory store stands in for etcd in the tests of the mesh, so one contract holds for both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import aetcd.rpc
import anyio
import anyio.lowlevel
import pytest

from mm.edge.embedded_etcd import EmbeddedEtcd, embedded_etcd
from mm.edge.etcd_store import EtcdStore
from mm.edge.memory_store import MemoryStore
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Put, Store, Write
from tests.edge.store_world import next_batch, put, until

pytestmark = pytest.mark.anyio

#: The alarm of an etcd for want of space, and how it is cleared.
NOSPACE = 1
DEACTIVATE = 2
#: Renewed three times in that time: one may be late on a machine with other work.
TTL_S = 3


@dataclass(frozen=True)
class World:
    store: Store
    fill: Callable[[], Awaitable[None]]
    make_room: Callable[[], Awaitable[None]]


async def fill_etcd(etcd: EmbeddedEtcd) -> None:
    """Change one key until there is no room for its past.

    Then a little on: until the alarm is raised, a moment later, there is room for small ones.
    """
    async with EtcdStore(etcd.target) as store:
        for size_bytes in (100_000, 1):
            for _ in range(2_000):
                try:
                    await put(store, "/filling", b"x" * size_bytes)
                except StoreUnavailableError:
                    break
            else:
                raise AssertionError("it did not fill")


async def make_room(etcd: EmbeddedEtcd) -> None:
    """What an operator does: compact, defragment, disarm."""
    channel = aetcd.rpc.insecure_channel(str(etcd.endpoint))
    async with EtcdStore(etcd.target) as store:
        revision = (await store.list("/")).revision
    compaction = aetcd.rpc.CompactionRequest(revision=revision, physical=True)
    await aetcd.rpc.KVStub(channel).Compact(compaction)
    maintenance = aetcd.rpc.MaintenanceStub(channel)
    await maintenance.Defragment(aetcd.rpc.DefragmentRequest())
    raised = await maintenance.Alarm(aetcd.rpc.AlarmRequest(alarm=NOSPACE))
    for each in raised.alarms:
        disarm = aetcd.rpc.AlarmRequest(action=DEACTIVATE, alarm=NOSPACE, memberID=each.memberID)
        await maintenance.Alarm(disarm)
    await channel.close()


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Each kind of store in turn."""
    if request.param == "memory":
        memory = MemoryStore()

        async def set_full(is_full: bool) -> None:
            memory.server.is_full = is_full

        yield World(memory, lambda: set_full(True), lambda: set_full(False))
        return
    async with (
        embedded_etcd(["--quota-backend-bytes=1500000"]) as etcd,
        EtcdStore(etcd.target) as store,
    ):
        yield World(store, lambda: fill_etcd(etcd), lambda: make_room(etcd))


async def test_a_full_store_refuses_writes_and_goes_on_with_the_rest(world: World) -> None:
    store = world.store
    async with store.session(60) as session, store.watch("/t/") as batches:
        await next_batch(batches)
        lease_id = session.lease_id
        kept = await put(store, "/t/kept", lease_id=lease_id)
        await until(batches, Put(kept))
        assert not store.out_of_space

        await world.fill()
        for write in (Write("/t/new", b"1", 0), Write("/t/kept", b"2", None, lease_id)):
            with pytest.raises(StoreUnavailableError, match="is out of space"):
                await store.write(write)
        assert store.out_of_space
        assert store.connected, "this is another fault"
        assert await store.get("/t/kept") == kept
        assert list((await store.list("/t/")).items) == [kept]

        await world.make_room()
        new = await put(store, "/t/new")
        assert not store.out_of_space
        assert await until(batches, Put(new)) == [Put(new)]
        assert session.lease_id == lease_id


@pytest.mark.etcd
async def test_a_lease_is_kept_while_etcd_is_full() -> None:
    """Renewing one takes no room; only who loses it is invisible until there is some again."""
    async with (
        embedded_etcd(["--quota-backend-bytes=1500000"]) as etcd,
        EtcdStore(etcd.target) as store,
        store.session(TTL_S) as session,
    ):
        lease_id = session.lease_id
        await put(store, "/t/me", lease_id=lease_id)
        await fill_etcd(etcd)
        end_s = anyio.current_time() + 2 * TTL_S
        while anyio.current_time() < end_s:
            assert await store.get("/t/me") is not None
        with pytest.raises(StoreUnavailableError, match="is out of space"):
            async with store.session(1):
                pass
        channel = aetcd.rpc.insecure_channel(str(etcd.endpoint))
        await aetcd.rpc.LeaseStub(channel).LeaseRevoke(aetcd.rpc.LeaseRevokeRequest(ID=lease_id))
        await channel.close()
        with anyio.fail_after(60):
            while session.lease_id == lease_id:
                await anyio.lowlevel.checkpoint()
        assert session.lease_id == 0
        await make_room(etcd)
        with anyio.fail_after(60):
            assert await session.wait_change(0) != lease_id

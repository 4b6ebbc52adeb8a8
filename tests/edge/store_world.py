"""Two clients of one store, the first one behind something that can fail; and what tests ask.

A helper of the store's tests; the fixtures are in ``conftest``.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import aetcd.rpc
import anyio
import anyio.lowlevel

from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Item, Resync, Store, WatchEvent, Write
from mm.testing.losing_proxy import losing_proxy
from mm.testing.simulated_store import SimulatedStore

#: Ends what hangs; no test asserts how fast anything is by it.
PATIENCE_S = 60.0
MEMORY_TIMEOUT_S = 0.5

Batches = AsyncIterator[Sequence[WatchEvent]]


@dataclass(frozen=True)
class World:
    """A store, another client of the same data, and control over the first one's connection."""

    store: Store
    other: Store
    #: Long for a machine with other work, short for a test that waits for it to pass.
    timeout_s: float
    lose: Callable[[], None]
    restore: Callable[[], Awaitable[None]]
    revoke: Callable[[int], Awaitable[None]]


def slow_store(timeout_s: float) -> SimulatedStore:
    """The simulator's store, with every message and event under way for a while."""
    store = SimulatedStore(
        MemoryServer(), random.Random(1), lambda key, text: None, timeout_s=timeout_s
    )
    store.way_s_max = store.late_s_max = 0.01
    return store


def memory_world(store: MemoryStore) -> World:
    """Two clients of one memory server."""

    async def restore() -> None:
        store.set_fault(None)

    async def revoke(lease_id: int) -> None:
        store.revoke_lease(lease_id)

    def lose() -> None:
        store.set_fault(Fault.SILENT)

    return World(store, MemoryStore(store.server), MEMORY_TIMEOUT_S, lose, restore, revoke)


@asynccontextmanager
async def etcd_world(etcd: EtcdProcess) -> AsyncIterator[World]:
    """A client of a real etcd behind a proxy, and one that is connected directly."""
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
        timeout_s = 1.6
        store = await stack.enter_async_context(
            EtcdStore(target, timeout_s=timeout_s, silence_s=1.2)
        )
        other = await stack.enter_async_context(EtcdStore(direct))
        yield World(store, other, timeout_s, proxy.lose, proxy.restore, revoke)


async def put(store: Store, key: str, value: bytes = b"1", lease_id: int = 0) -> Item:
    """Write whatever is there, and answer it."""
    result = await store.write(Write(key, value, None, lease_id))
    assert result.succeeded
    assert result.item is not None
    return result.item


async def wait_answers(store: Store) -> None:
    """Return when a store that was away works again; it does so by itself."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            try:
                await store.check()
            except StoreUnavailableError:
                await anyio.lowlevel.checkpoint()
            else:
                return


async def next_batch(batches: Batches) -> Sequence[WatchEvent]:
    """Answer the next events."""
    with anyio.fail_after(PATIENCE_S):
        batch = await anext(batches)
    assert batch
    return batch


async def resync(batches: Batches) -> Resync:
    """Answer the table that the watch begins with, or begins again with."""
    [event] = await next_batch(batches)
    assert isinstance(event, Resync)
    return event


async def until(batches: Batches, last: WatchEvent) -> list[WatchEvent]:
    """Answer the events up to the batch that holds ``last``."""
    events: list[WatchEvent] = []
    while last not in events:
        events += await next_batch(batches)
    return events


async def assert_quiet(batches: Batches, for_s: float) -> None:
    """See that a watch tells nothing for some time."""
    with anyio.move_on_after(for_s) as scope:
        await anext(batches)
    assert scope.cancelled_caught

"""The store of one process: ``KV_STORE=memory``, tests and the simulator.

Owns one client's view of a ``MemoryServer``, with the contract of the etcd store and faults on
command. The data and the leases live in ``mm.edge.memory_server``. Written on anyio alone: it
runs under trio's virtual clock too.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from mm.edge.memory_server import MemoryServer, Watcher
from mm.errors import StoreUnavailableError
from mm.mesh.ports import (
    REVISIONS_MAX,
    Item,
    Part,
    Resync,
    Session,
    Store,
    WatchEvent,
    Write,
    WriteResult,
)


class Fault(enum.Enum):
    """What is wrong between client and server; watches are silent and leases run out in each."""

    #: Calls fail at once: the port is closed.
    REFUSED = "refused"
    #: Calls fail after the time limit and have no effect: packets are dropped.
    SILENT = "silent"
    #: Calls take effect, then fail after the time limit: answers are dropped.
    REPLIES_LOST = "replies-lost"


class MemoryStore(Store):
    """A client of a ``MemoryServer``; without one it makes its own.

    ``call_delay_s`` is spent half before and half after each call takes effect, ``watch_delay_s``
    before events are delivered. A session's lease needs no upkeep: it lives as long as this
    client has no fault and the session is open. Set a fault before cancelling a simulated
    instance to make that a crash: nothing is revoked then. The simulator's store has more ways to
    be wrong: it overrides ``_apply``, ``_delay``, ``_take`` and ``_hears``.
    """

    def __init__(
        self,
        server: MemoryServer | None = None,
        *,
        timeout_s: float = 3.5,
        call_delay_s: float = 0.0,
        watch_delay_s: float = 0.0,
    ) -> None:
        self.server = server if server is not None else MemoryServer()
        self._timeout_s = timeout_s
        self._call_delay_s = call_delay_s
        self._watch_delay_s = watch_delay_s
        self._fault: Fault | None = None
        self._out_of_space = False
        self._sessions: set[_MemorySession] = set()
        self._watchers: set[Watcher] = set()

    @property
    def connected(self) -> bool:
        """Whether there is no fault."""
        return self._fault is None

    @property
    def out_of_space(self) -> bool:
        """Whether the last write met a full server."""
        return self._out_of_space

    @property
    def fault(self) -> Fault | None:
        """The fault in force."""
        return self._fault

    def set_fault(self, fault: Fault | None) -> None:
        """Break the connection, or mend it: watches then catch up, lost leases are replaced."""
        self._fault = fault
        for session in self._sessions:
            if fault is None:
                session.reconnect()
            else:
                self.server.let_go(session.lease_id)
        for watcher in self._watchers:
            watcher.wake()

    def look_after_leases(self) -> None:
        """Replace leases that the server does not know any longer, unless there is a fault."""
        if self._fault is None:
            for session in self._sessions:
                session.reconnect()

    def revoke_lease(self, lease_id: int) -> None:
        """Lose a lease as if an operator had revoked it; a session that held it replaces it."""
        self.server.revoke(lease_id)
        self.look_after_leases()

    async def check(self) -> None:
        """Return if there is no fault."""
        await self._reach()
        await self._reply()

    async def get(self, key: str) -> Item | None:
        """Read linearizably."""
        number = self._same_store(self.server.history_number)
        await self._reach()
        item = self.server.get(key)
        await self._reply()
        self._same_store(number)
        return item

    async def revisions(self, keys: Sequence[str]) -> Sequence[int]:
        """Read the revisions of keys linearizably; 0 for one that is not there."""
        if len(keys) > REVISIONS_MAX:
            raise ValueError(f"{len(keys)} keys at once; at most {REVISIONS_MAX}")
        number = self._same_store(self.server.history_number)
        await self._reach()
        items = [self.server.get(key) for key in keys]
        await self._reply()
        self._same_store(number)
        return [0 if item is None else item.mod_revision for item in items]

    async def list(self, prefix: str) -> Resync:
        """Read a table at one revision."""
        await self._reach()
        table = self.server.table(prefix)
        await self._reply()
        return table

    async def write(self, write: Write) -> WriteResult:
        """One compare-and-set."""
        succeeded, items = await self.transact([write])
        return WriteResult(succeeded, items[0])

    async def transact(self, parts: Sequence[Part]) -> tuple[bool, Sequence[Item | None]]:
        """All writes or none; then what is stored under each key, in the order given."""
        number = self._same_store(self.server.history_number)
        await self._reach()
        self._out_of_space = self.server.is_full
        outcome = self._apply(parts)
        await self._reply()
        self._same_store(number)
        return outcome

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncIterator[AsyncIterator[Sequence[WatchEvent]]]:
        """Follow a table: batches of events, a ``Resync`` first; silent while there is a fault."""
        watcher = self.server.attach(prefix)
        self._watchers.add(watcher)
        try:
            yield _Batches(self, watcher)
        finally:
            self._watchers.discard(watcher)
            self.server.detach(watcher)

    @asynccontextmanager
    async def session(self, ttl_s: int) -> AsyncIterator[Session]:
        """Hold a lease; revoked on the way out if there is no fault."""
        await self._reach()
        session = _MemorySession(self.server, ttl_s)
        self._sessions.add(session)
        try:
            await self._reply()
            yield session
        finally:
            self._sessions.discard(session)
            if self._fault is None:
                self.server.revoke(session.lease_id)
            else:
                self.server.let_go(session.lease_id)

    async def _reach(self) -> None:
        """Get a request to the server."""
        await anyio.lowlevel.checkpoint()
        if self._fault is None or self._fault is Fault.REPLIES_LOST:
            await self._delay()
        if self._fault is Fault.REFUSED:
            raise StoreUnavailableError("the memory store refuses connections (fault)")
        if self._fault is Fault.SILENT:
            await anyio.sleep(self._timeout_s)
            raise StoreUnavailableError(
                f"the memory store did not answer within {self._timeout_s:g} s (fault)"
            )

    async def _reply(self) -> None:
        """Get an answer back."""
        await self._delay()
        if self._fault is not None:
            await anyio.sleep(self._timeout_s)
            raise StoreUnavailableError(
                f"the memory store did not answer within {self._timeout_s:g} s (fault)"
            )

    def _same_store(self, number: int) -> int:
        """Answer the number; raise if the store is another one, or watches have not told so yet."""
        told = {watcher.history_number for watcher in self._watchers} - {0}
        if number != self.server.history_number or told - {number}:
            raise StoreUnavailableError("the memory store was replaced; tables are read anew")
        return number

    def _apply(self, parts: Sequence[Part]) -> tuple[bool, Sequence[Item | None]]:
        """Have a transaction that arrived take effect."""
        return self.server.transact(parts)

    async def _delay(self) -> None:
        """Be on the way to the server, or back."""
        if self._call_delay_s:
            await anyio.sleep(self._call_delay_s / 2)

    async def _take(self, watcher: Watcher) -> Sequence[WatchEvent]:
        """Answer the events that there are for a watch, once they are here, if they come."""
        if self._watch_delay_s:
            await anyio.sleep(self._watch_delay_s)
        return self.server.take(watcher) if self._hears(watcher) else []

    def _hears(self, watcher: Watcher) -> bool:
        """Answer whether events get through to a watch."""
        return self._fault is None


class _Batches(AsyncIterator[Sequence[WatchEvent]]):
    """What a watch yields. It ends leases that run out meanwhile: nobody else may be awake."""

    def __init__(self, store: MemoryStore, watcher: Watcher) -> None:
        self._store = store
        self._watcher = watcher

    async def __anext__(self) -> Sequence[WatchEvent]:
        await anyio.lowlevel.checkpoint()
        store, server, watcher = self._store, self._store.server, self._watcher
        while True:
            server.expire_leases()
            if store._hears(watcher) and (watcher.pending or watcher.resync_due):
                events = await store._take(watcher)
                if events:
                    self._note_store(events)
                    return events
            watcher.changed = anyio.Event()
            with anyio.CancelScope(deadline=server.next_expiry_s()):
                await watcher.changed.wait()

    def _note_store(self, events: Sequence[WatchEvent]) -> None:
        tables = [event for event in events if isinstance(event, Resync)]
        if tables:
            self._watcher.history_number = self._watcher.taken_number
        if any(table.is_of_other_store for table in tables):
            self._store.look_after_leases()


class _MemorySession(Session):
    def __init__(self, server: MemoryServer, ttl_s: int) -> None:
        self._server = server
        self._ttl_s = ttl_s
        self._changed = anyio.Event()
        self._lease_id = server.grant(ttl_s).lease_id

    @property
    def lease_id(self) -> int:
        return self._lease_id

    async def wait_change(self, lease_id: int) -> int:
        await anyio.lowlevel.checkpoint()
        while self._lease_id == lease_id:
            await self._changed.wait()
        return self._lease_id

    def reconnect(self) -> None:
        """Take the lease up again, or another one if it is lost."""
        if self._server.hold(self._lease_id):
            return
        self._lease_id = self._server.grant(self._ttl_s).lease_id
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

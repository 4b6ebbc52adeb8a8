"""etcd in miniature: keys, revisions, leases and watchers of one process.

The shared half of ``MemoryStore``: any number of stores (clients) may stand on one server, which
is how simulated instances share a registry. Written on anyio alone, so that it runs under trio's
virtual clock. Nothing is written to disk.

Invariants:
1. ``revision`` grows by one with each transaction that changes anything, and every key changed in
it carries it.
2. A key bound to a lease is in that lease's ``keys``, and in no other's.
3. A watcher's pending events are in order of revision, or it is due a ``Resync``. After ``wipe``
both: they are of the store before, and come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import anyio

from mm.errors import StoreUnavailableError
from mm.mesh.ports import Delete, Item, Part, Put, Resync, WatchEvent, Write

#: A watcher that is this far behind gets the whole table instead; bounds memory while a client is
#: cut off.
PENDING_EVENTS_MAX: Final = 10_000


@dataclass(slots=True)
class Lease:
    """A lease; without a deadline while its holder is in contact, which stands for keep-alives."""

    lease_id: int
    ttl_s: int
    deadline_s: float = math.inf
    keys: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Watcher:
    """One watch. ``changed`` is set whenever looking again may help."""

    prefix: str
    pending: list[WatchEvent] = field(default_factory=list)
    resync_due: bool = True
    #: Of which store this one has told, as the server counts them; 0: nothing told yet.
    history_number: int = 0
    #: Of which the table is that was taken last; it may still be on its way.
    taken_number: int = 0
    changed: anyio.Event = field(default_factory=anyio.Event)

    def wake(self) -> None:
        """Make whoever waits look again."""
        self.changed.set()


@dataclass(frozen=True, slots=True)
class Backup:
    """What a store was at a revision."""

    items: Mapping[str, Item]
    revision: int


NO_BACKUP: Final = Backup({}, 1)


class MemoryServer:
    """The data behind one or many ``MemoryStore``s; every method is atomic, none blocks."""

    def __init__(self) -> None:
        self.revision = 1
        #: Full: it takes no writes until somebody makes room.
        self.is_full = False
        #: Counts the stores that this one has been.
        self.history_number = 1
        self._items: dict[str, Item] = {}
        self._leases: dict[int, Lease] = {}
        self._leases_running_out: dict[int, Lease] = {}
        self._watchers: set[Watcher] = set()
        self._next_lease_id = 1001

    def backup(self) -> Backup:
        """Answer what is to be kept, but for keys that are bound to leases."""
        kept = {key: item for key, item in self._items.items() if not item.lease_id}
        return Backup(kept, self.revision)

    def wipe(self, backup: Backup = NO_BACKUP) -> None:
        """Be another store, empty or a backup restored: revisions begin there, no lease is known.

        What watchers were not told yet reaches them still, as what is in buffers of the network.
        """
        self.history_number += 1
        self.revision = backup.revision
        self._items = dict(backup.items)
        self._leases.clear()
        self._leases_running_out.clear()
        for watcher in self._watchers:
            watcher.resync_due = True
            watcher.wake()

    # --- keys ---

    def get(self, key: str) -> Item | None:
        """Answer what is stored under ``key``."""
        self.expire_leases()
        return self._items.get(key)

    def table(self, prefix: str) -> Resync:
        """Answer all items below ``prefix``, in order of key."""
        self.expire_leases()
        keys = sorted(key for key in self._items if key.startswith(prefix))
        return Resync(items=[self._items[key] for key in keys], revision=self.revision)

    def transact(self, parts: Sequence[Part]) -> tuple[bool, list[Item | None]]:
        """Apply all writes if every condition holds; then answer what is stored under each key.

        Raises ``StoreUnavailableError`` when a lease is lost, or nothing more fits.
        """
        self.expire_leases()
        if self.is_full:
            raise StoreUnavailableError("the memory store is out of space")
        keys = [part.key for part in parts]
        writes = [part for part in parts if isinstance(part, Write)]
        if len(set(keys)) != len(keys):
            raise ValueError(f"a key occurs twice in one transaction: {keys}")
        for write in writes:
            if write.value is not None and write.lease_id and write.lease_id not in self._leases:
                raise StoreUnavailableError(f"the lease {write.lease_id:x} is lost")
        succeeded = all(map(self._holds, parts))
        if succeeded:
            self._commit(writes)
        return succeeded, [self._items.get(key) for key in keys]

    def _holds(self, part: Part) -> bool:
        if part.if_revision is None:
            return True
        item = self._items.get(part.key)
        return (item.mod_revision if item else 0) == part.if_revision

    def _commit(self, writes: Iterable[Write]) -> None:
        changes = [w for w in writes if w.value is not None or w.key in self._items]
        if not changes:
            return
        self.revision += 1
        events = [
            self._remove(write.key) if write.value is None else self._put(write, write.value)
            for write in changes
        ]
        self._publish(events)

    def _put(self, write: Write, value: bytes) -> Put:
        before = self._items.get(write.key)
        if before is not None:
            self._unbind(before)
        item = Item(
            key=write.key,
            value=value,
            mod_revision=self.revision,
            create_revision=before.create_revision if before else self.revision,
            lease_id=write.lease_id,
        )
        if write.lease_id:
            self._leases[write.lease_id].keys.add(write.key)
        self._items[write.key] = item
        return Put(item)

    def _remove(self, key: str) -> Delete:
        self._unbind(self._items.pop(key))
        return Delete(key, self.revision)

    def _unbind(self, item: Item) -> None:
        lease = self._leases.get(item.lease_id)
        if lease is not None:
            lease.keys.discard(item.key)

    # --- leases ---

    def grant(self, ttl_s: int) -> Lease:
        """Create a lease, held."""
        lease = Lease(self._next_lease_id, ttl_s)
        self._next_lease_id += 1
        self._leases[lease.lease_id] = lease
        return lease

    def revoke(self, lease_id: int) -> None:
        """End a lease: its keys are gone at once. An unknown one is gone already."""
        lease = self._leases.pop(lease_id, None)
        self._leases_running_out.pop(lease_id, None)
        if lease is None or not lease.keys:
            return
        self.revision += 1
        self._publish([self._remove(key) for key in sorted(lease.keys)])

    def is_alive(self, lease_id: int) -> bool:
        """Answer whether the lease exists."""
        self.expire_leases()
        return lease_id in self._leases

    def hold(self, lease_id: int) -> bool:
        """Say that the holder is in contact again; False if the lease did not live to see it."""
        if not self.is_alive(lease_id):
            return False
        self._leases[lease_id].deadline_s = math.inf
        self._leases_running_out.pop(lease_id, None)
        return True

    def let_go(self, lease_id: int) -> None:
        """Say that the holder lost contact: the lease lives ``ttl_s`` unless it comes back."""
        lease = self._leases.get(lease_id)
        if lease is None or lease_id in self._leases_running_out:
            return
        lease.deadline_s = anyio.current_time() + lease.ttl_s
        self._leases_running_out[lease_id] = lease
        # There is no task that expires leases: whoever waits does, and has a new deadline now.
        self._wake_all()

    def expire_leases(self) -> None:
        """End the leases whose time is over."""
        if not self._leases_running_out:
            return
        now_s = anyio.current_time()
        for lease in list(self._leases_running_out.values()):
            if lease.deadline_s <= now_s:
                self.revoke(lease.lease_id)

    def next_expiry_s(self) -> float:
        """Answer when ``expire_leases`` has something to do (``anyio.current_time()``)."""
        deadlines = (lease.deadline_s for lease in self._leases_running_out.values())
        return min(deadlines, default=math.inf)

    # --- watchers ---

    def attach(self, prefix: str) -> Watcher:
        """Start a watch; its first events are a ``Resync``."""
        watcher = Watcher(prefix)
        self._watchers.add(watcher)
        return watcher

    def detach(self, watcher: Watcher) -> None:
        """End a watch."""
        self._watchers.discard(watcher)

    def take(self, watcher: Watcher) -> Sequence[WatchEvent]:
        """Answer the events since the last time; empty if there are none."""
        self.expire_leases()
        if watcher.resync_due:
            before, watcher.pending = watcher.pending, []
            watcher.resync_due = False
            watcher.taken_number = self.history_number
            table = self.table(watcher.prefix)
            if watcher.history_number in (0, self.history_number):
                return [table]
            return [*before, replace(table, is_of_other_store=True)]
        events, watcher.pending = watcher.pending, []
        return events

    def give_back(self, watcher: Watcher, events: Sequence[WatchEvent]) -> None:
        """Say that what was taken did not arrive: it is to be taken again, or what is newer."""
        if any(isinstance(event, Resync) for event in events):
            watcher.resync_due = True
            events = [event for event in events if not isinstance(event, Resync)]
        if watcher.history_number != self.history_number:
            watcher.pending = list(events)
        else:
            watcher.pending = [] if watcher.resync_due else [*events, *watcher.pending]

    def forget_history(self) -> None:
        """Compact: a watcher with events not yet taken gets a ``Resync`` instead of them."""
        for watcher in self._watchers:
            if watcher.pending:
                _overtake(watcher)

    def _publish(self, events: Sequence[Put | Delete]) -> None:
        for watcher in self._watchers:
            wanted = [event for event in events if _key_of(event).startswith(watcher.prefix)]
            if not wanted or watcher.resync_due:
                continue
            watcher.pending += wanted
            if len(watcher.pending) > PENDING_EVENTS_MAX:
                _overtake(watcher)
            watcher.wake()

    def _wake_all(self) -> None:
        for watcher in self._watchers:
            watcher.wake()


def _key_of(event: Put | Delete) -> str:
    return event.item.key if isinstance(event, Put) else event.key


def _overtake(watcher: Watcher) -> None:
    watcher.pending = []
    watcher.resync_due = True

"""A table of the store mirrored in memory: id -> raw value and revision (spec core 1.4).

Owns the fold of watch events and of our own writes into one map, newest revision first. Does not
know what a value
means: ``registry``, ``vmodels`` and ``members`` decode.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import anyio
from anyio.abc import TaskStatus

from mm.core.sorted_ids import SortedIds
from mm.mesh.backups import Past, out_of_date
from mm.mesh.ports import Delete, Item, Put, Resync, Store, WatchEvent, Write
from mm.table import ID_BYTES_MAX

logger = logging.getLogger(__name__)

#: Of a key that is no id, the log shows this much.
_SHOWN_MAX = 64

#: Told of every change: the id and the new item, None when it is gone. Must not block or raise.
Listener = Callable[[str, Item | None], None]


class Mirror:
    """One prefix of the store, always the newest state seen.

    News come on two ways that overtake each other: the watch, in order of revision, and answers to
    reads and writes of this process, in any order.

    Invariants: 1. an entry's revision only rises, as long as the store is the same one; 2. the
    listeners are called exactly once for each change of the map, after it; 3. what was deleted, by
    whomever, is not brought back by an event or an answer that is older than the deletion; 4. every
    id in the map is one that the table can hold: what else stands in the store is named in the log,
    and skipped.

    When the store was emptied, restored or exchanged, everything known is kept as *unconfirmed*,
    with revision 0, as if it had never been stored: it goes on serving, whatever the new store says
    of a key wins, and the next change of an entry writes it anew. ``restorer`` does so soon. Only
    where the new store is a backup of the old one, and has an older text than ours or what was
    deleted since, it does not win (``backups``): then the entry has that text's revision, or is
    *outlived*: not in the map, and to be deleted again.
    """

    def __init__(self, store: Store, prefix: str, listener: Listener) -> None:
        self._store = store
        self._listeners = [listener]
        self._items: dict[str, Item] = {}
        #: The ids of these, for listings.
        self.ids = SortedIds()
        #: Those known only from a store that is no more, in order; their items have revision 0.
        self._unconfirmed: dict[str, None] = {}
        #: Deleted by this process, event still to come: the revision that the record had.
        self._deleted: dict[str, int] = {}
        #: In a backup, deleted since: the revision of what is to be deleted again.
        self._outlived: dict[str, int] = {}
        self._past = Past()
        #: In the store, but nobody's ids.
        self._skipped: set[str] = set()
        self.prefix = prefix
        #: The watch has told of everything up to here.
        self.revision = 0
        #: Set, and replaced, whenever the store turned out to be another one; and when that was.
        self.store_replaced = anyio.Event()
        self.store_replaced_s = -math.inf

    def items(self) -> Iterator[tuple[str, Item]]:
        """Iterate over ids and values."""
        return iter(self._items.items())

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def listen(self, listener: Listener) -> None:
        """Have one more told of every change, after those that are there."""
        self._listeners.append(listener)

    def _tell(self, key_id: str, item: Item | None) -> None:
        for listener in self._listeners:
            listener(key_id, item)

    @property
    def skipped_count(self) -> int:
        """Keys in the store that cannot be ids; each was named in the log."""
        return len(self._skipped)

    def get(self, key_id: str) -> Item | None:
        """Answer the newest value seen, without asking the store."""
        return self._items.get(key_id)

    def key(self, key_id: str) -> str:
        """Answer the store's key for an id."""
        return self.prefix + key_id

    def is_unconfirmed(self, key_id: str) -> bool:
        """Answer whether an entry is known only from a store that is no more."""
        return key_id in self._unconfirmed

    @property
    def unconfirmed_count(self) -> int:
        """How many these are, and of those outlived."""
        return len(self._unconfirmed) + len(self._outlived)

    def unconfirmed(self) -> list[str]:
        """Answer the ids of all these entries."""
        return list(self._unconfirmed)

    def outlived(self) -> list[str]:
        """Answer the ids of what a backup has, and was deleted since."""
        return list(self._outlived)

    def is_outlived(self, item: Item) -> bool:
        """Answer whether a record that the store has is one that was deleted since its backup."""
        return self._outlived.get(item.key[len(self.prefix) :], 0) >= item.mod_revision > 0

    async def restore(self, key_id: str) -> bool:
        """Have the store take an unconfirmed entry, unless it has a newer one, or delete one that
        is outlived; answers whether it did. Raises ``StoreUnavailableError``.
        """
        value: bytes | None = None
        if key_id in self._outlived:
            revision = self._outlived[key_id]
        elif key_id in self._unconfirmed:
            revision, value = self._items[key_id].mod_revision, self._items[key_id].value
        else:
            return False
        result = await self._store.write(Write(self.key(key_id), value, if_revision=revision))
        if result.item is not None:
            self.written(result.item)
        else:
            self._outlived.pop(key_id, None)
            self.deleted_by_us(key_id, revision)
        return result.succeeded

    async def read(self, key_id: str) -> Item | None:
        """Ask the store, and answer the entry as it is known then.

        Raises ``StoreUnavailableError``.
        """
        if key_id not in self._outlived:
            await self.restore(key_id)
        known = self.get(key_id)
        item = await self._store.get(self.key(key_id))
        if item is not None:
            self.written(item)
        elif known is not None:
            self.deleted_by_us(key_id, known.mod_revision)
        return self.get(key_id)

    def forget_unconfirmed(self) -> None:
        """Give up what nobody has written to the new store."""
        for key_id in self.unconfirmed():
            self._drop(key_id)
            self._tell(key_id, None)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Follow the table until cancelled; reports started once the whole table is here."""
        started = False
        async with self._store.watch(self.prefix) as batches:
            async for batch in batches:
                self.fold(batch)
                if not started:
                    started = True
                    task_status.started()
        raise AssertionError("a watch ended by itself; it must last until cancelled")

    def fold(self, events: Sequence[WatchEvent]) -> None:
        """Apply events of the watch, in order."""
        for event in events:
            match event:
                case Put(item):
                    self._put(item)
                    self.revision = max(self.revision, item.mod_revision)
                case Delete(key, mod_revision):
                    self._removed(key[len(self.prefix) :], mod_revision)
                    self.revision = max(self.revision, mod_revision)
                case Resync(items, revision, is_of_other_store):
                    if is_of_other_store:
                        self._keep_unconfirmed(items)
                    self._resync(items, revision)
                    self.revision = max(self.revision, revision)
                    if is_of_other_store:
                        self.store_replaced.set()
                        self.store_replaced = anyio.Event()

    def written(self, item: Item) -> None:
        """Take over an answer of the store: a value that we read or wrote."""
        if item.mod_revision <= self.revision and item.key[len(self.prefix) :] not in self._items:
            return  # the watch has told of it, and of its deletion
        self._put(item)

    def answered(self, key_id: str, mod_revision: int, item: Item | None) -> None:
        """Take over what a transaction left, or what stood in its way, of an entry that was taken
        to have this revision; 0: not to be there.
        """
        if item is not None:
            self.written(item)
        elif mod_revision:
            self.deleted_by_us(key_id, mod_revision)

    def deleted_by_us(self, key_id: str, mod_revision: int) -> None:
        """Forget an entry that this process deleted, or found deleted, when it had this revision.

        The event of the deletion is still to come, or has overtaken this answer.
        """
        known = self._items.get(key_id)
        if known is None:
            if self.revision < mod_revision:
                self._deleted[key_id] = max(mod_revision, self._deleted.get(key_id, 0))
        elif known.mod_revision <= mod_revision:
            self._drop(key_id)
            self._deleted[key_id] = mod_revision
            self._tell(key_id, None)

    def _put(self, item: Item) -> None:
        key_id = item.key[len(self.prefix) :]
        if not _can_be_id(key_id):
            self._skip(key_id)
            return
        known = self._items.get(key_id)
        if known is not None and known.mod_revision >= item.mod_revision:
            return
        if item.mod_revision <= self._deleted.get(key_id, 0):
            return
        self._deleted.pop(key_id, None)
        self._outlived.pop(key_id, None)
        if known is None:
            self.ids.add(key_id)
            self._past.created(key_id)
        elif key_id not in self._unconfirmed:  # those were never stored with that revision
            self._past.changed(key_id, known)
        self._items[key_id] = item
        self._unconfirmed.pop(key_id, None)
        self._tell(key_id, item)

    def _skip(self, key_id: str) -> None:
        if key_id not in self._skipped:
            self._skipped.add(key_id)
            shown = ascii(key_id[:_SHOWN_MAX])
            logger.error("a key of %d characters, %s, is no id: skipped", len(key_id), shown)

    def _drop(self, key_id: str) -> None:
        self._past.deleted(key_id, self._items.pop(key_id))
        self.ids.remove(key_id)
        self._unconfirmed.pop(key_id, None)

    def _removed(self, key_id: str, mod_revision: int) -> None:
        self._skipped.discard(key_id)
        if self._deleted.get(key_id, mod_revision) < mod_revision:
            del self._deleted[key_id]
            self._outlived.pop(key_id, None)
        known = self._items.get(key_id)
        if known is not None and known.mod_revision < mod_revision:
            self._drop(key_id)
            self._tell(key_id, None)

    def _keep_unconfirmed(self, items: Sequence[Item]) -> None:
        if self._items:
            logger.warning(
                "the store under %s is another one: %d entries are kept", self.prefix, len(self)
            )
        table = {item.key[len(self.prefix) :]: item for item in items}
        old = out_of_date(table, self._items, self._unconfirmed, self._past)
        if old.changed or old.deleted:
            logger.warning(
                "it is a backup: %d entries under %s are newer here, %d were deleted since",
                len(old.changed),
                self.prefix,
                len(old.deleted),
            )
        self.revision = 0
        self.store_replaced_s = anyio.current_time()
        self._past.clear()
        self._outlived = {key_id: table[key_id].mod_revision for key_id in old.deleted}
        self._deleted = dict(self._outlived)
        self._items = {k: replace(item, mod_revision=0) for k, item in self._items.items()}
        for key_id in old.changed:
            replaces = table[key_id].mod_revision
            self._items[key_id] = replace(self._items[key_id], mod_revision=replaces)
        self._unconfirmed = dict.fromkeys(self._items)

    def _resync(self, items: Sequence[Item], revision: int) -> None:
        present: dict[str, int] = {}
        if (
            self._items or self._deleted or self._skipped
        ):  # not at the start: a million entries for nothing
            present = {item.key[len(self.prefix) :]: item.mod_revision for item in items}
        gone = [
            key_id
            for key_id, item in self._items.items()
            if key_id not in present and 0 < item.mod_revision <= revision
        ]
        # A snapshot that still shows what we deleted is older than the deletion.
        self._deleted = {
            key_id: deleted
            for key_id, deleted in self._deleted.items()
            if deleted > revision or present.get(key_id, deleted + 1) <= deleted
        }
        self._outlived = {k: r for k, r in self._outlived.items() if k in self._deleted}
        self._skipped.intersection_update(present)
        for key_id in gone:
            self._drop(key_id)
            self._tell(key_id, None)
        for item in items:
            self._put(item)


def _can_be_id(key_id: str) -> bool:
    """Answer whether a key names something: the bare prefix does not, and what is not UTF-8 or too
    long for the table could be neither called nor loaded.
    """
    if key_id.isascii():
        return 0 < len(key_id) <= ID_BYTES_MAX
    try:
        return len(key_id.encode()) <= ID_BYTES_MAX
    except UnicodeEncodeError:
        return False

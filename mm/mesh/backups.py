"""What a restored backup says that this instance knows to be out of date (decision 14).

Pure: owns the memory of what records were before, and the comparison of a table that was read from
another store with what was known of the one before. What follows from it is ``mirror``'s and
``restorer``'s.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from mm.mesh.ports import Item

#: Changes remembered, the last ones; 16 bytes each. It is what ten busy instances write in
#: half an hour (``docs/operating.md``). Of an older backup all is told that is older than a record
#: that has not changed since; deletions before these come back with it.
PAST_MAX: Final = 10_000


class Past:
    """What the records of a table were before their last changes, as far as that is remembered.

    Not what is bound to a lease: that comes and goes by itself.
    """

    def __init__(self) -> None:
        #: Of what is no longer so: revisions, and beside each a hash of whose it was and of its
        #: text. Rings, for as objects they were 3 MB of an instance that has run for a while.
        self._revisions = array("q")
        self._hashes = array("q")
        #: Where the next goes once the rings are full.
        self._oldest = 0
        #: By revision, while it is asked about; None: not made.
        self._by_revision: dict[int, int] | None = None
        #: Ids that were deleted, the last one last.
        self._graves: OrderedDict[str, None] = OrderedDict()

    def changed(self, key_id: str, before: Item) -> None:
        """Note what a record was that was just changed."""
        if before.lease_id or not before.mod_revision:
            return
        self._by_revision = None
        if len(self._revisions) < PAST_MAX:
            self._revisions.append(before.mod_revision)
            self._hashes.append(_hash_of(key_id, before))
        else:
            self._revisions[self._oldest] = before.mod_revision
            self._hashes[self._oldest] = _hash_of(key_id, before)
            self._oldest = (self._oldest + 1) % PAST_MAX

    def deleted(self, key_id: str, before: Item) -> None:
        """Note what a record was that was just deleted."""
        if before.lease_id:
            return
        self.changed(key_id, before)
        self._graves[key_id] = None
        if len(self._graves) > PAST_MAX:
            self._graves.popitem(last=False)

    def created(self, key_id: str) -> None:
        """Note that there is such a record, perhaps again."""
        self._graves.pop(key_id, None)

    def clear(self) -> None:
        """Forget all: their revisions are those of a store that is no more."""
        self._revisions = array("q")
        self._hashes = array("q")
        self._oldest = 0
        self._by_revision = None
        self._graves.clear()

    def has_seen(self, key_id: str, item: Item) -> bool:
        """Answer whether a record was once this very one, with its revision."""
        if self._by_revision is None:
            self._by_revision = dict(zip(self._revisions, self._hashes, strict=True))
        return self._by_revision.get(item.mod_revision) == _hash_of(key_id, item)

    def has_seen_go(self, key_id: str) -> bool:
        """Answer whether a record was deleted."""
        return key_id in self._graves


def _hash_of(key_id: str, item: Item) -> int:
    return hash((key_id, item.value))


@dataclass(frozen=True, slots=True)
class OutOfDate:
    """Ids whose records in a backup are older than what was known."""

    #: We know a later text of these,
    changed: tuple[str, ...]
    #: and that these were deleted.
    deleted: tuple[str, ...]


def out_of_date(
    table: Mapping[str, Item], known: Mapping[str, Item], unsaved: Collection[str], past: Past
) -> OutOfDate:
    """Compare a table of another store with what was known of the one before.

    Revisions of two stores can be compared only as far as they have one history: up to the newest
    record of the new one that is, or once was, the very same in the old one. Beyond that, and if
    there is none, what the new store says is to be believed. ``unsaved``: known ids that a store
    before the last one did not take; their revision is that of what they are to replace.
    """
    common = max(
        (
            item.mod_revision
            for key_id, item in table.items()
            if known.get(key_id) == item or past.has_seen(key_id, item)
        ),
        default=0,
    )
    old = {k: item for k, item in table.items() if item.mod_revision <= common}
    changed = [
        key_id
        for key_id, item in old.items()
        if key_id in known
        and not item.lease_id
        and known[key_id].mod_revision > item.mod_revision - (key_id in unsaved)
        and known[key_id].value != item.value
    ]
    deleted = [key_id for key_id in old if key_id not in known and past.has_seen_go(key_id)]
    return OutOfDate(tuple(changed), tuple(deleted))

"""The registry of models: the mirrored records and every change to them (spec core 1.4, 1.6).

Owns lookups, compare-and-set updates and the index of which models an instance holds. Does not
decide what a record
should say: callers hand in the change as a function of the present record.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator

import anyio

from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.records import ModelRecord, RecordError
from mm.errors import ContendedError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.confirmations import Entry
from mm.mesh.instance_index import InstanceIndex
from mm.mesh.look_ups import LookUps
from mm.mesh.mirror import Mirror
from mm.mesh.parsed_records import ParsedRecords
from mm.mesh.policy_index import PolicyIndex
from mm.mesh.ports import Check, Item, Store, Write, WriteResult

logger = logging.getLogger(__name__)

#: The change to make: the present record (None: absent) in, the wanted one (None: delete) out.
#: Returning the very
#: object that came in means "leave it". May raise a ``MeshError`` to give up.
Change = Callable[[ModelRecord | None], ModelRecord | None]

#: Told after a change of a record; None when it is gone.
RecordListener = Callable[[ModelId, ModelRecord | None], None]

#: Compare-and-set tries before a change gives up: each loss means that somebody else's change
#: succeeded.
CAS_TRIES_MAX = 64
#: Attributes of a record that name instances; in its JSON they cannot look otherwise.
_NAMING = (b'"instanceIds"', b'"failedIn"')
#: What makes a record worth to be parsed when it comes.
_TELLING = (*_NAMING, b'"policy"')
#: In its JSON, too, no text can look like that: its quotes would be escaped.
_LAST_USE = re.compile(rb'"lu":(\d{1,18})(?!\d)')
#: A last use that cannot be (spec core 5.6).
_NO_USE = b'"lu":%d' % NEVER_MS


class Registry:
    """Every model record of the cluster, as this instance sees it."""

    def __init__(self, store: Store, prefix: str, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._mirror = Mirror(store, prefix, self._changed)
        self.look_ups = LookUps(store, self._mirror, limits)
        # By value, not by revision: another store may come to the same revisions.
        self._parsed = ParsedRecords(ModelRecord.decode)
        self._holders = InstanceIndex()
        self._failed = InstanceIndex()
        #: Models whose record in the store has a last use that cannot be: ``reaper`` repairs them.
        self.never_used: set[ModelId] = set()
        #: The models of which something is kept.
        self.policies = PolicyIndex()
        self._listeners: list[RecordListener] = []
        self.run = self._mirror.run

    def __len__(self) -> int:
        return len(self._mirror)

    def __iter__(self) -> Iterator[ModelId]:
        return (ModelId(key_id) for key_id in self._mirror)

    @property
    def mirror(self) -> Mirror:
        """The records as they came."""
        return self._mirror

    @property
    def corrupt_count(self) -> int:
        """Records in the store that could not be read; each was named in the log."""
        return self._parsed.corrupt_count + self._mirror.skipped_count

    def listen(self, listener: RecordListener) -> None:
        """Call ``listener`` after every change; it must not block or raise."""
        self._listeners.append(listener)

    def get(self, model_id: ModelId) -> ModelRecord | None:
        """Answer the mirrored record; None when it is unknown or unreadable."""
        item = self._mirror.get(model_id)
        return None if item is None else self._parsed.get(model_id, item)

    def peek(self, model_id: ModelId) -> ModelRecord | None:
        """Answer what ``get`` does, and keep nothing: for whoever looks at all of them in turn."""
        item = self._mirror.get(model_id)
        if item is None:
            return None
        return self._parsed.peek(model_id, item)

    async def find(
        self, model_id: ModelId, *, is_known_to_peer: bool = False
    ) -> ModelRecord | None:
        """Answer the mirrored record, else what the store itself says (spec core 1.4,
        "cached-or-strong-if-absent"); None when it is unknown or unreadable.

        Raises ``StoreUnavailableError``, or ``LimitError`` when too many unknown ids are asked for,
        or one too long to be registered.
        """
        item = await self.look_ups.find(model_id, is_known_to_peer=is_known_to_peer)
        return None if item is None else self._parsed.get(model_id, item)

    async def read(self, model_id: ModelId) -> ModelRecord | None:
        """Answer what the store says now.

        Raises ``StoreUnavailableError``, or ``LimitError`` when too many ask already.
        """
        item = await self.look_ups.read(model_id)
        return None if item is None else self._parsed.get(model_id, item)

    def held_by(self, instance_id: InstanceId) -> frozenset[ModelId]:
        """Answer the models that have a copy registered at ``instance_id``."""
        return self._holders.models(instance_id)

    def holders(self) -> frozenset[InstanceId]:
        """Answer every instance that is registered as holding a copy of something."""
        return self._holders.instances()

    def idle_since_ms(self, model_id: ModelId) -> int:
        """Answer the last use of a model of which no copy is registered; 0 if there is one, or
        nothing is known. Without parsing: this is asked of all models.
        """
        item = self._mirror.get(model_id)
        if item is None or _NAMING[0] in item.value:
            return 0
        found = _LAST_USE.search(item.value)
        return 0 if found is None else int(found[1])

    @property
    def held_count(self) -> int:
        """Models of which a copy is registered."""
        return len(self._holders)

    @property
    def failed_count(self) -> int:
        """Models with a failed load recorded."""
        return len(self._failed)

    def failed_at(self, instance_id: InstanceId) -> frozenset[ModelId]:
        """Answer the models with a failed load recorded at ``instance_id``."""
        return self._failed.models(instance_id)

    def failed(self) -> frozenset[InstanceId]:
        """Answer every instance at which a failed load is recorded."""
        return self._failed.instances()

    async def update(
        self,
        model_id: ModelId,
        change: Change,
        *,
        fresh: bool = False,
        relied_on: Callable[[], Iterable[Entry]] = tuple,
    ) -> ModelRecord | None:
        """Apply ``change`` by compare-and-set and answer the record as it then is.

        Starts from the mirror, or with ``fresh`` from the store; on a conflict the change is asked
        again with what stands there. ``relied_on`` answers what else must be as mirrored when a
        record is created. Raises ``StoreUnavailableError``, ``RecordError`` and what
        ``change`` raises.
        """
        key = self._mirror.key(model_id)
        item = await self._mirror.read(model_id) if fresh else self._mirror.get(model_id)
        for _ in range(CAS_TRIES_MAX):
            is_there = item is not None and not self._mirror.is_outlived(item)
            present = self._parsed.get(model_id, item) if item is not None and is_there else None
            if is_there and present is None:
                raise RecordError(f"the record of model {model_id} is unreadable; unregister it")
            wanted = change(present)
            if wanted is present:
                return present
            if wanted is None:
                self.refuse_if_emptied()
            revision = 0 if item is None else item.mod_revision
            if wanted is None and item is not None and not revision:
                # Others know it, too, and must see it go: a new store has to have it first.
                await self._mirror.restore(model_id)
                item = self._mirror.get(model_id)
                continue
            value = None if wanted is None else wanted.encode()
            write = Write(key, value, if_revision=revision)
            result = await self._write(write, relied_on() if present is None else ())
            item = result.item
            if item is not None:
                if result.succeeded and wanted is not None:
                    self._parsed.remember(model_id, item.value, wanted)  # no need to parse it
                self._mirror.written(item)
            elif revision:
                self._mirror.deleted_by_us(model_id, revision)
            if result.succeeded:
                return wanted
        raise ContendedError(
            f"the record of model {model_id} changed {CAS_TRIES_MAX} times while being changed"
        )

    async def _write(self, write: Write, relied_on: Iterable[Entry]) -> WriteResult:
        entries = [(mirror, key_id, mirror.get(key_id)) for mirror, key_id in relied_on]
        if not entries:
            return await self._store.write(write)
        checks = [
            Check(mirror.key(key_id), 0 if item is None else item.mod_revision)
            for mirror, key_id, item in entries
        ]
        succeeded, items = await self._store.transact([write, *checks])
        for (mirror, key_id, _), check, item in zip(entries, checks, items[1:], strict=True):
            mirror.answered(key_id, check.if_revision, item)
        return WriteResult(succeeded, items[0])

    def refuse_if_emptied(self) -> None:
        """Raise soon after the store lost everything: who has not noticed yet would restore what we
        delete.
        """
        since_s = anyio.current_time() - self._mirror.store_replaced_s
        if since_s < self._limits.restore_grace_s:
            raise StoreUnavailableError(
                "the store has just lost its records and is given them back; retry in"
                f" {self._limits.restore_grace_s - since_s:.0f} s"
            )

    async def delete_corrupt(self, model_id: ModelId) -> bool:
        """Delete a record that cannot be read; answers whether there was one."""
        item = await self._store.get(self._mirror.key(model_id))
        if item is None or self._parsed.get(model_id, item) is not None:
            return False
        result = await self._store.write(Write(item.key, None, if_revision=item.mod_revision))
        if result.succeeded:
            self._mirror.deleted_by_us(model_id, item.mod_revision)
        return result.succeeded

    def _changed(self, key_id: str, item: Item | None) -> None:
        model_id = ModelId(key_id)
        if item is not None and _NO_USE in item.value:
            self.never_used.add(model_id)
        else:
            self.never_used.discard(model_id)
        record: ModelRecord | None = None
        # Most records name no instance: they stay packed, and no listener is interested in them.
        quiet = item is not None and not any(word in item.value for word in _TELLING)
        known = key_id in self._holders or key_id in self._failed or key_id in self.policies
        if item is None:
            self._parsed.forget(key_id)
        elif not quiet or known:
            record = self._parsed.get(key_id, item)
        elif not item.value.startswith(b"{"):
            self._parsed.get(key_id, item)  # for the log
        self._holders.set(model_id, frozenset(record.copies if record is not None else ()))
        self._failed.set(model_id, frozenset(record.failures if record is not None else ()))
        if quiet and not known:
            return
        self.policies.note(model_id, record)
        for listener in self._listeners:
            listener(model_id, record)

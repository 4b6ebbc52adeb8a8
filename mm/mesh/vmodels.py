"""The mirror of the vmodel records: which model is active, and what changed (spec core 2.15).

Owns look-ups. Changing them is ``vmodel_writer``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.lowlevel

from mm.core.calls import NamedBy
from mm.core.ids import ModelId
from mm.core.records import VModelRecord
from mm.core.vmodel_changes import references
from mm.errors import MeshError, ModelMovedError, ModelNotFoundError, StatusCode
from mm.limits import Limits
from mm.mesh.look_ups import ANSWER_S, LookUps
from mm.mesh.mirror import Mirror
from mm.mesh.parsed_records import ParsedRecords
from mm.mesh.ports import Item, Store
from mm.mesh.vmodel_references import TOLD_MAX, VModelReferences

logger = logging.getLogger(__name__)

#: Records of a table taken over before others have their turn.
AT_ONCE: Final = 200

#: Told after a change of a record; None when it is gone, or cannot be read.
VModelListener = Callable[[str, VModelRecord | None], None]


@dataclass(frozen=True, slots=True)
class _Broken:
    model_id: ModelId
    until_s: float


class VModels:
    """Every vmodel record of the cluster, as this instance sees it."""

    def __init__(self, store: Store, prefix: str, limits: Limits) -> None:
        self._store = store
        self._listing = anyio.Lock()
        self.mirror = Mirror(store, prefix, self._changed)
        self.look_ups = LookUps(store, self.mirror, limits)
        self.run = self.mirror.run
        #: Vmodels whose model is missing, as the store said a moment ago, the oldest first.
        self._broken: dict[str, _Broken] = {}
        self._broken_max = limits.look_ups_per_s_max
        self._parsed = ParsedRecords(VModelRecord.decode)
        self.references = VModelReferences()
        self._listeners: list[VModelListener] = [self.references.changed]

    def __len__(self) -> int:
        return len(self.mirror)

    @property
    def corrupt_count(self) -> int:
        """Records in the store that could not be read; each was named in the log."""
        return self._parsed.corrupt_count + self.mirror.skipped_count

    def listen(self, listener: VModelListener) -> None:
        """Call ``listener`` after every change; it must not block or raise."""
        self._listeners.append(listener)

    def get(self, vmodel_id: str) -> VModelRecord | None:
        """Answer the mirrored record; None when it is unknown or unreadable."""
        item = self.mirror.get(vmodel_id)
        return None if item is None else self._parsed.get(vmodel_id, item)

    async def find(self, vmodel_id: str) -> VModelRecord | None:
        """Answer the mirrored record, else what the store says.

        Raises ``StoreUnavailableError`` or ``LimitError``.
        """
        item = await self.look_ups.find(vmodel_id)
        return None if item is None else self._parsed.get(vmodel_id, item)

    async def read(self, vmodel_id: str) -> VModelRecord | None:
        """Answer what the store says now.

        Raises ``StoreUnavailableError``, or ``LimitError`` when too many ask already.
        """
        item = await self.look_ups.read(vmodel_id)
        return None if item is None else self._parsed.get(vmodel_id, item)

    async def look_at_references(self, model_id: ModelId) -> None:
        """See that what ``references`` tells of a model is so, of all that it tells of. Raises
        ``StoreUnavailableError``.

        For the rare cases in which the count of the model itself cannot be trusted. Few vmodels are
        read one by one; many in one table, by one caller after the other.
        """
        if self.references.count(model_id) > TOLD_MAX:
            async with self._listing:
                await self._look_at_all()
            return
        for vmodel_id in self.references.of(model_id):
            await self.mirror.read(vmodel_id)

    async def _look_at_all(self) -> None:
        known = dict(self.mirror.items())
        table = await self._store.list(self.mirror.prefix)
        present = {item.key[len(self.mirror.prefix) :]: item for item in table.items}
        for number, item in enumerate(table.items):
            self.mirror.written(item)
            if not number % AT_ONCE:
                await anyio.lowlevel.checkpoint()
        for vmodel_id, item in known.items():
            if vmodel_id not in present and 0 < item.mod_revision <= table.revision:
                self.mirror.deleted_by_us(vmodel_id, item.mod_revision)

    async def resolve(
        self, vmodel_id: str, missing: Collection[ModelId] = (), *, fresh: bool = False
    ) -> ModelId:
        """Answer the active model, with ``fresh`` the one that the store has. If models that it was
        before turned out to be ``missing``: what the store says it is now, else the target (spec
        core 2.15).

        Raises ``ModelNotFoundError``, ``StoreUnavailableError`` or ``LimitError``; INTERNAL if
        there is no other model.
        """
        if missing:
            return await self._resolve_anew(vmodel_id, missing)
        record = await (self.read(vmodel_id) if fresh else self.find(vmodel_id))
        return _required(record).active_model_id

    def has_moved(self, named_by: NamedBy, model_id: ModelId) -> bool:
        """Answer whether a vmodel that named a model is seen to have left it since."""
        item = self.mirror.get(named_by.vmodel_id)
        if item is None or item.mod_revision <= named_by.revision:
            return False
        record = self.get(named_by.vmodel_id)
        return record is not None and model_id not in references(record)

    def refuse_if_moved(self, named_by: NamedBy | None, model_id: ModelId) -> None:
        """Raise ``ModelMovedError`` if a vmodel named the model, and has left it since."""
        if named_by is not None and self.has_moved(named_by, model_id):
            raise ModelMovedError

    def as_mirrored(self, named_by: NamedBy) -> NamedBy:
        """Answer the same with the revision that is mirrored, if that is newer."""
        item = self.mirror.get(named_by.vmodel_id)
        revision = 0 if item is None else item.mod_revision
        return named_by._replace(revision=max(revision, named_by.revision))

    async def _resolve_anew(self, vmodel_id: str, missing: Collection[ModelId]) -> ModelId:
        now_s = anyio.current_time()
        told = self._broken.get(vmodel_id)
        # A switch deletes the old model in the same transaction, so a vmodel whose model is missing
        # stays broken until somebody mends it: each call need not ask the store for that.
        if told is None or told.until_s < now_s or told.model_id not in missing:
            record = _required(await self.read(vmodel_id))
            for model_id in (record.active_model_id, record.target_model_id):
                if model_id and model_id not in missing:
                    return model_id
            self._broken.pop(vmodel_id, None)
            if len(self._broken) >= self._broken_max:
                del self._broken[next(iter(self._broken))]
            told = self._broken[vmodel_id] = _Broken(record.target_model_id, now_s + ANSWER_S)
        raise MeshError(
            f"Target model {told.model_id} of vmodel {vmodel_id} not found",
            code=StatusCode.INTERNAL,
        )

    def _changed(self, vmodel_id: str, item: Item | None) -> None:
        if item is None:
            self._parsed.forget(vmodel_id)
        record = None if item is None else self._parsed.peek(vmodel_id, item)
        for listener in self._listeners:
            listener(vmodel_id, record)


def _required(record: VModelRecord | None) -> VModelRecord:
    if record is None:
        raise ModelNotFoundError("vmodel not found")
    return record

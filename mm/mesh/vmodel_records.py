"""The records of vmodels and of their models, mirrored and stored: read together, written together.

Owns what the mirrors know, what has to be asked for, and the transaction. What is written, and when
it is tried again, ``vmodel_writer`` says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import anyio

from mm.config import Config
from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.core.vmodel_changes import ModelRecords, VModelChange
from mm.errors import MeshError, StatusCode, StoreUnavailableError
from mm.mesh.confirmations import Entry
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Check, Part, Store, Write
from mm.mesh.registry import Registry
from mm.mesh.statistics import Counters
from mm.mesh.vmodels import VModels


class UnreadableVModelError(MeshError):
    """What is stored is no record of a vmodel: nobody can tell which models it counts for."""

    code = StatusCode.FAILED_PRECONDITION

    def __init__(self, vmodel_id: str, *, owner: str = "") -> None:
        text = f"the record of vmodel {vmodel_id} is unreadable; delete it"
        # Whose it is stands there, too.
        super().__init__(f"{text} without an owner: it may not be {owner}'s" if owner else text)


class VModelRecords:
    """Two tables of the store, as one."""

    def __init__(
        self,
        config: Config,
        store: Store,
        registry: Registry,
        vmodels: VModels,
        counters: Counters,
    ) -> None:
        self._config = config
        self._store = store
        self._registry = registry
        self._vmodels = vmodels
        self._counters = counters

    def are_known(self, vmodel_id: str, models: Collection[ModelId]) -> bool:
        """Answer whether the mirrors have what there is to know of a change."""
        is_readable = (self._vmodels.get(vmodel_id) is None) == (
            self._vmodels.mirror.get(vmodel_id) is None
        )
        return is_readable and not (
            self._vmodels.mirror.is_unconfirmed(vmodel_id)
            or any(self._registry.mirror.is_unconfirmed(each) for each in models)
        )

    def entries(self, vmodel_id: str, model_ids: Iterable[ModelId] = ()) -> list[Entry]:
        """Answer what an answer about a vmodel and these models is taken from."""
        models = [(self._registry.mirror, str(each)) for each in sorted(model_ids)]
        return [(self._vmodels.mirror, vmodel_id), *models]

    def relied_on(
        self, vmodel_id: str, models: ModelRecords, target_id: ModelId | None
    ) -> list[Entry]:
        """Answer what a plan is made from, and need not write: that a model is missing, and which
        other vmodels count for the target when it comes back, as far as they are told. Any of that
        may be wrong by now, or only here, and a reference that is counted wrong stays.
        """
        missing = [model_id for model_id, record in models.items() if record is None]
        others = self._vmodels.references.of(target_id) if target_id in missing else ()
        return [
            *((self._registry.mirror, str(each)) for each in missing),
            *((self._vmodels.mirror, str(each)) for each in others if each != vmodel_id),
        ]

    # --- reading ---

    async def vmodel(self, vmodel_id: str, *, fresh: bool) -> VModelRecord | None:
        """Answer a vmodel as it is mirrored, or with ``fresh`` as it is stored.

        Raises ``UnreadableVModelError`` or ``StoreUnavailableError``.
        """
        mirror = self._vmodels.mirror
        await self._update(mirror, [vmodel_id], fresh=fresh)
        vmodel = self._vmodels.get(vmodel_id)
        if vmodel is None and mirror.get(vmodel_id) is not None:
            raise UnreadableVModelError(vmodel_id)
        return vmodel

    async def update_models(self, models: Collection[ModelId], *, fresh: bool) -> None:
        """See that the mirror is right about these. Raises ``StoreUnavailableError``."""
        await self._update(self._registry.mirror, models, fresh=fresh)

    async def _update(self, mirror: Mirror, ids: Collection[str], *, fresh: bool) -> None:
        """See that the mirror is right about these: about all with ``fresh``, or as far as it knows
        that it is not.
        """
        wrong = [key_id for key_id in ids if fresh or mirror.is_unconfirmed(key_id)]
        if not wrong:
            return
        failure: StoreUnavailableError | None = None

        async def read(key_id: str) -> None:
            nonlocal failure
            try:
                await mirror.read(key_id)
            except StoreUnavailableError as exc:
                failure = exc

        async with anyio.create_task_group() as group:
            for key_id in wrong:
                group.start_soon(read, key_id)
        if failure is not None:
            raise failure

    def models(self, concerned: Collection[ModelId], target_id: ModelId | None) -> ModelRecords:
        """Answer the models as they are mirrored. Raises ``MeshError`` for a target that cannot be
        read.
        """
        models: dict[ModelId, ModelRecord | None] = {}
        for model_id in concerned:
            models[model_id] = self._registry.get(model_id)
            is_there = self._registry.mirror.get(model_id) is not None
            if models[model_id] is None and is_there and model_id == target_id:
                raise MeshError(
                    f"the record of model {model_id} is unreadable; unregister it",
                    code=StatusCode.FAILED_PRECONDITION,
                )
        return models

    # --- writing ---

    async def write(
        self, changes: Mapping[str, VModelChange], relied_on: Iterable[Entry] = ()
    ) -> bool:
        """Answer whether they are stored; else the mirrors have what stood in the way. Of several
        changes of one model the last one counts: it was planned on those before.

        ``relied_on``: what must be as mirrored, too.
        """
        self._require_writable()
        values: dict[Entry, bytes | None] = {}
        for vmodel_id, change in changes.items():
            values[self._vmodels.mirror, vmodel_id] = _value(change.vmodel)
            for model_id, record in change.models.items():
                values[self._registry.mirror, model_id] = _value(record)
        if None in values.values():
            self._registry.refuse_if_emptied()
        parts: dict[Entry, Part] = {}
        for entry in (*values, *relied_on):
            mirror, key_id = entry
            key, item = mirror.key(key_id), mirror.get(key_id)
            revision = 0 if item is None else item.mod_revision
            is_written = entry in values
            parts[entry] = (
                Write(key, values[entry], revision) if is_written else Check(key, revision)
            )
        succeeded, items = await self._store.transact(list(parts.values()))
        for ((mirror, key_id), part), item in zip(parts.items(), items, strict=True):
            mirror.answered(key_id, part.if_revision or 0, item)
        self._counters.vmodel_changes += succeeded * len(changes)
        self._counters.vmodel_conflicts += not succeeded
        return succeeded

    def _require_writable(self) -> None:
        if self._config.kv_read_only:
            raise MeshError("model-mesh is in read-only mode", code=StatusCode.UNAVAILABLE)

    async def delete_unreadable(self, vmodel_id: str) -> None:
        """Delete a record that cannot be read. Raises ``StoreUnavailableError``."""
        self._require_writable()
        item = await self._vmodels.mirror.read(vmodel_id)
        if item is None or self._vmodels.get(vmodel_id) is not None:
            return
        result = await self._store.write(Write(item.key, None, if_revision=item.mod_revision))
        if result.succeeded:
            self._vmodels.mirror.deleted_by_us(vmodel_id, item.mod_revision)


def _value(record: VModelRecord | ModelRecord | None) -> bytes | None:
    return None if record is None else record.encode()

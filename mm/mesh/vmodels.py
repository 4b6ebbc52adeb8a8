"""The mirror of the vmodel records: which model is active, and what changed (spec core 2.15).

Owns look-ups and waiting for changes. Changing them is ``vmodel_writer``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio

from mm.core.ids import ModelId
from mm.core.records import RecordError, VModelRecord
from mm.errors import ModelNotFoundError
from mm.limits import Limits
from mm.mesh.look_ups import LookUps
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Item, Store

logger = logging.getLogger(__name__)

#: Told after a change of a record; None when it is gone, or cannot be read.
VModelListener = Callable[[str, VModelRecord | None], None]


class VModels:
    """Every vmodel record of the cluster, as this instance sees it."""

    def __init__(self, store: Store, prefix: str, limits: Limits) -> None:
        self.mirror = Mirror(store, prefix, self._changed)
        self.look_ups = LookUps(store, self.mirror, limits)
        self.run = self.mirror.run
        self._listeners: list[VModelListener] = []
        #: Set at the next change of the vmodel; there while somebody waits.
        self._waited_for: dict[str, anyio.Event] = {}

    def __len__(self) -> int:
        return len(self.mirror)

    def listen(self, listener: VModelListener) -> None:
        """Call ``listener`` after every change; it must not block or raise."""
        self._listeners.append(listener)

    def get(self, vmodel_id: str) -> VModelRecord | None:
        """Answer the mirrored record; None when it is unknown or unreadable."""
        item = self.mirror.get(vmodel_id)
        return None if item is None else _decode(item)

    async def find(self, vmodel_id: str) -> VModelRecord | None:
        """Answer the mirrored record, else what the store says.

        Raises ``StoreUnavailableError`` or ``LimitError``.
        """
        item = await self.look_ups.find(vmodel_id)
        return None if item is None else _decode(item)

    async def read(self, vmodel_id: str) -> VModelRecord | None:
        """Answer what the store says now.

        Raises ``StoreUnavailableError``, or ``LimitError`` when too many ask already.
        """
        item = await self.look_ups.read(vmodel_id)
        return None if item is None else _decode(item)

    async def resolve(self, vmodel_id: str) -> ModelId:
        """Answer the active model.

        Raises ``ModelNotFoundError``, ``StoreUnavailableError`` or ``LimitError``.
        """
        record = await self.find(vmodel_id)
        if record is None:
            raise ModelNotFoundError("vmodel not found")
        return record.active_model_id

    async def wait_change(self, vmodel_id: str) -> None:
        """Return at the next change of the vmodel that is seen here."""
        event = self._waited_for.setdefault(vmodel_id, anyio.Event())
        try:
            await event.wait()
        finally:
            if not event.statistics().tasks_waiting and self._waited_for.get(vmodel_id) is event:
                del self._waited_for[vmodel_id]

    def _changed(self, vmodel_id: str, item: Item | None) -> None:
        event = self._waited_for.pop(vmodel_id, None)
        if event is not None:
            event.set()
        if self._listeners:
            record = None if item is None else _decode(item)
            for listener in self._listeners:
                listener(vmodel_id, record)


def _decode(item: Item) -> VModelRecord | None:
    try:
        return VModelRecord.decode(item.value)
    except RecordError as exc:
        logger.error("record %s skipped: %s", item.key, exc)
        return None

"""VModels as calls need them: the mirror of their records, and which model is active (spec core
2.15).

Changing them is not here yet.
"""

from __future__ import annotations

import logging

from mm.core.ids import ModelId
from mm.core.records import RecordError, VModelRecord
from mm.errors import ModelNotFoundError
from mm.limits import Limits
from mm.mesh.look_ups import LookUps
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Item, Store

logger = logging.getLogger(__name__)


class VModels:
    """Every vmodel record of the cluster, as this instance sees it."""

    def __init__(self, store: Store, prefix: str, limits: Limits) -> None:
        self.mirror = Mirror(store, prefix, lambda _id, _item: None)
        self.look_ups = LookUps(store, self.mirror, limits)
        self.run = self.mirror.run

    async def resolve(self, vmodel_id: str) -> ModelId:
        """Answer the active model.

        Raises ``ModelNotFoundError``, ``StoreUnavailableError`` or ``LimitError``.
        """
        item = await self.look_ups.find(vmodel_id)
        record = None if item is None else _decode(item)
        if record is None or not record.active_model_id:
            raise ModelNotFoundError("vmodel not found")
        return record.active_model_id


def _decode(item: Item) -> VModelRecord | None:
    try:
        return VModelRecord.decode(item.value)
    except RecordError as exc:
        logger.error("record %s skipped: %s", item.key, exc)
        return None

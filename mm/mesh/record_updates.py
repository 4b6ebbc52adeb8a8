"""One change to many records, few at a time: what the janitor and the reaper have in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import anyio

from mm.core.ids import ModelId
from mm.core.records import RecordError
from mm.errors import ContendedError, StoreUnavailableError
from mm.mesh.registry import Change, Registry

logger = logging.getLogger(__name__)

#: Writes at a time; a vanished instance may have held thousands of copies.
CONCURRENCY = 16


async def update_all(registry: Registry, changes: Mapping[ModelId, Change]) -> None:
    """Change these records. If the store goes away, the rest is left for the next time."""
    limiter = anyio.CapacityLimiter(CONCURRENCY)
    is_away = False

    async def update(model_id: ModelId) -> None:
        nonlocal is_away
        async with limiter:
            if is_away:
                return
            try:
                await registry.update(model_id, changes[model_id])
            except ContendedError as exc:
                logger.warning("the record of model %s is not cleaned yet: %s", model_id, exc)
            except StoreUnavailableError as exc:
                logger.warning("%d records are not cleaned yet: %s", len(changes), exc)
                is_away = True
            except RecordError as exc:
                logger.warning("the record of model %s is not cleaned: %s", model_id, exc)

    async with anyio.create_task_group() as group:
        for model_id in sorted(changes):  # in the same order each time: simulations are repeated
            group.start_soon(update, model_id)

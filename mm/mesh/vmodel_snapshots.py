"""What a vmodel and the models that it names were at one moment (spec core 6.4, interop 1.5).

Owns reading them together, for an answer. What is said of them is ``vmodel_manager``'s.

The tables are mirrored by two watches, and one may be far ahead of the other: a switch deletes the
old model in the same transaction, and whoever takes the vmodel from one mirror and its models from
the other tells of a model that serves, and is not there. So records are taken from the mirrors in
one go, and count if the store has these revisions, all of them at a time. What it has otherwise is
read, the models after the vmodel; if the vmodel is the same still after that, it was so while each
of the models was.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import anyio

from mm.core.ids import ModelId
from mm.core.records import VModelRecord
from mm.core.vmodel_changes import ModelRecords, references
from mm.errors import ContendedError, LimitError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.confirmations import Confirmations, Entry
from mm.mesh.registry import Registry
from mm.mesh.vmodels import VModels

logger = logging.getLogger(__name__)

#: Each time the vmodel itself has changed between two reads of a few milliseconds.
TRIES_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class VModelSnapshot:
    """A vmodel, and each model that it names; None for one that the store does not have."""

    vmodel: VModelRecord
    models: ModelRecords


class VModelSnapshots:
    """Takes snapshots; costs a share of one read where the mirrors are right."""

    def __init__(
        self,
        limits: Limits,
        registry: Registry,
        vmodels: VModels,
        confirmations: Confirmations,
    ) -> None:
        self._wait_s = limits.vmodel_status_wait_s
        self._registry = registry
        self._vmodels = vmodels
        self._confirmations = confirmations

    async def take(self, vmodel_id: str) -> VModelSnapshot | None:
        """Answer what the store has, or, if it says nothing, what is mirrored, as long as no model
        is missing there: then that is no answer. None for an unknown vmodel.

        Raises ``StoreUnavailableError`` or ``LimitError``.
        """
        await self._vmodels.find(vmodel_id)
        known = self._mirrored(vmodel_id)  # from here to the question nobody else has a turn
        if known is None:
            return None
        outdated = await self._outdated(vmodel_id, known)
        if outdated is None:
            if None not in known.models.values():
                return known
            outdated = [(self._vmodels.mirror, vmodel_id)]
        return await self._read(vmodel_id, known, outdated) if outdated else known

    def _mirrored(self, vmodel_id: str) -> VModelSnapshot | None:
        vmodel = self._vmodels.get(vmodel_id)
        if vmodel is None:
            return None
        models = {each: self._registry.get(each) for each in sorted(references(vmodel))}
        return VModelSnapshot(vmodel, models)

    async def _outdated(self, vmodel_id: str, known: VModelSnapshot) -> Sequence[Entry] | None:
        """Answer what the store has otherwise; None if it says nothing."""
        entries: list[Entry] = [(self._vmodels.mirror, vmodel_id)]
        entries += ((self._registry.mirror, str(each)) for each in known.models)
        try:
            with anyio.move_on_after(self._wait_s):
                return await self._confirmations.outdated(entries)
        except (LimitError, StoreUnavailableError) as exc:
            logger.debug("%s is told as it is mirrored: %s", vmodel_id, exc)
        return None

    async def _read(
        self, vmodel_id: str, known: VModelSnapshot, outdated: Sequence[Entry]
    ) -> VModelSnapshot | None:
        """Answer what the store has, where the mirrors have something else."""
        mirror = self._vmodels.mirror
        of_vmodel: Entry = (mirror, vmodel_id)
        for _ in range(TRIES_MAX):
            unsure = [ModelId(key_id) for _, key_id in outdated]
            if of_vmodel in outdated:
                if await self._vmodels.read(vmodel_id) is None:
                    return None
                mirrored = self._mirrored(vmodel_id)
                if mirrored is None or mirror.is_unconfirmed(vmodel_id):
                    return mirrored  # the second is about to be written back
                known, unsure = mirrored, list(mirrored.models)
            item = mirror.get(vmodel_id)
            models = dict(known.models)
            for model_id in unsure:
                models[model_id] = await self._registry.read(model_id)
            known = VModelSnapshot(known.vmodel, models)
            outdated = [of_vmodel]
            if mirror.get(vmodel_id) is item:
                outdated = await self._confirmations.outdated([of_vmodel])
            if not outdated:
                return known
        raise ContendedError(f"vmodel {vmodel_id} changed {TRIES_MAX} times while being read")

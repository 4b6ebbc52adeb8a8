"""Which vmodels refer to a model: the index behind lists of models.

Made from the mirror of the vmodels, event by event. How often a model is referred to is in its own
record, which is what counts (``refs``), unless that is gone or wrong; this tells by whom.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mm.core.ids import ModelId, VModelId
from mm.core.records import VModelRecord
from mm.core.vmodel_changes import OtherReferences

#: Of the vmodels that refer to one model so many are told: whoever wants all lists the vmodels.
TOLD_MAX: Final = 100


class VModelReferences:
    """Model -> vmodels whose active or target it is."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[ModelId, ...]] = {}
        self._vmodels: dict[ModelId, set[VModelId]] = {}

    def count(self, model_id: ModelId, *, besides: str = "") -> int:
        """Answer how many vmodels refer to a model, one of them not counted."""
        vmodels = self._vmodels.get(model_id, set())
        return len(vmodels) - (besides in vmodels)

    def others(self, vmodel_id: str, models: Iterable[ModelId]) -> OtherReferences:
        """Answer how many vmodels refer to each of these models besides one."""
        return {each: self.count(each, besides=vmodel_id) for each in models}

    def of(self, model_id: ModelId) -> tuple[VModelId, ...]:
        """Answer the vmodels that refer to a model, by id; not more than ``TOLD_MAX``."""
        return tuple(sorted(self._vmodels.get(model_id, ()))[:TOLD_MAX])

    def changed(self, key_id: str, record: VModelRecord | None) -> None:
        """Hear of a change of the mirror."""
        models = _models_of(record)
        known = self._models.get(key_id, ())
        if models == known:
            return
        vmodel_id = VModelId(key_id)
        for model_id in known:
            vmodels = self._vmodels[model_id]
            vmodels.discard(vmodel_id)
            if not vmodels:
                del self._vmodels[model_id]
        for model_id in models:
            self._vmodels.setdefault(model_id, set()).add(vmodel_id)
        if models:
            self._models[key_id] = models
        else:
            self._models.pop(key_id, None)


def _models_of(record: VModelRecord | None) -> tuple[ModelId, ...]:
    if record is None:
        return ()
    return tuple(dict.fromkeys((record.active_model_id, record.target_model_id)))

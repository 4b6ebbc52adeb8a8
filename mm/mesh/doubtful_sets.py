"""Sets of vmodels of which nobody knows whether they came about: the store's answer was lost, or
whoever asked has left.

If one did, and took the place of a model that served, the new one is to be loaded as after any
other. Whoever sets again hears that it is so already, and would have nothing loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mm.core.ids import ModelId
from mm.core.records import VModelRecord
from mm.mesh.vmodels import VModels

#: The oldest is forgotten: its model is loaded by the first call then.
DOUBTS_MAX: Final = 1_000


class DoubtfulSets:
    """``load`` hears of each target that turns out to be active; it must not block or raise."""

    def __init__(self, vmodels: VModels, load: Callable[[ModelId], object]) -> None:
        self._vmodels = vmodels
        self._load = load
        self._expected: dict[str, VModelRecord] = {}
        vmodels.listen(self._changed)

    def __len__(self) -> int:
        return len(self._expected)

    def add(self, vmodel_id: str, expected: VModelRecord) -> None:
        """Wait for the record that the set would leave, until there is another one."""
        self._expected.pop(vmodel_id, None)
        if len(self._expected) >= DOUBTS_MAX:
            del self._expected[next(iter(self._expected))]
        self._expected[vmodel_id] = expected
        if self._vmodels.get(vmodel_id) == expected:
            self._changed(vmodel_id, expected)

    def _changed(self, vmodel_id: str, vmodel: VModelRecord | None) -> None:
        expected = self._expected.pop(vmodel_id, None)
        if expected is not None and vmodel == expected:
            self._load(expected.active_model_id)

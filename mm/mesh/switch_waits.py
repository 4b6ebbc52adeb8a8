"""Who waits for vmodels to go over to their targets: setVModel with ``sync`` (spec core 6.2).

Owns when such a wait is over, and how many there may be. What is answered then is
``vmodel_manager``'s.
"""

from __future__ import annotations

from mm.core.ids import ModelId
from mm.core.records import VModelRecord
from mm.core.vmodel_changes import is_in_transition
from mm.errors import LimitError
from mm.limits import Limits
from mm.mesh.crowd import Crowd
from mm.mesh.statistics import Counters
from mm.mesh.vmodels import VModels


class _Wait(Crowd):
    """Those who wait for one vmodel to go over to one target."""

    __slots__ = ("ended_with",)

    def __init__(self) -> None:
        super().__init__()
        self.ended_with: VModelRecord | None = None


class SwitchWaits:
    """A change of a vmodel costs the same however many wait for its switch, until that comes: then
    they go on a few at a time.
    """

    def __init__(self, vmodels: VModels, limits: Limits, counters: Counters) -> None:
        self._vmodels = vmodels
        self._waiting_max = limits.vmodel_switches_waited_for_max
        self._counters = counters
        self._waits: dict[str, dict[ModelId, _Wait]] = {}
        self._count = 0
        vmodels.listen(self._changed)

    def refuse_if_full(self) -> None:
        """Raise ``LimitError`` if nobody else can wait."""
        if self._count >= self._waiting_max:
            self._counters.vmodel_waits_refused += 1
            raise LimitError(
                f"{self._count} calls wait for vmodels to switch already, the limit; retry later,"
                " or without sync",
                retry_after_ms=1000,
            )

    async def wait(self, vmodel_id: str, target_id: ModelId) -> VModelRecord | None:
        """Wait until the target serves, is said to have failed, or is no longer the target; answers
        the vmodel as it was then. Raises ``LimitError``.
        """
        vmodel = self._vmodels.get(vmodel_id)
        if not _is_on_its_way(vmodel, target_id):
            return vmodel
        self.refuse_if_full()
        waits = self._waits.setdefault(vmodel_id, {})
        wait = waits.setdefault(target_id, _Wait())
        self._count += 1
        try:
            await wait.wait()
        finally:
            self._count -= 1
            if not wait and not wait.is_over:
                del waits[target_id]
                if not waits:
                    del self._waits[vmodel_id]
        return wait.ended_with

    def _changed(self, vmodel_id: str, vmodel: VModelRecord | None) -> None:
        waits = self._waits.get(vmodel_id)
        if waits is None:
            return
        for target_id in [each for each in waits if not _is_on_its_way(vmodel, each)]:
            wait = waits.pop(target_id)
            wait.ended_with = vmodel
            wait.end()
        if not waits:
            del self._waits[vmodel_id]


def _is_on_its_way(vmodel: VModelRecord | None, target_id: ModelId) -> bool:
    return (
        vmodel is not None
        and vmodel.target_model_id == target_id
        and is_in_transition(vmodel)
        and not vmodel.failed
    )

"""Where a call goes on whose vmodel stood for a model that is gone, or could not be loaded.

``proxy`` and ``multi`` ask after a failed attempt of which nobody has noticed anything.
"""

from __future__ import annotations

from mm.core.calls import MOVES_MAX, Call
from mm.core.ids import ModelId
from mm.errors import LoadFailedError, LoadTimeoutError, MeshError, ModelNotFoundError
from mm.mesh.ports import Router


class Moves:
    """The models that one call of a vmodel was for, one after the other."""

    def __init__(self, router: Router, vmodel_id: str | None) -> None:
        self._router = router
        self._vmodel_id = vmodel_id
        self._left: set[ModelId] = set()

    async def follow(self, call: Call, error: MeshError) -> Call | None:
        """Answer the call for the model that the vmodel stands for now; None if there is no
        other, and the error stands. Raises ``MeshError`` if that cannot be told.
        """
        if self._vmodel_id is None or len(self._left) == MOVES_MAX:
            return None
        if isinstance(error, ModelNotFoundError):
            # It went away between two looks.
            self._left.add(call.model_id)
            return call.moved_to(await self._router.resolve(self._vmodel_id, self._left))
        if not isinstance(error, LoadFailedError | LoadTimeoutError):
            return None
        # The vmodel may have switched while the call waited for a load.
        model_id = await self._router.resolve(self._vmodel_id)
        if model_id == call.model_id or model_id in self._left:
            return None
        self._left.add(call.model_id)
        return call.moved_to(model_id)

"""Where a call goes on whose vmodel stood for a model that is gone, or could not be loaded, or that
it waited for when the vmodel moved on.

``proxy`` and ``multi`` ask after a failed attempt of which nobody has noticed anything.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mm.core.calls import MOVES_MAX, Call
from mm.core.ids import ModelId
from mm.errors import (
    LimitError,
    LoadFailedError,
    LoadTimeoutError,
    MeshError,
    ModelMovedError,
    ModelNotFoundError,
    StoreUnavailableError,
)
from mm.mesh.ports import Router

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Moves:
    """The models that one call of a vmodel was for, one after the other."""

    def __init__(self, router: Router, vmodel_id: str | None) -> None:
        self._router = router
        self._vmodel_id = vmodel_id
        self._left: set[ModelId] = set()
        self._moves_count = 0

    async def serve(self, call: Call, attempt: Callable[[Call], Awaitable[T]]) -> T:
        """Make attempts, each for where the vmodel is by then, until one has an answer, and end the
        call's turn. Raises the ``MeshError`` of the last one.
        """
        try:
            while True:
                try:
                    return await attempt(call)
                except MeshError as error:
                    moved = await self.follow(call, error)
                    if moved is None:
                        raise
                    call = moved
        finally:
            call.end_turn()

    async def follow(self, call: Call, error: MeshError) -> Call | None:
        """Answer the call for the model that the vmodel stands for now; None if there is no
        other, and the error stands. Raises ``MeshError`` if that cannot be told.
        """
        if self._vmodel_id is None:
            return None
        if isinstance(error, ModelMovedError):
            return await self._where(call, self._vmodel_id)
        if len(self._left) == MOVES_MAX:
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

    async def _where(self, call: Call, vmodel_id: str) -> Call:
        """Answer the call for where the vmodel is; nobody need ask for that if it is not known."""
        self._moves_count += 1
        model_id = call.model_id
        if self._moves_count <= MOVES_MAX:
            try:
                model_id = await self._router.resolve(vmodel_id)
                if model_id == call.model_id:  # a peer has heard of it first
                    model_id = await self._router.resolve(vmodel_id, fresh=True)
            except (LimitError, StoreUnavailableError) as exc:
                logger.debug("vmodel %s is not followed: %s", vmodel_id, exc)
        return call.moved_to(model_id) if model_id != call.model_id else stay(call)


def stay(call: Call) -> Call:
    """Answer the call for its model, wherever its vmodel may go."""
    call.named_by = None
    return call.moved_to(call.model_id)

"""Keeps the copies here of pinned models from eviction, as far as they leave room for others.

Owns which copies these are, event by event. What a pinned model is says its record; how the table
keeps a copy is ``copies``'.
"""

from __future__ import annotations

import logging

import anyio

from mm.core.ids import UNIT_BYTES, ModelId
from mm.core.model_policy import PINNED_DIVISOR
from mm.core.weights import fits, share
from mm.mesh.copies import Copies
from mm.mesh.local_copy import LocalCopy
from mm.mesh.registry import Registry
from mm.mesh.seldom import Seldom

logger = logging.getLogger(__name__)

#: Copies that found no room to be pinned are looked at again when anything changed here, and so
#: much later: room is what changes all the time.
LOOK_GAP_S = 1.0


class Pins:
    """Invariant: what is kept is pinned, serves, and takes half of the room here at most; what is
    pinned and serves, but would go beyond that, is in ``unmet``.
    """

    def __init__(self, registry: Registry, copies: Copies) -> None:
        self._registry = registry
        self._copies = copies
        #: Pinned, here, and evicted as any other: there is too much already.
        self.unmet: set[ModelId] = set()
        self._kept: dict[ModelId, LocalCopy] = {}
        self._unmet_told = Seldom()
        copies.on_weighed = self._weighed
        copies.promises.may_keep = lambda units: fits(units, self.room_units)
        registry.policies.listen(self._policy_changed)

    @property
    def room_units(self) -> int:
        """What may be kept here, as others reckon from our record, too."""
        return share(self._copies.accounting.published_capacity_units, PINNED_DIVISOR)

    async def run(self) -> None:
        """Look again at what is not kept, and keep to the room if that shrank."""
        while True:
            changed = self._copies.changed
            self._keep_to_room()
            for model_id in sorted(self.unmet):
                self._look(model_id, self._copies.get(model_id))
            await changed.wait()
            await anyio.sleep(LOOK_GAP_S)

    def _policy_changed(self, model_id: ModelId) -> None:
        self._look(model_id, self._copies.get(model_id))

    def _weighed(self, copy: LocalCopy) -> None:
        if copy.model_id in self._registry.policies:
            self._look(copy.model_id, copy)

    def _look(self, model_id: ModelId, copy: LocalCopy | None) -> None:
        """Keep a copy, or let it go, as its record says now."""
        promise = self._registry.policies.get(model_id)
        is_wanted = promise is not None and promise.policy.pinned
        if copy is None or not copy.serves or not is_wanted:
            if copy is not None:
                self._copies.release(copy)
            self.unmet.discard(model_id)
            self._kept.pop(model_id, None)
            return
        others_units = self._copies.table.kept_units - copy.weight_units * copy.is_kept
        if fits(others_units + copy.weight_units, self.room_units):
            self._copies.keep(copy)
            self._kept[model_id] = copy
            self.unmet.discard(model_id)
        else:
            self._is_unmet(copy)

    def _keep_to_room(self) -> None:
        """The capacity shrank: the copies that were pinned last go by their use again."""
        gone = [each for each, copy in self._kept.items() if not copy.is_kept]
        for model_id in gone:
            del self._kept[model_id]
        while self._kept and not fits(self._copies.table.kept_units, self.room_units):
            self._is_unmet(self._kept[next(reversed(self._kept))])

    def _is_unmet(self, copy: LocalCopy) -> None:
        self._copies.release(copy)
        self._kept.pop(copy.model_id, None)
        if copy.model_id in self.unmet:
            return
        self.unmet.add(copy.model_id)
        logger.log(
            self._unmet_told.level(anyio.current_time()),
            "model %s is pinned, but evicted like others here: pinned models take half of this"
            " instance at most, %d bytes; unpin some, or run larger or more instances (others are"
            " told at DEBUG)",
            copy.model_id,
            self.room_units * UNIT_BYTES,
        )

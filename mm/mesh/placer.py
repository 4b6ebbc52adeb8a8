"""Where a model is loaded for a call, and when it is not loaded at all (spec core 2.4 f-k).

Owns what is excluded and the errors when nothing is left; ``core.placement`` chooses.
"""

from __future__ import annotations

import logging
import random

from mm.core.calls import Call
from mm.core.ids import InstanceId
from mm.core.placement import PlacementRequest, choose_instance
from mm.core.records import ModelRecord
from mm.errors import LoadFailedError, MeshError, NoRoomError, RuntimeUnavailableError
from mm.limits import Limits
from mm.mesh.members import Members

logger = logging.getLogger(__name__)


class Placer:
    """Chooses the instance that is to load a model, from what ``members`` and the record say."""

    def __init__(
        self,
        *,
        me: InstanceId,
        members: Members,
        limits: Limits,
        failure_expiry_ms: int,
        default_units: int,
        rng: random.Random,
    ) -> None:
        self._me = me
        self._members = members
        self._limits = limits
        self._failure_expiry_ms = failure_expiry_ms
        self._default_units = default_units
        self._rng = rng

    def choose(self, call: Call, record: ModelRecord, now_ms: int) -> InstanceId:
        """Answer where to load, not to be asked again for this call. Raises ``MeshError``."""
        self.refuse_if_pointless(call, record, now_ms)
        # Where a copy failed this call and said why, `excludes` knows; "not here" may well load it.
        holders = set(record.copies) - call.tried - {self._me}
        excluded = call.excludes | holders | self._failing(record, now_ms)
        size_units = call.known_size_units or self._default_units
        placement = choose_instance(
            self._members.view(now_ms),
            PlacementRequest(
                model_id=call.model_id,
                model_type=record.info.model_type,
                excludes=frozenset(excluded),
                size_units=size_units,
                last_used_ms=call.last_used_ms,
                favour_self=call.balanced,
            ),
            self._rng,
        )
        chosen = placement.instance_id
        if chosen is None:
            raise call.failure or self._nowhere(record, now_ms)
        logger.debug("model %s: load placed on %s: %s", call.model_id, chosen, placement.reason)
        call.excludes.add(chosen)
        if chosen != self._me:
            self._members.note_sent(chosen, size_units)
        return chosen

    def refuse_if_pointless(self, call: Call, record: ModelRecord, now_ms: int) -> None:
        """Raise if no load can help: the model fails everywhere, or is loaded and not at fault."""
        if not call.may_load:
            raise call.failure or RuntimeUnavailableError("the model runtime is unavailable")
        if len(self._failing(record, now_ms)) >= self._limits.load_failures_max:
            raise call.failure or self._nowhere(record, now_ms)

    def _failing(self, record: ModelRecord, now_ms: int) -> set[InstanceId]:
        """Where loads failed recently; older failures are no reason any more (spec core 3.11,
        10.1).
        """
        oldest_ms = now_ms - self._failure_expiry_ms
        return {i for i, failed_ms in record.failures.items() if failed_ms > oldest_ms}

    def _nowhere(self, record: ModelRecord, now_ms: int) -> MeshError:
        """Answer the newest failure that still counts, else that there is no instance to load."""
        failing = self._failing(record, now_ms)
        if failing:
            newest = max(failing, key=lambda i: record.failures[i])
            return LoadFailedError(record.failure_text(newest) or f"the load failed at {newest}")
        return NoRoomError(
            "Nowhere available to load", retry_after_ms=self._members.next_reachable_ms()
        )

"""Where a model is loaded for a call, and when it is not loaded at all (spec core 2.4 f-k).

Owns what is excluded and the errors when nothing is left; ``core.placement`` chooses.
"""

from __future__ import annotations

import logging
import random

from mm.core.calls import Call
from mm.core.ids import InstanceId
from mm.core.load_failures import FailureKind, FailureRules, LoadFailure, Verdict
from mm.core.placement import PlacementRequest, choose_instance
from mm.core.records import ModelRecord
from mm.errors import LoadFailedError, MeshError, NoRoomError, RuntimeUnavailableError
from mm.mesh.members import Members

logger = logging.getLogger(__name__)


class Placer:
    """Chooses the instance that is to load a model, from what ``members`` and the record say."""

    def __init__(
        self,
        *,
        me: InstanceId,
        members: Members,
        failure_rules: FailureRules,
        default_units: int,
        rng: random.Random,
    ) -> None:
        self._me = me
        self._members = members
        self._failure_rules = failure_rules
        self._default_units = default_units
        self._rng = rng

    def choose(self, call: Call, record: ModelRecord, now_ms: int) -> InstanceId:
        """Answer where to load, not to be asked again for this call. Raises ``MeshError``."""
        verdict = self.refuse_if_pointless(call, record, now_ms)
        # Where a copy failed this call and said why, `excludes` knows; "not here" may well load it.
        holders = set(record.copies) - call.tried - {self._me}
        view = self._members.view(now_ms)
        too_small = {
            each.instance_id
            for each in view.instances
            if each.record.capacity_units < verdict.needed_units
        }
        excluded = call.excludes | holders | verdict.excluded | too_small
        size_units = call.known_size_units or max(self._default_units, verdict.needed_units)
        placement = choose_instance(
            view,
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
            raise call.failure or self._nowhere(verdict)
        logger.debug("model %s: load placed on %s: %s", call.model_id, chosen, placement.reason)
        call.excludes.add(chosen)
        if chosen != self._me:
            self._members.note_sent(chosen, size_units)
        return chosen

    def refuse_if_pointless(self, call: Call, record: ModelRecord, now_ms: int) -> Verdict:
        """Answer what earlier failures say. Raise if no load can help: the model fails everywhere,
        or is loaded and not at fault.
        """
        if not call.may_load:
            raise call.failure or RuntimeUnavailableError("the model runtime is unavailable")
        verdict = self._failure_rules.verdict(call.model_id, record, now_ms)
        if verdict.final is not None:
            raise call.failure or _told(verdict.final)
        return verdict

    def _nowhere(self, verdict: Verdict) -> MeshError:
        """Answer the newest failure that still counts, else that there is no instance to load."""
        if verdict.newest is not None:
            return _told(verdict.newest)
        return NoRoomError(
            "Nowhere available to load", retry_after_ms=self._members.next_reachable_ms()
        )


def _told(failure: LoadFailure) -> LoadFailedError:
    return LoadFailedError(
        failure.message or f"the load failed at {failure.instance_id}",
        is_permanent=failure.kind is FailureKind.PERMANENT,
    )

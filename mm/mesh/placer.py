"""Where a model is loaded for a call, and when it is not loaded at all (spec core 2.4 f-k).

Owns what is excluded, the errors when nothing is left, and what becomes of a choice: loads sent,
refused and ended. ``core.placement`` chooses, ``core.cluster_state`` knows the instances.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import anyio

from mm.core.calls import REFUSALS_MAX, Call, Outcome, PeerRoute
from mm.core.cluster_state import ClusterState
from mm.core.cluster_view import ClusterView
from mm.core.constraints import no_instance_message
from mm.core.hop_state import HopState
from mm.core.ids import InstanceId
from mm.core.load_failures import FailureKind, FailureRules, LoadFailure, Verdict
from mm.core.placement import (
    Placement,
    PlacementReason,
    PlacementRequest,
    choose_instance,
    is_still_right,
    may_host,
)
from mm.core.records import InstanceRecord, ModelRecord
from mm.errors import (
    LoadFailedError,
    MeshError,
    NoEligibleInstanceError,
    NoRoomError,
    RuntimeUnavailableError,
)
from mm.mesh.hop_errors import hop_error
from mm.mesh.members import Members
from mm.mesh.statistics import Counters

logger = logging.getLogger(__name__)

#: After these the instance has, or will have, the model that it was asked to load.
_TOOK: Final = frozenset(
    {
        Outcome.ANSWERED,
        Outcome.ABANDONED,
        Outcome.EXHAUSTED,
        Outcome.RUNTIME_UNAVAILABLE,
    }
)


class Placer:
    """Chooses the instance that is to load a model, and checks what others chose for this one."""

    def __init__(
        self,
        *,
        me: InstanceId,
        cluster: ClusterState,
        own_record: Callable[[], InstanceRecord],
        members: Members,
        failure_rules: FailureRules,
        default_units: int,
        counters: Counters,
        rng: random.Random,
    ) -> None:
        self._me = me
        self._cluster = cluster
        self._own_record = own_record
        self._members = members
        self._failure_rules = failure_rules
        self._default_units = default_units
        self._counters = counters
        self._rng = rng

    # --- the choice ---

    def choose(self, call: Call, record: ModelRecord, now_ms: int) -> InstanceId:
        """Answer where to load, not to be asked again for this call. Raises ``MeshError``."""
        verdict = self.refuse_if_pointless(call, record, now_ms)
        view, request = self.view(now_ms), self._request(call, record, verdict)
        placement = self._same_as_before(call, request)
        if placement is None and call.refusals_count >= REFUSALS_MAX:
            placement = self._among_refusing(view, call, record, verdict)
        if placement is None:
            placement = choose_instance(view, request, self._rng)
            if placement.instance_id is None:
                placement = self._among_refusing(view, call, record, verdict) or placement
        chosen = placement.instance_id
        if chosen is None:
            raise call.failure or self._nowhere(placement.reason, record, verdict)
        logger.debug("model %s: load placed on %s: %s", call.model_id, chosen, placement.reason)
        call.excludes.add(chosen)
        if chosen != self._me:
            now_s = anyio.current_time()
            self._cluster.load_sent(chosen, call.model_id, request.size_units, now_s=now_s)
        return chosen

    def choose_spare(self, call: Call, record: ModelRecord, now_ms: int) -> InstanceId | None:
        """Answer where to load a copy that nobody waits for; None if that would cost more than it
        brings: the instance would have to evict what was used later. Raises ``MeshError``.
        """
        verdict = self.refuse_if_pointless(call, record, now_ms)
        view, request = self.view(now_ms), self._request(call, record, verdict)
        placement = self._same_as_before(call, request)
        if placement is None:
            placement = choose_instance(view, request, self._rng)
            if placement.instance_id is None or call.refusals_count >= REFUSALS_MAX:
                placement = self._among_refusing(view, call, record, verdict) or placement
            if placement.instance_id is None:
                return None
            chosen = view.find(placement.instance_id)
            is_full = chosen is None or chosen.remaining_units < request.size_units
            if chosen is None or (is_full and chosen.lru_time_ms > (call.last_used_ms or now_ms)):
                return None
        target = placement.instance_id
        assert target is not None, placement
        call.excludes.add(target)
        if target != self._me:
            now_s = anyio.current_time()
            self._cluster.load_sent(target, call.model_id, request.size_units, now_s=now_s)
        return target

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

    # --- a choice that a peer made ---

    def check(self, call: Call, record: ModelRecord, now_ms: int) -> None:
        """Raise "stale" if a peer should not have chosen this instance, as long as it may be told
        so.
        """
        view, model_type = self.view(now_ms), record.info.model_type
        if not may_host(view, model_type):
            raise hop_error(Outcome.STALE, self._no_instance(model_type))
        if not call.may_refuse:
            return
        if not call.method and self._is_begun_unseen(call, record):
            raise hop_error(Outcome.STALE, f"others have begun to load model {call.model_id}")
        verdict = self._failure_rules.verdict(call.model_id, record, now_ms)
        request = self._request(call, record, verdict)
        if call.sender is not None:
            # It knew of itself what its record here may not say yet, and chose another.
            request = replace(request, excludes=request.excludes | {call.sender})
        if is_still_right(view, request):
            return
        self._counters.loads_refused += 1
        refusal = hop_error(Outcome.STALE, f"others can load model {call.model_id} better")
        refusal.hop_state = HopState.of(self._own_record()).write()
        raise refusal

    def _is_begun_unseen(self, call: Call, record: ModelRecord) -> bool:
        """Whether there are copies, and who asks for one knows of none: it asks for want of any."""
        return call.excludes.isdisjoint(record.copies) and any(
            self._members.stays(holder) for holder in record.copies
        )

    # --- what became of ours ---

    def refused(self, call: Call, route: PeerRoute, state: str) -> None:
        """A peer refused a load, and told why."""
        told = HopState.read(state)
        if told is None:
            return
        self._counters.loads_sent_back += 1
        now_s = anyio.current_time()
        self._cluster.learn(route.instance_id, told, now_s=now_s, refused=call.model_id)
        call.refused_by.add(route.instance_id)
        call.refusals_count += 1

    def load_ended(self, call: Call, route: PeerRoute, outcome: Outcome) -> None:
        """A call that was sent to have a model loaded came back."""
        # Without a method nobody waited for the end of the load.
        is_loading = outcome in (Outcome.ABANDONED, Outcome.MOVED) or not call.method
        self._cluster.load_ended(
            route.instance_id, call.model_id, took=outcome in _TOOK, is_loading=is_loading
        )

    # --- inside ---

    def view(self, now_ms: int) -> ClusterView:
        """Answer the cluster as a decision of this moment sees it."""
        return self._cluster.view(self._own_record(), now_ms=now_ms, now_s=anyio.current_time())

    def _request(self, call: Call, record: ModelRecord, verdict: Verdict) -> PlacementRequest:
        # Where a copy failed this call and said why, `excludes` knows; "not here" may well load it.
        holders = frozenset(record.copies)
        others = holders - call.tried - {self._me}
        return PlacementRequest(
            model_id=call.model_id,
            model_type=record.info.model_type,
            excludes=frozenset(call.excludes) | others | verdict.excluded,
            holders=holders,
            size_units=call.known_size_units or max(self._default_units, verdict.needed_units),
            needed_units=verdict.needed_units,
            last_used_ms=call.last_used_ms,
            favour_self=call.balanced,
        )

    def _same_as_before(self, call: Call, request: PlacementRequest) -> Placement | None:
        """Many calls may ask for one model before its record tells where it is: they share a load.

        Not with calls that were sent back, which know more than those before them.
        """
        target = self._cluster.load_target(call.model_id)
        if target is None or target in request.excludes or self._members.handle(target) is None:
            return None
        return Placement(target, PlacementReason.SENT_THERE)

    def _among_refusing(
        self, view: ClusterView, call: Call, record: ModelRecord, verdict: Verdict
    ) -> Placement | None:
        """After enough refusals, or when nobody else is left, the best that refused has to load it:
        of them it is known how they are, and even of a few known ones the best is good.
        """
        refusing = frozenset(call.refused_by)
        if not refusing:
            return None
        call.refused_by.clear()
        call.refusals_count = REFUSALS_MAX
        call.excludes -= refusing
        call.tried -= refusing
        others = frozenset(each.instance_id for each in view.instances) - refusing
        request = self._request(call, record, verdict)
        request = replace(request, excludes=request.excludes | others)
        placement = choose_instance(view, request, self._rng)
        return None if placement.instance_id is None else placement

    def _nowhere(self, reason: PlacementReason, record: ModelRecord, verdict: Verdict) -> MeshError:
        """Answer why nobody is asked: labels, the newest failure that still counts, else that there
        is no instance to load.
        """
        if reason is PlacementReason.NOT_ALLOWED:
            return NoEligibleInstanceError(self._no_instance(record.info.model_type))
        if verdict.newest is not None:
            return _told(verdict.newest)
        return NoRoomError(
            "Nowhere available to load", retry_after_ms=self._members.next_reachable_ms()
        )

    def _no_instance(self, model_type: str) -> str:
        return no_instance_message(model_type, self._cluster.constraints.required(model_type))


def _told(failure: LoadFailure) -> LoadFailedError:
    return LoadFailedError(
        failure.message or f"the load failed at {failure.instance_id}",
        is_permanent=failure.kind is FailureKind.PERMANENT,
    )

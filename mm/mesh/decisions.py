"""Routing decisions of this instance: what is known of a call, and ``core.routing``'s answer.

Owns the frozen views, and the errors of calls that end. Carrying a decision out is ``router``'s.
"""

from __future__ import annotations

import logging
import random

from mm.config import Config
from mm.core import routing
from mm.core.calls import Call, Outcome
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.core.routing import (
    Action,
    ComingCopy,
    Decision,
    Here,
    ReadyCopy,
    Reason,
    RoutingLimits,
    RoutingView,
)
from mm.errors import MeshError, NoRoomError
from mm.mesh.copies import Copies
from mm.mesh.hop_errors import hop_error
from mm.mesh.members import Members
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)


class Decisions:
    """Answers what to do with a call, from what is known here and now. Never waits."""

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        members: Members,
        copies: Copies,
        limits_concurrency: bool,
        rng: random.Random,
    ) -> None:
        self._me = config.instance_id
        self._registry = registry
        self._members = members
        self._copies = copies
        self._limits_concurrency = limits_concurrency
        self._rng = rng
        self._limits = RoutingLimits(
            attempts_max=config.retry_iterations_max,
            copies_tried_max=config.copies_tried_max,
            load_failures_max=config.load_failures_max,
        )

    def decide(self, call: Call, record: ModelRecord | None) -> Decision:
        """Answer what to do with a call; ``record`` is None for one that may not be forwarded."""
        return _noted(call, routing.decide(self._view(call, record), self._limits, self._rng))

    def last_resort(self, call: Call, record: ModelRecord) -> Decision:
        """Answer what to try before a call fails that nobody can load for."""
        view = self._view(call, record)
        return _noted(call, routing.last_resort(view, Reason.NO_COPY, self._rng))

    def has_copy(self, call: Call) -> bool:
        """Answer whether there is a copy, ready or on its way, that the call may still use."""
        action = self.decide(call, self._registry.get(call.model_id)).action
        return action not in (Action.FAIL, Action.LOAD)

    def is_busy(self, model_id: ModelId) -> bool:
        """Answer whether the copy here has as many calls as its runtime likes, or more."""
        table = self._copies.table
        return 0 < table.concurrency_max(model_id) <= table.in_flight(model_id)

    def favours_self(self, call: Call) -> bool:
        """Answer whether a copy here is as good as any (spec core 2.4 step 2)."""
        return not call.method or (call.balanced and not self._limits_concurrency)

    def failure(self, call: Call, reason: Reason) -> MeshError:
        """Answer what a call hears that ends here: the most telling failure, if there was one."""
        match reason:
            case Reason.NOT_HERE:
                # Registered here but not here: an eviction whose write is under way, or lost.
                self._copies.registrar.disown(call.model_id)
                return hop_error(Outcome.NOT_HERE, f"no copy of model {call.model_id} here")
            case Reason.ATTEMPTS_SPENT:
                failure = NoRoomError(f"{self._limits.attempts_max} retry iterations exhausted")
            case Reason.COPIES_FAILED:
                count = self._limits.copies_tried_max
                failure = NoRoomError(f"Failed to invoke model loaded in >={count} locations")
            case _:
                failure = NoRoomError("Nowhere available to load")
        return call.failure or failure

    def _view(self, call: Call, record: ModelRecord | None) -> RoutingView:
        now_ms = self._copies.clock.now_ms()
        copy = self._copies.get(call.model_id)
        here = Here.ABSENT
        if copy is not None:
            here = Here.READY if copy.serves else Here.COMING
        ready: list[ReadyCopy] = []
        coming: list[ComingCopy] = []
        suspects: list[InstanceId] = []
        if record is not None:
            ready, coming, suspects = self._members.copies_of(call.model_id, record, now_ms)
        calls_count = 0 if copy is None else self._copies.table.in_flight(call.model_id)
        return RoutingView(
            hop=call.hop,
            hops_left=call.hops_left,
            here=here,
            here_since_ms=0 if copy is None else copy.enqueued_ms,
            here_calls_count=calls_count,
            is_here_tried=self._me in call.tried,
            ready=ready,
            coming=coming,
            suspects=suspects,
            tried=call.tried,
            relays=self._relays(call, record),
            busy=call.busy,
            favour_self=self.favours_self(call),
            may_load=call.may_load,
            load_failures_count=call.load_failures_count,
            is_store_away=call.is_store_away,
            attempts_count=call.attempts,
            now_ms=now_ms,
        )

    def _relays(self, call: Call, record: ModelRecord | None) -> list[InstanceId]:
        if record is None or call.unreached.isdisjoint(record.copies):
            return []
        others = [each for each in self._members.staying() if each not in call.unreached]
        return [each for each in others if self._members.handle(each) is not None]


def _noted(call: Call, decision: Decision) -> Decision:
    logger.debug(
        "model %s: %s %s: %s",
        call.model_id,
        decision.action.value,
        decision.instance_id or "",
        decision.reason,
    )
    return decision

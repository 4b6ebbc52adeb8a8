"""What a call remembers of an attempt that failed (spec core 2.7, 10.6).

Carries out ``core.routing.retry_after``: which copies and instances are out of the question, what
the client hears if nothing else works, who is left alone for a while. Asking again is ``router``'s.
"""

from __future__ import annotations

from typing import Final

import anyio

from mm.core import call_texts
from mm.core.calls import Call, Hop, Outcome, PeerRoute
from mm.core.ids import InstanceId
from mm.core.routing import Again, retry_after
from mm.errors import (
    LoadFailedError,
    LoadTimeoutError,
    ModelMovedError,
    ModelNotFoundError,
    NoRoomError,
    QueueFullError,
    RuntimeUnavailableError,
    StoreUnavailableError,
)
from mm.mesh.members import Members
from mm.mesh.statistics import Counters

_LOAD_FAILURES: Final = frozenset(
    {Outcome.LOAD_FAILED, Outcome.LOAD_REFUSED, Outcome.LOAD_TIMEOUT, Outcome.STORE_AWAY}
)


class Retries:
    """The memory of calls between their attempts."""

    def __init__(self, me: InstanceId, members: Members, counters: Counters) -> None:
        self._me = me
        self._members = members
        self._counters = counters

    def failed_here(self, call: Call, outcome: Outcome, message: str) -> Again:
        """The runtime beside this instance did not answer, or refused."""
        if outcome is Outcome.UNREACHABLE:
            call.failure = RuntimeUnavailableError(call_texts.RUNTIME_SILENT % (self._me, message))
            if call.hop is not Hop.EXTERNAL:
                call.failure.hop_result = Outcome.UNREACHABLE.value
        return self._remember(call, self._me, outcome, message, is_here=True)

    def failed_there(self, call: Call, route: PeerRoute, outcome: Outcome, message: str) -> Again:
        """Another instance did not answer, or sent the call back."""
        match outcome:
            case Outcome.UNREACHABLE:
                self._members.mark_unreachable(route.instance_id, anyio.current_time())
                if route.hop is Hop.HIT_ONLY:
                    call.unreached.add(route.instance_id)
                call.failure = call.failure or NoRoomError(
                    call_texts.INSTANCE_GONE % (route.instance_id, message)
                )
            case Outcome.REDIRECT:
                call.busy = route.instance_id
                self._counters.redirects += 1
            case Outcome.LOAD_FAILED | Outcome.LOAD_REFUSED:
                is_permanent = outcome is Outcome.LOAD_REFUSED
                call.failure = LoadFailedError(message, is_permanent=is_permanent)
            case Outcome.LOAD_TIMEOUT:
                call.failure = LoadTimeoutError(message)
            case Outcome.STORE_AWAY:
                call.is_store_away = True
                call.failure = call.failure or StoreUnavailableError(message)
            case Outcome.NO_MODEL:
                call.failure = ModelNotFoundError(message)
            case Outcome.MOVED:
                call.failure = ModelMovedError(message)
        call.load_failures_count += outcome in _LOAD_FAILURES
        return self._remember(call, route.instance_id, outcome, message, is_here=False)

    def _remember(
        self, call: Call, instance_id: InstanceId, outcome: Outcome, message: str, *, is_here: bool
    ) -> Again:
        retry = retry_after(
            outcome, call.hop, is_here=is_here, exhausted_count=call.exhausted_count
        )
        if retry.is_copy_out:
            call.tried.add(instance_id)
        if retry.is_instance_out:
            call.excludes.add(instance_id)
        call.may_load = call.may_load and retry.may_load
        if outcome is Outcome.RUNTIME_UNAVAILABLE:
            call.failure = RuntimeUnavailableError(message)
        elif outcome is Outcome.EXHAUSTED:
            call.exhausted_count += 1
            call.failure = QueueFullError(message)
        if call.failure is not None:
            call.tell_retry(call.failure)
        return retry.again

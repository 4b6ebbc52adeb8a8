"""What attempts came to: whether asking the router again makes sense (spec core 2.7).

Owns that question, for attempts that the router answered and for those that the wire made from the
table alone. What a call remembers of one is ``retries``'.
"""

from __future__ import annotations

from dataclasses import replace

import anyio

from mm.core.calls import Call, Hop, LocalRoute, Outcome, PeerRoute, Route
from mm.core.ids import InstanceId, ModelId
from mm.core.routing import Again
from mm.mesh.copies import Copies
from mm.mesh.decisions import Decisions
from mm.mesh.members import Members
from mm.mesh.retries import Retries


class Outcomes:
    """Weighs attempts that are over."""

    def __init__(
        self,
        me: InstanceId,
        members: Members,
        copies: Copies,
        retries: Retries,
        decisions: Decisions,
    ) -> None:
        self._me = me
        self._members = members
        self._copies = copies
        self._retries = retries
        self._decisions = decisions

    def weigh(self, call: Call, route: Route, outcome: Outcome, message: str) -> bool:
        """Remember what an outcome means; answers whether asking again makes sense."""
        if outcome is Outcome.ANSWERED:
            if isinstance(route, LocalRoute):
                self._copies.answered(route.model_id, route.load_id)
            return False
        if outcome in (Outcome.ABANDONED, Outcome.CROWDED):
            self._copies.counters.calls_crowded += outcome is Outcome.CROWDED
            return False
        if isinstance(route, PeerRoute):
            again = self._retries.failed_there(call, route, outcome, message)
        elif outcome is Outcome.LOST:
            return self._copies.lost(call.model_id, route.load_id, anyio.current_time())
        else:
            again = self._retries.failed_here(call, outcome, message)
        return again is Again.YES or (again is Again.IF_COPY and self._decisions.has_copy(call))

    def tried(self, call: Call, route: Route, outcome: Outcome, message: str) -> bool:
        """Hear of an attempt that the wire made on its own, before it asked: ``route`` is where it
        went, and its ``load_id`` the bits of it that the table has. Answers like ``weigh``.
        """
        call.attempts += 1
        if isinstance(route, LocalRoute):
            copy = self._copies.get(route.model_id)
            is_same = copy is not None and copy.load_bits == route.load_id
            route = replace(route, load_id=copy.load_id if copy is not None and is_same else 0)
        return self.weigh(call, route, outcome, message)

    def route_there(
        self, model_id: ModelId, handle: int, *, may_redirect: bool
    ) -> PeerRoute | None:
        """Answer the route that the wire took to a copy; None if that instance is gone."""
        name = self._members.name_of(handle)
        if name is None or self._members.handle_if_known(name) != handle:
            return None
        return PeerRoute(
            model_id,
            name,
            self._members.address(name),
            Hop.HIT_ONLY,
            sender=self._me,
            may_redirect=may_redirect,
        )

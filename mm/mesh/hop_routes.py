"""Routes to other instances: what a hop tells of its call (design section 5).

Owns filling them in. Where a call goes is ``mm.core.routing``'s, and ``placer``'s.
"""

from __future__ import annotations

from dataclasses import replace

from mm.core.calls import Call, Hop, PeerRoute
from mm.core.ids import InstanceId
from mm.core.routing import Action, Decision
from mm.mesh.members import Members


class HopRoutes:
    """Routes from this instance."""

    def __init__(self, me: InstanceId, members: Members) -> None:
        self._me = me
        self._members = members

    def by(self, call: Call, decision: Decision) -> PeerRoute:
        """Answer the route to the instance that a decision names."""
        assert decision.instance_id is not None, decision
        if decision.action is Action.RELAY:
            return self._relay(call, decision.instance_id)
        return self.to(
            call,
            decision.instance_id,
            Hop.HIT_ONLY,
            may_wait=decision.action is Action.WAIT_THERE,
            may_redirect=decision.may_redirect,
        )

    def _relay(self, call: Call, instance_id: InstanceId) -> PeerRoute:
        """Ask another instance to pass it on to the copies that we found no way to, and for nothing
        else; once.
        """
        route = self.to(call, instance_id, Hop.LOAD_LOCAL)
        unreached, call.unreached = call.unreached, set()
        return replace(
            route, tried=route.tried - unreached, excludes=route.excludes | {instance_id}
        )

    def to(
        self,
        call: Call,
        instance_id: InstanceId,
        hop: Hop,
        *,
        may_wait: bool = False,
        may_redirect: bool = False,
    ) -> PeerRoute:
        """Answer the route to an instance, with what it must know of the call."""
        return PeerRoute(
            call.model_id,
            instance_id,
            self._members.address(instance_id),
            hop,
            tried=frozenset(call.tried),
            excludes=frozenset(call.excludes - {instance_id}),
            hops_left=call.hops_left - 1,
            known_size_units=call.known_size_units,
            sender=self._me,
            may_wait=may_wait,
            may_redirect=may_redirect,
        )

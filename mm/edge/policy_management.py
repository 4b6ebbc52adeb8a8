"""``setModelPolicy`` of the service ``mmesh.ModelMesh``: messages in, ``mesh.models`` called,
messages out.

Owns the mapping of field names. The method is not Java's, so it has no legacy spelling.
"""

from __future__ import annotations

from typing import Final

from mm.core.ids import ModelId
from mm.edge.h2 import IncomingCall
from mm.edge.unary import ServiceTable
from mm.mesh.models import Models
from mm.mesh.policies import PolicyState
from mm.pb import mmesh

METHOD: Final = "/mmesh.ModelMesh/setModelPolicy"


class PolicyManagement:
    """Serves the method at one listener; any instance may be asked."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def add_to(self, services: ServiceTable) -> None:
        """Serve it."""
        services.add_unary(METHOD, mmesh.SetModelPolicyRequest, self.set_model_policy)

    async def set_model_policy(
        self, request: mmesh.SetModelPolicyRequest, _call: IncomingCall
    ) -> mmesh.ModelPolicyInfo:
        """Change what is said of a model's policy, and tell what it is then."""
        state = await self._models.set_policy(
            ModelId(request.model_id), request.min_copies, request.pinned
        )
        return _message(state)


def _message(state: PolicyState) -> mmesh.ModelPolicyInfo:
    return mmesh.ModelPolicyInfo(
        min_copies=state.policy.copies_min,
        pinned=state.policy.pinned,
        ready_copies=state.ready_count,
        unmet=state.unmet_because,
    )

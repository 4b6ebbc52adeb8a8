"""The policies of models: how many copies the mesh keeps, and what it pins (issue 5 part 1).

Owns setting them and refusing what cannot be kept to. The attribute is ``mm.core.model_policy``'s;
that copies are there, whoever calls, is ``keeper``'s; that pinned ones stay, ``copies``'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mm.core.cluster_state import ClusterState
from mm.core.ids import ModelId
from mm.core.model_policy import COPIES_MIN_MAX, ModelPolicy
from mm.core.records import ModelRecord, RecordError
from mm.errors import InvalidRequestError, MeshError, ModelNotFoundError, StatusCode
from mm.mesh.members import Members
from mm.mesh.ports import Clock
from mm.mesh.registry import Registry


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A policy, and how far it is met."""

    policy: ModelPolicy
    #: Copies that are ready, at instances that are there to stay.
    ready_count: int


class Policies:
    """What clients ask of them. Every method raises ``MeshError`` for what the client must hear."""

    def __init__(
        self, registry: Registry, members: Members, cluster: ClusterState, clock: Clock
    ) -> None:
        self._registry = registry
        self._members = members
        self._cluster = cluster
        self._clock = clock

    async def get(self, model_id: ModelId) -> PolicyState:
        """Answer the policy of a model."""
        record = await self._registry.find(model_id)
        if record is None:
            raise ModelNotFoundError
        return self._state(record)

    async def set(
        self, model_id: ModelId, copies_min: int | None, pinned: bool | None
    ) -> PolicyState:
        """Change what is given of the policy of a model; nothing is written if that is so."""

        def change(record: ModelRecord | None) -> ModelRecord:
            if record is None:
                raise ModelNotFoundError
            policy = record.policy
            if copies_min is not None:
                policy = replace(policy, copies_min=copies_min)
            if pinned is not None:
                policy = replace(policy, pinned=pinned)
            return self.applied(record, policy)

        try:
            record = await self._registry.update(model_id, change, fresh=True)
        except RecordError as exc:
            raise MeshError(str(exc), code=StatusCode.FAILED_PRECONDITION) from exc
        assert record is not None, "a change never deletes it"
        return self._state(record)

    def applied(self, record: ModelRecord, policy: ModelPolicy) -> ModelRecord:
        """Answer the record with the policy, if the mesh can keep to it."""
        if policy != record.policy:
            self._require_possible(record, policy)
        return record.with_policy(policy)

    def _require_possible(self, record: ModelRecord, policy: ModelPolicy) -> None:
        if not 0 <= policy.copies_min <= COPIES_MIN_MAX:
            raise InvalidRequestError(
                f"min_copies is {policy.copies_min}; allowed: 0 to {COPIES_MIN_MAX}"
            )
        hosts_count = self._cluster.statistics_of(record.info.model_type).instance_count
        if policy.copies_needed > hosts_count:
            raise _impossible(
                f"min_copies is {policy.copies_needed}, but {hosts_count} instances may hold models"
                f" of type {record.info.model_type}: ask for fewer copies, start more instances,"
                " or let more of them hold the type (MM_TYPE_CONSTRAINTS)"
            )

    def _state(self, record: ModelRecord) -> PolicyState:
        holders = self._members.holders(record, self._clock.now_ms())
        return PolicyState(record.policy, len(holders.serving))


def _impossible(message: str) -> MeshError:
    return MeshError(message, code=StatusCode.FAILED_PRECONDITION)

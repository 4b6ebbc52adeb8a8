"""The policies of models: how many copies the mesh keeps, and what it pins (issue 5 part 1).

Owns setting them and refusing what cannot be kept to. The attribute is ``mm.core.model_policy``'s;
that copies are there, whoever calls, is ``keeper``'s; that pinned ones stay, ``copies``'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import anyio

from mm.config import Config
from mm.core.cluster_state import ClusterState
from mm.core.ids import UNIT_BYTES, InstanceId, ModelId
from mm.core.model_policy import COPIES_MIN_MAX, PINNED_DIVISOR, ModelPolicy
from mm.core.policy_plan import planned
from mm.core.records import InstanceRecord, ModelRecord, RecordError
from mm.core.weights import fits, share
from mm.errors import InvalidRequestError, MeshError, ModelNotFoundError, StatusCode
from mm.mesh.members import Members
from mm.mesh.ports import Clock
from mm.mesh.registry import Registry

#: Where not everything fits, who comes first is reckoned anew so often, for all are looked at;
#: sooner only when a policy, or who is there, changed: what was just accepted has its place.
PLAN_S: Final = 2.0
#: Then, too, not for each of very many changes: a rest in proportion to what the reckoning costs.
PLAN_REST_S_PER_MODEL: Final = 1e-5


@dataclass(frozen=True, slots=True)
class PolicyState:
    """A policy, and how far it is met."""

    policy: ModelPolicy
    #: Copies that are ready, at instances that are there to stay.
    ready_count: int
    #: Why these are too few; empty: they are enough.
    unmet_because: str


class Policies:
    """What clients ask of them. Every method raises ``MeshError`` for what the client must hear."""

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        members: Members,
        cluster: ClusterState,
        clock: Clock,
        default_units: int,
    ) -> None:
        self._config = config
        self._default_units = default_units
        self._registry = registry
        self._members = members
        self._cluster = cluster
        self._clock = clock
        #: What is to be there, where that is not all; until when that holds.
        self._plan: dict[ModelId, int] | None = None
        self._plan_until_s = -math.inf
        #: What it was made from: it is over when that changes.
        self._plan_basis: object = None
        self._plan_rest_until_s = -math.inf
        #: Models whose policy is not met, and why: ``keeper`` says so at the leader.
        self.unmet: dict[ModelId, str] = {}

    async def get(self, model_id: ModelId) -> PolicyState:
        """Answer the policy of a model."""
        record = await self._registry.find(model_id)
        if record is None:
            raise ModelNotFoundError
        return self._state(model_id, record)

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
            return self.applied(model_id, record, policy)

        try:
            record = await self._registry.update(model_id, change, fresh=True)
        except RecordError as exc:
            raise MeshError(str(exc), code=StatusCode.FAILED_PRECONDITION) from exc
        assert record is not None, "a change never deletes it"
        return self._state(model_id, record)

    def applied(self, model_id: ModelId, record: ModelRecord, policy: ModelPolicy) -> ModelRecord:
        """Answer the record with the policy, if the mesh can keep to it."""
        if not 0 <= policy.copies_min <= COPIES_MIN_MAX:
            raise InvalidRequestError(
                f"min_copies is {policy.copies_min}; allowed: 0 to {COPIES_MIN_MAX}"
            )
        # What asks for less than before was possible, or is nearer to what is.
        before = record.policy
        if policy.copies_needed > before.copies_needed or policy.pinned > before.pinned:
            self._require_possible(model_id, record, policy)
        return record.with_policy(policy)

    def kept_count(self, model_id: ModelId) -> int:
        """Answer how many copies are to be there now: what the policy asks for, or what there is
        room for beside the others; every instance answers the same.
        """
        promise = self._registry.policies.get(model_id)
        if promise is None:
            return 0
        now_s, members = anyio.current_time(), self._members
        basis = (
            self._registry.policies.changes_count,
            members.somebody_moved,
            members.standing_changed,
        )
        is_over = now_s >= self._plan_until_s
        if is_over or (basis != self._plan_basis and now_s >= self._plan_rest_until_s):
            self._plan, self._plan_basis = self._planned(), basis
            self._plan_until_s = now_s + PLAN_S
            self._plan_rest_until_s = now_s + PLAN_REST_S_PER_MODEL * len(self._registry.policies)
        needed_count = promise.policy.copies_needed
        return needed_count if self._plan is None else self._plan.get(model_id, 0)

    def _planned(self) -> dict[ModelId, int] | None:
        """Answer how many copies each model is to have; None: as many as its policy asks for."""
        constraints, index = self._cluster.constraints, self._registry.policies
        partitions = self._cluster.partitions()
        units = index.units_by_type(self._default_units)
        kinds: dict[str, frozenset[frozenset[str]]] = {}
        for model_type in index.types():
            key = constraints.key(model_type)
            kinds[model_type] = frozenset(each for each in partitions if key not in each)
        rooms = {
            prohibited: (sums.instance_count, share(sums.capacity_units, PINNED_DIVISOR))
            for prohibited, sums in partitions.items()
        }
        for kind in set(kinds.values()):
            wanted_units = sum(units.get(each, 0) for each in kinds if kinds[each] <= kind)
            if not fits(wanted_units, sum(rooms[each][1] for each in kind)):
                return planned(index.wishes(self._default_units), kinds, rooms)
        return None

    # --- whether it can be, and is ----------------------------------------------------------

    def unmet_because(self, model_id: ModelId, record: ModelRecord) -> str:
        """Answer why fewer copies are ready than the policy asks for; empty if that is not so."""
        needed_count = record.policy.copies_needed
        if not needed_count:
            return ""
        now_ms = self._clock.now_ms()
        holders = self._members.holders(record, now_ms)
        ready_count = len(holders.serving)
        if ready_count >= needed_count:
            return ""
        told = f"{ready_count} of {needed_count} copies are ready"
        hosts_count = self._cluster.statistics_of(record.info.model_type).instance_count
        if hosts_count < needed_count:
            return f"{told}: only {_instances(hosts_count)} may hold it"
        if ready_count >= self.kept_count(model_id):
            return f"{told}: policies keep half of the memory, and others come first"
        verdict = self._config.failure_rules.verdict(model_id, record, now_ms)
        if verdict.newest is not None:
            return f"{told}: loads failed: {verdict.newest.message}"
        return f"{told}, {len(holders.coming)} on their way"

    def crowded(self, record: ModelRecord) -> frozenset[InstanceId]:
        """Answer where a copy of a pinned model could not be kept from eviction, unless it is so
        everywhere.
        """
        if not record.policy.pinned:
            return frozenset()
        hosts = self._cluster.hosts(record.info.model_type)
        size_units = record.size_units or self._default_units
        crowded = frozenset(
            instance_id
            for instance_id, host in hosts.items()
            if instance_id not in record.copies
            and not fits(host.pinned_units + size_units, _room_units(host))
        )
        free = hosts.keys() - crowded - record.copies.keys()
        return crowded if free else frozenset()

    def _require_possible(
        self, model_id: ModelId, record: ModelRecord, policy: ModelPolicy
    ) -> None:
        model_type, index = record.info.model_type, self._registry.policies
        if model_id not in index and len(index) >= self._config.policies_max:
            raise _impossible(
                f"{len(index)} models have policies, the limit is {self._config.policies_max}:"
                " take it from others"
            )
        hosts = self._cluster.hosts(model_type)
        if policy.copies_needed > len(hosts):
            raise _impossible(
                f"min_copies is {policy.copies_needed}, but {_instances(len(hosts))} may hold"
                f" models of type {model_type}: ask for fewer copies, start more instances, or let"
                " more of them hold the type (MM_TYPE_CONSTRAINTS)"
            )
        size_units = record.size_units or self._default_units
        large_count = sum(fits(size_units, _room_units(host)) for host in hosts.values())
        if policy.copies_needed > large_count:
            raise _impossible(
                f"a copy takes {size_units * UNIT_BYTES} bytes, which is more than half of the"
                f" memory of all but {large_count} instances that may hold it, and policies may"
                " keep half: ask for fewer copies, or run larger instances"
            )
        promised = self._promised_units(model_id, model_type)
        wanted_units = size_units * policy.copies_needed
        room_units = sum(map(_room_units, hosts.values()))
        if not fits(promised + wanted_units, room_units):
            raise _impossible(
                f"{policy.copies_needed} copies take {wanted_units * UNIT_BYTES} bytes and those"
                f" that policies keep already {promised * UNIT_BYTES}: more than"
                f" {room_units * UNIT_BYTES}, half of the memory of the instances that may hold"
                " them. Ask for fewer copies, take policies from others, or start more instances"
            )

    def _promised_units(self, model_id: ModelId, model_type: str) -> int:
        """Answer what policies keep already of models that must be where this type may be."""
        constraints, partitions = self._cluster.constraints, self._cluster.partitions()

        def groups(each_type: str) -> set[frozenset[str]]:
            key = constraints.key(each_type)
            return {prohibited for prohibited in partitions if key not in prohibited}

        here, index = groups(model_type), self._registry.policies
        by_type: Mapping[str, int] = index.units_by_type(self._default_units)
        units = sum(each for name, each in by_type.items() if groups(name) <= here)
        own = index.get(model_id)
        return units - (0 if own is None else own.units(self._default_units))

    def _state(self, model_id: ModelId, record: ModelRecord) -> PolicyState:
        holders = self._members.holders(record, self._clock.now_ms())
        return PolicyState(
            record.policy, len(holders.serving), self.unmet_because(model_id, record)
        )


def _room_units(host: InstanceRecord) -> int:
    """Answer what may be kept at an instance."""
    return share(host.capacity_units, PINNED_DIVISOR)


def _impossible(message: str) -> MeshError:
    return MeshError(message, code=StatusCode.FAILED_PRECONDITION)


def _instances(count: int) -> str:
    return "1 instance" if count == 1 else f"{count} instances"

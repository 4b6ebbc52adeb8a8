"""The records in the store: what they say and their JSON (spec core 1.3-1.7).

A value is a plain JSON object with abbreviated names; an attribute that is null, false, 0 or empty
is not written, and absence means exactly that. Attributes that are not understood are kept and
written back as they were: it is how old and new instances share a store. Keys and compare-and-set
live in ``mm.mesh.registry``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from mm.core.copy_record import CopyRecord, CopyStage
from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.record_json import Attributes, RecordError, encode_object

__all__ = [
    "DEFAULT_MODEL_TYPE",
    "InstanceRecord",
    "ModelInfo",
    "ModelRecord",
    "RecordError",
    "VModelRecord",
]

#: What an absent ``type`` means (spec core 1.6).
DEFAULT_MODEL_TYPE: Final = "NLCLASSIFIER"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model is; it never changes under one id (spec core 0)."""

    model_type: str
    path: str = ""
    key: str = field(default="", repr=False)  # may hold credentials: never logged


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One registered model (spec core 1.6).

    Invariant: an instance id is in at most one of ``copies`` and ``failures``. An instance only
    ever adds or removes its own id; only the leader removes others'.
    """

    info: ModelInfo
    #: Copies loading or loaded: instance -> the time (ms) at which the load was enqueued there.
    copies: Mapping[InstanceId, int] = field(default_factory=dict)
    #: Recent load failures: instance -> the time (ms) of the failure.
    failures: Mapping[InstanceId, int] = field(default_factory=dict)
    #: The raw ``fails`` entries; text under ``msg``, other attributes preserved.
    failure_details: Mapping[str, object] = field(default_factory=dict)
    #: The raw ``copies`` entries: ask ``copy_state``. Those of other instances are preserved.
    copy_details: Mapping[str, object] = field(default_factory=dict)
    references: int = 0
    auto_delete: bool = False
    #: The raw ``policy`` entries: ask ``policy``. Those that others wrote are preserved.
    policy_details: Mapping[str, object] = field(default_factory=dict)
    last_used_ms: int = 0
    last_unload_ms: int = 0
    unknown: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def decode(cls, value: bytes) -> ModelRecord:
        """Read a stored value; raises ``RecordError`` when it is none."""
        attributes = Attributes(value)
        return cls(
            info=ModelInfo(
                model_type=attributes.text("type") or DEFAULT_MODEL_TYPE,
                path=attributes.text("mPath"),
                key=attributes.text("encKey"),
            ),
            copies=attributes.times("instanceIds"),
            failures=attributes.times("failedIn"),
            failure_details=attributes.mapping("fails"),
            copy_details=attributes.mapping_if_one("copies"),
            references=attributes.integer("refs"),
            auto_delete=attributes.boolean("autoDel"),
            policy_details=attributes.mapping_if_one("policy"),
            last_used_ms=_use_ms(attributes.integer("lu")),
            last_unload_ms=attributes.integer("lul"),
            unknown=attributes.unknown(),
        )

    def encode(self) -> bytes:
        """Answer the JSON to store."""
        return encode_object(
            self.unknown,
            {
                "type": self.info.model_type,
                "mPath": self.info.path,
                "encKey": self.info.key,
                "instanceIds": self.copies,
                "failedIn": self.failures,
                "fails": self.failure_details,
                "copies": self.copy_details,
                "refs": self.references,
                "autoDel": self.auto_delete,
                "policy": self.policy_details,
                "lu": self.last_used_ms,
                "lul": self.last_unload_ms,
            },
        )

    @property
    def size_units(self) -> int:
        """The size that the model has where it is loaded already, 0 if nobody says."""
        states = map(self.copy_state, self.copies)
        return max((state.size_units for state in states if state is not None), default=0)

    @property
    def policy(self) -> ModelPolicy:
        """How the mesh is to keep the model."""
        return ModelPolicy.read(self.policy_details)

    def with_policy(self, policy: ModelPolicy) -> ModelRecord:
        """Answer the record with another policy; the one it has already changes nothing."""
        if policy == self.policy:
            return self
        return replace(self, policy_details=policy.written(self.policy_details))

    def failure_text(self, instance_id: InstanceId) -> str:
        """Answer the message of the failure recorded for an instance; empty if none is."""
        details = self.failure_details.get(instance_id)
        message = details.get("msg") if isinstance(details, dict) else None
        return message if isinstance(message, str) else ""

    def copy_state(self, instance_id: InstanceId) -> CopyRecord | None:
        """Answer how far a copy is; None where nobody says so: then spec core 3.15 guesses."""
        state = CopyRecord.read(self.copy_details.get(instance_id))
        if state is None or self.copies.get(instance_id) != state.enqueued_ms:
            return None
        return state

    def used(self, last_used_ms: int) -> ModelRecord:
        """Answer the record with a later last use; an earlier one changes nothing."""
        if last_used_ms <= self.last_used_ms:
            return self
        return replace(self, last_used_ms=last_used_ms)

    def with_copy(
        self, instance_id: InstanceId, enqueued_ms: int, last_used_ms: int
    ) -> ModelRecord:
        """Answer the record after an instance enqueued a load: its failure is forgotten."""
        copies = {**self.copies, instance_id: enqueued_ms}
        state = CopyRecord(enqueued_ms, CopyStage.QUEUED, enqueued_ms)
        return replace(
            self,
            copies=copies,
            copy_details={**self._details_of(copies), instance_id: state.written(None)},
            failures=_without(self.failures, instance_id),
            failure_details=_without(self.failure_details, instance_id),
            last_used_ms=max(self.last_used_ms, last_used_ms),
        )

    def with_copy_state(
        self, instance_id: InstanceId, stage: CopyStage, since_ms: int, size_units: int = 0
    ) -> ModelRecord:
        """Answer the record after a copy came so far; an instance without a copy changes nothing.

        A size that is known already is kept when none is given.
        """
        enqueued_ms = self.copies.get(instance_id)
        if enqueued_ms is None:
            return self
        present = self.copy_state(instance_id)
        if not size_units and present is not None:
            size_units = present.size_units
        state = CopyRecord(enqueued_ms, stage, since_ms, size_units)
        if state == present:
            return self
        details = self._details_of(self.copies)
        details[instance_id] = state.written(details.get(instance_id))
        return replace(self, copy_details=details)

    def _details_of(self, copies: Mapping[InstanceId, int]) -> dict[str, object]:
        """Answer ``copy_details`` for these copies. Entries without a copy, which Java leaves
        behind, go with any change: instances come and go under ever new ids.
        """
        return {i: entry for i, entry in self.copy_details.items() if i in copies}

    def without_copy(
        self, instance_id: InstanceId, now_ms: int, last_used_ms: int = 0
    ) -> ModelRecord:
        """Answer the record after a copy went; notes the time if more than two remain."""
        remaining = _without(self.copies, instance_id)
        return replace(
            self,
            copies=remaining,
            copy_details=self._details_of(remaining),
            last_used_ms=max(self.last_used_ms, last_used_ms),
            last_unload_ms=now_ms if len(remaining) > 2 else 0,
        )

    def with_failure(self, instance_id: InstanceId, failed_ms: int, message: str) -> ModelRecord:
        """Answer the record after a load failed at ``instance_id``."""
        details = dict(_without(self.failure_details, instance_id))
        if message:
            details[instance_id] = {"msg": message}
        remaining = _without(self.copies, instance_id)
        return replace(
            self,
            copies=remaining,
            copy_details=self._details_of(remaining),
            failures={**self.failures, instance_id: failed_ms},
            failure_details=details,
        )

    def without_failure(self, instance_id: InstanceId) -> ModelRecord:
        """Answer the record without the failure of ``instance_id``."""
        return replace(
            self,
            failures=_without(self.failures, instance_id),
            failure_details=_without(self.failure_details, instance_id),
        )


def _use_ms(stored_ms: int) -> int:
    """Answer a last use as it counts. "Never" is nobody's last use (spec core 5.6, 10.3: its origin
    was never found), and is as good as none: the next write of the record ends it.
    """
    return 0 if stored_ms >= NEVER_MS else stored_ms


_K = TypeVar("_K", bound=str)
_V = TypeVar("_V")


def _without(entries: Mapping[_K, _V], key: str) -> Mapping[_K, _V]:
    return {name: value for name, value in entries.items() if name != key}


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """What one instance publishes of itself, bound to its session lease (spec core 1.5)."""

    start_time_ms: int = 0
    version: int = 0
    location: str = ""
    zone: str = ""
    labels: tuple[str, ...] = ()
    lru_time_ms: int = NEVER_MS
    count: int = 0
    capacity_units: int = 0
    used_units: int = 0
    loading_threads: int = 0
    loads_in_progress: int = 0
    busyness_rpm: int = 0
    shutting_down: bool = False
    #: host:port of the peer listener (ours; Java instances have none).
    address: str = ""
    #: version of mm (ours).
    mm_version: str = ""
    #: With less than this remaining it is full, by its own sizing; 0: it does not say (ours).
    min_space_units: int = 0
    #: Its first loads failed, though it may not be the models: others load what they can (ours).
    loads_fail: bool = False
    #: Of what is used, what pinned models take (ours).
    pinned_units: int = 0
    unknown: Mapping[str, object] = field(default_factory=dict)

    @property
    def remaining_units(self) -> int:
        """Capacity not used; never negative, whatever was published."""
        return max(0, self.capacity_units - self.used_units)

    @classmethod
    def decode(cls, value: bytes) -> InstanceRecord:
        """Read a stored value; raises ``RecordError`` when it is none."""
        attributes = Attributes(value)
        attributes.ignore("actionable")
        return cls(
            start_time_ms=attributes.integer("startTime"),
            version=attributes.integer("vers"),
            location=attributes.text("loc"),
            zone=attributes.text("zone"),
            labels=attributes.texts("labels"),
            lru_time_ms=attributes.integer("lruTime"),
            count=attributes.integer("count"),
            capacity_units=attributes.integer("cap"),
            used_units=attributes.integer("used"),
            loading_threads=attributes.integer("lThreads"),
            loads_in_progress=attributes.integer("lInProg"),
            busyness_rpm=attributes.integer("rpm"),
            shutting_down=attributes.boolean("shutdown"),
            address=attributes.text("addr"),
            mm_version=attributes.text("mv"),
            min_space_units=attributes.integer("minSpace"),
            loads_fail=attributes.boolean("loadsFail"),
            pinned_units=attributes.integer("pinned"),
            unknown=attributes.unknown(),
        )

    def encode(self) -> bytes:
        """Answer the JSON to store."""
        return encode_object(
            self.unknown,
            {
                "startTime": self.start_time_ms,
                "vers": self.version,
                "loc": self.location,
                "zone": self.zone,
                "labels": self.labels,
                "lruTime": self.lru_time_ms,
                "count": self.count,
                "cap": self.capacity_units,
                "used": self.used_units,
                "lThreads": self.loading_threads,
                "lInProg": self.loads_in_progress,
                "rpm": self.busyness_rpm,
                "shutdown": self.shutting_down,
                "actionable": True,
                "addr": self.address,
                "mv": self.mm_version,
                "minSpace": self.min_space_units,
                "loadsFail": self.loads_fail,
                "pinned": self.pinned_units,
            },
        )


@dataclass(frozen=True, slots=True)
class VModelRecord:
    """An alias with an active and a target model (spec core 1.7)."""

    active_model_id: ModelId
    target_model_id: ModelId
    owner: str = ""
    failed: bool = False
    unknown: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def decode(cls, value: bytes) -> VModelRecord:
        """Read a stored value; raises ``RecordError`` when it is none."""
        attributes = Attributes(value)
        return cls(
            owner=attributes.text("o"),
            active_model_id=ModelId(attributes.required_text("amid")),
            target_model_id=ModelId(attributes.required_text("tmid")),
            failed=attributes.boolean("failed"),
            unknown=attributes.unknown(),
        )

    def encode(self) -> bytes:
        """Answer the JSON to store."""
        return encode_object(
            self.unknown,
            {
                "o": self.owner,
                "amid": self.active_model_id,
                "tmid": self.target_model_id,
                "failed": self.failed,
            },
        )

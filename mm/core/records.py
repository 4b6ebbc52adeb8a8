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

import msgspec

from mm.core.ids import NEVER_MS, InstanceId, ModelId

#: What an absent ``type`` means (spec core 1.6).
DEFAULT_MODEL_TYPE: Final = "NLCLASSIFIER"

#: Whole numbers are int64 for everybody who shares the store.
INT64_MAX: Final = 2**63 - 1


class RecordError(ValueError):
    """A stored value is not a record; the text names the attribute and what was found."""


def _decode(value: bytes) -> dict[str, object]:
    try:
        decoded = msgspec.json.decode(value)
    except (ValueError, RecursionError) as exc:
        # Bad UTF-8, endless nesting and endless numbers raise others than the parser's own.
        raise RecordError(f"not JSON: {exc}") from exc
    if not isinstance(decoded, dict):
        raise RecordError(f"a JSON object expected, found {_kind(decoded)}")
    return decoded


def _encode(unknown: Mapping[str, object], known: Mapping[str, object]) -> bytes:
    """Write what is unknown as it is, and of the known what differs from absence."""
    return msgspec.json.encode(
        {**unknown, **{name: value for name, value in known.items() if value}}
    )


def _kind(value: object) -> str:
    """Say what was found, but no texts and nothing from inside: it may be a model's key."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return msgspec.json.encode(value).decode()
        case str():
            return "a text"
        case list():
            return "an array"
        case _:
            return "an object"


class _Attributes:
    """Takes typed attributes out of a decoded object; what is left over is unknown, and kept."""

    __slots__ = ("_left",)

    def __init__(self, value: bytes) -> None:
        self._left = _decode(value)

    def unknown(self) -> Mapping[str, object]:
        return self._left

    def ignore(self, name: str) -> None:
        self._left.pop(name, None)

    def text(self, name: str) -> str:
        value = self._left.pop(name, None)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise RecordError(f"{name}: text expected, found {_kind(value)}")
        return value

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if not value:
            raise RecordError(f"{name}: missing")
        return value

    def integer(self, name: str) -> int:
        return _integer(name, self._left.pop(name, None))

    def boolean(self, name: str) -> bool:
        value = self._left.pop(name, None)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise RecordError(f"{name}: true or false expected, found {_kind(value)}")
        return value

    def object(self, name: str) -> dict[str, object]:
        value = self._left.pop(name, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise RecordError(f"{name}: an object expected, found {_kind(value)}")
        return value

    def times(self, name: str) -> Mapping[InstanceId, int]:
        entries = self.object(name)
        return {InstanceId(key): _integer(f"{name}.{key}", value) for key, value in entries.items()}

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._left.pop(name, None)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise RecordError(f"{name}: an array of texts expected")
        return tuple(value)


def _integer(name: str, value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecordError(f"{name}: a whole number expected, found {_kind(value)}")
    if not -INT64_MAX - 1 <= value <= INT64_MAX:
        raise RecordError(f"{name}: a whole number of 64 bits expected, found a larger one")
    return value


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
    references: int = 0
    auto_delete: bool = False
    last_used_ms: int = 0
    last_unload_ms: int = 0
    unknown: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def decode(cls, value: bytes) -> ModelRecord:
        """Read a stored value; raises ``RecordError`` when it is none."""
        attributes = _Attributes(value)
        return cls(
            info=ModelInfo(
                model_type=attributes.text("type") or DEFAULT_MODEL_TYPE,
                path=attributes.text("mPath"),
                key=attributes.text("encKey"),
            ),
            copies=attributes.times("instanceIds"),
            failures=attributes.times("failedIn"),
            failure_details=attributes.object("fails"),
            references=attributes.integer("refs"),
            auto_delete=attributes.boolean("autoDel"),
            last_used_ms=attributes.integer("lu"),
            last_unload_ms=attributes.integer("lul"),
            unknown=attributes.unknown(),
        )

    def encode(self) -> bytes:
        """Answer the JSON to store."""
        return _encode(
            self.unknown,
            {
                "type": self.info.model_type,
                "mPath": self.info.path,
                "encKey": self.info.key,
                "instanceIds": self.copies,
                "failedIn": self.failures,
                "fails": self.failure_details,
                "refs": self.references,
                "autoDel": self.auto_delete,
                "lu": self.last_used_ms,
                "lul": self.last_unload_ms,
            },
        )

    def failure_text(self, instance_id: InstanceId) -> str:
        """Answer the message of the failure recorded for an instance; empty if none is."""
        details = self.failure_details.get(instance_id)
        message = details.get("msg") if isinstance(details, dict) else None
        return message if isinstance(message, str) else ""

    def used(self, last_used_ms: int) -> ModelRecord:
        """Answer the record with a later last use; an earlier one changes nothing."""
        if last_used_ms <= self.last_used_ms:
            return self
        return replace(self, last_used_ms=last_used_ms)

    def with_copy(
        self, instance_id: InstanceId, enqueued_ms: int, last_used_ms: int
    ) -> ModelRecord:
        """Answer the record after an instance enqueued a load: its failure is forgotten."""
        return replace(
            self,
            copies={**self.copies, instance_id: enqueued_ms},
            failures=_without(self.failures, instance_id),
            failure_details=_without(self.failure_details, instance_id),
            last_used_ms=max(self.last_used_ms, last_used_ms),
        )

    def without_copy(
        self, instance_id: InstanceId, now_ms: int, last_used_ms: int = 0
    ) -> ModelRecord:
        """Answer the record after a copy went; notes the time if more than two remain."""
        remaining = _without(self.copies, instance_id)
        return replace(
            self,
            copies=remaining,
            last_used_ms=max(self.last_used_ms, last_used_ms),
            last_unload_ms=now_ms if len(remaining) > 2 else 0,
        )

    def with_failure(self, instance_id: InstanceId, failed_ms: int, message: str) -> ModelRecord:
        """Answer the record after a load failed at ``instance_id``."""
        details = dict(_without(self.failure_details, instance_id))
        if message:
            details[instance_id] = {"msg": message}
        return replace(
            self,
            copies=_without(self.copies, instance_id),
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
    unknown: Mapping[str, object] = field(default_factory=dict)

    @property
    def remaining_units(self) -> int:
        """Capacity not used; never negative, whatever was published."""
        return max(0, self.capacity_units - self.used_units)

    @classmethod
    def decode(cls, value: bytes) -> InstanceRecord:
        """Read a stored value; raises ``RecordError`` when it is none."""
        attributes = _Attributes(value)
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
            unknown=attributes.unknown(),
        )

    def encode(self) -> bytes:
        """Answer the JSON to store."""
        return _encode(
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
        attributes = _Attributes(value)
        return cls(
            owner=attributes.text("o"),
            active_model_id=ModelId(attributes.required_text("amid")),
            target_model_id=ModelId(attributes.required_text("tmid")),
            failed=attributes.boolean("failed"),
            unknown=attributes.unknown(),
        )

    def encode(self) -> bytes:
        """Answer the JSON to store."""
        return _encode(
            self.unknown,
            {
                "o": self.owner,
                "amid": self.active_model_id,
                "tmid": self.target_model_id,
                "failed": self.failed,
            },
        )

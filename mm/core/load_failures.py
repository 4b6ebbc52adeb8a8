"""What a failed load means for the next one: its kind, how long it counts, and where else to try
(spec core 3.10, 3.11, 10.9).

Owns the kinds, the back-off and the attributes of a failure in a model record. The texts are
``load_errors``'s, choosing an instance ``placement``'s.

*How to use it.* Whoever is about to place a load asks ``FailureRules.verdict`` with the record.
``verdict.final`` is the failure to answer instead of loading: there is no use in another try.
Otherwise leave out the instances in ``verdict.excluded``, and all whose whole capacity is below
``verdict.needed_units`` (0: nobody knows). Whoever records a failure counts it with
``FailureRules.count_next`` and stores ``LoadFailure.written_to``. Whoever cleans records drops a
failure at ``FailureRules.forgotten_ms``.
"""

from __future__ import annotations

import enum
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Self

from mm.core.ids import InstanceId, ModelId
from mm.core.load_errors import status_of
from mm.core.records import ModelRecord
from mm.errors import StatusCode


class FailureKind(enum.Enum):
    """Why a load failed, as far as it matters for trying again."""

    #: It is the model: wherever it is tried, the same will be said.
    PERMANENT = "permanent"
    #: It is the memory of that instance: a larger or emptier one may take it.
    CAPACITY = "capacity"
    #: Anything else: it may be that instance or that moment.
    TRANSIENT = "transient"


_KINDS: Final = {kind.value: kind for kind in FailureKind}

#: Codes that speak of the request, which is the same for every instance: its arguments, its path,
#: its type, its key. The first two say besides that nothing was tried (``load_errors``). All others
#: may be an instance's own trouble. UNKNOWN and INTERNAL are what adapters answer to everything, so
#: they say nothing; a model that is really broken costs few tries, for the pauses double.
_PERMANENT: Final = frozenset(
    {
        StatusCode.INVALID_ARGUMENT,
        StatusCode.FAILED_PRECONDITION,
        StatusCode.NOT_FOUND,
        StatusCode.OUT_OF_RANGE,
        StatusCode.PERMISSION_DENIED,
        StatusCode.UNAUTHENTICATED,
        StatusCode.UNIMPLEMENTED,
    }
)

#: Words of allocators. Adapters pass them on with any code at all, so the text decides first.
_OUT_OF_MEMORY: Final = re.compile(
    r"out of (?:\w+ )?memory|cannot allocate memory|failed to allocate|bad_?alloc", re.IGNORECASE
)


#: Counts stop here: the pause has long reached any expiry, and 2**40 ms any time.
COUNT_MAX: Final = 40


def kind_of(code: int, message: str = "") -> FailureKind:
    """Answer the kind of a failed load from what the runtime answered."""
    status = status_of(code)
    if status is StatusCode.RESOURCE_EXHAUSTED or _OUT_OF_MEMORY.search(message):
        return FailureKind.CAPACITY
    return FailureKind.PERMANENT if status in _PERMANENT else FailureKind.TRANSIENT


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """One failure in a model record: ``failedIn.<instance>`` and ``fails.<instance>``."""

    instance_id: InstanceId
    failed_ms: int
    message: str = ""
    #: None: written by a Java instance, or unreadable; then Java's rule holds.
    kind: FailureKind | None = None
    #: Tries in a row that failed, this one included; a round of tries on several instances is one.
    count: int = 1
    #: What the model needs, if it is known that this is more than that instance has at all.
    needed_units: int = 0

    @classmethod
    def read(cls, record: ModelRecord, instance_id: InstanceId) -> Self:
        """Answer a failure of the record, whoever wrote it."""
        details = record.failure_details.get(instance_id)
        details = details if isinstance(details, dict) else {}
        kind = details.get("kind")
        return cls(
            instance_id,
            record.failures[instance_id],
            record.failure_text(instance_id),
            _KINDS.get(kind) if isinstance(kind, str) else None,
            max(1, _integer(details.get("n"))),
            max(0, _integer(details.get("needs"))),
        )

    @property
    def attributes(self) -> Mapping[str, object]:
        """What to write beside ``msg``; Java keeps it and does not look."""
        written: dict[str, object] = {}
        if self.kind is not None:
            written = {"kind": self.kind.value, "n": self.count}
        if self.needed_units:
            written["needs"] = self.needed_units
        return written

    def written_to(self, record: ModelRecord) -> ModelRecord:
        """Answer the record after this failure, which replaces the copy of its instance."""
        after = record.with_failure(self.instance_id, self.failed_ms, self.message)
        details = dict(after.failure_details)
        details[self.instance_id] = {"msg": self.message, **self.attributes}
        return replace(after, failure_details=details)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the failures of a model say about its next load."""

    #: Where not to try now.
    excluded: frozenset[InstanceId] = frozenset()
    #: Instances with less than this in all need not be tried.
    needed_units: int = 0
    #: Answer this and try nowhere; None: try.
    final: LoadFailure | None = None
    #: The latest failure that counts, to be told if no instance is left.
    newest: LoadFailure | None = None


@dataclass(frozen=True, slots=True)
class FailureRules:
    """How long failures count, and how many of them are enough.

    A permanent failure counts for the whole expiry, and half of it for a model that is asked for
    (spec core 3.11); so does one that Java wrote. Others count for a pause that starts at
    ``pause_first_ms``, doubles with each further round of tries and ends at the expiry. The pause
    is shortened by up to a quarter, differently for each failure: tries that failed together are
    not repeated together. All of it is drawn from the record alone: every instance answers alike,
    and no use of the model makes a failure last longer.
    """

    expiry_ms: int
    pause_first_ms: int
    failures_max: int

    def over_ms(self, model_id: ModelId, failure: LoadFailure, *, in_use: bool = True) -> int:
        """Answer when a failure stops to count."""
        if failure.kind in (None, FailureKind.PERMANENT) or failure.needed_units:
            return failure.failed_ms + (self.expiry_ms // 2 if in_use else self.expiry_ms)
        # A count from outside must not cost memory.
        pause_ms = min(self.expiry_ms, self.pause_first_ms << min(failure.count, COUNT_MAX) - 1)
        name = f"{model_id}/{failure.instance_id}/{failure.failed_ms}"
        quarter = zlib.crc32(name.encode("utf-8", "surrogatepass")) % 1024
        return failure.failed_ms + pause_ms - pause_ms * quarter // 4096

    def forgotten_ms(self, failure: LoadFailure) -> int:
        """Answer when a failure tells nothing any more, not even how long the next pause is."""
        if failure.kind in (None, FailureKind.PERMANENT):
            return failure.failed_ms + self.expiry_ms
        return failure.failed_ms + 2 * self.expiry_ms

    def counting(
        self, model_id: ModelId, record: ModelRecord, now_ms: int, *, in_use: bool = True
    ) -> list[LoadFailure]:
        """Answer the failures that count now, the latest first."""
        failures = [LoadFailure.read(record, instance_id) for instance_id in record.failures]
        # A time far ahead is no time: nobody's clock is an expiry fast, and it would never be over.
        counting = [
            f
            for f in failures
            if f.failed_ms - self.expiry_ms <= now_ms < self.over_ms(model_id, f, in_use=in_use)
        ]
        return sorted(counting, key=lambda f: (-f.failed_ms, f.instance_id))

    def count_next(self, model_id: ModelId, record: ModelRecord, now_ms: int) -> int:
        """Answer the count of a failure that is about to be recorded: one more than in the rounds
        that are over, as many as in the one that is not.
        """
        count = 1
        for instance_id in record.failures:
            failure = LoadFailure.read(record, instance_id)
            if now_ms < self.forgotten_ms(failure):
                is_over = now_ms >= self.over_ms(model_id, failure)
                count = max(count, failure.count + is_over)
        return min(count, COUNT_MAX)

    def verdict(
        self, model_id: ModelId, record: ModelRecord, now_ms: int, *, in_use: bool = True
    ) -> Verdict:
        """Answer where a load may be tried: nowhere after a permanent failure, nor after
        ``failures_max`` others. That an instance is too small for the model is none of these.
        """
        counting = self.counting(model_id, record, now_ms, in_use=in_use)
        if not counting:
            return Verdict()
        permanent = [f for f in counting if f.kind is FailureKind.PERMANENT]
        at_fault = [f for f in counting if not f.needed_units]
        final = None
        if permanent:
            final = permanent[0]
        elif len(at_fault) >= self.failures_max:
            final = counting[0]
        return Verdict(
            excluded=frozenset(f.instance_id for f in counting),
            needed_units=max(f.needed_units for f in counting),
            final=final,
            newest=counting[0],
        )


def _integer(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0

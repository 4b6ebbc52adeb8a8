"""Whether the first loads of an instance fail for reasons of its own (spec core 7.3).

A version whose runtime loads nothing must not take the place of one whose runtime does. Owns the
judgement of one failure, the count, and the verdict. Who hears of the loads, and what follows, is
``mm.mesh.probation``'s.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from mm.core.ids import InstanceId, ModelId
from mm.core.load_failures import FailureKind
from mm.core.records import ModelRecord
from mm.core.routing import is_ready

#: So many models may fail here though they serve elsewhere: chance, or a storage that was away.
FATAL_MAX: Final = 2
#: Of fewer loads, no share says anything;
LOADS_MIN: Final = 20
#: of more, this share may fail.
FAILED_SHARE_MAX: Final = 0.5
#: So many loads in a row that succeed show that what was wrong is no more.
RECOVERY_LOADS: Final = 3


#: Models that failed and are remembered: more would change no verdict.
FAILED_MODELS_MAX: Final = 1000


class Judgement(enum.Enum):
    """What a failed load says of the instance where it failed."""

    #: The model serves elsewhere, so it is not the model.
    FATAL = "the model serves elsewhere"
    #: It may be the model, it may be the instance.
    GENERAL = "nobody knows the model to be at fault"
    #: It failed elsewhere before, or needs more memory than there is here.
    EXEMPT = "it is the model"


@dataclass(frozen=True, slots=True)
class Terms:
    """On what an instance is judged."""

    me: InstanceId
    start_time_ms: int
    #: For so long after the start; 0: never.
    period_ms: int
    #: A copy that says nothing of its state serves once it is as old.
    load_timeout_ms: int


def judge(terms: Terms, record: ModelRecord, kind: FailureKind, now_ms: int) -> Judgement:
    """Judge the failure of a model with this record.

    One that failed at another instance well before this one was there is no news. What failed at
    others of the same rollout is: those that started a period ago have been judged themselves.
    """
    if kind is FailureKind.CAPACITY:
        return Judgement.EXEMPT
    if serves_elsewhere(record, terms.me, now_ms, terms.load_timeout_ms):
        return Judgement.FATAL
    known_ms = terms.start_time_ms - terms.period_ms
    if any(ms < known_ms for each, ms in record.failures.items() if each != terms.me):
        return Judgement.EXEMPT
    return Judgement.GENERAL


def serves_elsewhere(
    record: ModelRecord, me: InstanceId, now_ms: int, load_timeout_ms: int
) -> bool:
    """Answer whether another instance has a copy that is ready."""
    return any(
        each != me and is_ready(record, each, now_ms, load_timeout_ms) for each in record.copies
    )


class Probation:
    """Counts loads from the start of an instance, models that failed rather than tries.

    Three states. *On probation*, for a period: failures count. *Failed*, from too many of them:
    until loads succeed again, however long it takes. *Over*: nothing counts any more.

    Invariant: as long as it has failed there is a model to try again.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._successes_count = 0
        #: What failed last time, to be tried again in this order; True: it serves elsewhere.
        self._failed: dict[ModelId, bool] = {}
        self._has_failed = False
        #: Loads in a row that succeeded since.
        self._row_count = 0

    @property
    def has_failed(self) -> bool:
        """Whether this instance is to be left out for now."""
        return self._has_failed

    @property
    def failed_models(self) -> tuple[ModelId, ...]:
        """The models whose last load failed, in the order in which to try them again."""
        return tuple(self._failed)

    @property
    def fatal_count(self) -> int:
        """How many of them serve elsewhere."""
        return sum(self._failed.values())

    def is_on(self, now_ms: int) -> bool:
        """Answer whether loads count: in the period, and after it as long as it has failed."""
        terms = self._terms
        is_early = 0 <= now_ms - terms.start_time_ms < terms.period_ms
        if not is_early and not self._has_failed:
            self._failed.clear()
        return is_early or self._has_failed

    def succeeded(self, model_id: ModelId, now_ms: int) -> None:
        """A load succeeded."""
        if not self.is_on(now_ms):
            return
        self._successes_count += 1
        self._row_count += 1
        self._failed.pop(model_id, None)
        self._recover_if_proved()

    def failed(
        self, model_id: ModelId, judgement: Judgement, *, in_progress_count: int, now_ms: int
    ) -> None:
        """A load failed, while so many others were in progress."""
        if judgement is Judgement.EXEMPT or not self.is_on(now_ms):
            return
        self._row_count = 0
        self._failed.pop(model_id, None)
        self._failed[model_id] = judgement is Judgement.FATAL
        if len(self._failed) > FAILED_MODELS_MAX:
            del self._failed[next(iter(self._failed))]
        loads_count = self._successes_count + len(self._failed) + in_progress_count
        self._has_failed = (
            self._has_failed
            or self.fatal_count > FATAL_MAX
            or (loads_count > LOADS_MIN and len(self._failed) / loads_count > FAILED_SHARE_MAX)
        )

    def postpone(self, model_id: ModelId) -> None:
        """A model could not be tried: the others first."""
        if model_id in self._failed:
            self._failed[model_id] = self._failed.pop(model_id)

    def forget(self, model_id: ModelId) -> None:
        """A model need not be tried again: it is not registered any more, or there already."""
        self._failed.pop(model_id, None)
        self._recover_if_proved()

    def _recover_if_proved(self) -> None:
        """It is proved when enough loads succeed, or nothing that failed is left."""
        if self._has_failed and (self._row_count >= RECOVERY_LOADS or not self._failed):
            self._has_failed = False
            self._failed.clear()
            self._successes_count = self._row_count = 0

"""The probation of a new instance: hears how its first loads end (spec core 7.3).

Owns the log lines. Who is judged how is ``core.probation``'s; what failed is tried again by
``trials``. That an instance on which loads fail is not ready is ``readiness``'s, that others are
preferred for loads ``core.placement``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio

from mm.core.ids import ModelId
from mm.core.load_failures import FailureKind
from mm.core.probation import Probation, Terms, judge, serves_elsewhere
from mm.mesh.ports import Clock
from mm.mesh.registry import Registry
from mm.mesh.statistics import Counters

logger = logging.getLogger(__name__)

#: Models that a log line names.
NAMED_MAX = 5


class FirstLoads:
    """Hears how loads end here, and knows whether this instance is to be left out for that."""

    def __init__(
        self,
        terms: Terms,
        *,
        registry: Registry,
        clock: Clock,
        counters: Counters,
        loads_in_progress: Callable[[], int],
    ) -> None:
        self._terms = terms
        self._registry = registry
        self._clock = clock
        self._counters = counters
        self._loads_in_progress = loads_in_progress
        self._probation = Probation(terms)
        #: Set, and replaced, when the verdict changes.
        self.changed = anyio.Event()

    @property
    def fail(self) -> bool:
        """Whether too many of them failed, and not enough have succeeded since."""
        return self._probation.has_failed

    @property
    def models_to_try(self) -> tuple[ModelId, ...]:
        """What is to be tried again, in this order, while too many fail."""
        return self._probation.failed_models if self.fail else ()

    def serve_elsewhere(self, model_id: ModelId) -> bool:
        """Answer whether a model is ready at another instance."""
        record, terms = self._registry.get(model_id), self._terms
        return record is not None and serves_elsewhere(
            record, terms.me, self._clock.now_ms(), terms.load_timeout_ms
        )

    def loaded(self, model_id: ModelId) -> None:
        """A load succeeded."""
        did_fail = self.fail
        self._probation.succeeded(model_id, self._clock.now_ms())
        self._tell_end(did_fail)

    def failed(self, model_id: ModelId, kind: FailureKind) -> None:
        """A load failed; its copy still counts as in progress."""
        record, now_ms = self._registry.get(model_id), self._clock.now_ms()
        if record is None or self._terms.period_ms == 0:
            return
        did_fail, probation = self.fail, self._probation
        judgement = judge(self._terms, record, kind, now_ms)
        others_count = max(0, self._loads_in_progress() - 1)
        probation.failed(model_id, judgement, in_progress_count=others_count, now_ms=now_ms)
        if did_fail or not self.fail:
            return
        self._counters.probations_failed += 1
        models = probation.failed_models
        logger.error(
            "the first loads fail here: %d models, %d of which serve elsewhere (%s%s). This"
            " instance is not ready, and others load what they can, until loads succeed; what"
            " failed is tried again. MM_FAILFAST_UPGRADE_ENABLED=false turns that off",
            len(models),
            probation.fatal_count,
            ", ".join(models[:NAMED_MAX]),
            ", ..." if len(models) > NAMED_MAX else "",
        )
        self._notify()

    def forget(self, model_id: ModelId) -> None:
        """A model that failed need not be tried again."""
        did_fail = self.fail
        self._probation.forget(model_id)
        self._tell_end(did_fail)

    def postpone(self, model_id: ModelId) -> None:
        """A model that failed could not be tried again now."""
        self._probation.postpone(model_id)

    def _tell_end(self, did_fail: bool) -> None:
        if did_fail and not self.fail:
            logger.warning("loads succeed again: this instance is as good as others from now on")
            self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

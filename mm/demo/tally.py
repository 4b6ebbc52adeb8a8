"""What became of the demo's calls: counts, latencies, and the first few things that went wrong.

Pure bookkeeping; ``traffic`` reports to it, ``view`` and ``summary`` read it.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

#: Failures and wrong answers that are kept with their text; more are only counted.
EXAMPLES_MAX: Final = 5


@dataclass(slots=True)
class Tally:
    """Counts since the start of the traffic.

    Every call ends in exactly one of: ``checked`` (an answer came and was compared; ``wrong`` of
    them differed), ``failed`` (no answer) or ``lost`` (no answer, because the call was in flight
    on the connection to an instance when that instance was killed).
    """

    checked: int = 0
    wrong: int = 0
    failed: int = 0
    lost: int = 0
    #: Calls whose client had moved to another instance than its own one.
    moved: int = 0
    wrong_examples: list[str] = field(default_factory=list)
    failed_examples: list[str] = field(default_factory=list)
    lost_examples: list[str] = field(default_factory=list)
    #: Answered calls by instance, in the order of the instances.
    answered_by: Counter[str] = field(default_factory=Counter)
    _latencies_ms: list[float] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """All calls, however they ended."""
        return self.checked + self.failed + self.lost

    def record_answer(self, instance: str, latency_ms: float, difference: str | None) -> None:
        """An answer came; ``difference`` tells how it differs from what scikit-learn says."""
        self.checked += 1
        self.answered_by[instance] += 1
        bisect.insort(self._latencies_ms, latency_ms)
        if difference is not None:
            self.wrong += 1
            _keep(self.wrong_examples, difference)

    def record_failure(self, text: str) -> None:
        """A call failed that had no excuse."""
        self.failed += 1
        _keep(self.failed_examples, text)

    def record_loss(self, text: str) -> None:
        """A call was in flight on the connection to an instance that was killed."""
        self.lost += 1
        _keep(self.lost_examples, text)

    def percentile_ms(self, percent: float) -> float:
        """Answer the latency that ``percent`` of the answers did not exceed; 0 without answers."""
        if not self._latencies_ms:
            return 0.0
        rank = -(-len(self._latencies_ms) * percent // 100)
        return self._latencies_ms[max(0, int(rank) - 1)]


def _keep(examples: list[str], text: str) -> None:
    if len(examples) < EXAMPLES_MAX:
        examples.append(text)

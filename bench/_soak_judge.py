"""What ``bench/soak.py`` goes by: whether a process grows, and why calls were refused.

Owns the samples of resident memory with their windows, and the faults beside which refusals are
held. Sums of calls are ``soak.py``'s.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from urllib.parse import unquote

import grpc.aio
from _soak_world import Place, rss_kib_of

SAMPLE_S = 1.0
#: The measured time in so many parts, each of which has one figure: its middle sample. What a burst
#: or a fault takes for a moment is not in it, nor how much glibc keeps free from minute to minute,
#: which is 3 % of an instance.
WINDOWS = 5
#: The goal; and what a small process may have more for a few messages that are large.
SHARE_MAX, KIB_MAX = 0.02, 512
#: So long after a fault calls may be refused because of it: connections are given up 5 to 7.5 s
#: after a last sign of life, and those that could not be reached are left alone for 10 s at most.
FELT_S = 20.0
#: What a call has, of ``soaker.c`` and of those that move vmodels.
CALL_S = 30.0
#: So long a switch waits for an instance that says nothing and might take a copy.
SILENCE_S = 60.0
_DEADLINE_EXCEEDED = 4
#: What differs from call to call in a text.
_NUMBERS = re.compile(r"[0-9]+(\.[0-9]+)*(:[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Growth:
    """How the memory of one process went, which was there all the time."""

    windows_kib: tuple[float, ...]

    @property
    def first_kib(self) -> float:
        """The first window."""
        return self.windows_kib[0]

    @property
    def more_kib(self) -> float:
        """How much more the last window has than the first."""
        return self.windows_kib[-1] - self.windows_kib[0]

    @property
    def trend_kib(self) -> float:
        """The same by all windows: the middle one of the slopes between any two of them."""
        pairs = combinations(enumerate(self.windows_kib), 2)
        slope = median((later - earlier) / (n - m) for (m, earlier), (n, later) in pairs)
        return slope * (len(self.windows_kib) - 1)

    @property
    def is_flat(self) -> bool:
        """Whether neither of the two is more than the goal allows.

        Less is no growth: the warm-up has more faults at a time.
        """
        return max(self.more_kib, self.trend_kib) <= max(KIB_MAX, SHARE_MAX * self.first_kib)


class Memory:
    """Samples of all processes, while somebody takes them."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        #: Process -> its id, when, KiB.
        self._samples: defaultdict[str, list[tuple[int, float, int]]] = defaultdict(list)

    @asynccontextmanager
    async def sampled(self) -> AsyncIterator[None]:
        """Take samples, as long as the context is open."""
        self._samples.clear()
        task = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _sample(self) -> None:
        while True:
            for place in self._places:
                for name, pid in place.pids().items():
                    kib = rss_kib_of(pid)
                    if kib is not None:
                        sample = (pid, time.monotonic(), kib)
                        self._samples[f"{name} {place.number}"].append(sample)
            await asyncio.sleep(SAMPLE_S)

    def last_kib(self) -> dict[str, int]:
        """Answer the last sample of each process."""
        return {name: samples[-1][2] for name, samples in self._samples.items()}

    def growths(self) -> dict[str, Growth | None]:
        """Answer how each process went; None if it was started anew meanwhile."""
        return {name: growth_of(samples) for name, samples in self._samples.items()}


def growth_of(samples: Sequence[tuple[int, float, int]]) -> Growth | None:
    """Answer how a process went; None if it is not one, or was looked at too seldom."""
    if len({pid for pid, _, _ in samples}) > 1:
        return None
    began_s = samples[0][1]
    window_s = (samples[-1][1] - began_s) / WINDOWS
    windows: list[list[int]] = [[] for _ in range(WINDOWS)]
    for _, at_s, kib in samples:
        number = int((at_s - began_s) / window_s) if window_s else 0
        windows[min(WINDOWS - 1, number)].append(kib)
    return Growth(tuple(median(window) for window in windows)) if all(windows) else None


@dataclass(slots=True)
class Fault:
    """Something that was done to an instance or a runtime; without an end it is under way."""

    began_s: float
    ended_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Refusal:
    """One call that ended with a status that is not OK."""

    at_s: float
    status: int
    has_begun: bool
    text: str
    #: So long before it the fault may be over that it is because of.
    felt_s: float = FELT_S

    @classmethod
    def read(cls, line: str) -> Refusal:
        """Read what ``soaker.c`` says of it."""
        _, _, _, status, has_begun, text = line.split(" ", 5)
        felt_s = FELT_S + CALL_S * (int(status) == _DEADLINE_EXCEEDED)
        shown = _shown(unquote(text))
        return cls(time.monotonic(), int(status), has_begun == "1", shown, felt_s)

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Refusal:
        """Take what a vmodel was not moved for."""
        code: int = error.code().value[0]
        shown = f"setVModel: {_shown(error.details() or '')}"
        return cls(time.monotonic(), code, False, shown, FELT_S + CALL_S + SILENCE_S)

    def may_follow(self, fault: Fault) -> bool:
        """Answer whether the fault is so near that it may be why."""
        return fault.began_s <= self.at_s <= fault.ended_s + self.felt_s


def weigh_refusals(
    refusals: Sequence[Refusal], faults: Sequence[Fault]
) -> tuple[list[str], list[str]]:
    """Answer lines that tell of what was refused, and what has no fault beside it."""
    told: Counter[str] = Counter()
    unexplained: Counter[str] = Counter()
    for each in refusals:
        when = "after its answer had begun" if each.has_begun else "before any answer"
        what = f"status {each.status} {when}: {each.text}"
        told[what] += 1
        if not any(each.may_follow(fault) for fault in faults):
            unexplained[what] += 1
    lines = [f"{count:6,}  {what}" for what, count in told.most_common()]
    wrong = [f"{n} calls refused while nothing failed: {what}" for what, n in unexplained.items()]
    return lines, wrong


def _shown(text: str) -> str:
    return _NUMBERS.sub("#", text)

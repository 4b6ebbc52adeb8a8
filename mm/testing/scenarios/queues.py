"""Copies of a model as queues, and calls that a policy sends to them: an event simulation.

Owns arrivals, work, queues and time. Which copy gets a call is the policy's. The same seed makes
the same arrivals and the same work for every policy, so that two of them differ by their choices
only.
"""

from __future__ import annotations

import enum
import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol


@dataclass(slots=True)
class Job:
    """One call: where it came in, when, and how much work it is."""

    router: int
    arrived_s: float
    work_s: float
    #: The copy that sent it on; -1: none did.
    busy: int = -1


class Policy(Protocol):
    """Chooses a copy for each call, and hears what happens to it."""

    def choose(self, job: Job, now_s: float) -> int:
        """Answer which copy gets the call."""
        ...

    def is_redirected(self, job: Job, in_flight: int) -> bool:
        """Answer whether a copy that has so many calls sends this one back."""
        ...

    def counted(self, copy: int, in_flight: int, now_s: float) -> None:
        """The calls at a copy changed."""
        ...

    def replied(self, job: Job, copy: int, in_flight: int, now_s: float) -> None:
        """A reply came to the call's router; the copy had so many calls when it sent it."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Who calls whom, and how much."""

    routers_count: int
    #: For each copy, how much longer than the fastest it takes for the same work.
    slowness: Sequence[float]
    #: What a copy does at a time.
    slots_count: int
    service_mean_s: float
    #: Between router and copy, one way.
    latency_s: float
    #: Work that arrives, as a part of what all copies can do.
    load: float

    @property
    def arrivals_per_s(self) -> float:
        """Answer how many calls a second make the load."""
        speed = sum(1 / each for each in self.slowness)
        return self.load * speed * self.slots_count / self.service_mean_s


@dataclass(slots=True)
class _Copy:
    slowness: float
    running_count: int = 0
    waiting: deque[Job] = field(default_factory=deque)

    @property
    def in_flight(self) -> int:
        return self.running_count + len(self.waiting)


def simulate(shape: Shape, policy: Policy, calls_count: int, seed: str) -> list[float]:
    """Answer how long each call took from its router and back, in order of their answers."""
    return _Simulation(shape, policy, seed).run(calls_count)


class _Step(enum.Enum):
    REACH = "reach the copy"
    REPLY = "reply to the router"
    SENT_BACK = "back to the router"


class _Simulation:
    def __init__(self, shape: Shape, policy: Policy, seed: str) -> None:
        self._shape = shape
        self._policy = policy
        self._rng = random.Random(f"queues {seed}")
        self._copies = [_Copy(slowness) for slowness in shape.slowness]
        #: When, a number that settles ties, which copy, which call.
        self._ends: list[tuple[float, int, int, Job]] = []
        #: When, what, which copy, which call, calls in flight that are told: all take the same time
        #: from here to there, so they arrive in the order in which they left.
        self._wire: deque[tuple[float, _Step, int, Job, int]] = deque()
        self._sequence = 0
        self._times_s: list[float] = []

    def run(self, calls_count: int) -> list[float]:
        rng, ends, wire = self._rng, self._ends, self._wire
        rate, mean_s = self._shape.arrivals_per_s, self._shape.service_mean_s
        handlers = {
            _Step.REACH: self._reach,
            _Step.REPLY: self._reply,
            _Step.SENT_BACK: self._sent_back,
        }
        next_s = rng.expovariate(rate)
        while True:
            end_s = ends[0][0] if ends else inf
            wire_s = wire[0][0] if wire else inf
            if next_s <= end_s and next_s <= wire_s:
                if next_s == inf:
                    return self._times_s
                calls_count -= 1
                router = rng.randrange(self._shape.routers_count)
                self._send(Job(router, next_s, rng.expovariate(1 / mean_s)), next_s)
                next_s = next_s + rng.expovariate(rate) if calls_count else inf
            elif wire_s <= end_s:
                now_s, step, copy, job, told = wire.popleft()
                handlers[step](now_s, copy, job, told)
            else:
                now_s, _, copy, job = heapq.heappop(ends)
                self._finish(now_s, copy, job)

    def _send(self, job: Job, now_s: float) -> None:
        copy = self._policy.choose(job, now_s)
        self._wire.append((now_s + self._shape.latency_s, _Step.REACH, copy, job, 0))

    def _reach(self, now_s: float, copy: int, job: Job, told: int) -> None:
        state = self._copies[copy]
        if self._policy.is_redirected(job, state.in_flight):
            at_s = now_s + self._shape.latency_s
            self._wire.append((at_s, _Step.SENT_BACK, copy, job, state.in_flight))
            return
        if state.running_count < self._shape.slots_count:
            self._start(now_s, copy, job)
        else:
            state.waiting.append(job)
        self._policy.counted(copy, state.in_flight, now_s)

    def _start(self, now_s: float, copy: int, job: Job) -> None:
        state = self._copies[copy]
        state.running_count += 1
        self._sequence += 1
        end_s = now_s + job.work_s * state.slowness
        heapq.heappush(self._ends, (end_s, self._sequence, copy, job))

    def _finish(self, now_s: float, copy: int, job: Job) -> None:
        state = self._copies[copy]
        state.running_count -= 1
        if state.waiting:
            self._start(now_s, copy, state.waiting.popleft())
        self._policy.counted(copy, state.in_flight, now_s)
        at_s = now_s + self._shape.latency_s
        self._wire.append((at_s, _Step.REPLY, copy, job, state.in_flight))

    def _reply(self, now_s: float, copy: int, job: Job, told: int) -> None:
        self._policy.replied(job, copy, told, now_s)
        self._times_s.append(now_s - job.arrived_s)

    def _sent_back(self, now_s: float, copy: int, job: Job, told: int) -> None:
        self._policy.replied(job, copy, told, now_s)
        job.busy = copy
        self._send(job, now_s)

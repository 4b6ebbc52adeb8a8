"""``tail``: how long calls of one model wait that has eight copies, two of them at half speed.

The queues are simulated event by event around the choice that the mesh makes: each router has a
table of its own and asks ``choose``; it hears the calls in flight that a copy tells in its replies
and pushes in between; and a copy without a free slot sends a call on, once. The same arrivals and
the same work are given to two others. *Join the shortest queue* knows all calls in flight at every
moment, which nobody can build: it is what is aimed at. *Fewest in flight as the sender counts them*
is the Java mesh's rule, and what is left behind.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from mm.core.ids import InstanceId
from mm.core.load_reports import RECENT_S, SERVICE_PART
from mm.core.routing import ReadyCopy, RoutingLimits, RoutingView, decide
from mm.limits import Limits
from mm.table import Table
from mm.testing.scenarios.queues import Job, Policy, Shape, simulate
from mm.testing.scenarios.report import Figure, ScenarioReport

CALLS_COUNT: Final = 200_000
#: The first part of the calls finds queues that are still short, and does not count.
WARM_UP_DIVISOR: Final = 20
SLOWNESS: Final = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0)
COPIES_COUNT: Final = len(SLOWNESS)
NAMES: Final = tuple(InstanceId(f"copy{number}") for number in range(COPIES_COUNT))
#: Routers, load, and what a copy does at a time, as its runtime tells the mesh
#: (``maxConcurrency``). One at a time is the hardest: a wrong choice costs a whole call.
POINTS: Final = ((16, 0.7, 4), (16, 0.9, 4), (64, 0.7, 4), (64, 0.9, 4), (64, 0.9, 1))
#: So that a quarter of it is the shortest time between two pushes.
SERVICE_MEAN_S: Final = 0.02
LATENCY_S: Final = 0.0003
TIMES_SHORTEST_MAX: Final = 1.15
MODEL: Final = "m"
_DEFAULTS: Final = Limits()
LIMITS: Final = RoutingLimits(
    _DEFAULTS.retry_iterations_max, _DEFAULTS.copies_tried_max, _DEFAULTS.load_failures_max
)


class JoinShortestQueue:
    """Sends each call to where the fewest are, those on their way there included."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        #: On their way there, and there; and only the latter.
        self._counts = [0] * COPIES_COUNT
        self._there = [0] * COPIES_COUNT

    def choose(self, job: Job, now_s: float) -> int:
        """Answer the copy with the fewest calls; among equals by chance."""
        fewest = min(self._counts)
        copies = [copy for copy, count in enumerate(self._counts) if count == fewest]
        copy = copies[int(self._rng.random() * len(copies))]
        self._counts[copy] += 1
        return copy

    def is_redirected(self, job: Job, in_flight: int) -> bool:
        """Answer no."""
        return False

    def counted(self, copy: int, in_flight: int, now_s: float) -> None:
        """Know it at once, of every router's calls."""
        self._counts[copy] -= in_flight < self._there[copy]
        self._there[copy] = in_flight

    def replied(self, job: Job, copy: int, in_flight: int, now_s: float) -> None:
        """Have known it already."""


class SendersCount:
    """The Java mesh: each sender by what it has in flight itself; ties to the longest unused."""

    def __init__(self, routers_count: int) -> None:
        self._sent = [[0] * COPIES_COUNT for _ in range(routers_count)]
        self._used_s = [[0.0] * COPIES_COUNT for _ in range(routers_count)]

    def choose(self, job: Job, now_s: float) -> int:
        """Answer the copy that this sender uses least."""
        sent, used_s = self._sent[job.router], self._used_s[job.router]
        copy = min(range(COPIES_COUNT), key=lambda each: (sent[each], used_s[each]))
        sent[copy] += 1
        used_s[copy] = now_s
        return copy

    def is_redirected(self, job: Job, in_flight: int) -> bool:
        """Answer no."""
        return False

    def counted(self, copy: int, in_flight: int, now_s: float) -> None:
        """Not know of it."""

    def replied(self, job: Job, copy: int, in_flight: int, now_s: float) -> None:
        """One call fewer."""
        self._sent[job.router][copy] -= 1


@dataclass(slots=True)
class _Pushes:
    """What one copy pushed to the routers: a count when it changed, at most so often."""

    gap_s: float
    count: int = 0
    pushed_count: int = 0
    pushed_s: float = 0.0
    #: The push before, while the last one is on its way.
    earlier: tuple[float, int] = (0.0, 0)

    def push_if_due(self, now_s: float, count: int) -> None:
        """Push what was due since, then this count if it may be."""
        if self.count != self.pushed_count and self.pushed_s + self.gap_s <= now_s:
            self._push(self.pushed_s + self.gap_s)
        self.count = count
        if count != self.pushed_count and self.pushed_s + self.gap_s <= now_s:
            self._push(now_s)

    def _push(self, at_s: float) -> None:
        self.earlier = (self.pushed_s, self.pushed_count)
        self.pushed_s, self.pushed_count = at_s, self.count


class MeshRule:
    """What the mesh does: two random choices on what copies told, pushes, and one redirect."""

    def __init__(self, routers_count: int, slots_count: int, rng: random.Random) -> None:
        self._rng = rng
        self._slots_count = slots_count
        self._tables = [Table(1) for _ in range(routers_count)]
        for table in self._tables:
            self._handles = [table.add_instance(name) for name in NAMES]
            table.set_peers(MODEL, self._handles)
        self._copies = {handle: copy for copy, handle in enumerate(self._handles)}
        #: When what a router knows of a copy was true.
        self._known_s = [[0.0] * COPIES_COUNT for _ in range(routers_count)]
        #: When it called it last.
        self._called_s = [[0.0] * COPIES_COUNT for _ in range(routers_count)]
        # A round of messages to all routers takes its part of what may be sent in a second.
        gap_s = max(
            _DEFAULTS.load_push_interval_min_s,
            SERVICE_PART * SERVICE_MEAN_S,
            routers_count / _DEFAULTS.load_pushes_per_s_max,
        )
        self._pushes = [_Pushes(gap_s) for _ in range(COPIES_COUNT)]

    def choose(self, job: Job, now_s: float) -> int:
        """Take over what was pushed since the last call, then decide as the mesh does."""
        table, known_s = self._tables[job.router], self._known_s[job.router]
        called_s = self._called_s[job.router]
        sent_s = now_s - LATENCY_S
        for copy, pushes in enumerate(self._pushes):
            if pushes.count != pushes.pushed_count:
                pushes.push_if_due(now_s, pushes.count)
            pushed_s, count = pushes.pushed_s, pushes.pushed_count
            if pushed_s > sent_s:
                pushed_s, count = pushes.earlier
            # Who has not called of late is not told.
            if known_s[copy] < pushed_s <= called_s[copy] + RECENT_S:
                known_s[copy] = pushed_s
                table.report_load(self._handles[copy], MODEL, count)
        if job.busy < 0:
            chosen = self._copies[table.choose(MODEL, self._rng.getrandbits(64))]
        else:
            chosen = self._choose_again(table, job)
        called_s[chosen] = now_s
        return chosen

    def _choose_again(self, table: Table, job: Job) -> int:
        ready = [
            ReadyCopy(NAMES[self._copies[handle]], count)
            for handle, count in table.peer_loads(MODEL)
        ]
        view = RoutingView(ready=ready, busy=NAMES[job.busy], attempts_count=1)
        decision = decide(view, LIMITS, self._rng)
        assert decision.instance_id is not None, decision
        return NAMES.index(decision.instance_id)

    def is_redirected(self, job: Job, in_flight: int) -> bool:
        """Answer as ``Router`` does: once, and from a copy without a free slot."""
        return job.busy < 0 and in_flight >= self._slots_count

    def counted(self, copy: int, in_flight: int, now_s: float) -> None:
        """Push it, at once or when it is time."""
        self._pushes[copy].push_if_due(now_s, in_flight)

    def replied(self, job: Job, copy: int, in_flight: int, now_s: float) -> None:
        """Tell the router's table."""
        self._known_s[job.router][copy] = now_s - LATENCY_S
        self._tables[job.router].report_load(self._handles[copy], MODEL, in_flight)


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, CALLS_COUNT)


def report(seed: int, calls_count: int) -> ScenarioReport:
    """Answer the figures of so many calls for each point."""
    figures = []
    for routers_count, load, slots_count in POINTS:
        shape = Shape(routers_count, SLOWNESS, slots_count, SERVICE_MEAN_S, LATENCY_S, load)
        figures += _point(shape, calls_count, seed)
    return ScenarioReport("tail", tuple(figures))


def _point(shape: Shape, calls_count: int, seed: int) -> list[Figure]:
    routers_count, slots_count = shape.routers_count, shape.slots_count
    point = f"{seed} {routers_count} {shape.load} {slots_count}"

    def p99_s(policy: Policy, divisor: int = 1) -> float:
        times_s = simulate(shape, policy, calls_count // divisor, point)
        counted = sorted(times_s[len(times_s) // WARM_UP_DIVISOR :])
        return counted[len(counted) * 99 // 100]

    best_s = p99_s(JoinShortestQueue(random.Random(f"shortest {point}")))
    mesh_s = p99_s(MeshRule(routers_count, slots_count, random.Random(f"mesh {point}")))
    senders_s = p99_s(SendersCount(routers_count), divisor=4)
    title = f"{routers_count} routers, load {shape.load:g}, {slots_count} at a time: p99"
    return [
        Figure(
            f"{title} of the mesh",
            f"<= {TIMES_SHORTEST_MAX:g} x shortest queue",
            f"{mesh_s / best_s:.2f} x ({1000 * mesh_s:.0f} ms to {1000 * best_s:.0f} ms)",
            mesh_s <= TIMES_SHORTEST_MAX * best_s,
        ),
        Figure(f"{title} by the sender's count (Java)", "", f"{senders_s / best_s:.2f} x", None),
    ]

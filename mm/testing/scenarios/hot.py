"""``hot``: the calls of one model rise twenty-fold, stay so for a while, and fall back.

Real nodes in virtual time, all of them full of other models, which are called now and then. The
model has one copy, which is a fifth busy; then it is called four times as much as a copy bears. How
long until somebody decides to add copies, until there are enough of them, and until they have gone
again; and whether any was added or taken away more than once. No call may fail meanwhile.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import anyio

from mm.core.ids import ModelId
from mm.errors import MeshError
from mm.scaling_settings import ScalingSettings
from mm.testing.cluster import Cluster, running_cluster, small_parameters
from mm.testing.fake_runtime import ModelPlan
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time
from mm.testing.steadiness import turns

HOT: Final = ModelId("hot")
INSTANCES_COUNT: Final = 12
CAPACITY_MIB: Final = 10
#: More than fit, so that memory is scarce all the time.
OTHERS_COUNT: Final = 2 * INSTANCES_COUNT * CAPACITY_MIB
LOAD_S: Final = 5.0
PLAN: Final = ModelPlan(load_s=LOAD_S, unload_s=0.5)
#: What one copy bears: the default.
RPM: Final = 2_000
BUSY: Final = 0.2
RISE: Final = 20
CALM_S: Final = 30.0
HOT_S: Final = 20.0
#: Copies are held for ten minutes after the fall. That they stay for half an hour after the last
#: was made, and go 80 s after one another, is made shorter here: virtual hours take real minutes.
HOLD_S: Final = HOT_S + 600.0
LIMITS: Final = {"scaledown_settled_s": 300.0, "scaledown_gap_s": 20.0}
#: Copies that were needed for a moment of the fall are held once more.
FALL_S: Final = 1_500.0
FALLEN_PER_S: Final = 1.0
OTHERS_EVERY_S: Final = 2.0
DECIDED_S_MAX: Final = 1.0
#: Four fifths of what they bear, and one for chance.
COPIES_MAX: Final = math.ceil(RISE * BUSY / 0.8) + 1


@dataclass(slots=True)
class Course:
    """What was seen, in seconds since the rise."""

    decided_s: float = math.inf
    enough_s: float = math.inf
    copies_max: int = 0
    fell_s: float = math.inf
    copies_last: int = 0
    added_count: int = 0
    dropped_count: int = 0
    failed_count: int = 0
    #: Copies, each time that there was another number of them.
    history: list[int] = field(default_factory=list)


class _Traffic:
    """Clients, who call by any instance."""

    def __init__(self, cluster: Cluster, course: Course, seed: int) -> None:
        self._cluster = cluster
        self._course = course
        self._rng = random.Random(f"hot {seed}")

    async def hot(self, calls_per_s: float, seconds: float) -> None:
        """Call the model by chance, so often on average."""
        end_s = anyio.current_time() + seconds
        async with anyio.create_task_group() as group:
            while anyio.current_time() < end_s:
                await anyio.sleep(self._rng.expovariate(calls_per_s))
                group.start_soon(self._call, HOT)

    async def others(self) -> None:
        """Call the other models in turn, for ever."""
        async with anyio.create_task_group() as group:
            number = 0
            while True:
                await anyio.sleep(OTHERS_EVERY_S)
                number += 1
                group.start_soon(self._call, ModelId(f"m{number % OTHERS_COUNT}"))

    async def _call(self, model_id: ModelId) -> None:
        try:
            await self._rng.choice(self._cluster.serving).invoke(model_id)
        except MeshError:
            self._course.failed_count += 1


async def _watch(cluster: Cluster, course: Course, wanted_count: int, begun_s: float) -> None:
    """Note each change of the number of copies."""
    while True:
        record = cluster.record(HOT)
        assert record is not None
        states = [record.copy_state(each) for each in record.copies]
        ready_count = sum(state is not None and state.is_ready for state in states)
        now_s = anyio.current_time() - begun_s
        if len(states) > 1:
            course.decided_s = min(course.decided_s, now_s)
        if ready_count >= wanted_count:
            course.enough_s = min(course.enough_s, now_s)
        if not course.history or course.history[-1] != len(states):
            course.history.append(len(states))
            course.fell_s = now_s
        course.copies_max = max(course.copies_max, len(states))
        course.copies_last = len(states)
        await anyio.sleep(0.02 if now_s < DECIDED_S_MAX + LOAD_S else 1.0)


async def _run(seed: int, hot_s: float, fall_s: float) -> Course:
    course = Course()
    rate = BUSY * RPM / 60
    parameters = small_parameters(CAPACITY_MIB, loading_concurrency_max=4)
    scaling = ScalingSettings(rpm_threshold=RPM)
    async with running_cluster(
        seed=seed, parameters=parameters, plan=PLAN, scaling=scaling, **LIMITS
    ) as cluster:
        cluster.watch_delay_s = 0.02
        cluster.network.latency_s = 0.0005
        cluster.call_s = 0.01
        for number in range(INSTANCES_COUNT):
            await cluster.start(f"i{number:02}")
        await cluster["i00"].register(HOT, load_now=True, sync=True)
        for number in range(OTHERS_COUNT):
            await cluster["i00"].register(f"m{number}")
        traffic = _Traffic(cluster, course, seed)
        async with anyio.create_task_group() as group:
            await _fill(cluster)
            group.start_soon(traffic.others)
            await traffic.hot(rate, CALM_S)
            begun_s = anyio.current_time()
            wanted_count = math.ceil(RISE * BUSY)
            group.start_soon(_watch, cluster, course, wanted_count, begun_s)
            await traffic.hot(RISE * rate, hot_s)
            await traffic.hot(FALLEN_PER_S, fall_s)
            group.cancel_scope.cancel()
        counters = [each.node.parts.counters for each in cluster.serving]
        course.added_count = sum(each.copies_added + each.second_copies_added for each in counters)
        course.dropped_count = sum(each.copies_dropped for each in counters)
    return course


async def _fill(cluster: Cluster) -> None:
    """Have all instances full of other models.

    A few at a time: all at once would meet instances full of what is loading, and be refused.
    """
    limiter = anyio.CapacityLimiter(INSTANCES_COUNT)

    async def load(model_id: str) -> None:
        async with limiter:
            await cluster["i00"].load(model_id)

    async with anyio.create_task_group() as group:
        for number in range(OTHERS_COUNT // 2):
            group.start_soon(load, f"m{number}")


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, HOT_S, FALL_S)


def report(seed: int, hot_s: float, fall_s: float) -> ScenarioReport:
    """Answer the figures; those of the fall only if it lasts long enough for all copies to go."""
    course = run_in_virtual_time(partial(_run, seed, hot_s, fall_s), f"hot {seed}")
    wanted_count = math.ceil(RISE * BUSY)
    figures = (
        Figure(
            "from the rise to the decision to add copies",
            f"<= {DECIDED_S_MAX:.1f} s",
            f"{course.decided_s:.2f} s",
            course.decided_s <= DECIDED_S_MAX,
        ),
        Figure(
            f"until {wanted_count} copies are ready (a load takes {LOAD_S:g} s)",
            f"<= {2 * LOAD_S:.1f} s",
            f"{course.enough_s:.2f} s",
            course.enough_s <= 2 * LOAD_S,
        ),
        Figure(
            "most copies",
            f"{wanted_count} to {COPIES_MAX}",
            f"{course.copies_max}",
            wanted_count <= course.copies_max <= COPIES_MAX,
        ),
        Figure("calls that failed", "0", f"{course.failed_count}", course.failed_count == 0),
    )
    return ScenarioReport("hot", figures if fall_s < FALL_S else (*figures, *_of_the_fall(course)))


def _of_the_fall(course: Course) -> tuple[Figure, ...]:
    turns_count = turns(course.history)
    return (
        Figure(
            "copies 25 minutes after the fall",
            "1",
            f"{course.copies_last}",
            course.copies_last == 1,
        ),
        Figure(
            "the last of them gone, after the rise",
            f">= {HOLD_S:.0f} s",
            f"{course.fell_s:.0f} s",
            course.fell_s >= HOLD_S,
        ),
        Figure("turns from more copies to fewer or back", "1", f"{turns_count}", turns_count == 1),
        Figure(
            "copies added, and given up",
            "the same number",
            f"{course.added_count}, {course.dropped_count}",
            course.added_count == course.dropped_count,
        ),
    )

"""``crash``: one of 6 instances dies with a sixth of the models; a load takes 5 s.

Clients go on calling. A model that only the dead one had costs its next caller a load; what nobody
calls is loaded when its instance has been gone long enough. Each is loaded once.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Final

import anyio

from mm.testing.cluster import Cluster, small_parameters
from mm.testing.fake_runtime import ModelPlan
from mm.testing.instance import Instance
from mm.testing.scenarios.life import Callers, call_each, fleet
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time

INSTANCES_COUNT: Final = 6
MODELS_COUNT: Final = 300
#: By Zipf's law these get nearly half of the calls.
HOT_COUNT: Final = 30
LOAD_S: Final = 5.0
CALLS_PER_S: Final = 100.0
CAPACITY_MIB: Final = 200
#: Less than a load takes: no model has a second copy yet.
BEFORE_S: Final = 2.0
AFTER_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one crash came to."""

    #: Hot models that only the dead one had, and those of them for which a call waited.
    hot_lost_count: int
    hot_waited_count: int
    hot_wait_max_s: float
    failures_count: int
    calls_count: int
    #: Loads of the model that was loaded most often.
    loads_most: int
    lost_count: int
    back_count: int


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, MODELS_COUNT, CALLS_PER_S)


def report(seed: int, models_count: int, calls_per_s: float) -> ScenarioReport:
    """Answer the figures with so many models and calls."""
    outcome = run_in_virtual_time(partial(_crash, seed, models_count, calls_per_s), f"crash {seed}")
    figures = (
        Figure(
            f"hot models that a call waited for, of {outcome.hot_lost_count} that only it had",
            ">= 1",
            f"{outcome.hot_waited_count}",
            outcome.hot_waited_count >= 1,
        ),
        Figure(
            "longest call to a hot model after the crash",
            f"<= {2 * LOAD_S:g} s",
            f"{outcome.hot_wait_max_s:.2f} s",
            outcome.hot_wait_max_s <= 2 * LOAD_S,
        ),
        Figure(
            "loads of one model after the crash, the most",
            "1",
            f"{outcome.loads_most}",
            outcome.loads_most <= 1,
        ),
        Figure(
            f"models back after {AFTER_S:g} s, of {outcome.lost_count} lost",
            "all",
            f"{outcome.back_count}",
            outcome.back_count == outcome.lost_count,
        ),
        Figure(
            f"calls that failed, of {outcome.calls_count}",
            "0",
            f"{outcome.failures_count}",
            not outcome.failures_count,
        ),
    )
    return ScenarioReport("crash", figures)


async def _crash(seed: int, models_count: int, calls_per_s: float) -> Outcome:
    models = [f"m{number:03}" for number in range(models_count)]
    rng = random.Random(f"crash {seed}")
    parameters = small_parameters(CAPACITY_MIB, loading_concurrency_max=8)
    async with fleet(
        seed, INSTANCES_COUNT, models, parameters, ModelPlan(load_s=LOAD_S)
    ) as cluster:
        await call_each(cluster, models, rng)
        hot = set(models[:HOT_COUNT])
        victim = max(cluster.serving[1:], key=lambda each: len(_only_at(each, hot, cluster)))
        others = [each for each in cluster.serving if each is not victim]
        for each in others:
            each.runtime.loads_begun.clear()
        callers = Callers(cluster, models, rng, calls_per_s)
        async with anyio.create_task_group() as group:
            group.start_soon(callers.run)
            await anyio.sleep(BEFORE_S)
            began_s = anyio.current_time()
            lost = set(victim.runtime.loaded)
            hot_lost = _only_at(victim, hot, cluster)
            await victim.crash()
            await anyio.sleep(AFTER_S)
            group.cancel_scope.cancel()
        await cluster.settle()
        loads: Counter[str] = Counter()
        for each in others:
            loads.update(each.runtime.loads_begun)
        waits = [each for each in callers.tally.waits if each[0] >= began_s and each[1] in hot]
        there = set().union(*(each.runtime.loaded for each in others))
        return Outcome(
            len(hot_lost),
            len(hot_lost & {name for _, name, _ in waits}),
            max((wait_s for _, _, wait_s in waits), default=0.0),
            len(callers.tally.failures),
            callers.tally.calls_count,
            max(loads.values(), default=0),
            len(lost),
            len(lost & there),
        )


def _only_at(instance: Instance, models: set[str], cluster: Cluster) -> set[str]:
    """Answer which of these models no other instance has."""
    others = (each.runtime.loaded for each in cluster.serving if each is not instance)
    return (models & set(instance.runtime.loaded)).difference(*others)

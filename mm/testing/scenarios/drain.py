"""``drain``: one of 4 instances is told to stop; 500 models are loaded, a load takes 5 s.

Clients go on calling all four until the one that stops is gone. No call may fail, and none may wait
while a copy lives: only a model that had not moved when the time was up would cost its next caller
a load.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Final

import anyio

from mm.testing.cluster import small_parameters
from mm.testing.fake_runtime import ModelPlan
from mm.testing.scenarios.life import Callers, call_each, fleet, loads_count
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time

INSTANCES_COUNT: Final = 4
MODELS_COUNT: Final = 500
LOAD_S: Final = 5.0
CALLS_PER_S: Final = 50.0
#: All fit three times over: this is about moving, not about room.
CAPACITY_MIB: Final = 500
SLOTS: Final = 8
WAIT_MAX_S: Final = 1.0
BEFORE_S: Final = 10.0
AFTER_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one stop came to."""

    loads_before_count: int
    calls_count: int
    failures: list[str]
    wait_max_s: float
    models_count: int
    loads_count: int
    stop_s: float


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, MODELS_COUNT, CALLS_PER_S)


def report(seed: int, models_count: int, calls_per_s: float) -> ScenarioReport:
    """Answer the figures with so many models and calls."""
    outcome = run_in_virtual_time(partial(_drain, seed, models_count, calls_per_s), f"drain {seed}")
    extra = outcome.loads_count - outcome.models_count
    figures = (
        Figure(
            f"loads for one call of each of {models_count} models",
            f"{models_count}",
            f"{outcome.loads_before_count}",
            outcome.loads_before_count == models_count,
        ),
        Figure(
            f"calls that failed, of {outcome.calls_count}",
            "0",
            f"{len(outcome.failures)}",
            not outcome.failures,
        ),
        Figure(
            "longest call",
            f"<= {WAIT_MAX_S:g} s",
            f"{outcome.wait_max_s:.2f} s",
            outcome.wait_max_s <= WAIT_MAX_S,
        ),
        Figure("loads beyond one for each model only there", "", f"{extra}", None),
        Figure(f"to move {outcome.models_count} models", "", f"{outcome.stop_s:.1f} s", None),
    )
    return ScenarioReport("drain", figures)


async def _drain(seed: int, models_count: int, calls_per_s: float) -> Outcome:
    models = [f"m{number:03}" for number in range(models_count)]
    rng = random.Random(f"drain {seed}")
    parameters = small_parameters(CAPACITY_MIB, loading_concurrency_max=SLOTS)
    async with fleet(
        seed, INSTANCES_COUNT, models, parameters, ModelPlan(load_s=LOAD_S)
    ) as cluster:
        await call_each(cluster, models, rng)
        leaver = cluster.serving[1]
        elsewhere = set().union(*(e.runtime.loaded for e in cluster.serving if e is not leaver))
        here_count, before = len(leaver.runtime.loaded - elsewhere), loads_count(cluster)
        callers = Callers(cluster, models, rng, calls_per_s)
        async with anyio.create_task_group() as group:
            group.start_soon(callers.run)
            await anyio.sleep(BEFORE_S)
            began_s = anyio.current_time()
            await leaver.stop()
            stop_s = anyio.current_time() - began_s
            await anyio.sleep(AFTER_S)
            group.cancel_scope.cancel()
        await cluster.settle()
        cluster.check()
        return Outcome(
            before,
            callers.tally.calls_count,
            callers.tally.failures,
            callers.tally.wait_max_s(began_s),
            here_count,
            loads_count(cluster) - before,
            stop_s,
        )

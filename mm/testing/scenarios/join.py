"""``join``: an instance joins 8 that are full. ``flap``: one comes and goes for an hour.

What the mesh loads of its own accord is bounded: into new room only what had been evicted, and an
instance that never stays is not filled again and again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import anyio

from mm.testing.cluster import Cluster, small_parameters
from mm.testing.fake_runtime import MIB, ModelPlan
from mm.testing.scenarios.growth import (
    GROWTH_ENTRIES,
    GROWTH_ENTRIES_SHORT,
    filled_soon,
    growth_figure,
)
from mm.testing.scenarios.life import Callers, call_each, fleet, loads_count
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time
from mm.testing.table_sizes import table_sizes

INSTANCES_COUNT: Final = 8
CAPACITY_MIB: Final = 24
#: A quarter more than fit.
MODELS_COUNT: Final = 230
LOAD_S: Final = 2.0
CALLS_PER_S: Final = 20.0
JOIN_S: Final = 300.0
SHARE_MAX: Final = 1.1 / (INSTANCES_COUNT + 1)

FLAP_S: Final = 30.0
HOUR_S: Final = 3600.0
FLAP_INSTANCES_COUNT: Final = 3
FLAP_MODELS_COUNT: Final = 90
#: Of the capacity of the one that comes and goes: what it was loaded with, all in all.
FLAP_TIMES_MAX: Final = 12.0
#: The copies of one that crashed stand in the records for a sixth of the time: ten minutes.
GONE_SHARE: Final = 1 / 6
#: Those that are there, those that crashed in the last ten minutes (every other one does), and two.
KNOWN_MAX: Final = FLAP_INSTANCES_COUNT + 5 + 2


@dataclass(frozen=True, slots=True)
class Joined:
    """What became of an instance that joined."""

    resident_bytes: int
    reloaded_bytes: int
    first_s: float
    failures_count: int


def run_join(seed: int) -> ScenarioReport:
    """Answer the figures of ``join`` for a seed."""
    return join_report(seed, JOIN_S)


def join_report(seed: int, seconds: float) -> ScenarioReport:
    """Answer the figures when it is looked on for so long."""
    joined = run_in_virtual_time(partial(_join, seed, seconds), f"join {seed}")
    share = joined.reloaded_bytes / joined.resident_bytes
    figures = (
        Figure(
            "loaded again of its own accord, of what was there",
            f"<= {SHARE_MAX:.1%}",
            f"{share:.1%}",
            0 < share <= SHARE_MAX,
        ),
        Figure(
            "until the first load begins",
            "<= 10 s",
            f"{joined.first_s:.1f} s",
            joined.first_s <= 10,
        ),
        Figure("calls that failed", "0", f"{joined.failures_count}", not joined.failures_count),
    )
    return ScenarioReport("join", figures)


async def _join(seed: int, seconds: float) -> Joined:
    rng = random.Random(f"join {seed}")
    async with _full_fleet(seed, INSTANCES_COUNT, MODELS_COUNT, rng, CALLS_PER_S) as (
        cluster,
        callers,
    ):
        resident = sum(each.runtime.memory_bytes for each in cluster.serving)
        before, first_s = loads_count(cluster), seconds
        async with anyio.create_task_group() as group:
            group.start_soon(callers.run)
            await anyio.sleep(30)
            before = loads_count(cluster)
            began_s = anyio.current_time()
            await cluster.start("new")
            while anyio.current_time() < began_s + seconds:
                await anyio.sleep(0.5)
                if loads_count(cluster) > before:
                    first_s = min(first_s, anyio.current_time() - began_s)
            group.cancel_scope.cancel()
        await cluster.settle()
        reloaded = (loads_count(cluster) - before) * MIB
        return Joined(resident, reloaded, first_s, len(callers.tally.failures))


@dataclass(frozen=True, slots=True)
class Flapped:
    """What an hour of it came to."""

    loaded_bytes: int
    capacity_bytes: int
    failures_count: int
    #: Instances that some table knows, at most.
    known_count: int
    #: What the leader and another one that stays remember, each time that the other one has gone.
    sizes: list[Counter[str]]


def run_flap(seed: int) -> ScenarioReport:
    """Answer the figures of ``flap`` for a seed."""
    return flap_report(seed, HOUR_S)


def flap_report(seed: int, seconds: float) -> ScenarioReport:
    """Answer the figures of so many seconds."""
    flapped = run_in_virtual_time(partial(_flap, seed, seconds), f"flap {seed}")
    times = flapped.loaded_bytes / flapped.capacity_bytes
    entries = GROWTH_ENTRIES if seconds >= HOUR_S else GROWTH_ENTRIES_SHORT
    figures = (
        Figure(
            "loaded into it in an hour, times its capacity",
            f"<= {FLAP_TIMES_MAX:g}",
            f"{times:.1f}",
            times <= FLAP_TIMES_MAX,
        ),
        Figure("calls that failed", "0", f"{flapped.failures_count}", not flapped.failures_count),
        Figure(
            "instances that any table knows, the most",
            f"<= {KNOWN_MAX}",
            f"{flapped.known_count}",
            flapped.known_count <= KNOWN_MAX,
        ),
        growth_figure(flapped.sizes, f"{len(flapped.sizes)} times", entries),
    )
    return ScenarioReport("flap", figures)


async def _flap(seed: int, seconds: float) -> Flapped:
    rng = random.Random(f"flap {seed}")
    fleet_of_seed = _full_fleet(
        *(seed, FLAP_INSTANCES_COUNT, FLAP_MODELS_COUNT, rng, 2.0),
        gone_after_s=GONE_SHARE * seconds,
    )
    with filled_soon():
        async with fleet_of_seed as (cluster, callers):
            loads, known_count, number = 0, 0, 0
            sizes: list[Counter[str]] = []
            leader, other = cluster.serving[:2]
            begun_s = anyio.current_time()
            async with anyio.create_task_group() as group:
                group.start_soon(callers.run)
                while anyio.current_time() < begun_s + seconds:
                    # Each time a new process with an id of its own, as a pod has.
                    flapper = await cluster.start(f"f{number:03}")
                    number += 1
                    await anyio.sleep(FLAP_S)
                    if number % 2:
                        await flapper.stop()
                    else:
                        await flapper.crash()
                    loads += flapper.runtime.loads_begun.total()
                    del cluster.instances[flapper.name]
                    await anyio.sleep(FLAP_S)
                    known_count = max(known_count, _known_count(cluster))
                    here = table_sizes(leader.node, "node")
                    here.update(table_sizes(other.node, "other"))
                    sizes.append(here)
                group.cancel_scope.cancel()
            failures_count = len(callers.tally.failures)
    return Flapped(loads * MIB, CAPACITY_MIB * MIB, failures_count, known_count, sizes)


@asynccontextmanager
async def _full_fleet(
    seed: int,
    instances_count: int,
    models_count: int,
    rng: random.Random,
    calls_per_s: float,
    **limits: float,
) -> AsyncIterator[tuple[Cluster, Callers]]:
    """Run instances that loaded what fits of all models, and callers of what is loaded: every load
    from then on is the mesh's own.
    """
    models = [f"m{number:03}" for number in range(models_count)]
    parameters = small_parameters(CAPACITY_MIB, loading_concurrency_max=4)
    plan = ModelPlan(load_s=LOAD_S)
    async with fleet(seed, instances_count, models, parameters, plan, **limits) as cluster:
        await call_each(cluster, models, rng)
        loaded = [m for m in models if any(m in each.runtime.loaded for each in cluster.serving)]
        yield cluster, Callers(cluster, loaded, rng, calls_per_s)


def _known_count(cluster: Cluster) -> int:
    """Answer how many instances those tables know that could grow with all that came and went."""
    count = 0
    for each in cluster.serving:
        parts = each.node.parts
        count = max(count, len(parts.members), len(parts.members._gone))
        count = max(count, len(parts.registry.holders() | parts.registry.failed()))
    return count

"""``cold-burst``: 50 models that nobody has loaded are called at once over 16 instances.

Real nodes in virtual time; every watch tells of a write 1 s after it, so all decisions are made
from records that do not know of the burst. The mesh herds if it believes them: all go to the
instance that looked best. Whoever asks does so at any instance, or all at one (a client behind a
sticky balancer), of empty instances, or of full ones that must evict. Several bursts of each, and
the worst counts.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Final

import anyio

from mm.core.ids import ModelId
from mm.errors import MeshError
from mm.testing.cluster import Cluster, running_cluster, small_parameters
from mm.testing.fake_runtime import ModelPlan
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time

INSTANCES_COUNT: Final = 16
MODELS_COUNT: Final = 50
RECORDS_AGE_S: Final = 1.0
#: Longer than the burst takes to be asked for, shorter than the records take to tell of it.
LOAD_S: Final = 2.0
#: As many models of 1 MiB make an instance full.
CAPACITY_MIB: Final = 16
TIMES_MEAN_MAX: Final = 2.0
BURSTS_COUNT: Final = 4
#: (what it is called, instances are full, all calls come in at one of them)
KINDS: Final = (
    ("empty instances, asked of all", False, False),
    ("empty instances, asked of one", False, True),
    ("full instances, asked of all", True, False),
    ("full instances, asked of one", True, True),
)


@dataclass(frozen=True, slots=True)
class Burst:
    """What one burst came to."""

    loads_most: int
    loads_count: int
    failed_count: int
    #: The longest call, in virtual time.
    wait_max_s: float

    @property
    def times_mean(self) -> float:
        """Answer how many times its fair share the busiest instance loaded."""
        return self.loads_most / (MODELS_COUNT / INSTANCES_COUNT)


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, BURSTS_COUNT)


def report(
    seed: int, bursts_count: int, kinds: tuple[tuple[str, bool, bool], ...] = KINDS
) -> ScenarioReport:
    """Answer the figures of so many bursts of each kind."""
    figures = []
    for title, is_full, is_sticky in kinds:
        work = partial(_bursts, seed, bursts_count, is_full=is_full, is_sticky=is_sticky)
        bursts = run_in_virtual_time(work, f"{seed} {title}")
        figures += _figures(title, bursts)
    return ScenarioReport("cold-burst", tuple(figures))


def _figures(title: str, bursts: list[Burst]) -> list[Figure]:
    worst = max(bursts, key=lambda each: each.loads_most)
    extra = max(each.loads_count for each in bursts) - MODELS_COUNT
    failed = sum(each.failed_count for each in bursts)
    wait_s = max(each.wait_max_s for each in bursts)
    return [
        Figure(
            f"{title}: most loads on one instance",
            f"<= {TIMES_MEAN_MAX:g} x mean",
            f"{worst.times_mean:.2f} x ({worst.loads_most} of {MODELS_COUNT})",
            worst.times_mean <= TIMES_MEAN_MAX,
        ),
        Figure(f"{title}: calls that failed", "0", f"{failed}", failed == 0),
        Figure(f"{title}: loads beyond one a model", "0", f"{extra}", extra == 0),
        Figure(f"{title}: longest call", "", f"{wait_s:.2f} s", None),
    ]


async def _bursts(seed: int, count: int, *, is_full: bool, is_sticky: bool) -> list[Burst]:
    names = [f"i{number:02}" for number in range(INSTANCES_COUNT)]
    async with running_cluster(
        seed=seed,
        parameters=small_parameters(CAPACITY_MIB, loading_concurrency_max=4),
        plan=ModelPlan(load_s=LOAD_S),
    ) as cluster:
        cluster.watch_delay_s = RECORDS_AGE_S
        cluster.network.latency_s = 0.0005
        for name in names:
            await cluster.start(name)
        rng = random.Random(f"cold-burst {seed} {is_full} {is_sticky}")
        if is_full:
            await _fill(cluster)
        bursts = []
        for number in range(count):
            models = [f"b{number}-{index}" for index in range(MODELS_COUNT)]
            bursts.append(await _burst(cluster, models, rng, is_sticky=is_sticky))
            if not is_full:
                for model_id in models:
                    await cluster[names[0]].node.models.unregister(ModelId(model_id))
            await cluster.settle()
        return bursts


async def _fill(cluster: Cluster) -> None:
    """Give every instance as many models as it holds, used at nearly the same times."""
    async with anyio.create_task_group() as group:
        for instance in cluster.serving:
            for index in range(CAPACITY_MIB):
                model_id = f"old-{instance.name}-{index}"
                await instance.register(model_id)
                group.start_soon(instance.load_here, model_id)
    await cluster.settle()
    await anyio.sleep(60)


async def _burst(
    cluster: Cluster, models: list[str], rng: random.Random, *, is_sticky: bool
) -> Burst:
    names = sorted(cluster.instances)
    for model_id in models:
        await cluster[names[0]].register(model_id)
    await anyio.sleep(60)
    before = _loads(cluster)
    waits_s: list[float] = []
    entry = rng.choice(names)

    async def call(name: str, model_id: str) -> None:
        begun_s = anyio.current_time()
        try:
            await cluster[name].invoke(model_id)
        except MeshError:
            return  # counted by its absence
        waits_s.append(anyio.current_time() - begun_s)

    async with anyio.create_task_group() as group:
        for model_id in models:
            group.start_soon(call, entry if is_sticky else rng.choice(names), model_id)
    loads = _loads(cluster)
    loads.subtract(before)
    return Burst(
        max(loads.values()), loads.total(), len(models) - len(waits_s), max(waits_s, default=0.0)
    )


def _loads(cluster: Cluster) -> Counter[str]:
    return Counter({each.name: each.runtime.loads_begun.total() for each in cluster.serving})

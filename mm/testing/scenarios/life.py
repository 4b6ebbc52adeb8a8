"""What the scenarios of instances that come and go have in common: a fleet, callers, counts.

Real nodes in virtual time. Callers call in an open loop, at instances drawn by chance, models drawn
by Zipf's law; what failed and what waited is told by the second in which it began.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import anyio

from mm.errors import MeshError
from mm.mesh.ports import RuntimeParameters
from mm.testing.cluster import Cluster, ConnectionLostError, running_cluster
from mm.testing.fake_runtime import ModelPlan
from mm.testing.instance import Instance

WATCH_DELAY_S: Final = 0.02
LATENCY_S: Final = 0.0005
REGISTER_AT_ONCE: Final = 50
ZIPF_EXPONENT: Final = 0.9


@dataclass(slots=True)
class Tally:
    """What became of the calls."""

    calls_count: int = 0
    failures: list[str] = field(default_factory=list)
    #: (begun, model, how long it took), of those that took longer than a tenth of a second.
    waits: list[tuple[float, str, float]] = field(default_factory=list)

    def wait_max_s(self, since_s: float) -> float:
        """Answer the longest of the calls begun since then."""
        return max((wait_s for begun_s, _, wait_s in self.waits if begun_s >= since_s), default=0.0)


class Callers:
    """Calls in an open loop until cancelled."""

    def __init__(
        self, cluster: Cluster, models: Sequence[str], rng: random.Random, calls_per_s: float
    ) -> None:
        self._cluster = cluster
        self._models = models
        self._weights = list(
            itertools.accumulate((rank + 1) ** -ZIPF_EXPONENT for rank in range(len(models)))
        )
        self._rng = rng
        self._calls_per_s = calls_per_s
        self.tally = Tally()

    async def run(self) -> None:
        """Call."""
        async with anyio.create_task_group() as group:
            while True:
                await anyio.sleep(self._rng.expovariate(self._calls_per_s))
                model_id = self._rng.choices(self._models, cum_weights=self._weights)[0]
                group.start_soon(self._call, self._rng.choice(self._cluster.serving), model_id)

    async def _call(self, entry: Instance, model_id: str) -> None:
        tally, begun_s = self.tally, anyio.current_time()
        tally.calls_count += 1
        try:
            await entry.invoke(model_id)
        except MeshError as exc:
            tally.failures.append(f"{begun_s:.2f} {entry.name} {model_id}: {exc.message}")
        except ConnectionLostError:
            return  # its entry crashed: no mesh could have answered
        took_s = anyio.current_time() - begun_s
        if took_s > 0.1:
            tally.waits.append((begun_s, model_id, took_s))


@asynccontextmanager
async def fleet(
    seed: int,
    instances_count: int,
    models: Sequence[str],
    parameters: RuntimeParameters,
    plan: ModelPlan,
    **limits: float,
) -> AsyncIterator[Cluster]:
    """Run instances that know these models, none loaded."""
    async with running_cluster(seed=seed, parameters=parameters, plan=plan, **limits) as cluster:
        cluster.watch_delay_s = WATCH_DELAY_S
        cluster.network.latency_s = LATENCY_S
        for number in range(instances_count):
            await cluster.start(f"i{number:02}")
        for start in range(0, len(models), REGISTER_AT_ONCE):
            async with anyio.create_task_group() as group:
                for model_id in models[start : start + REGISTER_AT_ONCE]:
                    group.start_soon(cluster.serving[0].register, model_id)
        await anyio.sleep(1)
        yield cluster


async def call_each(cluster: Cluster, models: Sequence[str], rng: random.Random) -> None:
    """Call every model once, the last one first: then the first was used last."""
    async with anyio.create_task_group() as group:
        for model_id in reversed(models):
            group.start_soon(rng.choice(cluster.serving).invoke, model_id)
            await anyio.sleep(0.01)
    await cluster.settle()


def loads_count(cluster: Cluster) -> int:
    """Answer the loads that the instances that are there have begun."""
    return sum(each.runtime.loads_begun.total() for each in cluster.instances.values())

"""``rolling``: a new version takes the place of the old one, instance by instance, under load.

Real nodes in virtual time. Done as Kubernetes does it with one instance too many: a new one starts,
and as soon as it is ready an old one is told to stop and the next new one starts. Clients are sent
to those that are ready, and hear of changes late. What must not happen is that a call fails, or
that the cluster forgets what it had loaded (*the hit ratio*): models have to be moved before the
memory that they are in goes, and not all at once. Popularity is Zipf's, and there are half as many
models again as fit, so that a tenth of the loading slots is busy anyhow.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import anyio
from anyio.abc import TaskGroup

from mm.core.ids import ModelId
from mm.errors import MeshError
from mm.testing.cluster import (
    Cluster,
    ConnectionLostError,
    running_cluster,
    small_parameters,
    until,
)
from mm.testing.fake_runtime import FakeRuntime, ModelPlan
from mm.testing.instance import Instance
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scenarios.zipf import ZipfCalls
from mm.testing.scheduling import run_in_virtual_time

INSTANCES_COUNT: Final = 6
CAPACITY_MIB: Final = 40
LOADING_THREADS: Final = 4
PLAN: Final = ModelPlan(load_s=0.5, unload_s=0.1)
ZIPF: Final = 0.9
#: Models of 1 MiB for each instance.
MODELS_EACH: Final = 3 * CAPACITY_MIB // 2
CALLS_PER_S_EACH: Final = 10
#: How long a runtime takes to start, and clients to hear that an instance came or goes.
START_S: Final = 5.0
HEARD_S: Final = 1.0
#: Kubernetes asks every 5 s whether an instance is ready.
PROBE_S: Final = 5.0
READY_MAX_S: Final = 600.0
#: Before the rollout begins, every rank of popularity has been called often enough to be where it
#: belongs.
WARM_S: Final = 60.0
#: Calls in which a hit ratio is looked at. With 1,000 of them chance alone lowers the worst of
#: twenty by 2 points.
WINDOW_CALLS: Final = 1_000
#: Of the ratio before, the lowest window must have this share.
HITS_SHARE_MIN: Final = 0.95


@dataclass(slots=True)
class Outcome:
    """What the calls and the rollout came to."""

    #: In order of their ends, in the rollout or before it: whether it was a hit.
    before: list[bool] = field(default_factory=list)
    during: list[bool] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    wait_max_s: float = 0.0
    stopping_max: int = 0
    rollout_s: float = 0.0
    resident_count: int = 0
    loads_count: int = 0


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, INSTANCES_COUNT, WARM_S, WINDOW_CALLS)


def report(seed: int, instances_count: int, warm_s: float, window_calls: int) -> ScenarioReport:
    """Answer the figures of so many instances."""
    outcome = run_in_virtual_time(
        partial(_rolling, seed, instances_count, warm_s), f"rolling {seed} {instances_count}"
    )
    before = _percent(outcome.before)
    lowest = _lowest_percent(outcome.during, window_calls)
    limit = HITS_SHARE_MIN * before
    stopped = f"instances that stop at a time, of {instances_count} that are replaced"
    return ScenarioReport(
        "rolling",
        (
            Figure("hits before the rollout", "", f"{before:.2f} %", None),
            Figure(
                f"hits of the worst {window_calls:,} calls before, by chance",
                "",
                f"{_lowest_percent(outcome.before, window_calls):.2f} %",
                None,
            ),
            Figure(
                f"hits of the worst {window_calls:,} calls in it",
                f">= {limit:.2f} %",
                f"{lowest:.2f} %",
                lowest >= limit,
            ),
            Figure("hits after it began", "", f"{_percent(outcome.during):.2f} %", None),
            Figure(
                f"calls that failed, of {len(outcome.before) + len(outcome.during):,}",
                "0",
                f"{outcome.failures.total()}{_commonest(outcome.failures)}",
                not outcome.failures,
            ),
            Figure(stopped, "1", f"{outcome.stopping_max}", outcome.stopping_max == 1),
            Figure("longest call", "", f"{outcome.wait_max_s:.2f} s", None),
            Figure("time that it took", "", f"{outcome.rollout_s:.0f} s", None),
            Figure(
                "loads meanwhile, and copies at its begin",
                "",
                f"{outcome.loads_count}, {outcome.resident_count}",
                None,
            ),
        ),
    )


def _percent(hits: list[bool]) -> float:
    return 100 * sum(hits) / max(1, len(hits))


def _lowest_percent(hits: list[bool], window_calls: int) -> float:
    """Answer the ratio of the worst window, whenever it begins."""
    count = lowest = sum(hits[:window_calls])
    for number in range(window_calls, len(hits)):
        count += hits[number] - hits[number - window_calls]
        lowest = min(lowest, count)
    return 100 * lowest / min(window_calls, max(1, len(hits)))


def _is_ready(instance: Instance) -> bool:
    return instance.node.unready is None


def _commonest(failures: Counter[str]) -> str:
    return f" ({failures.most_common(1)[0][0]})" if failures else ""


async def _rolling(seed: int, instances_count: int, warm_s: float) -> Outcome:
    parameters = small_parameters(CAPACITY_MIB, loading_concurrency_max=LOADING_THREADS)
    async with running_cluster(seed=seed, parameters=parameters, plan=PLAN) as cluster:
        cluster.watch_delay_s = 0.01
        cluster.network.latency_s = 0.0005
        rollout = _Rollout(cluster, random.Random(f"rolling {seed}"), instances_count)
        await rollout.run(warm_s)
        await cluster.settle()
        cluster.check()
        return rollout.outcome


class _Rollout:
    def __init__(self, cluster: Cluster, rng: random.Random, instances_count: int) -> None:
        self.outcome = Outcome()
        self._cluster = cluster
        self._rng = rng
        self._count = instances_count
        self._models = [ModelId(f"m{number:03}") for number in range(MODELS_EACH * instances_count)]
        #: Where clients are sent.
        self._endpoints: list[Instance] = []
        self._stopping_count = 0
        self._has_begun = False

    async def run(self, warm_s: float) -> None:
        """Start the old version, let it get warm, replace it."""
        old = [await self._start("bbbbbb", number, version=1) for number in range(self._count)]
        self._endpoints += old
        for model_id in self._models:
            await old[0].register(model_id)
        # The least popular first: what fits is then what is worth it.
        async with anyio.create_task_group() as group:
            for number, model_id in enumerate(reversed(self._models)):
                group.start_soon(self._call, model_id)
                if number % (LOADING_THREADS * self._count) == 0:
                    await anyio.sleep(PLAN.load_s)
        self.outcome.before.clear()
        async with anyio.create_task_group() as clients:
            clients.start_soon(self._call_all, clients)
            await anyio.sleep(warm_s)
            await self._replace(old)
            clients.cancel_scope.cancel()

    async def _replace(self, old: list[Instance]) -> None:
        outcome = self.outcome
        self._has_begun = True
        begun_s = anyio.current_time()
        outcome.resident_count = sum(len(each.runtime.loaded) for each in old)
        before = self._loads_count()
        async with anyio.create_task_group() as stops:
            for number, each in enumerate(old):
                new = await self._start("cccccc", number, version=2)
                await until(partial(_is_ready, new), READY_MAX_S, f"{new} is ready")
                await anyio.sleep(self._rng.uniform(0, PROBE_S) + HEARD_S)
                self._endpoints.append(new)
                stops.start_soon(self._stop, each)
        outcome.rollout_s = anyio.current_time() - begun_s
        await anyio.sleep(10)
        outcome.loads_count = self._loads_count() - before

    async def _start(self, replica_set: str, number: int, *, version: int) -> Instance:
        """Start an instance with the id that Kubernetes would give it."""
        runtime = FakeRuntime(self._cluster.parameters, default_plan=PLAN, start_s=START_S)
        name = f"{replica_set}-2222{'bcdfghjkmn'[number]}"
        return await self._cluster.start(name, runtime=runtime, version=version)

    async def _stop(self, each: Instance) -> None:
        self._stopping_count += 1
        self.outcome.stopping_max = max(self.outcome.stopping_max, self._stopping_count)
        async with anyio.create_task_group() as group:
            group.start_soon(each.stop)
            await anyio.sleep(HEARD_S)
            self._endpoints.remove(each)
        self._stopping_count -= 1

    async def _call_all(self, group: TaskGroup) -> None:
        ranks = iter(ZipfCalls(len(self._models), ZIPF, 10**9, self._rng))
        while True:
            await anyio.sleep(self._rng.expovariate(CALLS_PER_S_EACH * self._count))
            group.start_soon(self._call, self._models[next(ranks)])

    async def _call(self, model_id: ModelId) -> None:
        outcome, begun_s = self.outcome, anyio.current_time()
        results = outcome.during if self._has_begun else outcome.before
        try:
            await self._rng.choice(self._endpoints).invoke(model_id)
        except (MeshError, ConnectionLostError) as exc:
            outcome.failures[str(exc) or type(exc).__name__] += 1
        wait_s = anyio.current_time() - begun_s
        outcome.wait_max_s = max(outcome.wait_max_s, wait_s)
        results.append(wait_s < PLAN.load_s / 10)

    def _loads_count(self) -> int:
        return sum(each.runtime.loads_begun.total() for each in self._cluster.instances.values())

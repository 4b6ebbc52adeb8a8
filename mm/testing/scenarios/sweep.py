"""``sweep``: somebody goes through all models in turn, and there are twice as many as fit.

Real nodes in virtual time. No cache can keep what is called once a round, and none should try: each
call of the sweep is a load and, since all is full, an eviction. What must not happen is more than
that (*churn*: loads that push each other out before they served, models loaded twice), that the
models which others use all the time go too (*the hot set*), or that somebody waits much longer than
the loads before him take (*starving*). After some rounds everything is called at once, which is the
same in the hardest form.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import anyio

from mm.errors import MeshError
from mm.testing.cluster import Cluster, running_cluster, small_parameters
from mm.testing.fake_runtime import ModelPlan
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time

INSTANCES: Final = ("a", "b", "c")
CAPACITY_MIB: Final = 40
LOADING_THREADS: Final = 4
PLAN: Final = ModelPlan(load_s=0.2, unload_s=0.05)
#: A load, and the unload that makes room for it.
TURN_S: Final = PLAN.load_s + PLAN.unload_s
SLOTS_COUNT: Final = len(INSTANCES) * LOADING_THREADS
MODELS_COUNT: Final = 2 * len(INSTANCES) * CAPACITY_MIB
#: A sixth of what fits. Each is called once in `HOT_GAP_S`; to go through the rest of the cache
#: takes the sweep two to three times as long.
HOT_COUNT: Final = 20
HOT_GAP_S: Final = 0.7
#: Twice as many as there are slots: there is always one who waits.
SWEEPERS_COUNT: Final = 2 * SLOTS_COUNT
ROUNDS_COUNT: Final = 6

#: Of the sweep's calls, how many may cost more than one load: two instances that are asked at the
#: same time for the same model cannot both know.
LOADS_PER_CALL_MAX: Final = 1.02
#: The hot models are always younger than the oldest of the others, so they are never the victim:
#: the margin is for what the first calls load.
HOT_HITS_PERCENT_MIN: Final = 99.5
#: With two sweepers a slot nobody has more than one before him; twice that, because loads are
#: spread by chance over the instances.
WAIT_MAX_S: Final = 2 * 2 * TURN_S
#: All at once: as many rounds as there are models for a slot, and half as many again, by the same
#: chance.
WAVE_MAX_S: Final = 1.5 * MODELS_COUNT / SLOTS_COUNT * TURN_S


@dataclass(slots=True)
class Part:
    """What some of the calls came to."""

    calls_count: int = 0
    #: Calls that took as long as a load, or longer.
    loaded_count: int = 0
    wait_max_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Outcome:
    """What a sweep came to: its own calls, those of the hot set, and the last wave."""

    sweep: Part = field(default_factory=Part)
    hot: Part = field(default_factory=Part)
    wave: Part = field(default_factory=Part)
    loads_count: int = 0
    evictions_count: int = 0
    wave_loads_count: int = 0


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, ROUNDS_COUNT)


def report(seed: int, rounds_count: int) -> ScenarioReport:
    """Answer the figures of so many rounds."""
    outcome = run_in_virtual_time(partial(_sweep, seed, rounds_count), f"sweep {seed}")
    sweep, hot, wave = outcome.sweep, outcome.hot, outcome.wave
    hot_percent = 100 * (1 - hot.loaded_count / hot.calls_count)
    failures = sweep.failures + hot.failures + wave.failures
    return ScenarioReport(
        "sweep",
        (
            _at_most(
                f"loads per call of the sweep ({sweep.calls_count:,} calls)",
                LOADS_PER_CALL_MAX,
                outcome.loads_count / sweep.calls_count,
            ),
            _at_most(
                "evictions per call of the sweep",
                LOADS_PER_CALL_MAX,
                outcome.evictions_count / sweep.calls_count,
            ),
            Figure(
                f"hits of the hot set meanwhile ({hot.calls_count:,} calls)",
                f">= {HOT_HITS_PERCENT_MIN:g} %",
                f"{hot_percent:.2f} %",
                hot_percent >= HOT_HITS_PERCENT_MIN,
            ),
            _at_most("longest call of the sweep", WAIT_MAX_S, sweep.wait_max_s, " s"),
            _at_most("longest call of the hot set", WAIT_MAX_S, hot.wait_max_s, " s"),
            _at_most(
                f"all {MODELS_COUNT} models at once: longest call",
                WAVE_MAX_S,
                wave.wait_max_s,
                " s",
            ),
            _at_most(
                "all models at once: loads per call",
                LOADS_PER_CALL_MAX,
                outcome.wave_loads_count / wave.calls_count,
            ),
            Figure(
                "calls that failed",
                "0",
                f"{failures.total()}{_commonest(failures)}",
                not failures,
            ),
        ),
    )


def _at_most(text: str, limit: float, reached: float, unit: str = "") -> Figure:
    return Figure(text, f"<= {limit:.2f}{unit}", f"{reached:.2f}{unit}", reached <= limit)


def _commonest(failures: Counter[str]) -> str:
    return f" ({failures.most_common(1)[0][0]})" if failures else ""


async def _sweep(seed: int, rounds_count: int) -> Outcome:
    async with running_cluster(
        seed=seed,
        parameters=small_parameters(CAPACITY_MIB, loading_concurrency_max=LOADING_THREADS),
        plan=PLAN,
    ) as cluster:
        cluster.watch_delay_s = 0.01
        cluster.network.latency_s = 0.0005
        for name in INSTANCES:
            await cluster.start(name)
        sweep = _Sweep(cluster, random.Random(f"sweep {seed}"))
        for model_id in (*sweep.hot, *sweep.cold):
            await cluster["a"].register(model_id)
        await anyio.sleep(1)
        await sweep.warm_up()
        await sweep.go_round(rounds_count)
        await cluster.settle()
        await sweep.call_all_at_once()
        await cluster.settle()
        cluster.check()
        return sweep.outcome


class _Sweep:
    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self.hot = [f"hot{number:02}" for number in range(HOT_COUNT)]
        self.cold = [f"cold{number:03}" for number in range(MODELS_COUNT - HOT_COUNT)]
        self.outcome = Outcome()
        self._cluster = cluster
        self._rng = rng
        self._is_over = False

    async def warm_up(self) -> None:
        """Fill the cache, the hot set last."""
        part = Part()
        for model_id in (*self.cold, *self.hot):
            await self._call(part, model_id)
        assert not part.failures, part.failures

    async def go_round(self, rounds_count: int) -> None:
        """Call all cold models in turn, so many at a time, and the hot ones again and again."""
        before = self._counts()
        order = iter(self.cold * rounds_count)

        async def sweeper() -> None:
            for model_id in order:
                await self._call(self.outcome.sweep, model_id)

        async with anyio.create_task_group() as hot:
            for model_id in self.hot:
                hot.start_soon(self._keep_hot, model_id)
            async with anyio.create_task_group() as group:
                for _ in range(SWEEPERS_COUNT):
                    group.start_soon(sweeper)
            hot.cancel_scope.cancel()
        loads_count, evictions_count = self._counts()
        # What the hot set had to load again is the sweep's doing too.
        self.outcome.loads_count = loads_count - before[0]
        self.outcome.evictions_count = evictions_count - before[1]

    async def call_all_at_once(self) -> None:
        """Call every model at the same moment."""
        before = self._counts()[0]
        async with anyio.create_task_group() as group:
            for model_id in (*self.hot, *self.cold):
                group.start_soon(self._call, self.outcome.wave, model_id)
        self.outcome.wave_loads_count = self._counts()[0] - before

    async def _keep_hot(self, model_id: str) -> None:
        await anyio.sleep(self._rng.uniform(0, HOT_GAP_S))
        while True:
            await self._call(self.outcome.hot, model_id)
            await anyio.sleep(HOT_GAP_S)

    async def _call(self, part: Part, model_id: str) -> None:
        begun_s = anyio.current_time()
        try:
            await self._cluster[self._rng.choice(INSTANCES)].invoke(model_id)
        except MeshError as exc:
            part.failures[f"{exc.code.name}: {exc.message}"] += 1
        wait_s = anyio.current_time() - begun_s
        part.calls_count += 1
        part.loaded_count += wait_s >= PLAN.load_s
        part.wait_max_s = max(part.wait_max_s, wait_s)

    def _counts(self) -> tuple[int, int]:
        """Answer the loads and evictions of all instances so far."""
        instances = self._cluster.serving
        return (
            sum(each.runtime.loads_begun.total() for each in instances),
            sum(each.node.statistics().counters.evictions for each in instances),
        )

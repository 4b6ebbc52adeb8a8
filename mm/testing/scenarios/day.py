"""``day``: a small cluster for 24 hours, in which everything comes and goes and nothing may grow.

Real nodes in virtual time, with few calls. Two instances stay, one of them the leader; the third is
replaced each hour by one with another id, mostly in order and sometimes by a crash. Models are
registered under ever new ids, called by Zipf's law with favourites that change, and unregistered;
some never load, some have a policy. Vmodels come and go under new ids, too, and one moves on.
Clients ask for ids that nobody knows, and lose patience. Runtimes lose models. At the end of each
hour, with a minute's rest, the size of everything is noted that the two remember: what is larger in
the second half of the day than in the first has a leak.
"""

from __future__ import annotations

import gc
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Final

import anyio

from mm.core.ids import ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.vmodel_changes import SetVModel
from mm.errors import MeshError, StatusCode
from mm.mesh.models import NO_POLICY
from mm.scaling_settings import ScalingSettings
from mm.testing.cluster import Cluster, ConnectionLostError, running_cluster, small_parameters
from mm.testing.fake_runtime import ModelPlan
from mm.testing.instance import Instance
from mm.testing.scenarios.growth import (
    GROWTH_ENTRIES,
    GROWTH_ENTRIES_SHORT,
    filled_soon,
    growth_figure,
)
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scenarios.zipf import ZipfCalls
from mm.testing.scheduling import run_in_virtual_time
from mm.testing.table_sizes import table_sizes

HOURS_COUNT: Final = 24
HOUR_S: Final = 3600.0
#: Nobody calls at the end of an hour, so that what is noted is not on its way.
REST_S: Final = 60.0
INSTANCES_COUNT: Final = 3
#: The first one leads, so what only a leader remembers is seen, and what only others do.
STAYING_COUNT: Final = 2
OTHER: Final = "other"
#: Every so many instances one does not stop in order.
CRASH_EVERY: Final = 4
CAPACITY_MIB: Final = 20
#: Twice what fits.
MODELS_COUNT: Final = 2 * INSTANCES_COUNT * CAPACITY_MIB
PLAN: Final = ModelPlan(load_s=0.5, unload_s=0.1)
CALL_GAP_S: Final = 6.0
#: A model comes and the oldest one goes each so often; every tenth never loads.
MODEL_GAP_S: Final = 60.0
BROKEN_EVERY: Final = 10
#: Of each ten models one, never a broken one, has a policy; a vmodel comes with another one.
POLICY_AT: Final = 7
VMODEL_AT: Final = 5
#: The oldest goes, long before its model does.
VMODELS_COUNT: Final = 3
#: Of the calls, those for ids that nobody knows, and those of clients without patience.
UNKNOWN_SHARE: Final = 0.05
HASTY_SHARE: Final = 0.05
HASTE_S: Final = 0.2

#: Objects of Python in the whole process, as they are many.
OBJECTS_GROWTH_MAX: Final = 1.02
SHOWN_COUNT: Final = 8


@dataclass(slots=True)
class Outcome:
    """What was noted each hour, and what the calls came to."""

    sizes: list[Counter[str]] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    loads_count: int = 0


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, HOURS_COUNT, HOUR_S)


def report(seed: int, hours_count: int, hour_s: float) -> ScenarioReport:
    """Answer the figures of so many hours, each as long as this."""
    outcome = run_in_virtual_time(partial(_day, seed, hours_count, hour_s), f"day {seed}")
    is_day = hours_count >= HOURS_COUNT
    half = hours_count // 2
    objects = median(outcome.objects[:half]), median(outcome.objects[half:])
    bad = sum(count for what, count in outcome.answers.items() if what.startswith("bad"))
    return ScenarioReport(
        "day",
        (
            growth_figure(
                outcome.sizes,
                f"{hours_count} h",
                GROWTH_ENTRIES if is_day else GROWTH_ENTRIES_SHORT,
            ),
            Figure(
                "objects of Python, first half and second",
                f"<= {OBJECTS_GROWTH_MAX:g} x",
                f"{objects[0]:,.0f}, {objects[1]:,.0f}",
                objects[1] <= OBJECTS_GROWTH_MAX * objects[0],
            ),
            Figure(
                f"calls that should have been served and were not, of {outcome.answers.total():,}",
                "0",
                f"{bad}{_commonest(outcome.answers)}",
                not bad,
            ),
            Figure("loads", "", f"{outcome.loads_count:,}", None),
            *_largest(outcome.sizes),
        ),
    )


def _largest(sizes: list[Counter[str]]) -> list[Figure]:
    """Tell of the largest tables, at each quarter."""
    quarters = [sizes[len(sizes) * number // 4 - 1] for number in range(1, 5)]
    names = (name for name, _ in quarters[-1].most_common() if not name.startswith(OTHER))
    largest = list(itertools.islice(names, SHOWN_COUNT))
    return [
        Figure(f"entries of {name}", "", ", ".join(f"{each[name]:,}" for each in quarters), None)
        for name in largest
    ]


def _commonest(answers: Counter[str]) -> str:
    bad = Counter({what: count for what, count in answers.items() if what.startswith("bad")})
    return f" ({bad.most_common(1)[0][0]})" if bad else ""


async def _day(seed: int, hours_count: int, hour_s: float) -> Outcome:
    # Second copies have come when the first hours are over, however short these are.
    scaling = ScalingSettings(
        second_copy_age_min_s=round(420 * hour_s / HOUR_S),
        second_copy_age_max_s=round(2400 * hour_s / HOUR_S),
    )
    cluster_of_seed = running_cluster(
        seed=seed,
        parameters=small_parameters(CAPACITY_MIB),
        plan=PLAN,
        scaling=scaling,
        # With few calls it is most of what wakes in a day.
        demand_interval_s=2.0,
    )
    with filled_soon():
        async with cluster_of_seed as cluster:
            cluster.watch_delay_s = 0.02
            cluster.network.latency_s = 0.0005
            day = _Day(cluster, random.Random(f"day {seed}"), hour_s)
            await day.begin()
            for hour in range(hours_count):
                await day.pass_hour(hour)
            cluster.check(losses_unnoticed=True)
            return day.outcome


class _Day:
    def __init__(self, cluster: Cluster, rng: random.Random, hour_s: float) -> None:
        self.outcome = Outcome()
        self._hour_s = hour_s
        self._cluster = cluster
        self._rng = rng
        self._numbers = itertools.count()
        self._names = (f"i{number}" for number in itertools.count())
        #: In order of their registration.
        self._models: list[ModelId] = []
        self._broken: set[ModelId] = set()
        self._vmodels: list[str] = []
        self._instances: list[Instance] = []
        self._loads_of_others = 0

    async def begin(self) -> None:
        """Start all instances, register the first models and call each."""
        for _ in range(INSTANCES_COUNT):
            await self._start()
        for _ in range(MODELS_COUNT):
            await self._register()
            await self._call(self._models[-1])

    async def pass_hour(self, hour: int) -> None:
        """Let an hour pass, and note what there is at its end."""
        with anyio.move_on_after(self._hour_s - REST_S):
            async with anyio.create_task_group() as group:
                group.start_soon(self._call_all)
                group.start_soon(self._change_models)
                await anyio.sleep(self._rng.uniform(0, self._hour_s / 2))
                await self._replace(is_crash=hour % CRASH_EVERY == CRASH_EVERY - 1)
        await anyio.sleep(REST_S)
        await self._cluster.settle()
        self._note()

    def _note(self) -> None:
        leader, other = self._instances[:STAYING_COUNT]
        sizes = table_sizes(leader.node, "node")
        sizes.update(table_sizes(other.node, OTHER))
        sizes["tasks"] = len(anyio.get_running_tasks())
        sizes["records"] = len(self._cluster.records())
        server = self._cluster.server
        sizes["keys"] = len(server.table("").items)
        self.outcome.sizes.append(sizes)
        gc.collect()
        self.outcome.objects.append(len(gc.get_objects()) + gc.get_freeze_count())
        here = sum(each.runtime.loads_begun.total() for each in self._instances)
        self.outcome.loads_count = self._loads_of_others + here

    # --- instances ------------------------------------------------------------------------------

    async def _start(self) -> None:
        name = next(self._names)
        instance = await self._cluster.start(name, is_known_by_all=True)
        for model_id in self._broken:
            instance.runtime.fail_loads(model_id, StatusCode.INTERNAL, "broken")
        self._instances.append(instance)

    async def _replace(self, *, is_crash: bool) -> None:
        await self._start()
        leaving = self._instances.pop(STAYING_COUNT)
        self._loads_of_others += leaving.runtime.loads_begun.total()
        if is_crash:
            await leaving.crash()
        else:
            await leaving.stop()
        del self._cluster.instances[leaving.name]
        lucky = self._rng.choice(self._instances).runtime
        for model_id in sorted(lucky.loaded)[:1]:
            lucky.lose(model_id)

    # --- models ---------------------------------------------------------------------------------

    async def _change_models(self) -> None:
        while True:
            await anyio.sleep(MODEL_GAP_S)
            gone = self._models.pop(0)
            self._broken.discard(gone)
            await self._any().node.models.unregister(gone)
            await self._register()

    async def _register(self) -> None:
        number = next(self._numbers)
        model_id = ModelId(f"m{number}")
        if number % BROKEN_EVERY == 0:
            self._broken.add(model_id)
            for instance in self._instances:
                instance.runtime.fail_loads(model_id, StatusCode.INTERNAL, "broken")
        place = number % BROKEN_EVERY
        policy = ModelPolicy(copies_min=1) if place == POLICY_AT else NO_POLICY
        await self._any().register(model_id, policy=policy)
        self._models.append(model_id)
        if place == VMODEL_AT:
            await self._point_to(model_id)

    async def _point_to(self, model_id: ModelId) -> None:
        """Set a new vmodel, and the one that moves on, and delete the oldest."""
        for vmodel_id in ("v", f"v-{model_id}"):
            await self._any().node.vmodels.set(SetVModel(vmodel_id, model_id))
        self._vmodels.append(f"v-{model_id}")
        if len(self._vmodels) > VMODELS_COUNT:
            await self._any().node.vmodels.delete(self._vmodels.pop(0))

    # --- calls ----------------------------------------------------------------------------------

    async def _call_all(self) -> None:
        ranks = iter(ZipfCalls(MODELS_COUNT, 0.9, 50, self._rng))
        async with anyio.create_task_group() as group:
            while True:
                await anyio.sleep(self._rng.expovariate(1 / CALL_GAP_S))
                place = next(ranks)
                if place < len(self._models):
                    group.start_soon(self._call, self._models[place])

    async def _call(self, model_id: ModelId) -> None:
        draw = self._rng.random()
        if draw < UNKNOWN_SHARE:
            model_id = ModelId(f"unknown{next(self._numbers)}")
        patience_s = HASTE_S if draw > 1 - HASTY_SHARE else 600.0
        what = "gave up"
        with anyio.move_on_after(patience_s):
            try:
                await self._any().invoke(model_id)
                what = "served"
            except (MeshError, ConnectionLostError) as exc:
                is_due = model_id in self._models and model_id not in self._broken
                what = f"{'bad: ' if is_due else ''}{str(exc) or type(exc).__name__}"
                if model_id not in self._models:
                    what = "unknown"
        self.outcome.answers[what] += 1

    def _any(self) -> Instance:
        return self._rng.choice([each for each in self._instances if each.is_serving])

"""The simulator: one seed, one cluster, faults, then none; the same run each time, to the byte.

Owns the course of a run and its options, all drawn from the seed: a *safety* phase, in which things
go wrong while clients call (``faults``, ``workload``, ``invariants``), and a *liveness* phase, in
which nothing does and the cluster must come right (``convergence``). Real ``Node``s run on trio's
virtual clock.
"""

from __future__ import annotations

import gc
import random
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

import anyio

from mm.mesh.ports import RuntimeParameters
from mm.testing import steadiness, vmodel_users
from mm.testing.convergence import Convergence
from mm.testing.event_log import Event, EventLog
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, MIB
from mm.testing.faults import Faults
from mm.testing.invariants import InvariantError, Invariants
from mm.testing.scheduling import run_in_virtual_time
from mm.testing.simulated_cluster import SKEW_MS_MAX, ModelShape, SimulatedCluster, logging_to
from mm.testing.steadiness import Steadiness
from mm.testing.vmodel_users import VModelUsers
from mm.testing.vmodel_workload import VModelWorkload
from mm.testing.workload import CLIENTS_COUNT, Workload

#: How much of the story a failure tells.
STORY_EVENTS_MAX: Final = 30
#: Limits that would make a run long: minutes of production in place of which some seconds show as
#: much. Everything else is as in production.
LIMITS: Final = {
    # Half of all that wakes in a run was this look, most of the time at nothing.
    "demand_interval_s": 1.0,
    "space_wait_s": 40.0,
    "gone_after_s": 15.0,
    "reaper_interval_s": 60.0,
    "janitor_interval_s": 60.0,
    # Twice that is how long one may be remembered.
    "load_failure_expiry_ms": 90_000,
}
#: Faults come each four seconds or so, and last for up to a minute.
SAFETY_S: Final = 60.0
LOAD_TIMEOUT_MS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Options:
    """How large a run is; 0 leaves it to the seed."""

    instances_count: int = 0
    models_count: int = 0
    safety_s: float = SAFETY_S
    #: vmodels that are set and deleted meanwhile; what else happens is then another story.
    vmodels_count: int = 0

    def arguments(self) -> str:
        """Answer what to add to ``mm sim`` for the same run."""
        texts = []
        if self.instances_count:
            texts.append(f" --instances {self.instances_count}")
        if self.models_count:
            texts.append(f" --models {self.models_count}")
        if self.safety_s != SAFETY_S:
            texts.append(f" --seconds {self.safety_s:g}")
        if self.vmodels_count:
            texts.append(f" --vmodels {self.vmodels_count}")
        return "".join(texts)


@dataclass(frozen=True, slots=True)
class Failure:
    """What a run violated, and the events that led there."""

    text: str
    story: tuple[Event, ...]
    #: A bug's traceback; empty if an invariant was violated.
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """What one seed came to."""

    seed: int
    options: Options
    failure: Failure | None
    digest: str
    events_count: int
    faults_count: int
    answers: dict[str, int]
    vmodel_answers: dict[str, int]
    loads_count: int
    #: From the end of faults until nothing was on its way, virtual.
    rest_s: float
    took_s: float

    @property
    def replay(self) -> str:
        """Answer the one line that does it again."""
        return f"mm sim --first-seed {self.seed} --seeds 1{self.options.arguments()}"


def simulate(seed: int, options: Options | None = None) -> Run:
    """Run one seed, start to end; what it violates is in the answer, nothing is raised."""
    begun_s = time.perf_counter()
    simulation = _Simulation(seed, options or Options())
    failure: Failure | None = None
    with logging_to(simulation.log):
        try:
            run_in_virtual_time(simulation.run, f"simulation {seed}")
        except Exception as exc:
            failure = simulation.failure(exc)
    # A run leaves thousands of objects in cycles; none of them must be collected in the next one,
    # where the end of a generator would be an event.
    gc.collect()
    return simulation.outcome(failure, time.perf_counter() - begun_s)


class _Simulation:
    def __init__(self, seed: int, options: Options) -> None:
        self.seed = seed
        self.options = options
        self.log = EventLog()
        self.rng = random.Random(f"options {seed}")
        count = options.instances_count or self.rng.randint(3, 5)
        self.names = [f"i{number}" for number in range(count)]
        self.follows_load = steadiness.follows_load(seed)
        #: It takes a while: not in runs that somebody made small.
        self.is_steady = steadiness.is_steady(seed) and options == Options()
        self.models = [
            f"m{number}" for number in range(options.models_count or self.rng.randint(20, 40))
        ]
        self.shapes = {model_id: self._shape() for model_id in self.models}
        if self.options.vmodels_count:
            self.shapes |= {model_id: self._shape() for model_id in vmodel_users.MODELS}
        self.answers: Counter[str] = Counter()
        self.vmodel_answers: Counter[str] = Counter()
        self.faults_count = 0
        self.loads_count = 0
        self.rest_s = 0.0

    def _shape(self) -> ModelShape:
        """Most models are as predicted, by default or by the runtime; one in ten is larger."""
        size_bytes = self.rng.choice([MIB, MIB, MIB // 2, 2 * MIB])
        predicted_bytes = size_bytes
        if size_bytes <= MIB and self.rng.random() < 0.5:
            predicted_bytes = 0
        if self.rng.random() < 0.1:
            predicted_bytes = MIB // 4
        return ModelShape(
            size_bytes=size_bytes,
            predicted_bytes=predicted_bytes,
            load_s=self.rng.choice([0.0, 0.2, 1.0]),
            unload_s=self.rng.choice([0.0, 0.05, 0.5]),
            is_size_told=self.rng.random() < 0.7,
        )

    def _parameters(self) -> RuntimeParameters:
        return replace(
            DEFAULT_PARAMETERS,
            capacity_bytes=self.rng.randint(10, 16) * MIB,
            loading_concurrency_max=self.rng.choice([1, 2, 4]),
            load_timeout_ms=LOAD_TIMEOUT_MS,
        )

    async def run(self) -> None:
        """Everything, in virtual time."""
        async with anyio.create_task_group() as group:
            cluster = SimulatedCluster(
                group,
                seed=self.seed,
                log=self.log,
                shapes=self.shapes,
                parameters=self._parameters(),
                skew_ms_max=self.rng.choice([0, SKEW_MS_MAX]),
                limits=LIMITS | steadiness.LIMITS if self.follows_load else LIMITS,
            )
            for name in self.names:
                await cluster.launch(name)
            group.start_soon(Invariants(cluster).run)
            workload = Workload(cluster, self.models)
            vmodels = VModelWorkload(cluster, self.options.vmodels_count)
            try:
                await self._be_safe(cluster, workload, vmodels)
                convergence = Convergence(cluster, workload, self.models)
                self.rest_s = await convergence.run()
                if self.is_steady:
                    await Steadiness(cluster, workload, self.models).run()
                await vmodels.converge()
            finally:
                self.answers = workload.answers
                self.vmodel_answers = vmodels.answers
                runtimes = [each.runtime for each in cluster.instances.values()]
                self.loads_count = sum(each.loads_begun.total() for each in runtimes)
            group.cancel_scope.cancel()

    async def _be_safe(
        self, cluster: SimulatedCluster, workload: Workload, vmodels: VModelWorkload
    ) -> None:
        """The first part: until the faults are over and all calls begun have ended."""
        for model_id in self.models:
            await workload.register(model_id)
        faults = Faults(cluster, self.names, self.models)
        users: VModelUsers | None = None
        # After a loss of the store records may come back that were deleted.
        if self.options.vmodels_count and "store wiped" not in faults.kinds:
            users = VModelUsers(cluster)
            await users.create()
            faults.affect(vmodel_users.MODELS)
        self.log.tell("", "", f"faults of this run: {', '.join(faults.kinds)}")
        async with anyio.create_task_group() as clients:
            for _ in range(CLIENTS_COUNT):
                clients.start_soon(workload.client)
            clients.start_soon(workload.manager)
            clients.start_soon(workload.set_policies)
            if self.options.vmodels_count:
                clients.start_soon(vmodels.run)
            if users is not None:
                clients.start_soon(users.exchange)
                clients.start_soon(users.client)
                clients.start_soon(users.client)
            try:
                with anyio.move_on_after(self.options.safety_s):
                    await faults.run()
            finally:
                # Of a run that a violation ends here, too.
                self.faults_count = faults.count
            await faults.calm()
            workload.end()
            vmodels.end()
            if users is not None:
                users.end()
        if users is not None:
            await users.check()

    # --- what became of it ----------------------------------------------------------------------

    def failure(self, exc: BaseException) -> Failure:
        """Answer what to tell of the exception that ended the run."""
        while isinstance(exc, BaseExceptionGroup):
            exc = _most_telling(exc)
        if isinstance(exc, InvariantError):
            story = self.log.about(exc.instances, exc.models, STORY_EVENTS_MAX)
            return Failure(str(exc), tuple(story))
        story = self.log.about(frozenset(self.names), frozenset(self.models), STORY_EVENTS_MAX)
        lines = traceback.format_exception(exc)
        return Failure(f"a bug: {exc!r}", tuple(story), "".join(lines))

    def outcome(self, failure: Failure | None, took_s: float) -> Run:
        """Answer the report."""
        return Run(
            seed=self.seed,
            options=self.options,
            failure=failure,
            digest=self.log.digest,
            events_count=self.log.count,
            faults_count=self.faults_count,
            answers=dict(self.answers),
            vmodel_answers=dict(self.vmodel_answers),
            loads_count=self.loads_count,
            rest_s=self.rest_s,
            took_s=took_s,
        )


def _most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of several that ended a run at once, an invariant's is told; a bug's, if there is none."""
    invariants, _ = group.split(InvariantError)
    return (invariants or group).exceptions[0]

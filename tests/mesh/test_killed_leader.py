"""The leader is killed at each step of a transition: the next one ends it, once, and nobody notices
(spec core 6.5).

A step is a transaction of the leader whose answer is about to come, or a load that begins or has
ended, at whichever instance. A test runs a transition again and again, and kills at the first step,
the second, and so on until there is none left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
import pytest
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.ids import ModelId
from mm.core.records import ModelInfo, VModelRecord
from mm.core.vmodel_changes import SetVModel, references
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import MemoryStore
from mm.errors import MeshError, StatusCode
from mm.mesh.ports import Item, Loaded, Part
from mm.testing.cluster import INFO, PREFIX, Cluster, until
from mm.testing.fake_runtime import FakeRuntime, ModelPlan
from mm.testing.instance import Instance

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

VMODEL, MODELS = f"{PREFIX}/vmodels/v", f"{PREFIX}/registry/"
N = ModelId("n")
STEPS_MAX = 100


@dataclass(slots=True)
class Steps:
    """Where the leader dies, once somebody has said who it is."""

    kill_at: int
    #: Whether registrations and ends of loads are passed without counting.
    is_brief: bool
    leader: Instance | None = None
    passed: list[str] = field(default_factory=list)
    is_over: bool = False

    async def reach(self, name: str, what: str, *, by_leader: bool) -> None:
        """Pass a step, or die."""
        leader = self.leader
        if leader is None or self.is_over or (by_leader and leader.name != name):
            return
        if self.is_brief and VMODEL not in what and "begins" not in what:
            return
        self.passed.append(f"{name} {what}")
        if len(self.passed) == self.kill_at:
            self.is_over = True
            await leader.crash()


class SteppedStore(MemoryStore):
    """Transactions about models and vmodels are steps; after each of anybody's the references are
    counted.
    """

    def __init__(self, server: MemoryServer, name: str, steps: Steps, cluster: StepCluster) -> None:
        super().__init__(server, call_delay_s=0.01)
        self._name, self._steps, self._cluster = name, steps, cluster
        self._applied: list[str] = []

    def _apply(self, parts: Sequence[Part]) -> tuple[bool, Sequence[Item | None]]:
        outcome = super()._apply(parts)
        self._cluster.check_counts()
        self._applied = sorted(each.key for each in parts)
        return outcome

    async def _reply(self) -> None:
        # Before anything else can happen: who waits for the answer is cancelled by the event.
        keys, self._applied = self._applied, []
        if keys and (keys[-1] == VMODEL or keys[0].startswith(MODELS)):
            await self._steps.reach(self._name, f"has written {keys}", by_leader=True)
        await super()._reply()


class SteppedRuntime(FakeRuntime):
    """Loads are steps."""

    def be_watched(self, name: str, steps: Steps) -> None:
        self._name, self._steps = name, steps

    async def load(self, model_id: ModelId, info: ModelInfo) -> Loaded:
        await self._steps.reach(self._name, f"begins {model_id}", by_leader=False)
        loaded = await super().load(model_id, info)
        await self._steps.reach(self._name, f"has loaded {model_id}", by_leader=False)
        return loaded


class StepCluster(Cluster):
    """Remembers what "v" stood for, and sees that references are counted right all the time."""

    steps: Steps
    pairs: list[tuple[str, str]]

    def make_store(self, config: Config) -> MemoryStore:
        return SteppedStore(self.server, config.instance_id, self.steps, self)

    def make_runtime(self, config: Config) -> FakeRuntime:
        runtime = SteppedRuntime(self.parameters, default_plan=self.plan)
        runtime.be_watched(config.instance_id, self.steps)
        return runtime

    def vmodel(self) -> VModelRecord | None:
        item = self.server.get(VMODEL)
        return None if item is None else VModelRecord.decode(item.value)

    def check_counts(self) -> None:
        vmodel = self.vmodel()
        told = Counter({i: record.references for i, record in self.records().items()})
        assert +told == Counter(references(vmodel)), (told, vmodel)
        assert min(told.values(), default=0) >= 0
        pair = (vmodel.active_model_id, vmodel.target_model_id) if vmodel else ("", "")
        if self.pairs[-1:] != [pair]:
            self.pairs.append(pair)


async def set_target(instance: Instance, target: str) -> None:
    request = SetVModel("v", ModelId(target), info=INFO, auto_delete=True)
    await instance.node.vmodels.set(request)


async def call_on(instance: Instance, answers: list[str]) -> None:
    """Call the vmodel all the time; a failure is an answer, too."""
    while True:
        try:
            answers.append(await instance.invoke_vmodel("v"))
        except MeshError as exc:
            answers.append(f"failed: {exc}")
        await anyio.sleep(0.5)


async def exchange(cluster: StepCluster, group: TaskGroup, *, fails_first: bool) -> None:
    """Have "n" take over from "m", which two instances serve, under calls at those two."""
    for name in ("a", "b", "c"):
        await cluster.start(name)
    (leader,) = [each for each in cluster.serving if each.node.services.leader.is_leader]
    callers = [each for each in cluster.serving if each is not leader]
    await set_target(callers[0], "m")
    for each in callers:
        await each.load_here("m")
    await cluster.settle()
    if fails_first:
        for each in cluster.serving:
            each.runtime.fail_loads("n", StatusCode.INVALID_ARGUMENT, "no such path", times=1)
    answers: list[str] = []
    for each in callers:
        group.start_soon(call_on, each, answers)
    cluster.steps.leader = leader
    await set_target(callers[1], "n")
    await until(lambda: cluster.vmodel() == VModelRecord(N, N), 300.0, "n took over")
    await until(lambda: set(answers[-2:]) == {"n"}, 10.0, "all calls go to n")
    await cluster.settle()
    assert [pair for pair in cluster.pairs if pair[0]] == [("m", "m"), ("m", "n"), ("n", "n")]
    assert set(cluster.records()) == {"n"}, "m went with its last reference"
    assert set(answers) == {"m", "n"}, "no call failed"
    assert answers == sorted(answers), "none went back"


async def killed_at(number: int, *, fails_first: bool) -> tuple[list[str], bool]:
    """Do so, with the leader dying at a step; answer the steps until then, and whether it died."""
    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        # Loads and registrations are the same whether one has failed before.
        steps = Steps(number, is_brief=fails_first)
        try:
            cluster = StepCluster(group, plan=ModelPlan(load_s=1.0), load_failure_expiry_ms=20_000)
            cluster.steps, cluster.pairs = steps, []
            await exchange(cluster, group, fails_first=fails_first)
        except Exception as exc:
            failure = exc  # raised outside the group, so that it is seen bare
        group.cancel_scope.cancel()
    if failure is not None:
        raise AssertionError(f"killed at step {number}: {steps.passed[-1:]}") from failure
    return steps.passed, steps.is_over


@pytest.mark.parametrize("fails_first", [False, True])
async def test_the_leader_is_killed_at_every_step(fails_first: bool) -> None:
    for number in range(1, STEPS_MAX):
        passed, was_killed = await killed_at(number, fails_first=fails_first)
        if not was_killed:
            break
    assert not was_killed, "there is an end"
    assert sum(VMODEL in each for each in passed) == 1 + fails_first, passed
    assert sum("begins" in each for each in passed) >= 2, passed

"""Whole clusters under random faults; then without, when everything must come right again.

*Safety*, while things go wrong: no runtime holds more than it has, no contract is broken, the
books of every instance balance, and a call ends in an answer or an error of the mesh in bounded
time. *Liveness*, after faults end: every model can be called at every instance, and the registry
says what the runtimes hold. The seed is the test's parameter, and trio's schedule follows from it.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import anyio
import pytest

from mm.edge.memory_store import Fault
from mm.errors import MeshError, StatusCode
from mm.testing.cluster import (
    Cluster,
    ConnectionLostError,
    RuntimeAnswerError,
    running_cluster,
    small_parameters,
)
from mm.testing.fake_runtime import MIB, ModelPlan
from tests.mesh.calls import call_for

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

MODELS_COUNT = 45
#: Longer than all that a call may wait for: five load time limits, and one try after another.
CALL_LIMIT_S = 8 * 5 * 10


class Storm:
    """Traffic and faults over one cluster."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.rng = random.Random(seed)
        self.names = list(cluster.instances)
        self.models = [f"m{number}" for number in range(MODELS_COUNT)]
        weights = (1 / rank for rank in range(1, MODELS_COUNT + 1))
        self.cumulative = list(itertools.accumulate(weights))
        self.answers: Counter[str] = Counter()
        self.is_over = False

    def model(self) -> str:
        """A model, by Zipf."""
        return self.rng.choices(self.models, cum_weights=self.cumulative)[0]

    def calm(self) -> None:
        """End all faults of runtimes, stores and wires."""
        self.is_over = True
        self.cluster.network.heal()
        for each in self.cluster.serving:
            each.store.set_fault(None)
            each.runtime.start()
            each.fail_predictions(0, "")
            for model_id in self.models:
                each.runtime.fail_loads(model_id, StatusCode.OK, times=0)
                each.runtime.fail_unloads(model_id, StatusCode.OK, times=0)
                each.runtime.plan(model_id, load_s=0.2, unload_s=0.05)

    async def client(self) -> None:
        """Call, and call again, until the storm is over."""
        while not self.is_over:
            serving = self.cluster.serving
            if serving:
                await self.call(self.rng.choice(serving).name)
            await anyio.sleep(self.rng.choice([0, 0.3, 1, 3]))

    async def call(self, name: str) -> None:
        patience_s = self.rng.choice([0.05, 5, CALL_LIMIT_S, CALL_LIMIT_S])
        answer = "gave up"
        with anyio.move_on_after(patience_s) as scope:
            try:
                await self.cluster[name].send(
                    call_for(self.model(), balanced=self.rng.random() < 0.5)
                )
                answer = "served"
            except RuntimeAnswerError:
                answer = "runtime's error"
            except MeshError as exc:
                answer = exc.code.name
            except ConnectionLostError:
                answer = "crash"
        assert not (scope.cancelled_caught and patience_s == CALL_LIMIT_S), "it waits for ever"
        self.answers[answer] += 1

    async def weather(self, steps: int) -> None:
        for _ in range(steps):
            await self.disturb()
            await anyio.sleep(self.rng.choice([0.1, 1, 5, 30]))
            self.check_books()

    async def disturb(self) -> None:
        rng, serving = self.rng, self.cluster.serving
        if rng.random() < 0.2:
            for each in serving:
                each.store.set_fault(None)
        absent = [name for name in self.names if not self.cluster[name].is_serving]
        if absent and (len(serving) < 2 or rng.random() < 0.5):
            name = rng.choice(absent)
            others_hear = [each for each in serving if each.store.connected]
            if len(others_hear) == len(serving):
                await self.cluster.start(name)
            return
        each = rng.choice(serving)
        match rng.randrange(8):
            case 0 if len(serving) > 1:
                await each.crash()
            case 1 if len(serving) > 1 and each.store.connected:
                await each.stop()
            case 2:
                each.store.set_fault(rng.choice([*Fault, None]))
            case 3:
                each.runtime.stop()
                await anyio.sleep(rng.choice([0.1, 2, 20]))
                each.runtime.start()
            case 4:
                code = rng.choice([StatusCode.INTERNAL, StatusCode.UNKNOWN])
                each.runtime.fail_loads(self.model(), code, "boom", times=rng.choice([1, 3]))
            case 5:
                slow_s = rng.choice([0.2, 3, 15])
                each.runtime.plan(self.model(), load_s=slow_s, size_bytes=rng.choice([1, 2]) * MIB)
            case 6 if each.runtime.loaded:
                each.runtime.lose(rng.choice(sorted(each.runtime.loaded)))
            case 7:
                half = rng.sample(sorted(self.names), len(self.names) // 2)
                rest = set(self.names) - set(half)
                self.cluster.network.split(
                    [f"{name}:8080" for name in half], [f"{name}:8080" for name in rest]
                )
                await anyio.sleep(rng.choice([0.5, 10]))
                self.cluster.network.heal()

    def check_books(self) -> None:
        for each in self.cluster.serving:
            each.node._copies.check_invariants()
            each.node._copies.table.check_invariants()
            assert each.runtime.violations == []


@pytest.mark.parametrize("seed", range(3))
async def test_a_cluster_survives_a_storm(seed: int) -> None:
    rng = random.Random(seed)
    names = "abcde"[: 3 + seed % 3]
    parameters = replace(small_parameters(12), load_timeout_ms=10_000)
    async with running_cluster(
        *names, seed=seed, parameters=parameters, plan=ModelPlan(load_s=0.2), space_wait_s=40.0
    ) as cluster:
        cluster.store_delay_s = rng.choice([0, 0.002, 0.05])
        cluster.watch_delay_s = rng.choice([0, 0.01, 0.3])
        cluster.call_s = rng.choice([0, 0.02])
        storm = Storm(cluster, seed)
        for model_id in storm.models:
            await cluster["a"].register(model_id)
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(storm.client)
            await storm.weather(steps=30)
            storm.calm()
        await calm_down(storm)


async def calm_down(storm: Storm) -> None:
    """Everything comes right: at once for what is healthy, in time for what had failed."""
    cluster = storm.cluster
    for name in storm.names:
        if not cluster[name].is_serving:
            await cluster.start(name)
    assert storm.answers["served"] > sum(storm.answers.values()) / 5, storm.answers
    # Failures of loads count for a while, copies of the vanished longer.
    await anyio.sleep(16 * 60)
    await cluster.settle()
    cluster.check(losses_unnoticed=True)
    for name in storm.names:
        for model_id in storm.models:
            with anyio.fail_after(30):
                await cluster[name].invoke(model_id)
    await anyio.sleep(600)
    await cluster.settle()
    storm.check_books()
    cluster.check()
    for each in cluster.serving:
        accounting = each.node._accounting
        assert (accounting.lost_units, accounting.deficit_units) == (0, 0)
        assert not each.node.models._followed
        excess_bytes = each.runtime.overcommitted_bytes_max
        assert excess_bytes <= 2 * MIB, "as much as two that load at once exceed what was predicted"

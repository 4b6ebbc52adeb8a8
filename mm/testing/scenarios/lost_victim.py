"""``lost-victim``: a model is called while it is being evicted, again and again.

Real nodes in virtual time, with twice as many models as fit. As soon as a copy leaves the cache,
calls for it arrive at all instances, at moments spread over its eviction: while calls are still in
flight on it, while the runtime unloads it, just after. Each of them must be served by a copy that
is there from the beginning of the call to its end, which means a load, which evicts the next
victim. So it goes on by itself until there were enough.

A *hang* is a call without an answer long after every load it may have waited for. A *wrong answer*
is one of a runtime that had unloaded the model when the call came or while it was served.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import anyio
from anyio.abc import TaskGroup

from mm.core.calls import Call
from mm.core.ids import ModelId
from mm.errors import MeshError, StatusCode
from mm.mesh.ports import RuntimeCallError
from mm.testing.cluster import Cluster, Instance, running_cluster, small_parameters
from mm.testing.fake_runtime import FakeRuntime, Held, ModelPlan
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time

CALLS_COUNT: Final = 100_000
METHOD: Final = "/test.Victim/Call"
INSTANCES: Final = ("a", "b")
CAPACITY_MIB: Final = 12
MODELS: Final = tuple(f"m{number:02}" for number in range(2 * len(INSTANCES) * CAPACITY_MIB))
#: A victim is called at so many moments of its eviction, so often at each.
MOMENTS_COUNT: Final = 5
CALLS_AT_ONCE: Final = 40
#: One call in so many is made at the other instance, and comes from there.
ELSEWHERE_EVERY: Final = 8
#: Calls that wait at a time: below what an instance lets wait (``waiting_calls_max``).
UNANSWERED_MAX: Final = 10_000
#: Clients who call any model: they keep it going.
STRANGERS_COUNT: Final = 4
PLAN: Final = ModelPlan(load_s=0.02, unload_s=0.01)
#: A few lengths only: calls that end together cost the scheduler one turn.
CALLS_S: Final = (0.0, 0.005, 0.01, 0.015)
#: One in so many takes longer than a copy stays: its copy is evicted under it.
LONG_EVERY: Final = 20
LONG_CALL_S: Final = 1.0
#: About as long as an eviction takes with calls in flight.
EVICTION_S: Final = CALLS_S[-1] + PLAN.unload_s
#: A load takes 20 ms, and a few may be queued before it; minutes are for ever.
HANG_S: Final = 120.0


@dataclass(slots=True)
class Tally:
    """What became of the calls."""

    calls_count: int = 0
    #: In flight; at the end those that hang.
    unanswered_count: int = 0
    wrong_count: int = 0
    #: Calls that came to a runtime without the model; the mesh may mend that by a reload.
    missed_count: int = 0
    evictions_count: int = 0
    #: Copies that left the cache under calls.
    under_calls_count: int = 0
    wait_max_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)


class WatchedRuntime(FakeRuntime):
    """Takes a random time to answer, and notes whether the model was there all the while."""

    def __init__(self, tally: Tally, rng: random.Random) -> None:
        super().__init__(
            small_parameters(CAPACITY_MIB, loading_concurrency_max=4), default_plan=PLAN
        )
        self._tally = tally
        self._rng = rng

    async def predict(self, model_id: ModelId, seconds: float = 0.0) -> None:
        """Serve one call, and look again at its end."""
        if self.held(model_id) is not Held.LOADED:
            self._tally.missed_count += 1
            raise RuntimeCallError(StatusCode.NOT_FOUND, f"model {model_id} is not loaded")
        unloads_count = self.unloads_done[model_id]
        is_long = self._rng.randrange(LONG_EVERY) == 0
        await anyio.sleep(LONG_CALL_S if is_long else self._rng.choice(CALLS_S))
        is_there = self.held(model_id) is Held.LOADED
        if not is_there or self.unloads_done[model_id] != unloads_count:
            self._tally.wrong_count += 1


class _Chase:
    """Calls every victim while it goes."""

    def __init__(self, cluster: Cluster, tally: Tally, seed: int, calls_count: int) -> None:
        self._cluster = cluster
        self._tally = tally
        self._rng = random.Random(f"lost-victim {seed}")
        self._calls_count = calls_count
        self._enough = anyio.Event()

    async def run(self) -> None:
        """Go on until there were enough calls, and all are answered or hang."""
        async with anyio.create_task_group() as watchers:
            async with anyio.create_task_group() as callers:
                for instance in self._cluster.serving:
                    watchers.start_soon(self._watch, instance, callers)
                for _ in range(STRANGERS_COUNT):
                    callers.start_soon(self._stranger)
                await self._enough.wait()
                callers.cancel_scope.deadline = anyio.current_time() + HANG_S
            watchers.cancel_scope.cancel()

    async def _watch(self, instance: Instance, callers: TaskGroup) -> None:
        """See each copy leave, and have it called."""
        copies = instance.node.parts.copies
        leaving: set[str] = set()
        while True:
            before, leaving = leaving, {m for m in MODELS if ModelId(m) in copies.unloader}
            for model_id in sorted(leaving - before):
                self._tally.evictions_count += 1
                self._tally.under_calls_count += copies.table.in_flight(model_id) > 0
                for _ in range(MOMENTS_COUNT):
                    callers.start_soon(self._call_victim, instance, model_id, callers)
            await copies.changed.wait()

    async def _call_victim(self, holder: Instance, model_id: str, callers: TaskGroup) -> None:
        await anyio.sleep(self._rng.uniform(0, EVICTION_S))
        if self._enough.is_set() or ModelId(model_id) not in holder.node.parts.copies.unloader:
            return
        if self._tally.unanswered_count > UNANSWERED_MAX:
            return
        other = next(each for each in self._cluster.serving if each is not holder)
        for index in range(CALLS_AT_ONCE):
            caller = holder if index % ELSEWHERE_EVERY else other
            callers.start_soon(self._call, caller, model_id)
        self._tally.calls_count += CALLS_AT_ONCE
        if self._tally.calls_count >= self._calls_count:
            self._enough.set()

    async def _stranger(self) -> None:
        while not self._enough.is_set():
            instance = self._rng.choice(self._cluster.serving)
            await self._call(instance, self._rng.choice(MODELS))

    async def _call(self, instance: Instance, model_id: str) -> None:
        begun_s = anyio.current_time()
        self._tally.unanswered_count += 1
        try:
            await instance.serve(Call(ModelId(model_id), method=METHOD))
        except MeshError as exc:
            self._tally.failures[exc.code.name] += 1
        self._tally.unanswered_count -= 1
        self._tally.wait_max_s = max(self._tally.wait_max_s, anyio.current_time() - begun_s)


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, CALLS_COUNT)


def report(seed: int, calls_count: int) -> ScenarioReport:
    """Answer the figures of so many calls of victims."""
    tally = run_in_virtual_time(partial(_chase, seed, calls_count), f"lost-victim {seed}")
    failed_count = tally.failures.total()
    return ScenarioReport(
        "lost-victim",
        (
            Figure(
                "calls of a victim during its eviction",
                f">= {calls_count:,}",
                f"{tally.calls_count:,}",
                tally.calls_count >= calls_count,
            ),
            Figure(
                "evictions, and those with calls in flight on the copy",
                "some",
                f"{tally.evictions_count:,}, {tally.under_calls_count:,}",
                tally.under_calls_count > 0,
            ),
            _none("calls that hang", tally.unanswered_count),
            _none("wrong answers", tally.wrong_count),
            _none("calls sent to a runtime without the model", tally.missed_count),
            _none("calls that failed", failed_count, _commonest(tally.failures)),
            Figure("longest call", "", f"{tally.wait_max_s:.2f} s", None),
        ),
    )


def _none(text: str, count: int, detail: str = "") -> Figure:
    return Figure(text, "0", f"{count:,}{detail}", count == 0)


def _commonest(failures: Counter[str]) -> str:
    return f" ({failures.most_common(1)[0][0]})" if failures else ""


async def _chase(seed: int, calls_count: int) -> Tally:
    tally = Tally()
    async with running_cluster(seed=seed) as cluster:
        cluster.store_delay_s = 0.001
        cluster.watch_delay_s = 0.005
        cluster.network.latency_s = 0.0002
        for name in INSTANCES:
            rng = random.Random(f"lost-victim {seed} {name}")
            await cluster.start(name, runtime=WatchedRuntime(tally, rng))
        for model_id in MODELS:
            await cluster["a"].register(model_id)
        await anyio.sleep(1)
        await _Chase(cluster, tally, seed, calls_count).run()
        await cluster.settle()
        cluster.check()
    return tally

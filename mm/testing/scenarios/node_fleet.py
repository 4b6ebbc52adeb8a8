"""A fleet of real nodes in virtual time that serves given calls: what ``pure_fleet`` leaves out.

Loads and unloads take time, records travel through the store, and what is decided at one instance
is carried out at another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Final

import anyio

from mm.core.ids import UNIT_BYTES, ModelId
from mm.errors import MeshError
from mm.mesh.ports import RuntimeParameters
from mm.testing.cluster import Cluster, running_cluster
from mm.testing.fake_runtime import ModelPlan
from mm.testing.scenarios.report import Figure

PLAN: Final = ModelPlan(load_s=0.05, unload_s=0.02)
RECORDS_DELAY_S: Final = 0.02
LATENCY_S: Final = 0.0005
REGISTER_BATCH_COUNT: Final = 100
#: Calls begin together so often: what happens at once costs the scheduler one turn.
TICK_S: Final = 0.25


async def loads_of(
    seed: int,
    instances_count: int,
    parameters: RuntimeParameters,
    sizes_units: Mapping[ModelId, int],
    calls: Sequence[tuple[ModelId, int, float]],
    uncounted: int,
) -> tuple[int, list[Figure]]:
    """Answer how many loads the calls after the first ``uncounted`` made, and what went wrong."""
    async with running_cluster(seed=seed, parameters=parameters, plan=PLAN) as cluster:
        cluster.watch_delay_s = RECORDS_DELAY_S
        cluster.network.latency_s = LATENCY_S
        for number in range(instances_count):
            instance = await cluster.start(f"i{number:02}")
            for model_id, size_units in sizes_units.items():
                instance.runtime.plan(model_id, size_bytes=size_units * UNIT_BYTES)
        await _register(cluster, sizes_units)
        fleet = _Fleet(cluster, random.Random(f"node fleet {seed}"))
        await fleet.call_all(calls[:uncounted])
        before = fleet.loads_count
        await fleet.call_all(calls[uncounted:])
        await cluster.settle()
        cluster.check()
        failed = Figure(
            "calls that failed at real nodes", "0", f"{fleet.failed_count}", not fleet.failed_count
        )
        return fleet.loads_count - before, [failed]


async def _register(cluster: Cluster, sizes_units: Mapping[ModelId, int]) -> None:
    instance, ids = cluster.serving[0], list(sizes_units)
    for start in range(0, len(ids), REGISTER_BATCH_COUNT):
        async with anyio.create_task_group() as group:
            for model_id in ids[start : start + REGISTER_BATCH_COUNT]:
                group.start_soon(instance.register, model_id)
    await anyio.sleep(10 * RECORDS_DELAY_S)


class _Fleet:
    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._instances = cluster.serving
        self._rng = rng
        self._begun_s = anyio.current_time()
        self.failed_count = 0

    @property
    def loads_count(self) -> int:
        return sum(each.runtime.loads_begun.total() for each in self._instances)

    async def call_all(self, calls: Sequence[tuple[ModelId, int, float]]) -> None:
        """Make each call at its time, at any instance; return when all are answered."""
        async with anyio.create_task_group() as group:
            for model_id, _, at_s in calls:
                due_s = self._begun_s + TICK_S * math.ceil(at_s / TICK_S)
                if due_s > anyio.current_time():
                    await anyio.sleep_until(due_s)
                group.start_soon(self._call, model_id)

    async def _call(self, model_id: ModelId) -> None:
        try:
            await self._rng.choice(self._instances).invoke(model_id)
        except MeshError:
            self.failed_count += 1

"""``big-load``: a model of a third of the capacity arrives on an instance that is full.

A real node in virtual time with unloads that take a while. Memory that is being unloaded is not
free yet, and a cache that does not know what is on its way evicts again and again until it is: the
cascade that the unload accounting is there to prevent. The models that make room are of many
sizes; a victim may be larger than what was still missing, so the largest one is granted on top.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Final

import anyio

from mm.core.ids import UNIT_BYTES, ModelId
from mm.mesh.ports import RuntimeParameters
from mm.testing.cluster import Instance, running_cluster
from mm.testing.fake_runtime import MIB
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time

CAPACITY_BYTES: Final = 192 * MIB
BIG_BYTES: Final = CAPACITY_BYTES // 3
SMALL_BYTES_MAX: Final = 12 * MIB
LOAD_S: Final = 0.5
#: Much longer than a load: whoever counts on the memory too early, or not at all, shows it.
UNLOAD_S: Final = 3.0
ROUNDS_COUNT: Final = 12
PARAMETERS: Final = RuntimeParameters(
    capacity_bytes=CAPACITY_BYTES,
    default_model_size_bytes=4 * MIB,
    loading_concurrency_max=4,
    load_timeout_ms=90_000,
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What one arrival of large models cost."""

    needed_bytes: int
    evicted_bytes: int
    largest_bytes: int
    #: More in the runtime than it has.
    overcommitted_bytes: int

    @property
    def allowed_bytes(self) -> int:
        """Answer what may be evicted at most."""
        return self.needed_bytes + self.largest_bytes


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, ROUNDS_COUNT)


def report(seed: int, rounds_count: int) -> ScenarioReport:
    """Answer the figures of so many arrivals of each kind."""
    figures = []
    for title, is_predicted, bystanders_count in (
        ("size predicted", True, 0),
        ("size known after the load", False, 0),
        ("size predicted, 5 small ones beside it", True, 5),
    ):
        work = partial(_arrivals, seed, rounds_count, is_predicted, bystanders_count)
        arrivals = run_in_virtual_time(work, f"{seed} {title}")
        figures += _figures(title, arrivals, is_predicted=is_predicted)
    return ScenarioReport("big-load", tuple(figures))


def _figures(title: str, arrivals: list[Arrival], *, is_predicted: bool) -> list[Figure]:
    worst = max(arrivals, key=lambda each: each.evicted_bytes - each.allowed_bytes)
    over_bytes = max(each.overcommitted_bytes for each in arrivals)
    return [
        Figure(
            f"{title}: bytes evicted, worst of {len(arrivals)}",
            f"<= {_mib(worst.needed_bytes)} needed + {_mib(worst.largest_bytes)} the largest",
            _mib(worst.evicted_bytes),
            all(each.evicted_bytes <= each.allowed_bytes for each in arrivals),
        ),
        Figure(
            f"{title}: memory taken beyond the runtime's",
            "0 MiB" if is_predicted else "",
            _mib(over_bytes),
            over_bytes == 0 if is_predicted else None,
        ),
    ]


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f} MiB"


async def _arrivals(
    seed: int, count: int, is_predicted: bool, bystanders_count: int
) -> list[Arrival]:
    rng = random.Random(f"big-load {seed} {is_predicted} {bystanders_count}")
    async with running_cluster("a", seed=seed, parameters=PARAMETERS) as cluster:
        instance, arrivals = cluster["a"], []
        for number in range(count):
            await _fill(instance, f"r{number}", rng)
            loads = {f"r{number}-big": BIG_BYTES}
            for index in range(bystanders_count):
                loads[f"r{number}-by{index}"] = _small_bytes(rng)
            await _register(instance, loads, is_predicted=is_predicted)
            arrivals.append(await _arrive(instance, loads))
        return arrivals


def _small_bytes(rng: random.Random) -> int:
    return rng.randrange(MIB // 4, SMALL_BYTES_MAX, UNIT_BYTES)


async def _register(instance: Instance, sizes: dict[str, int], *, is_predicted: bool) -> None:
    for model_id, size_bytes in sizes.items():
        instance.runtime.plan(
            model_id,
            size_bytes=size_bytes,
            predicted_bytes=size_bytes if is_predicted else 0,
            load_s=LOAD_S,
            unload_s=UNLOAD_S,
        )
        await instance.register(model_id)


async def _fill(instance: Instance, prefix: str, rng: random.Random) -> None:
    """Load small models until those of earlier rounds are gone and the next would evict."""
    total_bytes, index = 0, 0
    while total_bytes <= CAPACITY_BYTES:
        model_id, size_bytes = f"{prefix}-{index}", _small_bytes(rng)
        await _register(instance, {model_id: size_bytes}, is_predicted=True)
        await instance.invoke(model_id)
        total_bytes += size_bytes
        index += 1
    await instance.cluster.settle()


async def _arrive(instance: Instance, loads: dict[str, int]) -> Arrival:
    table = instance.node.parts.copies.table
    before = {model_id: units * UNIT_BYTES for model_id, units, _ in table.cached()}
    free_bytes = table.capacity_units * UNIT_BYTES - sum(before.values())
    unloads_before = instance.runtime.unloads_done.copy()
    instance.runtime.overcommitted_bytes_max = 0
    async with anyio.create_task_group() as group:
        for model_id in loads:
            group.start_soon(instance.invoke, model_id)
    await instance.cluster.settle()
    instance.cluster.check()
    gone = instance.runtime.unloads_done - unloads_before
    sizes = {**before, **loads}
    evicted = [sizes[ModelId(model_id)] for model_id in gone.elements()]
    return Arrival(
        needed_bytes=sum(loads.values()) - free_bytes,
        evicted_bytes=sum(evicted),
        largest_bytes=max(evicted, default=0),
        overcommitted_bytes=instance.runtime.overcommitted_bytes_max,
    )

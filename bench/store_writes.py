"""What the mesh writes to its store: an idle one, a busy one, and for each load and eviction.

Counted on real nodes in virtual time, so the figures are the same on every machine. Renewing
a lease is no write. Bytes are those of keys and values; etcd keeps them all until it compacts.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial

import anyio

from mm.edge.memory_server import MemoryServer
from mm.mesh.ports import Item, Write
from mm.scaling_settings import ScalingSettings
from mm.testing.cluster import PREFIX, Cluster, running_cluster, small_parameters
from mm.testing.fake_runtime import ModelPlan
from mm.testing.scheduling import run_in_virtual_time

HOUR_S = 3600.0
CAPACITY_MIB = 20
#: Loads that are counted one by one; as many as fit, so that nothing is evicted.
LOADS_COUNT = 16
ROUNDS_COUNT = 10
#: A model becomes so busy that more copies are made of it: a copy bears two calls a second.
SCALING = ScalingSettings(rpm_threshold=120)
HOT_CALLS_PER_S = 20.0
HOT_S = 60.0


class CountingServer(MemoryServer):
    """Counts writes and bytes that had an effect, by table."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: Counter[str] = Counter()
        self.bytes = 0

    def transact(self, writes: Sequence[Write]) -> tuple[bool, list[Item | None]]:
        """Do it, and count if it was done."""
        succeeded, items = super().transact(writes)
        if succeeded:
            for write in writes:
                self.writes[write.key.removeprefix(f"{PREFIX}/").partition("/")[0]] += 1
                self.bytes += len(write.key) + len(write.value or b"")
        return succeeded, items


class Row:
    """What was counted while something happened so many times."""

    def __init__(self, server: CountingServer, text: str, times: float) -> None:
        parts = ", ".join(f"{n / times:.2f} {table}" for table, n in sorted(server.writes.items()))
        total, size = server.writes.total() / times, server.bytes / times
        self.line = f"{text:<52} {total:>8.2f} writes {size:>9.0f} bytes   {parts}"
        server.writes.clear()
        server.bytes = 0


async def hour(cluster: Cluster, calls_per_s: float, models: Sequence[str]) -> None:
    """Let an hour pass, with calls of loaded models."""
    rng = random.Random(1)
    if not calls_per_s:
        await anyio.sleep(HOUR_S)
        return
    end_s = anyio.current_time() + HOUR_S
    while anyio.current_time() < end_s:
        await anyio.sleep(rng.expovariate(calls_per_s))
        await rng.choice(cluster.serving).invoke(rng.choice(models))


async def copies_by_load(instances_count: int, load_s: float) -> list[str]:
    """Answer the line for the copies that a busy model gets."""
    plan = ModelPlan(load_s=load_s, unload_s=0.05)
    parameters = small_parameters(CAPACITY_MIB)
    async with running_cluster(plan=plan, parameters=parameters, scaling=SCALING) as cluster:
        server = cluster.server = CountingServer()
        names = [f"i{number:02}" for number in range(instances_count)]
        for name in names:
            await cluster.start(name)
        await cluster[names[0]].register("hot")
        await cluster[names[0]].invoke("hot")
        await anyio.sleep(60)
        server.writes.clear()
        server.bytes = 0
        end_s = anyio.current_time() + HOT_S
        while anyio.current_time() < end_s:
            await cluster[names[0]].invoke("hot")
            await anyio.sleep(1 / HOT_CALLS_PER_S)
        record = cluster.record("hot")
        assert record is not None
        row = Row(server, "copy made because of load", len(record.copies) - 1)
    return [f"{instances_count:>3} x {load_s:g} s   {row.line}"]


async def measure(instances_count: int, load_s: float) -> list[str]:
    """Answer the lines for a mesh of so many instances whose loads take so long."""
    rows = []
    plan = ModelPlan(load_s=load_s, unload_s=0.05)
    parameters = small_parameters(CAPACITY_MIB)
    async with running_cluster(plan=plan, parameters=parameters) as cluster:
        server = cluster.server = CountingServer()
        names = [f"i{number:02}" for number in range(instances_count)]
        for name in names:
            await cluster.start(name)
        rows.append(Row(server, "start of an instance", instances_count))
        models = [f"m{number:04}" for number in range(4 * instances_count * CAPACITY_MIB)]
        for model_id in models:
            await cluster[names[0]].register(model_id)
        rows.append(Row(server, "registration", len(models)))
        await anyio.sleep(60)
        server.writes.clear()
        server.bytes = 0
        await hour(cluster, 0, [])
        rows.append(Row(server, "an idle hour, an instance", instances_count))
        for model_id in models[:LOADS_COUNT]:
            await cluster[names[0]].invoke(model_id)
            await anyio.sleep(10)
        rows.append(Row(server, "load into free memory", LOADS_COUNT))
        await hour(cluster, 1.0, models[:LOADS_COUNT])
        rows.append(Row(server, "an hour of a call a second to 16, an instance", instances_count))
        for model_id in models:
            await cluster[names[0]].invoke(model_id)
        await anyio.sleep(60)
        server.writes.clear()
        server.bytes = 0
        count = ROUNDS_COUNT * LOADS_COUNT
        for model_id in models[:count]:
            await cluster[names[0]].invoke(model_id)
            await anyio.sleep(10)
        rows.append(Row(server, "load that evicts one", count))
    return [f"{instances_count:>3} x {load_s:g} s   {row.line}" for row in rows]


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    for instances_count, load_s in ((3, 0.05), (3, 5.0)):
        for what in (measure, copies_by_load):
            for line in run_in_virtual_time(partial(what, instances_count, load_s), "store writes"):
                print(line)


if __name__ == "__main__":
    main()

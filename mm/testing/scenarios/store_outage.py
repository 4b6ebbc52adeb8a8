"""``store-outage``: the store is away for ten minutes, then comes back empty, twice.

Real nodes in virtual time. Clients call loaded models all the while, at all instances: none of
these calls may fail, whatever the store does, and no copy may be loaded or unloaded because of it.
First the store is only away, longer than leases last: everybody has to come back, without a storm.
Then it comes back empty, and the instances have to give back what they know; and once more, now
that the instance whose turn that is has crashed in between.

A write to the store is on its way for as long as a transaction of 120 writes takes in etcd, and
240 may be under way, as there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import anyio

from mm.core.records import ModelRecord
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault
from mm.errors import MeshError
from mm.mesh.ports import Item, Part, Write
from mm.testing.cluster import (
    INFO,
    PREFIX,
    Cluster,
    running_cluster,
    small_parameters,
    until,
)
from mm.testing.event_log import EventLog
from mm.testing.fake_runtime import ModelPlan
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time
from mm.testing.simulated_cluster import logging_to

RECORDS_COUNT: Final = 20_000
OUTAGE_S: Final = 600.0
#: A wipe: the store is away so long, too.
WIPE_S: Final = 10.0
INSTANCES: Final = tuple("abcdef")
LOADED: Final = tuple(f"m{number:05}" for number in range(120))
#: Of these a copy is there by policy: nobody may take it for lost.
PROMISED: Final = LOADED[::6]
#: Room for the loaded models and little more: a second copy of what is in recurring use would be a
#: load that has nothing to do with the store.
PARAMETERS: Final = small_parameters(22)
CALLS_PER_S: Final = 5.0
PLAN: Final = ModelPlan(load_s=0.5, unload_s=0.2)
#: Writes, and events, are on their way so long.
WRITE_S: Final = 0.02
EVENT_S: Final = 0.05
RESTORED_S_MAX: Final = 10.0
WRITES_PER_RECORD_MAX: Final = 1.2
#: After an outage: an instance's lease and record, its candidature, and what changed meanwhile.
#: Nothing of that goes up with the models that are registered.
RETURN_WRITES_MAX: Final = 5.0
RETURN_S_MAX: Final = 10.0
#: Between two parts: leases of who is gone run out, records are published.
BETWEEN_S: Final = 30.0
INSTANCE_KEYS: Final = f"{PREFIX}/instances/"
PATIENCE_S: Final = 120.0


class CountingServer(MemoryServer):
    """Counts the writes that it was asked for, by table."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: Counter[str] = Counter()

    def transact(self, parts: Sequence[Part]) -> tuple[bool, list[Item | None]]:
        """Count, and do it."""
        for part in parts:
            self.writes[part.key.removeprefix(f"{PREFIX}/").partition("/")[0]] += 1
        return super().transact(parts)

    def count(self, table: str) -> int:
        """Answer how many records a table has."""
        return sum(key.startswith(f"{PREFIX}/{table}/") for key in self._items)


@dataclass(slots=True)
class Tally:
    """What the outages came to."""

    calls_count: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    #: Loads and unloads since all was loaded.
    moves_count: int = 0
    return_s: float = 0.0
    return_writes_per_instance: float = 0.0
    #: For each wipe: until all records were back, and how many were written for each.
    restored_s: list[float] = field(default_factory=list)
    writes_per_record: list[float] = field(default_factory=list)


class _Drill:
    """One cluster, its clients, and what befalls it."""

    def __init__(self, cluster: Cluster, seed: int, records_count: int, tally: Tally) -> None:
        assert isinstance(cluster.server, CountingServer)
        self._cluster = cluster
        self._server = cluster.server
        self._rng = random.Random(f"store-outage {seed}")
        self._records_count = records_count
        self._tally = tally

    async def run(self, outage_s: float) -> None:
        """Have it all happen, one after the other."""
        with anyio.fail_after(PATIENCE_S):
            await self._load_all()
        for model_id in PROMISED:
            await self._cluster["a"].set_policy(model_id, copies_min=1)
        await self._cluster.settle()
        await anyio.sleep(BETWEEN_S)
        moves_count = self._moves()
        async with anyio.create_task_group() as group:
            group.start_soon(self._call)
            await self._go_away(outage_s)
            await self._wipe()
            self._tally.moves_count = self._moves() - moves_count
            await self._cluster["a"].crash()
            await self._wipe()
            await anyio.sleep(BETWEEN_S)
            group.cancel_scope.cancel()

    async def _load_all(self) -> None:
        """Have a copy of each. One that a burst of loads drove out would come back later, into room
        that is free: a load that has nothing to do with the store.
        """
        while missing := sorted(set(LOADED) - self._loaded()):
            async with anyio.create_task_group() as group:
                for model_id in missing:
                    group.start_soon(self._cluster[self._rng.choice(INSTANCES)].invoke, model_id)
            await self._cluster.settle()

    def _loaded(self) -> set[str]:
        return set[str]().union(*(each.runtime.loaded for each in self._cluster.serving))

    async def _call(self) -> None:
        """Be the clients, until cancelled."""
        async with anyio.create_task_group() as group:
            while True:
                await anyio.sleep(self._rng.expovariate(CALLS_PER_S))
                group.start_soon(self._call_once)

    async def _call_once(self) -> None:
        serving = self._cluster.serving
        model_id = self._rng.choice(sorted(self._loaded()))
        self._tally.calls_count += 1
        try:
            await self._rng.choice(serving).invoke(model_id)
        except MeshError as exc:
            self._tally.failures[exc.code.name] += 1

    async def _go_away(self, outage_s: float) -> None:
        await self._lose(outage_s)
        self._server.writes.clear()
        begun_s = anyio.current_time()
        await until(self._all_are_back, PATIENCE_S, "all instances are back")
        self._tally.return_s = anyio.current_time() - begun_s
        await anyio.sleep(RETURN_S_MAX)
        writes_count = self._server.writes.total()
        self._tally.return_writes_per_instance = writes_count / len(self._cluster.serving)
        await anyio.sleep(BETWEEN_S)

    async def _wipe(self) -> None:
        self._server.wipe()
        await self._lose(WIPE_S)
        self._server.writes.clear()
        begun_s = anyio.current_time()
        await until(
            lambda: self._server.count("registry") == self._records_count, PATIENCE_S, "all is back"
        )
        self._tally.restored_s.append(anyio.current_time() - begun_s)
        await until(self._all_are_back, PATIENCE_S, "all instances are back")
        await anyio.sleep(BETWEEN_S)
        self._tally.writes_per_record.append(self._server.writes["registry"] / self._records_count)

    async def _lose(self, outage_s: float) -> None:
        """Be without the store for a while, in both ways."""
        for each in self._cluster.serving:
            each.store.set_fault(self._rng.choice([Fault.REFUSED, Fault.SILENT]))
        await anyio.sleep(outage_s)
        for each in self._cluster.serving:
            each.store.set_fault(None)

    def _all_are_back(self) -> bool:
        """Answer whether all stand in the store, and all have heard of it."""
        serving = self._cluster.serving
        stored = {each.name: self._server.get(f"{INSTANCE_KEYS}{each.name}") for each in serving}
        return None not in stored.values() and all(
            each.node.parts.members.mirror.get(name) == item
            for each in serving
            for name, item in stored.items()
        )

    def _moves(self) -> int:
        runtimes = [each.runtime for each in self._cluster.serving]
        return sum(each.loads_begun.total() + each.unloads_done.total() for each in runtimes)


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, RECORDS_COUNT, OUTAGE_S)


def report(seed: int, records_count: int, outage_s: float) -> ScenarioReport:
    """Answer the figures with so many records and so long an outage."""
    with logging_to(EventLog()):  # a store that is away is no news here
        tally = run_in_virtual_time(
            partial(_drill, seed, records_count, outage_s), f"store-outage {seed}"
        )
    failed_count = tally.failures.total()
    figures = [
        _none(f"calls to loaded models that failed, of {tally.calls_count:,}", failed_count),
        _none("loads and unloads because of it", tally.moves_count),
        _at_most(f"after {outage_s:g} s: all instances back in", RETURN_S_MAX, tally.return_s, "s"),
        _at_most(
            "after it: writes of an instance in 10 s",
            RETURN_WRITES_MAX,
            tally.return_writes_per_instance,
        ),
    ]
    names = ("wiped", "wiped, the first one crashed")
    for name, seconds, writes in zip(names, tally.restored_s, tally.writes_per_record, strict=True):
        what = f"{name}: {records_count:,} records back in"
        figures.append(_at_most(what, RESTORED_S_MAX, seconds, "s"))
        figures.append(_at_most(f"{name}: writes a record", WRITES_PER_RECORD_MAX, writes))
    return ScenarioReport("store-outage", tuple(figures))


def _none(text: str, count: int) -> Figure:
    return Figure(text, "0", f"{count:,}", count == 0)


def _at_most(text: str, limit: float, reached: float, unit: str = "") -> Figure:
    return Figure(
        text, f"<= {limit:g} {unit}".rstrip(), f"{reached:.2f} {unit}".rstrip(), reached <= limit
    )


async def _drill(seed: int, records_count: int, outage_s: float) -> Tally:
    tally = Tally()
    async with running_cluster(seed=seed, plan=PLAN, parameters=PARAMETERS) as cluster:
        cluster.server = CountingServer()
        cluster.store_delay_s, cluster.watch_delay_s = WRITE_S, EVENT_S
        cluster.network.latency_s = 0.0005
        value = ModelRecord(INFO, last_used_ms=1).encode()
        for number in range(records_count):
            cluster.server.transact([Write(f"{PREFIX}/registry/m{number:05}", value, 0)])
        for name in INSTANCES:
            await cluster.start(name)
        await _Drill(cluster, seed, records_count, tally).run(outage_s)
    return tally

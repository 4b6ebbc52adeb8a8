"""What goes wrong in a simulated cluster: each fault begins, lasts a while, and ends.

Owns the kinds of faults, their durations and mixture, and the calm after them. Chance is the
seed's: each run has its own mixture, because faults that all happen all the time hide one another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import anyio

from mm.edge.memory_store import Fault
from mm.errors import StatusCode
from mm.testing.instance import Instance
from mm.testing.lives import Lives
from mm.testing.simulated_cluster import (
    SKEW_MS_MAX,
    STORE_WAY_S_MAX,
    WAY_S_MAX,
    SimulatedCluster,
)
from mm.testing.simulated_store import SimulatedStore

#: Shorter than the lease (20 s); longer; so long that the copies of who lost it are taken out.
OUTAGES_S: Final = (0.3, 3.0, 12.0, 25.0, 45.0)
#: Between two faults of a run, on average.
FAULT_GAP_S: Final = 4.0
#: An emptied store is full again after this.
RESTORED_S: Final = 15.0
#: In one of so many runs somebody takes copies of living instances out of the registry; in another
#: one all instances are replaced by a newer version, maybe twice.
TAKEN_OUT_EVERY: Final = 4
UPGRADE_EVERY: Final = 4
LOAD_FAILURES: Final = (
    StatusCode.INTERNAL,
    StatusCode.UNKNOWN,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.UNAVAILABLE,
)

_Fault = Callable[[], Coroutine[Any, Any, None]]


class Faults:
    """The bad weather of one run."""

    def __init__(self, cluster: SimulatedCluster, names: list[str], models: list[str]) -> None:
        self._cluster = cluster
        self._names = names
        self._models = models
        self._rng = random.Random(f"faults {cluster.seed}")
        self._lives = Lives(cluster, names, self._rng, self._tell)
        self._kinds: list[_Fault] = self._mixture()
        if cluster.seed % TAKEN_OUT_EVERY == TAKEN_OUT_EVERY - 1:
            self._kinds.append(self._copies_taken_out)
        if cluster.seed % UPGRADE_EVERY == 1:
            self._kinds.append(self._lives.upgrade)
        self.count = 0

    def _mixture(self) -> list[_Fault]:
        kinds: list[_Fault] = [
            self._store_away,
            self._store_slow,
            self._store_full,
            self._store_wiped,
            self._watches_lost,
            self._watches_late,
            self._writes_forestalled,
            self._leases_lost,
            self._wires_cut,
            self._messages_lost,
            self._messages_slow,
            self._runtime_restarts,
            self._models_lost,
            self._loads_fail,
            self._unloads_fail,
            self._loads_slow,
            self._unloads_slow,
            self._lives.instance_crashes,
            self._lives.instance_restarts,
            self._half_speed,
            self._clock_steps,
        ]
        mixture = self._rng.sample(kinds, self._rng.randint(4, len(kinds)))
        if self._store_wiped not in mixture:
            return mixture
        # An instance that has not heard what was unregistered before the wipe brings it back: that
        # is so (decision 11), and not to be found again by each seed.
        unaware = (self._store_away, self._watches_lost, self._watches_late)
        return [kind for kind in mixture if kind not in unaware]

    def affect(self, models: Sequence[str]) -> None:
        """Let what goes wrong with models go wrong with these, too."""
        self._models = [*self._models, *models]

    @property
    def kinds(self) -> list[str]:
        """The names of the faults of this run."""
        return [kind.__name__.strip("_").replace("_", " ") for kind in self._kinds]

    async def run(self) -> None:
        """Let things go wrong until cancelled."""
        async with anyio.create_task_group() as group:
            while True:
                await anyio.sleep(self._rng.expovariate(1 / FAULT_GAP_S))
                self.count += 1
                group.start_soon(self._rng.choice(self._kinds))

    async def calm(self) -> None:
        """End everything that is wrong, and start who is not there."""
        cluster = self._cluster
        self._tell("", "the faults are over")
        cluster.network.heal()
        cluster.server.is_full = False
        cluster.loss_share.clear()
        cluster.way_s_max = WAY_S_MAX
        for each in cluster.instances.values():
            store = _store(each)
            store.calm()
            store.way_s_max = store.late_s_max = STORE_WAY_S_MAX
            each.runtime.start()
            each.runtime.slowness = 1.0
            for model_id in self._models:
                each.runtime.fail_loads(model_id, StatusCode.OK, times=0)
                each.runtime.fail_unloads(model_id, StatusCode.OK, times=0)
                self._plan(each, model_id, *cluster.times_s(model_id))
        await self._lives.start_missing()

    # --- stores ---------------------------------------------------------------------------------

    async def _store_away(self) -> None:
        fault = self._rng.choice(list(Fault))
        affected, seconds = self._some(), self._duration_s()
        self._tell(_names(affected), f"the store is away ({fault.value}) for {seconds:g} s")
        for each in affected:
            each.store.set_fault(fault)
        await anyio.sleep(seconds)
        for each in affected:
            if not each.has_crashed:
                each.store.set_fault(None)
        self._tell(_names(affected), "the store is back")

    async def _store_slow(self) -> None:
        affected, seconds = self._some(), self._duration_s()
        self._tell(_names(affected), f"the store is slow for {seconds:g} s")
        for each in affected:
            _store(each).way_s_max = self._rng.choice([0.2, 1.5])
        await anyio.sleep(seconds)
        for each in affected:
            _store(each).way_s_max = STORE_WAY_S_MAX

    async def _store_full(self) -> None:
        server, seconds = self._cluster.server, self._duration_s()
        self._tell("", f"the store is full for {seconds:g} s")
        server.is_full = True
        await anyio.sleep(seconds)
        server.is_full = False

    async def _store_wiped(self) -> None:
        """Have all know the same, lose the store, and find another one, empty, one after the other.

        Nobody starts or ends meanwhile: who comes new to an empty store knows nothing to restore.
        """
        names = self._lives.take_all()
        if not names:
            return
        seconds = self._rng.choice([3.0, 12.0, 30.0])
        self._tell("", f"the store is away for {seconds:g} s and comes back empty")
        everyone = [self._cluster[name] for name in names]
        for each in everyone:
            each.store.set_fault(self._rng.choice([Fault.REFUSED, Fault.SILENT]))
        self._cluster.server.wipe()
        await anyio.sleep(seconds)
        for each in self._rng.sample(everyone, len(everyone)):
            each.store.set_fault(None)
            await anyio.sleep(self._rng.uniform(0, 0.5))
        await anyio.sleep(RESTORED_S)
        self._lives.free(names)

    async def _watches_lost(self) -> None:
        affected, seconds = self._some(), self._rng.choice([1.0, 8.0, 30.0, 60.0])
        tables = self._rng.choice([["registry"], ["instances"], ["registry", "instances"]])
        self._tell(_names(affected), f"hears nothing of {tables} for {seconds:g} s")
        for each in affected:
            _store(each).deafen(tables)
        await anyio.sleep(seconds)
        history_is_lost = self._rng.random() < 0.5
        for each in affected:
            _store(each).hear(tables, history_is_lost=history_is_lost)
        self._tell(_names(affected), f"hears of {tables} again")

    async def _watches_late(self) -> None:
        affected, seconds = self._some(), self._duration_s()
        self._tell(_names(affected), f"hears late for {seconds:g} s")
        for each in affected:
            _store(each).late_s_max = self._rng.choice([0.3, 3.0])
        await anyio.sleep(seconds)
        for each in affected:
            _store(each).late_s_max = STORE_WAY_S_MAX

    async def _writes_forestalled(self) -> None:
        affected, seconds = self._some(), self._duration_s()
        self._tell(_names(affected), f"somebody else writes first for {seconds:g} s")
        for each in affected:
            _store(each).conflict_share = 0.4
        await anyio.sleep(seconds)
        for each in affected:
            _store(each).conflict_share = 0.0

    async def _leases_lost(self) -> None:
        affected = self._some()
        self._tell(_names(affected), "the lease is revoked")
        for each in affected:
            _store(each).lose_leases()

    async def _copies_taken_out(self) -> None:
        each = self._any()
        count = self._cluster.take_out_copies(each.name, self._rng)
        self._tell(
            each.name, f"is thought to be gone: {count} copies are taken out of the registry"
        )

    # --- wires ----------------------------------------------------------------------------------

    async def _wires_cut(self) -> None:
        network, seconds = self._cluster.network, self._rng.choice([0.5, 5.0, 20.0, 70.0])
        wires = self._wires()
        self._tell("", f"cut for {seconds:g} s: {_drawn(wires)}")
        for source, target in wires:
            network.cut(source, target)
        await anyio.sleep(seconds)
        for source, target in wires:
            network.mend(source, target)
        self._tell("", f"mended: {_drawn(wires)}")

    async def _messages_lost(self) -> None:
        wires, seconds = self._wires(), self._duration_s()
        self._tell("", f"connections break for {seconds:g} s: {_drawn(wires)}")
        share = self._rng.choice([0.05, 0.5])
        self._cluster.loss_share.update(dict.fromkeys(wires, share))
        await anyio.sleep(seconds)
        for wire in wires:
            self._cluster.loss_share.pop(wire, None)

    async def _messages_slow(self) -> None:
        seconds = self._duration_s()
        self._tell("", f"messages are slow for {seconds:g} s")
        self._cluster.way_s_max = self._rng.choice([0.1, 1.0])
        await anyio.sleep(seconds)
        self._cluster.way_s_max = WAY_S_MAX

    def _wires(self) -> list[tuple[str, str]]:
        """Between two, or two halves, in one direction or both."""
        addresses = [f"{name}:8080" for name in self._names]
        self._rng.shuffle(addresses)
        count = 1 if self._rng.random() < 0.5 else len(addresses) // 2
        rest = addresses[count:] if count > 1 else addresses[1:2]
        wires = [(source, target) for source in addresses[:count] for target in rest]
        if self._rng.random() < 0.5:
            wires += [(target, source) for source, target in wires]
        return wires

    # --- runtimes -------------------------------------------------------------------------------

    async def _runtime_restarts(self) -> None:
        each, seconds = self._any(), self._rng.choice([0.1, 2.0, 20.0])
        self._tell(each.name, f"the runtime is gone for {seconds:g} s")
        each.runtime.stop()
        await anyio.sleep(seconds)
        if not each.has_crashed:
            each.runtime.start()
            self._tell(each.name, "the runtime is back, empty")

    async def _models_lost(self) -> None:
        each = self._any()
        loaded = sorted(each.runtime.loaded)
        for model_id in self._rng.sample(loaded, self._rng.randint(0, len(loaded))):
            each.runtime.lose(model_id)

    async def _loads_fail(self) -> None:
        model_id, code = self._model(), self._rng.choice(LOAD_FAILURES)
        affected, times = self._some(), self._rng.choice([1, 3])
        self._tell(_names(affected), f"{times} loads of {model_id} will fail with {code.name}")
        for each in affected:
            each.runtime.fail_loads(model_id, code, "boom", times=times)

    async def _unloads_fail(self) -> None:
        model_id, each, times = self._model(), self._any(), self._rng.choice([1, 3])
        self._tell(each.name, f"{times} unloads of {model_id} will fail")
        each.runtime.fail_unloads(model_id, StatusCode.INTERNAL, "stuck", times=times)

    async def _loads_slow(self) -> None:
        await self._slow("load", self._rng.choice([3.0, 15.0]))

    async def _unloads_slow(self) -> None:
        await self._slow("unload", self._rng.choice([3.0, 10.0]))

    async def _slow(self, what: str, takes_s: float) -> None:
        cluster, affected, seconds = self._cluster, self._some(), self._duration_s()
        models = self._rng.sample(self._models, len(self._models) // 4)
        self._tell(_names(affected), f"a quarter of all {what}s take {takes_s:g} s")
        for each in affected:
            for model_id in models:
                load_s, unload_s = cluster.times_s(model_id)
                if what == "load":
                    load_s = takes_s
                else:
                    unload_s = takes_s
                self._plan(each, model_id, load_s, unload_s)
        await anyio.sleep(seconds)
        for each in affected:
            for model_id in models:
                self._plan(each, model_id, *cluster.times_s(model_id))

    def _plan(self, each: Instance, model_id: str, load_s: float, unload_s: float) -> None:
        each.runtime.plan(model_id, load_s=load_s, unload_s=unload_s)

    # --- instances ------------------------------------------------------------------------------

    async def _half_speed(self) -> None:
        each, seconds = self._any(), self._rng.choice([10.0, 60.0])
        self._tell(each.name, f"is at half speed for {seconds:g} s")
        each.runtime.slowness = 2.0
        await anyio.sleep(seconds)
        each.runtime.slowness = 1.0

    async def _clock_steps(self) -> None:
        each = self._any()
        each.clock.skew_ms = self._rng.randint(-SKEW_MS_MAX, SKEW_MS_MAX)
        self._tell(each.name, f"its clock is {each.clock.skew_ms} ms ahead from now on")

    # --- chance ---------------------------------------------------------------------------------

    def _tell(self, name: str, text: str) -> None:
        self._cluster.log.tell(name if "," not in name else "", "", f"fault: {name} {text}")

    def _duration_s(self) -> float:
        return self._rng.choice(OUTAGES_S)

    def _model(self) -> str:
        return self._rng.choice(self._models)

    def _any(self) -> Instance:
        return self._cluster[self._rng.choice(self._names)]

    def _some(self) -> list[Instance]:
        """One instance or all of them."""
        if self._rng.random() < 0.5:
            return [self._any()]
        return [self._cluster[name] for name in self._names]


def _store(each: Instance) -> SimulatedStore:
    assert isinstance(each.store, SimulatedStore), each
    return each.store


def _names(instances: list[Instance]) -> str:
    return ",".join(each.name for each in instances)


def _drawn(wires: list[tuple[str, str]]) -> str:
    return ", ".join(f"{s.partition(':')[0]} to {t.partition(':')[0]}" for s, t in wires)

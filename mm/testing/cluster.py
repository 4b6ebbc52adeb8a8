"""A cluster in one process: real ``Node``s over one memory store, fake runtimes and a fake network.

Owns what the instances share, their starts, and the check that everything fits together at rest;
one instance is ``mm.testing.instance``'s. Anyio alone: under trio all of it runs in virtual time,
from a seed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.ids import InstanceId
from mm.core.records import InstanceRecord, ModelRecord
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.mesh.ports import RuntimeParameters
from mm.testing.fake_clock import FakeClock
from mm.testing.fake_network import FakeNetwork
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, FakeRuntime, ModelPlan
from mm.testing.instance import INFO, ConnectionLostError, Instance, RuntimeAnswerError

__all__ = [
    "INFO",
    "PREFIX",
    "Cluster",
    "ConnectionLostError",
    "Instance",
    "RuntimeAnswerError",
    "running_cluster",
    "small_parameters",
    "until",
]

SERVICE: Final = "test"
PREFIX: Final = f"/tas-runtime/{SERVICE}"
#: How often ``until`` looks at first and at last; real time on asyncio, so short.
LOOK_MIN_S: Final = 0.001
LOOK_MAX_S: Final = 0.05
#: Limits of every cluster that is not told others: tests set them for all that they are not about.
DEFAULT_LIMITS: Final[dict[str, Any]] = {}


async def until(condition: Callable[[], bool], timeout_s: float = 60.0, what: str = "") -> None:
    """Return once the condition holds; raises ``AssertionError`` with what did not come true."""
    pause_s = LOOK_MIN_S
    with anyio.move_on_after(timeout_s):
        while not condition():
            await anyio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LOOK_MAX_S)
        return
    raise AssertionError(f"not so after {timeout_s:g} s: {what or condition}")


class Cluster:
    """Instances that share a store and a network; make one with ``running_cluster``."""

    def __init__(
        self,
        group: TaskGroup,
        *,
        seed: int = 0,
        parameters: RuntimeParameters = DEFAULT_PARAMETERS,
        plan: ModelPlan | None = None,
        **limits: Any,
    ) -> None:
        self.seed = seed
        self.server = MemoryServer()
        self.network = FakeNetwork()
        self.parameters = parameters
        self.plan = plan or ModelPlan()
        #: What a call costs the runtime.
        self.call_s = 0.0
        #: For stores of instances started from now on.
        self.store_delay_s = 0.0
        self.watch_delay_s = 0.0
        self.instances: dict[str, Instance] = {}
        self._limits = limits
        self._group = group

    async def start(
        self,
        name: str,
        *,
        address: str | None = None,
        runtime: FakeRuntime | None = None,
        fault: Fault | None = None,
        is_known_by_all: bool = True,
        **limits: Any,
    ) -> Instance:
        """Start an instance and answer it once it serves; raises ``StartupError``.

        With ``is_known_by_all`` all others must have heard of it first.
        """
        config = Config(
            service_name=SERVICE,
            kv_store="memory",
            instance_id=InstanceId(name),
            **{**DEFAULT_LIMITS, **self._limits, **limits},
        )
        runtime = runtime or self.make_runtime(config)
        instance = Instance(self, config, runtime, address or f"{name}:8080")
        if fault is not None:
            instance.store.set_fault(fault)
        self.network.listen(instance.address, instance)
        self.instances[name] = instance
        await self._group.start(instance.run)
        if is_known_by_all:
            await until(lambda: self._all_know(instance), what=f"all know {name}")
        return instance

    def tell(self, name: str, model_id: str, text: str) -> None:
        """Hear what the data plane of an instance does."""

    # --- what is beside an instance: a simulator makes it worse ----------------------------------

    def make_store(self, config: Config) -> MemoryStore:
        """Answer the store of an instance that is about to start."""
        return MemoryStore(
            self.server,
            timeout_s=config.store_timeout_s,
            call_delay_s=self.store_delay_s,
            watch_delay_s=self.watch_delay_s,
        )

    def make_clock(self, config: Config) -> FakeClock:
        """Answer its clock."""
        return FakeClock()

    def make_runtime(self, config: Config) -> FakeRuntime:
        """Answer its runtime."""
        return FakeRuntime(self.parameters, default_plan=self.plan)

    def _all_know(self, instance: Instance) -> bool:
        """Whether everybody who can hear of it has heard that it is there."""
        return all(
            instance.name in each.node.parts.members
            for each in self.serving
            if each.store.connected
        )

    def __getitem__(self, name: str) -> Instance:
        return self.instances[name]

    @property
    def serving(self) -> list[Instance]:
        """The instances that serve now."""
        return [each for each in self.instances.values() if each.is_serving]

    # --- what is stored -----------------------------------------------------------------------

    def record(self, model_id: str) -> ModelRecord | None:
        """Answer what the store says of a model, whatever any instance believes."""
        item = self.server.get(f"{PREFIX}/registry/{model_id}")
        return None if item is None else ModelRecord.decode(item.value)

    def records(self) -> dict[str, ModelRecord]:
        """Answer all models in the store."""
        prefix = f"{PREFIX}/registry/"
        items = self.server.table(prefix).items
        return {item.key[len(prefix) :]: ModelRecord.decode(item.value) for item in items}

    def instance_record(self, name: str) -> InstanceRecord | None:
        """Answer what the store says of an instance."""
        item = self.server.get(f"{PREFIX}/instances/{name}")
        return None if item is None else InstanceRecord.decode(item.value)

    # --- at rest ------------------------------------------------------------------------------

    async def settle(self, timeout_s: float = 600.0) -> None:
        """Return once nothing is on its way: no call, load or unload, no write that is owed."""
        await until(self.is_at_rest, timeout_s, "loads, unloads and writes end")

    def is_at_rest(self) -> bool:
        """Answer whether nothing is on its way, and every mirror equals the store."""
        return not any(_unrest(each) for each in self.serving) and self._agree()

    def unrest(self) -> str:
        """Answer what is on its way still."""
        return "; ".join(filter(None, map(_unrest, self.serving))) or "views differ from the store"

    def _agree(self) -> bool:
        prefix = f"{PREFIX}/registry/"
        items = {item.key[len(prefix) :]: item for item in self.server.table(prefix).items}
        return all(_mirrored(each) == items for each in self.serving)

    def check(self, *, losses_unnoticed: bool = False) -> None:
        """Assert that everything fits together; only at rest.

        A runtime that lost models shows it at their next calls only: before those the books may
        have more than it.
        """
        records = self.records()
        for each in self.serving:
            held = {copy.model_id for copy in each.node.parts.copies}
            lost = held - each.runtime.loaded
            assert losses_unnoticed or not lost, (each.name, lost)
            assert each.runtime.loaded <= held, (each.name, each.runtime.loaded - held)
            _check_node(each, records)


def _mirrored(instance: Instance) -> dict[str, Any]:
    return dict(instance.node.parts.registry._mirror.items())


def _unrest(instance: Instance) -> str:
    node = instance.node
    found = []
    if node.router.routes_open:
        found.append(f"{node.router.routes_open} calls")
    found += [repr(copy) for copy in node.parts.copies if copy.phase.name != "ACTIVE"]
    if node.parts.copies.unloader.count:
        found.append(f"{node.parts.copies.unloader.count} unloads")
    if node.parts.registrar.owed_count:
        found.append(f"{node.parts.registrar.owed_count} registrations owed")
    if not instance.store.connected:
        found.append("no store")
    return f"{instance.name}: {', '.join(found)}" if found else ""


def _check_node(instance: Instance, records: dict[str, ModelRecord]) -> None:
    node, name = instance.node, instance.name
    copies, accounting = node.parts.copies, node.parts.accounting
    table = copies.table
    accounting.check_invariants()
    table.check_invariants()
    copies.check_invariants()
    held = {copy.model_id for copy in copies}
    registered = {model_id for model_id, record in records.items() if name in record.copies}
    assert held == registered, (name, held ^ registered)
    assert accounting.unloading_units == 0, accounting
    assert instance.runtime.violations == [], (name, instance.runtime.violations)
    known = held | {m for m, record in records.items() if record.copies}
    assert len(table) <= len(known), (name, len(table), len(known))
    assert not any(table.in_flight(model_id) for model_id in records), name


@asynccontextmanager
async def running_cluster(*names: str, **options: Any) -> AsyncIterator[Cluster]:
    """Run a cluster of the named instances; on the way out everything is cancelled."""
    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        try:
            cluster = Cluster(group, **options)
            for name in names:
                await cluster.start(name)
            yield cluster
        except Exception as exc:
            failure = exc  # raised outside the group, so that a test sees it bare
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure


def small_parameters(capacity_mib: int, *, model_mib: int = 1, **changes: Any) -> RuntimeParameters:
    """Answer parameters for a runtime with little memory, so that eviction is near."""
    return replace(
        DEFAULT_PARAMETERS,
        capacity_bytes=capacity_mib << 20,
        default_model_size_bytes=model_mib << 20,
        **changes,
    )

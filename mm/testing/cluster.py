"""A cluster in one process: real ``Node``s over one memory store, fake runtimes and a fake network.

Owns starting, crashing and stopping instances, a data plane that calls objects instead of moving
bytes, and the check that everything fits together at rest. Anyio alone: under trio all of it runs
in virtual time, from a seed.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup, TaskStatus

from mm.config import Config
from mm.core.calls import Call, Hop, LocalRoute, Outcome, PeerRoute, Route
from mm.core.ids import InstanceId, ModelId
from mm.core.records import InstanceRecord, ModelInfo, ModelRecord
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import MeshError, NoRoomError, RuntimeUnavailableError, StatusCode
from mm.mesh.models import EnsureRequest
from mm.mesh.node import Node, Ports
from mm.mesh.ports import (
    ModelStatus,
    PeerCallError,
    PeerIdentity,
    RuntimeCallError,
    RuntimeParameters,
)
from mm.testing.fake_clock import FakeClock
from mm.testing.fake_network import FakeNetwork
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, FakeRuntime, ModelPlan

SERVICE: Final = "test"
PREFIX: Final = f"/tas-runtime/{SERVICE}"
INFO: Final = ModelInfo("type", "path")
#: How often ``until`` looks at first and at last; real time on asyncio, so short.
LOOK_MIN_S: Final = 0.001
LOOK_MAX_S: Final = 0.05


class ConnectionLostError(Exception):
    """The instance that a client called crashed before it answered."""


class RuntimeAnswerError(MeshError):
    """An error of the runtime itself, passed to the client untouched."""


async def until(condition: Callable[[], bool], timeout_s: float = 10.0, what: str = "") -> None:
    """Return once the condition holds; raises ``AssertionError`` with what did not come true."""
    pause_s = LOOK_MIN_S
    with anyio.move_on_after(timeout_s):
        while not condition():
            await anyio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LOOK_MAX_S)
        return
    raise AssertionError(f"not so after {timeout_s:g} s: {what or condition}")


class Instance:
    """One instance and all that is beside it; at the same time what listens on its peer port."""

    def __init__(
        self, cluster: Cluster, config: Config, runtime: FakeRuntime, address: str
    ) -> None:
        self.cluster = cluster
        self.name = config.instance_id
        self.address = address
        self.runtime = runtime
        self.config = config
        self.store = MemoryStore(
            cluster.server,
            timeout_s=config.store_timeout_s,
            call_delay_s=cluster.store_delay_s,
            watch_delay_s=cluster.watch_delay_s,
        )
        self.clock = FakeClock()
        self.node = Node(
            config,
            Ports(
                self.store,
                runtime,
                cluster.network.peers(self.address),
                self.clock,
                random.Random(f"{cluster.seed} {address}"),
            ),
        )
        self.is_serving = False
        self._has_started = False
        self._prediction_fault: RuntimeCallError | None = None
        self._scope = anyio.CancelScope()
        self._stopping = anyio.Event()
        self._ended = anyio.Event()
        self._clients: set[anyio.CancelScope] = set()

    def __repr__(self) -> str:
        return f"<Instance {self.name}{' serving' if self.is_serving else ''}>"

    # --- life ---------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Start, serve until told otherwise; raises what ``Node.running`` raises."""
        try:
            with self._scope:
                async with self.node.running(self.address):
                    self.is_serving = self._has_started = True
                    task_status.started()
                    await self._stopping.wait()
                    self.is_serving = False
        finally:
            self.is_serving = False
            self.cluster.network.close(self.address)
            self._ended.set()

    async def stop(self) -> None:
        """Stop in good order: as SIGTERM, without the wait for calls in flight."""
        self._stopping.set()
        await self._ended.wait()

    async def crash(self) -> None:
        """End at once: connections break, the lease runs out, nobody is told."""
        self.store.set_fault(Fault.REFUSED)
        self.runtime.stop()
        self.cluster.network.close(self.address)
        for scope in list(self._clients):
            scope.cancel()
        self._scope.cancel()
        await self._ended.wait()

    def fail_predictions(self, code: int, message: str) -> None:
        """Let the runtime answer every inference with an error; code 0 ends that."""
        self._prediction_fault = RuntimeCallError(code, message) if code else None

    # --- what a client does -------------------------------------------------------------------

    async def invoke(self, model_id: str, method: str = "/pkg.Service/Method") -> InstanceId:
        """Call a model as a client does; answers which instance served. Raises ``MeshError``."""
        return await self.send(Call(ModelId(model_id), method=method))

    async def send(self, call: Call) -> InstanceId:
        """Serve a client's call; raises ``ConnectionLostError`` if this instance crashes."""
        with anyio.CancelScope() as scope:
            self._clients.add(scope)
            try:
                return await self.serve(call)
            finally:
                self._clients.discard(scope)
        raise ConnectionLostError(self.name)

    async def register(
        self, model_id: str, info: ModelInfo = INFO, *, load_now: bool = False, sync: bool = False
    ) -> ModelStatus:
        """Register a model."""
        return await self.node.models.register(
            ModelId(model_id), info, load_now=load_now, sync=sync, last_used_ms=0
        )

    async def load(self, model_id: str, *, sync: bool = True) -> ModelStatus:
        """Ensure that a model is loaded somewhere."""
        return await self.node.models.ensure_loaded(EnsureRequest(ModelId(model_id), sync))

    async def load_here(self, model_id: str) -> ModelStatus:
        """Load a copy here, whatever placement would say."""
        call = Call(ModelId(model_id), hop=Hop.LOAD_LOCAL, hops_left=0)
        return await self.node.models.ensure_loaded(EnsureRequest(ModelId(model_id), True), call)

    async def status(self, model_id: str) -> ModelStatus:
        """Ask for the status of a model."""
        return await self.node.models.status(ModelId(model_id))

    # --- what peers do: fake_network.PeerServer -----------------------------------------------

    def identity(self) -> PeerIdentity:
        """Answer who this is."""
        return PeerIdentity(self.name, self.node.start_time_ms)

    async def ensure_loaded(self, call: Call, *, sync: bool) -> ModelStatus:
        """Load by a peer's order."""
        self._require_started()
        request = EnsureRequest(call.model_id, sync, last_used_ms=call.last_used_ms)
        return await self.node.models.ensure_loaded(request, call)

    async def model_status(self, model_id: ModelId) -> ModelStatus:
        """Answer for the copy here."""
        self._require_started()
        return await self.node.models.status(model_id, ask_peers=False)

    async def serve(self, call: Call) -> InstanceId:
        """Be the data plane: ask, send, and again, until there is an answer."""
        self._require_started()
        router = self.node.router
        while True:
            route = await router.route(call)
            outcome, error = Outcome.ABANDONED, None
            again = False
            try:
                served_by, outcome, error = await self._attempt(call, route)
            finally:
                message = "" if error is None else error.message
                again = router.finished(call, route, outcome, message)
            if error is None:
                assert served_by is not None
                return served_by
            if not again:
                raise self._passed_on(call, outcome, error)

    def _passed_on(self, call: Call, outcome: Outcome, error: MeshError) -> MeshError:
        if outcome is not Outcome.ANSWERED:
            if not isinstance(error, RuntimeAnswerError):
                error = call.failure or error
            if call.hop is not Hop.EXTERNAL and error.hop_result is None:
                error.hop_result = outcome.value
        return error

    async def _attempt(
        self, call: Call, route: Route
    ) -> tuple[InstanceId | None, Outcome, MeshError | None]:
        if isinstance(route, PeerRoute):
            return await self._attempt_there(call, route)
        assert isinstance(route, LocalRoute), route
        try:
            if self._prediction_fault is not None:
                raise self._prediction_fault
            await self.runtime.predict(route.model_id, self.cluster.call_s)
        except RuntimeCallError as exc:
            outcome = {
                StatusCode.NOT_FOUND: Outcome.LOST,
                StatusCode.UNAVAILABLE: Outcome.RUNTIME_UNAVAILABLE,
            }.get(StatusCode(exc.code), Outcome.ANSWERED)
            return None, outcome, RuntimeAnswerError(exc.message, code=StatusCode(exc.code))
        except RuntimeUnavailableError as exc:
            return None, Outcome.UNREACHABLE, exc
        return self.name, Outcome.ANSWERED, None

    async def _attempt_there(
        self, call: Call, route: PeerRoute
    ) -> tuple[InstanceId | None, Outcome, MeshError | None]:
        peers = self.cluster.network.peers(self.address)
        try:
            served_by = await peers.forward(route, call.method)
        except PeerCallError as exc:
            cause = exc.__cause__
            if isinstance(cause, RuntimeAnswerError):
                return None, exc.outcome, RuntimeAnswerError(cause.message, code=cause.code)
            return None, exc.outcome, RuntimeUnavailableError(exc.message)
        except MeshError as exc:
            return None, Outcome.ANSWERED, exc
        return served_by, Outcome.ANSWERED, None

    def _require_started(self) -> None:
        if not self._has_started:
            error = NoRoomError("this instance is still starting")
            error.hop_result = Outcome.DRAINING.value
            raise error


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
        **limits: Any,
    ) -> Instance:
        """Start an instance and answer it once it serves; raises ``StartupError``."""
        config = Config(
            service_name=SERVICE,
            kv_store="memory",
            instance_id=InstanceId(name),
            **{**self._limits, **limits},
        )
        runtime = runtime or FakeRuntime(self.parameters, default_plan=self.plan)
        instance = Instance(self, config, runtime, address or f"{name}:8080")
        if fault is not None:
            instance.store.set_fault(fault)
        self.network.listen(instance.address, instance)
        self.instances[name] = instance
        await self._group.start(instance.run)
        await until(lambda: self._all_know(instance), what=f"all know {name}")
        return instance

    def _all_know(self, instance: Instance) -> bool:
        """Whether everybody who can hear of it has heard that it is there."""
        return all(
            instance.name in each.node._members for each in self.serving if each.store.connected
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
        await until(self._is_at_rest, timeout_s, "loads, unloads and writes end")

    def _is_at_rest(self) -> bool:
        return all(_is_at_rest(each) for each in self.serving) and self._agree()

    def _agree(self) -> bool:
        records = self.records()
        return all(
            {k: v.value for k, v in _mirrored(each).items()}
            == {k: v.encode() for k, v in records.items()}
            for each in self.serving
        )

    def check(self, *, losses_unnoticed: bool = False) -> None:
        """Assert that everything fits together; only at rest.

        A runtime that lost models shows it at their next calls only: before those the books may
        have more than it.
        """
        records = self.records()
        for each in self.serving:
            held = {copy.model_id for copy in each.node._copies}
            lost = held - each.runtime.loaded
            assert losses_unnoticed or not lost, (each.name, lost)
            assert each.runtime.loaded <= held, (each.name, each.runtime.loaded - held)
            _check_node(each, records)


def _mirrored(instance: Instance) -> dict[str, Any]:
    return dict(instance.node._registry._mirror.items())


def _is_at_rest(instance: Instance) -> bool:
    node = instance.node
    return (
        node.router.routes_open == 0
        and all(copy.phase.name == "ACTIVE" for copy in node._copies)
        and node._copies.unloader.count == 0
        and node._registrar.owed_count == 0
        and instance.store.connected
    )


def _check_node(instance: Instance, records: dict[str, ModelRecord]) -> None:
    node, name = instance.node, instance.name
    copies, accounting = node._copies, node._accounting
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

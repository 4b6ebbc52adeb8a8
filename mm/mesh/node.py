"""One instance of the mesh: composes everything and owns every task (design section 7).

Owns the order of start and stop. Knows nothing of sockets: ``edge.app`` builds the ports and opens
the listeners.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup

import mm
from mm.config import Config
from mm.core.accounting import UnloadAccounting
from mm.core.busyness import Busyness
from mm.core.cluster_state import ClusterState
from mm.core.constraints import TypeConstraints
from mm.core.ids import ModelId
from mm.core.load_times import LoadTimes
from mm.core.records import InstanceRecord, ModelRecord
from mm.core.sizing import CacheSizing
from mm.errors import ModelNotFoundError, NoRoomError, StartupError, StoreUnavailableError
from mm.mesh.concurrency import CallLimits
from mm.mesh.copies import Copies
from mm.mesh.load_pusher import LoadPusher
from mm.mesh.loader import Loader
from mm.mesh.local_copy import Phase
from mm.mesh.members import Members
from mm.mesh.models import Models
from mm.mesh.own_id import refuse_if_taken
from mm.mesh.placer import Placer
from mm.mesh.ports import Clock, Peers, Runtime, RuntimeParameters, Session, Store
from mm.mesh.pruner import Pruner
from mm.mesh.publisher import Publisher
from mm.mesh.registrar import Registrar
from mm.mesh.registry import Registry
from mm.mesh.router import Router
from mm.mesh.statistics import Counters, InstanceStatistics
from mm.mesh.statuses import Statuses
from mm.mesh.store_check import wait_for_store
from mm.mesh.vmodels import VModels
from mm.mesh.waiters import Waiters
from mm.table import Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ports:
    """The world, as one node sees it."""

    store: Store
    runtime: Runtime
    peers: Peers
    clock: Clock
    rng: random.Random


class Node:
    """An instance from its start to its end.

    ``async with node.running(address):`` is the whole life: inside, the node serves; on the way out
    it drains. The
    attributes ``router`` and ``models`` are there once inside.
    """

    router: Router
    models: Models

    def __init__(self, config: Config, ports: Ports) -> None:
        self._config = config
        self._ports = ports
        self._me = config.instance_id
        self._counters = Counters()
        self._busyness = Busyness()
        self._address = ""
        self._draining = False
        prefix = f"/{config.kv_prefix}/{config.service_name}"
        self._registry = Registry(ports.store, f"{prefix}/registry/", config)
        self._vmodels = VModels(ports.store, f"{prefix}/vmodels/", config)
        self._instances_prefix = f"{prefix}/instances/"
        self.start_time_ms = ports.clock.now_ms()

    # --- life ---

    @asynccontextmanager
    async def running(self, address: str) -> AsyncIterator[None]:
        """Start, serve, drain. ``address`` is host:port of the peer listener, for the instance
        record.

        Raises ``StartupError`` when it cannot start: the store, the runtime, the id.
        """
        self._address = address
        await wait_for_store(self._ports.store, self._config)
        parameters = await self._ports.runtime.wait_ready()
        self._compose(parameters)
        failure: StartupError | None = None
        async with AsyncExitStack() as stack:
            try:
                session = await stack.enter_async_context(
                    self._ports.store.session(self._config.lease_ttl_s)
                )
            except StoreUnavailableError as exc:
                raise StartupError(_went_away(exc)) from exc
            group = await stack.enter_async_context(anyio.create_task_group())
            try:
                await self._join(group, session)
            except StoreUnavailableError as exc:
                failure = StartupError(_went_away(exc))
            except StartupError as exc:
                failure = exc
            if failure is None:
                self._log_start()
                try:
                    yield
                finally:
                    with anyio.move_on_after(self._config.close_timeout_s, shield=True):
                        await self._leave_cluster()
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure  # out here, so that it is not wrapped in a group

    def _log_start(self) -> None:
        logger.info(
            "instance %s serves: capacity %d units, %d models registered, %d other instances",
            self._me,
            self._accounting.capacity_units,
            len(self._registry),
            max(0, len(self._members) - 1),
        )

    async def drain(self) -> None:
        """Take no new work: others are told, loads are refused, registrations taken back. Calls in
        flight go on.
        """
        if self._draining:
            return
        self._draining = True
        refusal = NoRoomError(f"instance {self._me} is shutting down")
        refusal.hop_result = "draining"
        self._copies.close(refusal)
        for copy in list(self._copies):
            if copy.phase is not Phase.ACTIVE and not copy.serves:
                self._copies.remove(copy, refusal)
        await self._tell_others(self._publisher.publish)
        await self._tell_others(self._registrar.forget_all)

    async def _tell_others(self, write: Callable[[], Awaitable[object]]) -> None:
        try:
            await write()
        except StoreUnavailableError as exc:
            logger.warning("stopping without telling the others: %s", exc)

    def _compose(self, parameters: RuntimeParameters) -> None:
        self._parameters = parameters
        self._compose_cache(parameters)
        self._compose_cluster()
        self._compose_loads(parameters)
        self._compose_router(parameters)
        self._compose_models()
        self._registry.listen(self._record_changed)

    def _compose_cache(self, parameters: RuntimeParameters) -> None:
        config, ports = self._config, self._ports
        self._sizing = CacheSizing.from_runtime(
            capacity_bytes=parameters.capacity_bytes,
            default_model_size_bytes=parameters.default_model_size_bytes,
            loading_concurrency_max=parameters.loading_concurrency_max,
            load_timeout_ms=parameters.load_timeout_ms,
        )
        self._accounting = UnloadAccounting(self._sizing.capacity_units, self._sizing.reserve_units)
        table = Table(self._accounting.table_capacity_units)
        self._registrar = Registrar(self._registry, self._me, ports.clock)
        self._load_times = LoadTimes(self._sizing.assumed_load_ms)
        self._copies = Copies(
            table=table,
            accounting=self._accounting,
            runtime=ports.runtime,
            registrar=self._registrar,
            clock=ports.clock,
            limits=config,
            counters=self._counters,
            load_times=self._load_times,
        )
        if parameters.limit_model_concurrency:
            self._copies.call_limits = CallLimits(config.copy_calls_max, self._counters)

    def _compose_cluster(self) -> None:
        config, ports = self._config, self._ports
        self._cluster = ClusterState(
            self._me,
            config.labels,
            min_space_units=self._sizing.min_space_units,
            saturated_age_ms=self._sizing.saturated_age_ms,
            constraints=config.type_constraints,
        )
        self._members = Members(
            ports.store,
            self._instances_prefix,
            me=self._me,
            table=self._copies.table,
            registry=self._registry,
            cluster=self._cluster,
            clock=ports.clock,
            assumed_load_ms=self._load_times.assumed_ms,
        )
        self._pusher = LoadPusher(
            me=self._me,
            table=self._copies.table,
            members=self._members,
            peers=ports.peers,
            limits=config,
            counters=self._counters,
        )

    def _compose_loads(self, parameters: RuntimeParameters) -> None:
        config, ports = self._config, self._ports
        self._loader = Loader(
            copies=self._copies,
            registrar=self._registrar,
            runtime=ports.runtime,
            parameters=parameters,
            sizing=self._sizing,
            config=config,
        )
        self._waiters = Waiters(
            config,
            self._counters,
            wait_timeout_s=config.load_wait_factor * self._loader.load_timeout_s,
        )
        self._placer = Placer(
            me=self._me,
            cluster=self._cluster,
            own_record=self.own_record,
            members=self._members,
            failure_rules=config.failure_rules,
            default_units=self._sizing.default_units,
            counters=self._counters,
            rng=ports.rng,
        )

    def _compose_router(self, parameters: RuntimeParameters) -> None:
        self.router = Router(
            config=self._config,
            parameters=parameters,
            registry=self._registry,
            vmodels=self._vmodels,
            members=self._members,
            copies=self._copies,
            loader=self._loader,
            waiters=self._waiters,
            placer=self._placer,
            pusher=self._pusher,
            rng=self._ports.rng,
        )

    def _compose_models(self) -> None:
        config, ports = self._config, self._ports
        self.models = Models(
            config=config,
            registry=self._registry,
            statuses=Statuses(
                config=config,
                members=self._members,
                copies=self._copies,
                peers=ports.peers,
                clock=ports.clock,
                load_times=self._load_times,
            ),
            copies=self._copies,
            router=self.router,
            peers=ports.peers,
            clock=ports.clock,
        )

    async def _join(self, group: TaskGroup, session: Session) -> None:
        """Mirrors first, then the id, then our own record: from then on others may send us work."""
        config = self._config
        self._group = group
        with anyio.move_on_after(config.store_mirror_timeout_s) as scope:
            await group.start(self._registry.run)
            await group.start(self._vmodels.run)
            await group.start(self._members.run)
        if scope.cancelled_caught:
            raise StartupError(
                "the records could not be read from the store"
                f" in {config.store_mirror_timeout_s:g} s"
            )
        self._copies.open(group)
        self._loader.open(group)
        self.models.open(group)
        self._publisher = Publisher(
            store=self._ports.store,
            session=session,
            members=self._members,
            copies=self._copies,
            limits=config,
            own_record=self.own_record,
        )
        pruner = Pruner(
            registry=self._registry,
            members=self._members,
            me=self._me,
            clock=self._ports.clock,
            config=config,
        )
        with anyio.move_on_after(config.store_start_timeout_s) as scope:
            while not await self._publisher.publish(if_revision=await self._take_id()):
                logger.info("the record of instance %s changed meanwhile: looking again", self._me)
        if scope.cancelled_caught:
            raise StartupError("this instance could not be published: no lease, or no answer")
        for task in (
            self._waiters.run,
            self._publisher.run,
            self._registrar.run,
            self._pusher.run,
            pruner.run,
        ):
            group.start_soon(task)

    async def _take_id(self) -> int:
        """Refuse to be a second instance of one id; clean up after a first that is gone (issue:
        restart). Answers the revision of its record.
        """
        item = await self._ports.store.get(self._members.key())
        await refuse_if_taken(
            item,
            self._ports.peers,
            me=self._me,
            own_address=self._address,
            start_time_ms=self.start_time_ms,
            timeout_s=self._config.identity_timeout_s,
        )
        count = await self._registrar.forget_all()
        if count:
            logger.info("%d copies of an earlier process with this id were taken out", count)
        return 0 if item is None else item.mod_revision

    async def _leave_cluster(self) -> None:
        """The session's lease is revoked by its own exit, which deletes our record."""
        await self.drain()
        await self._tell_others(self._registrar.forget_all)

    def set_type_constraints(self, constraints: TypeConstraints) -> None:
        """Place loads by these from now on. Copies that they would not allow keep serving."""
        self._cluster.set_constraints(constraints)

    # --- views of it ---

    def own_record(self) -> InstanceRecord:
        """Answer this instance's record as of now (spec core 1.5)."""
        config = self._config
        return InstanceRecord(
            start_time_ms=self.start_time_ms,
            location=config.location,
            zone=config.zone,
            labels=config.labels,
            lru_time_ms=self._copies.oldest_use_ms(),
            count=len(self._copies),
            capacity_units=self._accounting.published_capacity_units,
            used_units=self._accounting.published_used_units,
            loading_threads=self._parameters.loading_concurrency_max,
            loads_in_progress=self._copies.loads_in_progress,
            busyness_rpm=self._busyness.rpm(self._counters.calls, self._ports.clock.now_ms()),
            shutting_down=self._draining,
            address=self._address,
            mm_version=mm.__version__,
            min_space_units=self._sizing.min_space_units,
        )

    def statistics(self) -> InstanceStatistics:
        """Answer a snapshot of counters and gauges."""
        copies = list(self._copies)
        look_ups = (self._registry.look_ups, self._vmodels.look_ups)
        return InstanceStatistics(
            instance_id=self._me,
            uptime_ms=self._ports.clock.now_ms() - self.start_time_ms,
            models_loaded=sum(copy.serves for copy in copies),
            models_loading=sum(not copy.serves for copy in copies),
            capacity_units=self._accounting.capacity_units,
            used_units=self._accounting.used_units,
            unloading_units=self._accounting.unloading_units,
            calls_in_flight=self.router.routes_open,
            waiting_calls=self._waiters.calls,
            waiting_bytes=self._waiters.request_bytes,
            loads_running=self._loader.running_count,
            loads_queued=self._loader.queue_length,
            store_connected=self._ports.store.connected,
            registered_models=len(self._registry),
            registry_writes_owed=self._registrar.owed_count,
            look_ups=sum(each.count for each in look_ups),
            look_ups_refused=sum(each.refused_count for each in look_ups),
            corrupt_records=self._registry.corrupt_count,
            instances=len(self._members),
            partitions=self._cluster.partitions(),
            counters=self._counters,
        )

    # --- reactions ---

    def _record_changed(self, model_id: ModelId, record: ModelRecord | None) -> None:
        """Unload what was unregistered; put back what others took out while we were thought to be
        gone.
        """
        copy = self._copies.get(model_id)
        if copy is None:
            if record is not None and self._me in record.copies:
                # A write that landed although its load had ended.
                self._registrar.disown(model_id)
        elif self._draining:
            return
        elif record is None:
            self._copies.remove(copy, ModelNotFoundError())
        elif record.info != copy.info:
            self._copies.remove(copy)  # registered anew: whoever waits asks again
        elif copy.registered and copy.started.is_set() and self._me not in record.copies:
            self._registrar.restore(copy)


def _went_away(error: StoreUnavailableError) -> str:
    return f"Problem connecting to etcd: it went away during the start: {error.message}"

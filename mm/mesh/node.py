"""One instance of the mesh: its life, and every task of it (design section 7).

Owns the order of start and stop. What it is made of is ``composition``'s. Knows nothing of sockets:
``edge.app`` builds the ports and opens the listeners.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
from anyio.abc import TaskGroup

import mm
from mm.config import Config
from mm.core.constraints import TypeConstraints
from mm.core.readiness import Unready
from mm.core.records import InstanceRecord
from mm.errors import NoRoomError, StartupError, StoreUnavailableError
from mm.mesh.composition import Parts, Ports, compose
from mm.mesh.local_copy import Phase
from mm.mesh.models import Models
from mm.mesh.own_id import refuse_if_taken
from mm.mesh.ports import Session
from mm.mesh.readiness import Readiness
from mm.mesh.router import Router
from mm.mesh.services import Services, compose_services
from mm.mesh.statistics import InstanceStatistics
from mm.mesh.store_check import wait_for_store
from mm.mesh.transitions import Transitions, compose_transitions
from mm.mesh.vmodel_manager import VModelManager, compose_vmodels

logger = logging.getLogger(__name__)

#: Between tries to tell the others that this instance stops, while the store is away.
TELL_AGAIN_S = 1.0


class Node:
    """An instance from its start to its end.

    ``async with node.running(address):`` is the whole life: inside, the node serves; on the way out
    it drains. The attributes are there once inside.
    """

    #: What others ask.
    router: Router
    models: Models
    vmodels: VModelManager
    #: What it is made of, for tests and tools.
    parts: Parts
    services: Services
    transitions: Transitions

    def __init__(self, config: Config, ports: Ports) -> None:
        self._config = config
        self._ports = ports
        self._me = config.instance_id
        self._address = ""
        self._draining = False
        self._readiness: Readiness | None = None
        #: Told before the counters are read, so that whoever counts elsewhere can bring them up to
        #: date; answers the calls that it has under way.
        self.on_read: Callable[[], int] | None = None
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
        self.parts = compose(self._config, self._ports, parameters, self.own_record)
        self.router, self.models = self.parts.router, self.parts.models
        self.vmodels = compose_vmodels(self._config, self._ports, self.parts)
        self._readiness = self.parts.readiness
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
                self.parts.readiness.started()
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
            self.parts.accounting.capacity_units,
            len(self.parts.registry),
            max(0, len(self.parts.members) - 1),
        )

    async def drain(self, limit_s: float = 0.0) -> None:
        """Take no new work, and have others take over what is here; then all is deregistered.

        Others are told, loads are refused; copies serve until their successors do, those of models
        that were used last first, for ``limit_s`` at most. Calls in flight go on.
        """
        if self._draining:
            return
        self._draining = True
        self.parts.readiness.stopping()
        refusal = NoRoomError(f"instance {self._me} is shutting down")
        refusal.hop_result = "draining"
        self.parts.copies.close(refusal)
        for copy in list(self.parts.copies):
            if copy.phase is not Phase.ACTIVE and not copy.serves:
                self.parts.copies.remove(copy, refusal)
        end_s, is_told = anyio.current_time() + limit_s, False
        with anyio.move_on_after(max(limit_s, self._config.close_timeout_s)):
            is_told = await self._say_that_we_stop()
        if not is_told:
            return
        with anyio.CancelScope(deadline=end_s):
            await self._tell_others(self.services.leader.resign)
            await self.services.drain.run()
        await self._tell_others(self.parts.registrar.forget_all)

    async def _say_that_we_stop(self) -> bool:
        """Answer whether the others know. Without the store nobody can take over what is here, so
        it is waited for, as long as there is something to take over.
        """
        level = logging.WARNING
        while True:
            try:
                await self.services.publisher.publish()
                return True
            except StoreUnavailableError as exc:
                if not self.services.drain.is_needed:
                    logger.warning("stopping without telling the others: %s", exc)
                    return False
                logger.log(level, "serving on: nobody can take over without the store: %s", exc)
                level = logging.DEBUG
            await anyio.sleep(TELL_AGAIN_S)

    async def _tell_others(self, write: Callable[[], Awaitable[object]]) -> bool:
        """Answer whether the store took it."""
        try:
            await write()
        except StoreUnavailableError as exc:
            logger.warning("stopping without telling the others: %s", exc)
            return False
        return True

    async def _join(self, group: TaskGroup, session: Session) -> None:
        """Mirrors first, then the id, then our own record: from then on others may send us work."""
        config = self._config
        self._group = group
        with anyio.move_on_after(config.store_mirror_timeout_s) as scope:
            await group.start(self.parts.registry.run)
            await group.start(self.parts.dynamic.run)
            self.parts.dynamic.require_enabled()
            await group.start(self.parts.vmodels.run)
            await group.start(self.parts.members.run)
        if scope.cancelled_caught:
            raise StartupError(
                "the records could not be read from the store"
                f" in {config.store_mirror_timeout_s:g} s"
            )
        self.parts.copies.open(group)
        self.parts.loader.open(group)
        self.parts.models.open(group)
        self.vmodels.open(group)
        self.services = compose_services(config, self._ports, self.parts, session, self.own_record)
        self.transitions = compose_transitions(
            config, self._ports.clock, self.parts, self.vmodels.writer, self.services.leader
        )
        with anyio.move_on_after(config.store_start_timeout_s) as scope:
            while not await self.services.publisher.publish(if_revision=await self._take_id()):
                logger.info("the record of instance %s changed meanwhile: looking again", self._me)
        if scope.cancelled_caught:
            raise StartupError("this instance could not be published: no lease, or no answer")
        for task in (*self.services.tasks, self.transitions.run):
            group.start_soon(task)

    async def _take_id(self) -> int:
        """Refuse to be a second instance of one id; clean up after a first that is gone (issue:
        restart). Answers the revision of its record.
        """
        item = await self._ports.store.get(self.parts.members.key())
        await refuse_if_taken(
            item,
            self._ports.peers,
            me=self._me,
            own_address=self._address,
            start_time_ms=self.start_time_ms,
            timeout_s=self._config.identity_timeout_s,
        )
        count = await self.parts.registrar.forget_all()
        if count:
            logger.info("%d copies of an earlier process with this id were taken out", count)
        return 0 if item is None else item.mod_revision

    async def _leave_cluster(self) -> None:
        """The session's lease is revoked by its own exit, which deletes our record."""
        await self.drain()
        if self._ports.store.connected:
            await self._tell_others(self.parts.registrar.forget_all)

    def set_type_constraints(self, constraints: TypeConstraints) -> None:
        """Place loads by these from now on. Copies that they would not allow keep serving."""
        self.parts.cluster.set_constraints(constraints)

    # --- views of it ---

    def own_record(self) -> InstanceRecord:
        """Answer this instance's record as of now (spec core 1.5)."""
        config, parts = self._config, self.parts
        loads_fail = parts.first_loads.fail or parts.runtime_watch.is_away
        self._read()
        return InstanceRecord(
            start_time_ms=self.start_time_ms,
            # Java loads at the newest version, whatever becomes of it.
            version=0 if loads_fail else config.version,
            location=config.location,
            zone=config.zone,
            labels=config.labels,
            lru_time_ms=parts.copies.oldest_use_ms(),
            count=len(parts.copies),
            capacity_units=parts.accounting.published_capacity_units,
            used_units=parts.accounting.published_used_units,
            loading_threads=parts.parameters.loading_concurrency_max,
            loads_in_progress=parts.copies.loads_in_progress,
            busyness_rpm=parts.busyness.rpm(parts.counters.calls, self._ports.clock.now_ms()),
            shutting_down=self._draining,
            address=self._address,
            mm_version=mm.__version__,
            min_space_units=parts.runtime_watch.sizing.min_space_units,
            loads_fail=loads_fail,
            pinned_units=parts.copies.table.kept_units,
        )

    def _read(self) -> int:
        return 0 if self.on_read is None else self.on_read()

    @property
    def unready(self) -> Unready | None:
        """What keeps clients from being sent here; None: nothing does."""
        return self._readiness.unready if self._readiness is not None else Unready.STARTING

    def statistics(self) -> InstanceStatistics:
        """Answer a snapshot of counters and gauges."""
        calls_elsewhere = self._read()
        parts = self.parts
        copies = list(parts.copies)
        look_ups = (parts.registry.look_ups, parts.vmodels.look_ups)
        saved_s, lost_s = parts.copies.eviction_gain_s
        return InstanceStatistics(
            instance_id=self._me,
            uptime_ms=self._ports.clock.now_ms() - self.start_time_ms,
            models_loaded=sum(copy.serves for copy in copies),
            models_loading=sum(not copy.serves for copy in copies),
            capacity_units=parts.accounting.capacity_units,
            used_units=parts.accounting.used_units,
            unloading_units=parts.accounting.unloading_units,
            calls_in_flight=parts.router.routes_open + calls_elsewhere,
            waiting_calls=parts.waiters.calls,
            waiting_bytes=parts.waiters.request_bytes,
            loads_running=parts.loader.running_count,
            loads_queued=parts.loader.queue_length,
            eviction_saved_s=saved_s,
            eviction_lost_s=lost_s,
            store_connected=self._ports.store.connected,
            store_out_of_space=self._ports.store.out_of_space,
            registered_models=len(parts.registry),
            registry_writes_owed=parts.registrar.owed_count,
            look_ups=sum(each.count for each in look_ups),
            look_ups_refused=sum(each.refused_count for each in look_ups),
            corrupt_records=parts.registry.corrupt_count + parts.vmodels.corrupt_count,
            records_unconfirmed=parts.registry.mirror.unconfirmed_count,
            transitions=self.transitions.count,
            transitions_blocked=self.transitions.blocked_count,
            instances=len(parts.members),
            instances_silent=parts.members.silent_count,
            instances_foreign=parts.members.foreign_count,
            runtime_away=parts.runtime_watch.is_away,
            partitions=parts.cluster.partitions(),
            version=self.own_record().version,
            unready_because=str(parts.readiness.unready or ""),
            first_loads_failed=len(parts.first_loads.models_to_try),
            policies=len(parts.registry.policies),
            policies_unmet=len(parts.policies.unmet),
            pinned_units=parts.copies.table.kept_units,
            pins_unmet=len(parts.pins.unmet),
            counters=parts.counters,
        )


def _went_away(error: StoreUnavailableError) -> str:
    return f"Problem connecting to etcd: it went away during the start: {error.message}"

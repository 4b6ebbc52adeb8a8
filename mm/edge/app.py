"""The process ``mm serve``: builds the ports, runs the node, opens the listeners (design 7).

Owns the order of start and stop of one process, and signals. What it serves is elsewhere.
"""

from __future__ import annotations

import logging
import random
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskStatus

from mm.config import Config
from mm.core.access import Access
from mm.core.call_meter import CallSource
from mm.core.dataplane import DataplaneConfig
from mm.core.dynamic_settings import LOG_LEVEL, Value
from mm.edge.access import AccessControl, remarks_of
from mm.edge.binding import Listener, open_listener
from mm.edge.client_limits import listener_limits
from mm.edge.garbage import collect_quietly
from mm.edge.h2 import (
    EXTERNAL_LIMITS,
    PEER_LIMITS,
    SERVING_LIMITS,
    Channel,
    ChannelPool,
    GrpcServer,
    IncomingCall,
    TransportLimits,
)
from mm.edge.life_cycle import LifeCycle
from mm.edge.log_context import Handler, HeaderLogging
from mm.edge.metrics import Metrics, call_meter
from mm.edge.payload_sinks import Observers
from mm.edge.peers import GrpcPeers, PeerService
from mm.edge.proxy import Proxy
from mm.edge.runtime_client import GrpcRuntime
from mm.edge.services import add_peer_services, client_services
from mm.edge.settings_files import SettingsFiles
from mm.edge.stores import open_store
from mm.edge.unary import ServiceTable
from mm.endpoints import Endpoint
from mm.errors import NoRoomError, StartupError
from mm.mesh.composition import Ports
from mm.mesh.node import Node
from mm.mesh.ports import Clock
from mm.mesh.readiness import Readiness
from mm.mesh.static_models import StaticModels
from mm.table import IMPLEMENTATION

if TYPE_CHECKING:
    from mm.edge.tls import Tls
    from mm.edge.wired import Wired

logger = logging.getLogger(__name__)

#: Of the time for stopping, this much is kept back for the end: leaving the cluster, closing.
STOP_RESERVE_S = 5.0
#: Of the rest, models may take this share to move elsewhere; calls in flight have what is left.
DRAIN_SHARE = 0.8


class WallClock(Clock):
    """The system's time."""

    def now_ms(self) -> int:
        """Answer milliseconds since the epoch."""
        return time.time_ns() // 1_000_000


async def serve(config: Config, on_started: Callable[[], None] = lambda: None) -> None:
    """Run one instance until SIGTERM or SIGINT; raises ``StartupError`` or ``ConfigError``.

    ``on_started`` is told once, when clients are let in.
    A second signal ends it at once. A bug anywhere inside ends it with the exception.
    """
    stopping = anyio.Event()
    try:
        async with anyio.create_task_group() as group:
            instance = Instance(config, on_started)
            await group.start(_listen_for_signals, stopping, group.cancel_scope, instance)
            await instance.run(stopping)
            group.cancel_scope.cancel()
    except BaseExceptionGroup as exc:
        startup = _first_startup_error(exc)
        if startup is None:
            raise
        raise startup from None


class _LogLevel:
    """What is logged: as the process was started, unless the store says otherwise."""

    def __init__(self) -> None:
        self._root = logging.getLogger()
        self._usual = self._root.level

    def set(self, level: Value | None) -> None:
        """Log from this level up."""
        self._root.setLevel(self._usual if level is None else str(level))


async def _listen_for_signals(
    stopping: anyio.Event,
    everything: anyio.CancelScope,
    instance: Instance,
    *,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            if stopping.is_set() or not instance.serving:
                logger.warning("%s: stopping at once", signal.Signals(number).name)
                everything.cancel()
                return
            logger.info("%s: stopping", signal.Signals(number).name)
            stopping.set()


class Instance:
    """One process's parts, from configuration to listeners."""

    def __init__(self, config: Config, on_started: Callable[[], None]) -> None:
        self._config = config
        self._on_started = on_started
        self._peer_services = ServiceTable(_starting)
        peer_limits = _limits(PEER_LIMITS, config, config.peer_streams_max)
        self._peer_server = GrpcServer(
            self._logged(self._peer_services), limits=peer_limits, external=False
        )
        #: For clients, and for those who manage models if they have their own.
        self._servers: list[GrpcServer] = []
        self._channels = ChannelPool(peer_limits)
        self._runtime = GrpcRuntime(config)
        #: For inferences; where that is, is known once the runtime is ready.
        self._serving_channel: Channel | None = None
        self._proxies: list[Proxy] = []
        self._wired: Wired | None = None
        self._access: AccessControl | None = None
        self._tls: Tls | None = None
        self._meter = call_meter(config)
        self._observers: Observers | None = None
        self.serving = False

    async def run(self, stopping: anyio.Event) -> None:
        """Start, serve until ``stopping``, stop in the reverse order."""
        config = self._config
        async with AsyncExitStack() as stack:
            # Before anything that takes time, and until all of it has ended.
            await stack.enter_async_context(LifeCycle(config, self._is_ready).shown())
            files = SettingsFiles(config)
            config = self._config = await files.read_into(config)
            access = await files.first_access()
            if access is not None:
                self._access = AccessControl(access)
            await self._secure(stack)
            store = await stack.enter_async_context(open_store(config))
            stack.push_async_callback(self._close)
            ports = Ports(
                store, self._runtime, GrpcPeers(self._channels), WallClock(), random.Random()
            )
            node = Node(config, ports)
            # Before anything else: a second process with our id is told by this listener.
            peer_service = PeerService(node, config.instance_id)
            peer_service.add_identity(self._peer_services)
            if config.dataplane == "wire" and not config.legacy_errors:
                self._wired = _begin_wire(config, self._tls)
            if self._access is not None:
                self._admit(self._access.access)
            peer_port = await self._open(self._peer_server, config.peer_port, "MM_PEER_PORT")
            await stack.enter_async_context(node.running(f"{config.advertise_host}:{peer_port}"))
            peer_service.add_statistics(self._peer_services)
            node.parts.dynamic.follow(LOG_LEVEL, _LogLevel().set)
            if config.payloads.sinks:
                self._observers = Observers(config, node.parts.counters, node.start_time_ms)
                await stack.enter_async_context(self._observers.running())
            services = self._serve_node(node)
            await stack.enter_async_context(self._metrics(node).shown())
            static_models = StaticModels(config, node.models, node.vmodels)
            await stack.enter_async_context(
                files.followed(
                    access=self._admit,
                    constraints=node.set_type_constraints,
                    dataplane=self._set_dataplane,
                    static_models=static_models.tell,
                )
            )
            # Peers are served by now: the same models may be loading here for others' starts.
            await static_models.register_first()
            if self._wired is not None:
                # Before clients: of which services there are, and what these need, it hears here.
                both = (services, self._peer_services)
                following = self._wired.following(node, both, self._serving_endpoint)
                await stack.enter_async_context(following)
            grpc_port = await self._open(self._servers[0], config.grpc_port, "MM_SVC_GRPC_PORT")
            management = await self._open_management()
            self.serving = True
            self._on_started()
            logger.info(
                "ready: instance %s, clients on port %d, peers on port %d%s",
                config.instance_id,
                grpc_port,
                peer_port,
                management,
            )
            async with anyio.create_task_group() as group:
                group.start_soon(collect_quietly, lambda: not node.statistics().waiting_calls)
                group.start_soon(self._show_readiness, node.parts.readiness)
                group.start_soon(static_models.run)
                await stopping.wait()
                group.cancel_scope.cancel()
            await self._stop(node)

    async def _secure(self, stack: AsyncExitStack) -> None:
        """Have TLS before there is a listener, if it is asked for."""
        if not self._config.tls.key_path:
            return
        # Not at the top of the file: plain text does without the extension and a tenth of a second.
        try:
            from mm.edge.tls import open_tls
        except ImportError as exc:
            raise StartupError(
                f"TLS needs the extension mm.wire._wire, which does not load: {exc}; "
                "run `make develop`"
            ) from exc
        self._tls = await open_tls(self._config)
        self._peer_server.tls = self._tls.peers
        self._channels.tls = self._tls.to_peers
        await stack.enter_async_context(self._tls.followed())

    async def _open(self, server: GrpcServer, port: int, variable: str) -> int:
        listener: Listener = server
        if self._wired is not None:
            assert self._wired.is_following or not server.external
            listener = self._wired.before(server)
        return await open_listener(listener, self._config.bind_host, port, variable)

    async def _open_management(self) -> str:
        """Listen for those who manage models, if that has a port; answers what the log says."""
        port = self._config.management_port
        if port is None:
            return ""
        # Not the wire's: nothing of it is a hit.
        host = self._config.bind_host
        port = await open_listener(self._servers[1], host, port, "MM_MANAGEMENT_PORT")
        return f", management on port {port}"

    @property
    def _serving_endpoint(self) -> Endpoint:
        """Where inferences go; known once the runtime is ready."""
        return self._config.runtime_serving_endpoint or self._runtime.endpoint

    def _metrics(self, node: Node) -> Metrics:
        sources: tuple[CallSource, ...] = () if self._meter is None else (self._meter,)
        wire = None
        if self._wired is not None:
            sources, wire = (*sources, self._wired.calls), self._wired.statistics
        return Metrics(self._config, node, sources, wire, self._tls, self._access)

    def _logged(self, services: ServiceTable) -> Handler:
        headers = self._config.logs.request_headers
        return HeaderLogging(headers, services) if headers else services

    def _asked(self, services: ServiceTable) -> Handler:
        """Before everything else, logs too: tokens are nobody's business there."""
        handler = self._logged(services)
        return handler if self._access is None else self._access.before(services, handler)

    def _admit(self, access: Access) -> None:
        """Calls that begin from now on go by it."""
        assert self._access is not None
        self._access.access = access
        if self._wired is not None:
            self._access.other_counts = self._wired.statistics
            self._wired.admit(access)
        for remark in remarks_of(access, self._config):
            logger.warning("access configuration: %s", remark)

    def _is_ready(self) -> bool:
        return self.serving and self._health.serving

    def _serve_node(self, node: Node) -> ServiceTable:
        """Attach everything to the listeners; answers what the external one serves."""
        config = self._config
        self._serving_channel = Channel(
            str(self._serving_endpoint),
            _limits(SERVING_LIMITS, config, SERVING_LIMITS.streams_max),
        )
        services = client_services(node, has_management_port=config.management_port is not None)
        add_peer_services(self._peer_services, node)
        for table, external in ((services.external, True), (self._peer_services, False)):
            proxy = Proxy(
                node.router,
                runtime=self._serving_channel,
                peers=self._channels,
                config=config,
                external=external,
                meter=self._meter,
                observers=self._observers,
            )
            self._proxies.append(proxy)
            table.fallback = proxy
        self._health = services.health
        self._health.set_serving(node.unready is None)
        base = _limits(EXTERNAL_LIMITS, config, config.external_streams_max)
        tls = None if self._tls is None else self._tls.clients
        self._servers = [
            GrpcServer(
                self._asked(each),
                limits=listener_limits(config, base, management=each is services.management),
                external=True,
                tls=tls,
            )
            for each in (services.external, services.management)
            if each is not None
        ]
        return services.external

    def _set_dataplane(self, dataplane: DataplaneConfig) -> None:
        """Calls that come from now on go by it."""
        for proxy in self._proxies:
            proxy.config = replace(proxy.config, dataplane_config=dataplane)
        if self._wired is not None:
            self._wired.configure(dataplane)

    async def _show_readiness(self, readiness: Readiness) -> None:
        while True:
            changed = readiness.changed
            self._health.set_serving(readiness.unready is None)
            await changed.wait()

    async def _stop(self, node: Node) -> None:
        config = self._config
        limit_s = max(1.0, config.shutdown_timeout_s - STOP_RESERVE_S)
        self._health.set_serving(False)
        heard_s = anyio.current_time() + config.stop_listens_s
        with anyio.move_on_after(limit_s) as everything:
            await node.drain(limit_s * DRAIN_SHARE)
            if node.parts.members.able_count:
                await anyio.sleep_until(heard_s)
            left_s = everything.deadline - anyio.current_time()
            grace_s = min(config.drain_timeout_s, max(0.0, left_s))
            if self._wired is not None:
                await self._wired.drain((*self._servers, self._peer_server), grace_s)
            else:
                async with anyio.create_task_group() as group:
                    for server in (*self._servers, self._peer_server):
                        group.start_soon(server.stop, grace_s)
        logger.info("stopped serving")

    async def _close(self) -> None:
        with anyio.move_on_after(self._config.close_timeout_s, shield=True):
            await self._peer_server.stop(0)
            if self._wired is not None:
                await self._wired.close()
            await self._channels.close()
            if self._serving_channel is not None:
                await self._serving_channel.close()
            await self._runtime.close()


def _begin_wire(config: Config, tls: Tls | None) -> Wired:
    # Not at the top of the file: the Python data plane does without the extension.
    try:
        from mm.edge.wired import Wired
    except ImportError as exc:
        raise StartupError(
            "MM_DATAPLANE=wire, the default, needs the extension mm.wire._wire, which does not"
            f" load: {exc}; build it (`make develop`), have libnghttp2 (Debian: apt-get install"
            " libnghttp2-14), or set MM_DATAPLANE=python, which needs neither"
        ) from exc
    if IMPLEMENTATION == "python":
        raise StartupError(
            "MM_DATAPLANE=wire, the default, reads the table of the extension mm._lru, and this"
            " process has the one in Python: unset MM_TABLE and build the extension"
            " (`make develop`), or set MM_DATAPLANE=python"
        )
    return Wired(config, tls)


async def _starting(_call: IncomingCall) -> None:
    error = NoRoomError("this instance is still starting")
    error.hop_result = "draining"
    raise error


def _first_startup_error(group: BaseExceptionGroup[BaseException]) -> StartupError | None:
    """A start that failed is one plain error, whatever was cancelled with it."""
    found = group.subgroup(StartupError)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]  # type: ignore[assignment]
    rest = group.subgroup(lambda exc: not isinstance(exc, StartupError))
    return found if rest is None else None


def _limits(limits: TransportLimits, config: Config, streams_max: int) -> TransportLimits:
    """What the configuration says of a listener or channel, on top of its kind's limits."""
    return replace(
        limits,
        message_bytes_max=config.message_bytes_max,
        header_list_bytes_max=max(config.headers_bytes_max, limits.header_list_bytes_max)
        if limits is not EXTERNAL_LIMITS
        else config.headers_bytes_max,
        streams_max=streams_max,
        greeting_s=config.tls_handshake_s,
    )

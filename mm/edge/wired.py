"""The wire in a process: its listeners, the two servers behind it, and what it is kept told of.

Owns the seam between ``mm.wire`` and the rest: tier 2's servers get their calls through
socketpairs, and whatever the threads go by is brought up to date from here. How calls move is
``mm.wire``'s; what a spliced or replayed call means is ``mm.edge.proxy``'s.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

import anyio

from mm.config import Config
from mm.core.access import Access, role_of_own
from mm.core.dataplane import DataplaneConfig
from mm.core.dynamic_settings import LOG_EACH, Value
from mm.core.ids import InstanceId, ModelId
from mm.core.records import VModelRecord
from mm.edge.binding import Listener
from mm.edge.h2.listening import listening_socket
from mm.edge.h2.server import GrpcServer
from mm.edge.h2.tls import HandshakeCounts
from mm.edge.unary import ServiceTable
from mm.edge.wire_access import wire_access
from mm.edge.wire_calls import WireCalls, measures_of
from mm.edge.wire_client_limits import client_limits
from mm.edge.wire_complaints import WireComplaints
from mm.edge.wire_peers import PeerTargets, resolve_sockaddr
from mm.edge.wire_words import hear, read_tried
from mm.endpoints import Endpoint, UnixEndpoint
from mm.mesh.concurrency import CallLimits
from mm.mesh.ports import RuntimeParameters
from mm.table import Table
from mm.wire import Method, MethodFlag, Role, Wire, WireSettings, WireStatistics, WireTls
from mm.wire.addresses import Target, unix_sockaddr

if TYPE_CHECKING:
    from mm.edge.tls import Contexts, Tls
    from mm.mesh.node import Node

#: After GOAWAY, calls that were on their way to us are in.
_DRAIN_NOTICE_S = 0.25
#: Between two looks whether all calls have ended.
_LOOK_S = 0.02
#: For the last answers to leave: as long as the servers give theirs.
_LAST_WORDS_S = 1.0
#: How busy copies are is looked at as often as may be told, and more seldom with many of them, so
#: that it takes a twentieth of a core at most: a look at one takes half a microsecond.
_LOOK_AT_EACH_S = 1e-5


class Tier2:
    """Connects the wire's threads with the servers that stand behind its listeners."""

    def __init__(self, servers: dict[Role, GrpcServer]) -> None:
        self.servers = servers
        self._adopting: set[asyncio.Task[None]] = set()

    def connect(self, role: Role, _own: bool) -> socket.socket:
        """Answer a connected socket at whose other end the server of a listener is.

        The mesh's own services have connections of their own, so that they do not stand in line
        with the calls that wait for models.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        task = asyncio.get_running_loop().create_task(self.servers[role].adopt(ours))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)
        return theirs


class _Front:
    """A listener of the wire, before a server."""

    def __init__(self, wire: Wire, tier2: Tier2, server: GrpcServer) -> None:
        self._wire, self._tier2, self._server = wire, tier2, server

    async def start(self, host: str, port: int) -> int:
        """Listen, and answer the port. Raises ``OSError``."""
        listener = listening_socket(host, port)
        role = Role.EXTERNAL if self._server.external else Role.PEER
        self._tier2.servers[role] = self._server
        self._wire.listen(listener, role)
        return int(listener.getsockname()[1])


class Wired:
    """The wire of one instance, from its first listener to its end."""

    def __init__(self, config: Config, tls: Tls | None = None) -> None:
        self._config = config
        self._tls = WireTls()
        if tls is not None:
            self._tls = self._tls_of(tls.contexts)
            tls.on_exchange.append(self._exchange)
            tls.other_counts = self._handshakes
        self._access: Access | None = None
        self._dataplane = config.dataplane_config
        self._services: list[ServiceTable] = []
        self._parameters: RuntimeParameters | None = None
        self._table: Table | None = None
        self._limits: CallLimits | None = None
        #: By model, calls that took a slot without waiting, as far as they are counted.
        self._slots_taken: dict[str, int] = {}
        self._tier2 = Tier2({})
        self._peers_changed = asyncio.Event()
        self._peers_called = asyncio.Event()
        self._attempts_failed = asyncio.Event()
        self._node: Node | None = None
        self._counted = (0, 0)
        self._logs_each = config.logs.each_invoke
        self._wire = Wire(config.wire_threads, self._tier2.connect, measures_of(config))
        self._complaints = WireComplaints(self._wire)
        self.calls = WireCalls(self._wire.calls)
        self._wire.start(self._settings())
        asyncio.get_running_loop().add_reader(self._wire.notice_fd, self._noticed)

    def _noticed(self) -> None:
        self._wire.mend()
        self._peers_called.set()
        self._attempts_failed.set()
        if self._limits is not None:
            self._limits.look()

    @property
    def is_following(self) -> bool:
        """Whether the threads know what is served: before, clients would be told nonsense."""
        return bool(self._services)

    def before(self, server: GrpcServer) -> Listener:
        """Answer what listens in the place of a server."""
        here = self._tls.clients if server.external else self._tls.peers
        assert (here is None) == (server.tls is None), "the threads have to speak what was asked"
        return _Front(self._wire, self._tier2, server)

    # --- what the threads go by ----------------------------------------------------------------

    @asynccontextmanager
    async def following(
        self,
        node: Node,
        services: Iterable[ServiceTable],
        serving: Endpoint,
    ) -> AsyncIterator[None]:
        """Let calls be served from the table of a node that runs; keep up with its changes.

        Whatever goes wrong in that is a bug, and ends whoever is within.
        """
        self._node = node
        self._parameters = node.parts.parameters
        self._services = list(services)
        parts = node.parts
        self._table = parts.copies.table
        self._limits = parts.copies.call_limits
        if self._limits is not None:
            self._limits.in_flight = self._table.in_flight
        self._wire.set_runtime(await _target_of(serving, self._config.instance_id))
        parts.members.on_reach = self._peers_changed.set
        # What the wire begins and ends changes what the peers of tier 2's calls have to hear, too.
        parts.pusher.on_peer_call = self._peers_called.set
        self._peers_changed.set()
        parts.vmodels.listen(self._vmodel_changed)
        for vmodel_id in list(parts.vmodels.mirror):
            self._vmodel_changed(vmodel_id, parts.vmodels.get(vmodel_id))
        node.on_read = self._fold
        parts.dynamic.follow(LOG_EACH, self._set_logs_each)
        self.configure(self._dataplane)
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow_peers)
            group.start_soon(self._watch_peers)
            group.start_soon(self._report_loads)
            group.start_soon(self._hear_failures)
            yield
            group.cancel_scope.cancel()

    def configure(self, dataplane: DataplaneConfig) -> None:
        """Go by this data-plane configuration: calls that come from now on."""
        self._dataplane = dataplane
        self._wire.configure(self._settings())

    def admit(self, access: Access) -> None:
        """Go by who may do what: calls that begin from now on."""
        self._access = access
        self._wire.configure(self._settings())

    def _exchange(self, contexts: Contexts) -> None:
        """Go by new files of TLS: connections that come from now on."""
        self._tls = self._tls_of(contexts)
        self._wire.configure(self._settings())

    def _tls_of(self, contexts: Contexts) -> WireTls:
        handshake_ms = round(1000 * self._config.tls_handshake_s)
        return WireTls(contexts.clients, contexts.peers, contexts.to_peers, handshake_ms)

    def _handshakes(self) -> HandshakeCounts:
        now = self._wire.statistics()
        return HandshakeCounts(now.handshakes, now.handshakes_failed, now.handshakes_late)

    def _set_logs_each(self, value: Value | None) -> None:
        """A line for each call is tier 2's to write."""
        self._logs_each = self._config.logs.each_invoke if value is None else bool(value)
        self._wire.configure(self._settings())

    def _settings(self) -> WireSettings:
        config = self._config
        runtime = self._parameters.methods if self._parameters is not None else {}
        refused = MethodFlag(0)
        if runtime and not (self._parameters and self._parameters.allow_any_method):
            refused = MethodFlag.REFUSED_HERE
        denied = MethodFlag(0) if self._dataplane.allow_other_rpcs else MethodFlag.DENIED
        methods: dict[bytes, Method] = {}
        for name in {*self._dataplane.rpcs, *runtime}:
            flags = MethodFlag(0) if name in runtime else refused
            rpc = self._dataplane.rpcs.get(name)
            if rpc is None:
                flags |= denied
            elif rpc.is_vmodel_id:
                flags |= MethodFlag.EXTRACTS_VMODEL
            extraction_path = () if rpc is None else rpc.id_extraction_path
            methods[b"/" + name.encode()] = Method(flags, runtime.get(name, ()), extraction_path)
        others = Method(denied | refused)
        self._mark_observed(methods, others)
        others = Method(others.flags | self._observed_flag(None))
        for service in self._services:
            for path, yields_to_ids in service.paths():
                own = MethodFlag.OWN_UNLESS_ID if yields_to_ids else MethodFlag.OWN
                found = methods.get(path, others)
                # Of what peers alone are served, nothing is said to clients.
                needs = role_of_own(path) if service is self._services[0] else found.needs
                methods[path] = replace(found, flags=found.flags | own, needs=needs)
        return WireSettings(
            table=self._table,
            methods=methods,
            others=others,
            header_bytes_max=config.headers_bytes_max,
            message_bytes_max=config.message_bytes_max,
            kept_bytes_max=config.retry_buffer_bytes_max,
            external_streams_max=config.external_streams_max,
            peer_streams_max=config.peer_streams_max,
            held_bytes_max=config.connections.buffer_bytes_max // 4,
            buffer_bytes_max=config.connections.buffer_bytes_max,
            clients=client_limits(config),
            peer_connections_max=config.peer_connections_max,
            leaves_here=self._logs_each,
            has_slots=self._limits is not None,
            observed_models=self._observed_models(),
            instance=quote(config.instance_id, safe="").encode(),
            access=wire_access(self._access),
            tls=self._tls,
        )

    def _observed_models(self) -> frozenset[bytes] | None:
        models = self._config.payloads.models
        return None if models is None else frozenset(each.encode() for each in models)

    def _observed_flag(self, name: str | None) -> MethodFlag:
        """Of a method, or of those that nobody has listed; whether it really is seen, tier 2 says.

        By its last part alone a method may be called in any service.
        """
        sinks = self._config.payloads.sinks
        if name is None:
            is_seen = any(sink.method is None or "/" not in sink.method for sink in sinks)
        else:
            is_seen = any(sink.wants_method(name) for sink in sinks)
        return MethodFlag.OBSERVED if is_seen else MethodFlag(0)

    def _mark_observed(self, methods: dict[bytes, Method], others: Method) -> None:
        named = {sink.method for sink in self._config.payloads.sinks if sink.method is not None}
        for path in {b"/" + name.encode() for name in named if "/" in name} - methods.keys():
            methods[path] = others
        for path, method in methods.items():
            flag = self._observed_flag(path[1:].decode())
            methods[path] = replace(method, flags=method.flags | flag)

    def _vmodel_changed(self, vmodel_id: str, record: VModelRecord | None) -> None:
        assert self._table is not None
        if record is None or not record.active_model_id:
            self._table.remove_alias(vmodel_id)
        else:
            self._table.set_alias(vmodel_id, record.active_model_id)

    async def _follow_peers(self) -> None:
        assert self._node is not None
        members = self._node.parts.members
        peers = PeerTargets(self._peers_changed.set)
        async with anyio.create_task_group() as group:
            while True:
                await self._peers_changed.wait()
                self._peers_changed.clear()
                self._wire.set_peers(peers.targets(members.callable_now(), group))

    async def _watch_peers(self) -> None:
        """Tell of instances that have calls of the wire, so that silent ones are noticed."""
        assert self._node is not None
        parts = self._node.parts
        members = parts.members
        before: dict[int, int] = {}
        while True:
            names = {handle: parts.members.name_of(handle) for handle, *_ in members.callable_now()}
            traffic = self._wire.peer_traffic(names)
            in_flight = {name: traffic[each][0] for each, name in names.items() if name}
            now = {each: answers for each, (_, answers) in traffic.items()}
            answered = [
                name
                for each, name in names.items()
                if name and now[each] != before.get(each, now[each])
            ]
            parts.sentinel.told(in_flight, answered)
            before = now
            self._complaints.look()
            await asyncio.sleep(self._config.peer_look_s)

    async def _report_loads(self) -> None:
        """Have peers told how busy the copies are that they call here, between replies too."""
        assert self._node is not None
        pusher, least_s = self._node.parts.pusher, self._config.load_push_interval_min_s
        while True:
            await self._peers_called.wait()
            self._peers_called.clear()
            goes_on = True
            while goes_on:
                for each in self._wire.take_reports():
                    sender = InstanceId(each.sender)
                    pusher.heard(ModelId(each.model_id), sender, each.told, each.service_s)
                goes_on = pusher.look(asyncio.get_running_loop().time())
                if goes_on:
                    await asyncio.sleep(max(least_s, len(pusher.watched) * _LOOK_AT_EACH_S))

    async def _hear_failures(self) -> None:
        """Weigh what attempts came to that the threads made for calls that cannot be sent again."""
        assert self._node is not None
        router = self._node.parts.router
        while True:
            await self._attempts_failed.wait()
            self._attempts_failed.clear()
            for headers in self._wire.take_failures():
                tried = read_tried(headers)
                assert tried is not None, headers
                hear(router, tried)

    def _fold(self) -> int:
        """Bring the counters of the instance up to date; answers the hits under way."""
        assert self._node is not None
        counters = self._node.parts.counters
        now = self._wire.statistics()
        here, there = self._counted
        counters.calls += now.calls_here - here
        counters.hits += now.calls_here - here
        counters.forwards += now.calls_there - there
        counters.calls_by_wire += now.calls_here - here + now.calls_there - there
        self._counted = (now.calls_here, now.calls_there)
        if self._limits is not None:
            self._fold_slots()
        return now.hits_open

    def _fold_slots(self) -> None:
        """Measure the waits of calls to which a thread gave a slot: they had none."""
        assert self._node is not None
        taken: dict[str, int] = {}
        for each in self._wire.calls():
            count = sum(each.invoked_us.counts)
            taken[each.model_id] = taken.get(each.model_id, 0) + count
        waits = self._node.parts.measures.slot_wait_ms
        for model_id, count in taken.items():
            before = self._slots_taken.get(model_id, 0)
            # Fewer than before: a row was given up, and began anew.
            more = count - before if count >= before else count
            if more:
                waits.observe(0, ModelId(model_id), more)
        self._slots_taken = taken

    def statistics(self) -> WireStatistics:
        """Answer what the threads counted since the start."""
        return self._wire.statistics()

    # --- the end -------------------------------------------------------------------------------

    async def drain(self, servers: Iterable[GrpcServer], grace_s: float) -> None:
        """Take no more calls, let those that run finish within ``grace_s``."""
        servers = list(servers)
        now_s = asyncio.get_running_loop().time
        deadline_s = now_s() + grace_s
        self._wire.drain()
        await asyncio.sleep(min(_DRAIN_NOTICE_S, grace_s))
        for server in servers:
            for link in list(server.links):
                server.end_watches(link)
        # Before the servers stop: until then a call may need them, and from then on the wire's
        # connections to them that end are not made anew.
        await self._wait_idle(deadline_s)
        asyncio.get_running_loop().remove_reader(self._wire.notice_fd)
        self._wire.end_calls()
        left_s = max(0.0, deadline_s - now_s())
        await asyncio.gather(*(server.stop(left_s) for server in servers))
        # What the clients of calls that were given up are told is on its way to them.
        await self._wait_idle(now_s() + _LAST_WORDS_S)

    async def _wait_idle(self, until_s: float) -> None:
        """Wait until no call is under way, but not longer than this."""
        while self._wire.statistics().calls_open:
            if asyncio.get_running_loop().time() >= until_s:
                return
            await asyncio.sleep(_LOOK_S)

    async def close(self) -> None:
        """End the threads."""
        asyncio.get_running_loop().remove_reader(self._wire.notice_fd)
        await asyncio.to_thread(self._wire.close)


async def _target_of(endpoint: Endpoint, beside: str) -> Target:
    label = str(endpoint)
    if isinstance(endpoint, UnixEndpoint):
        return Target("localhost", unix_sockaddr(endpoint.path), label=label, instance=beside)
    return Target(label, await resolve_sockaddr(label), instance=beside)

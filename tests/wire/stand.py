"""What the wire's tests stand on: real threads of it between foreign clients, runtimes and tier 2.

The runtime is grpcio, tier 2 the servers there are with a scripted router behind them. Where a call
went is told by the wire's own counters.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import grpc
import grpc.aio

from mm.core.calls import Call, Hop, Outcome, PeerRoute, Route
from mm.core.ids import InstanceId, ModelId
from mm.edge.h2 import (
    EXTERNAL_LIMITS,
    PEER_LIMITS,
    RUNTIME_LIMITS,
    Channel,
    ChannelPool,
    GrpcServer,
)
from mm.edge.h2.listening import listening_socket
from mm.edge.proxy import Proxy
from mm.edge.wire_calls import measures_of
from mm.edge.wire_words import hear, read_tried
from mm.edge.wired import Tier2
from mm.table import CopyState, Table
from mm.wire import Role, Wire, WireSettings, WireStatistics
from mm.wire.addresses import Target, inet_sockaddr
from tests.edge.upstream import PATIENCE_S, FakeRouter, FakeRuntime, make_config, serve_runtime

LOAD_ID = 7


class WireRouter(FakeRouter):
    """Hears of the wire's own attempts, too."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.tried_routes: list[tuple[Route, Outcome, str]] = []
        self.tries_again: list[bool] = []

    def tried(self, call: Call, route: Route, outcome: Outcome, message: str) -> bool:
        self.tried_routes.append((route, outcome, message))
        return self.tries_again.pop(0) if self.tries_again else True

    def route_there(self, model_id: ModelId, handle: int, *, may_redirect: bool) -> PeerRoute:
        name = InstanceId(str(self.table.instance_of(handle)))
        return PeerRoute(model_id, name, "", Hop.HIT_ONLY, may_redirect=may_redirect)


@dataclass
class WireStand:
    """A wire, and everything around it."""

    wire: Wire
    table: Table
    router: WireRouter
    runtime: FakeRuntime
    port: int
    settings: WireSettings
    tier2_servers: dict[Role, GrpcServer]
    addresses: list[str] = field(default_factory=list)

    def client(self, **options: Any) -> grpc.aio.Channel:
        settings = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        settings += options.pop("options", [])
        address = f"127.0.0.1:{self.port}"
        return grpc.aio.insecure_channel(address, options=settings, **options)

    @property
    def counts(self) -> WireStatistics:
        return self.wire.statistics()

    def put(self, model_id: str) -> None:
        """A copy of a model that serves calls."""
        self.table.put(model_id, 1, 1)
        self.table.set_flags(model_id, LOAD_ID << 8)
        self.table.set_state(model_id, CopyState.READY)

    def add_peer(self, model_id: str, port: int, name: str = "peer") -> int:
        """A copy of a model at another instance."""
        handle = self.table.add_instance(name)
        self.table.set_peers(model_id, [*self.table.peers(model_id), handle])
        address = inet_sockaddr("127.0.0.1", port)
        self.wire.set_peers([Target(f"127.0.0.1:{port}", address, handle, instance=name)])
        return handle

    def noticed(self) -> None:
        """Do what ``Wired`` does when a thread has news."""
        self.wire.mend()
        for headers in self.wire.take_failures():
            tried = read_tried(headers)
            assert tried is not None
            hear(self.router, tried)

    def configure(self, **values: Any) -> None:
        self.settings = replace(self.settings, **values)
        self.wire.configure(self.settings)

    async def settle(self, **counts: int) -> None:
        """Wait until the wire has counted so much."""
        await until(lambda: all(getattr(self.counts, k) == v for k, v in counts.items()))


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition of another thread's making."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.wait((asyncio.get_running_loop().create_future(),), timeout=0.005)


@asynccontextmanager
async def serve_wire(
    *,
    role: Role = Role.EXTERNAL,
    runtime_port: int | None = None,
    threads: int = 1,
    models_max: int = 0,
    socket_bytes: int | None = None,
    **config: Any,
) -> AsyncIterator[WireStand]:
    """A runtime and a wire before it; model "m" is ready here.

    ``socket_bytes`` is what the kernel keeps for a client; None: more and more, as it likes.
    """
    external = role is Role.EXTERNAL
    table = Table(1000)
    router = WireRouter(table)
    peers = ChannelPool(PEER_LIMITS)
    async with serve_runtime() as runtime:
        channel = Channel(f"127.0.0.1:{runtime.port}", RUNTIME_LIMITS)
        proxy = Proxy(
            router, runtime=channel, peers=peers, config=make_config(**config), external=external
        )
        limits = EXTERNAL_LIMITS if external else PEER_LIMITS
        server = GrpcServer(proxy, limits=limits, external=external)
        tier2 = Tier2({role: server})
        measures = measures_of(make_config(**config))
        assert measures is not None
        wire = Wire(threads, tier2.connect, replace(measures, models_max=models_max))
        settings = WireSettings(table=table, instance=b"me", **_wire_settings(config))
        wire.start(settings)
        listener = listening_socket("127.0.0.1", 0)
        if socket_bytes is not None:  # accepted ones inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, socket_bytes)
        wire.listen(listener, role)
        port = listener.getsockname()[1]
        runtime_port = runtime_port or runtime.port
        address = inet_sockaddr("127.0.0.1", runtime_port)
        wire.set_runtime(Target(f"127.0.0.1:{runtime_port}", address, instance="me"))
        stand = WireStand(wire, table, router, runtime, port, settings, tier2.servers)
        stand.put("m")
        asyncio.get_running_loop().add_reader(wire.notice_fd, stand.noticed)
        try:
            yield stand
        finally:
            asyncio.get_running_loop().remove_reader(wire.notice_fd)
            await asyncio.to_thread(wire.close)
            await server.stop(0)
            await channel.close()
            await peers.close()
            assert table.in_flight("m") == 0
            counts = wire.statistics()
            told = {field.name: getattr(counts, field.name) for field in fields(counts)}
            reasons = {
                kind: sum(count for name, count in told.items() if name.startswith(kind))
                for kind in ("left_", "again_")
            }
            assert reasons == {"left_": counts.spliced_model, "again_": counts.replayed}
            once = (
                counts.calls_here, counts.calls_there, counts.spliced_model, counts.spliced_own,
            )  # fmt: skip
            assert sum(once) <= counts.calls, "those that were refused or given up are in none"
            table.check_invariants()


def _wire_settings(config: dict[str, Any]) -> dict[str, Any]:
    names = {"message_bytes_max": "message_bytes_max", "retry_buffer_bytes_max": "kept_bytes_max"}
    return {wire: config[name] for name, wire in names.items() if name in config}

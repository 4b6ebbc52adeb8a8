"""What the proxy's tests stand between: a scripted router and foreign gRPC peers (grpcio)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio

from mm.config import Config
from mm.core.calls import Call, Hop, LocalRoute, Outcome, PeerRoute, Route
from mm.core.ids import InstanceId, ModelId
from mm.edge.h2 import (
    EXTERNAL_LIMITS,
    PEER_LIMITS,
    RUNTIME_LIMITS,
    Channel,
    ChannelPool,
    GrpcServer,
    TransportLimits,
)
from mm.edge.proxy import Proxy
from mm.errors import MeshError, ModelNotFoundError, StatusCode, WaitersFullError

#: Far above what anything here takes, far below pytest's own time limit.
#: Ends what hangs; no test asserts how fast anything is by it.
PATIENCE_S = 60.0


class FakeRouter:
    """Answers what the test says, remembers what it is told.

    ``answers`` are used up one a question (a route, an error, or an event to wait for first);
    after that every call goes to the runtime. ``again`` likewise for ``finished``; default False.
    """

    def __init__(self) -> None:
        self.answers: list[Route | MeshError | asyncio.Event] = []
        self.again: list[bool] = []
        self.calls: list[Call] = []
        self.finishes: list[tuple[Outcome, str]] = []
        self.finished_event = asyncio.Event()
        self.injection_path: tuple[int, ...] = ()
        self.vmodels: dict[str, str] = {}
        self.unknown: set[str] = set()
        self.load = 3
        self.loads: list[int] = []
        self.states: list[str] = []
        self.waiting = 0
        #: The calls themselves that waited, as they change.
        self.waits: list[Call] = []
        self.waiting_bytes_max = 2**30
        self.waiting_event = asyncio.Event()

    async def route(self, call: Call) -> Route:
        self.calls.append(replace(call))
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, asyncio.Event):
            self._set_waiting(1)
            call.waits = True
            self.waits.append(call)
            try:
                await answer.wait()
            finally:
                call.waits = False
                self._set_waiting(-1)
            answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, MeshError):
            raise answer
        if call.model_id in self.unknown:
            raise ModelNotFoundError
        assert not isinstance(answer, asyncio.Event)
        if isinstance(answer, PeerRoute) and answer.may_wait:
            call.waits = True
            self.waits.append(call)
            self._set_waiting(1)
        return answer or LocalRoute(call.model_id, self.injection_path)

    def finished(self, call: Call, route: Route, outcome: Outcome, message: str = "") -> bool:
        self.answer_began(call)
        if outcome is Outcome.NO_MODEL:
            call.failure = ModelNotFoundError(message)
        self.finishes.append((outcome, message))
        self.finished_event.set()
        return self.again.pop(0) if self.again else False

    def request_grew(self, call: Call, size_bytes: int) -> None:
        if call.request_bytes + size_bytes > self.waiting_bytes_max:
            raise WaitersFullError("too many bytes wait")
        call.request_bytes += size_bytes
        self.waiting_event.set()

    def request_passed_on(self, call: Call) -> None:
        call.request_bytes = 0
        self.waiting_event.set()

    def answer_began(self, call: Call) -> None:
        if call.waits:
            call.waits = False
            self._set_waiting(-1)

    async def resolve(
        self, vmodel_id: str, missing: Collection[ModelId] = (), *, fresh: bool = False
    ) -> ModelId:
        """A vmodel "v" that is "a b" was "a" until that turned out to be missing, and then "b"."""
        if vmodel_id not in self.vmodels:
            raise ModelNotFoundError("vmodel not found")
        for model_id in self.vmodels[vmodel_id].split():
            if model_id not in missing:
                return ModelId(model_id)
        raise MeshError(f"nothing left of {vmodel_id}", code=StatusCode.INTERNAL)

    def report_state(self, call: Call, route: PeerRoute, state: str) -> None:
        self.states.append(state)

    def report_load(self, route: PeerRoute, in_flight: int) -> None:
        self.loads.append(in_flight)

    def tell_load(self, call: Call) -> int:
        return self.load

    def _set_waiting(self, change: int) -> None:
        self.waiting += change
        self.waiting_event.set()

    async def wait_waiting(self, count: int) -> None:
        """Wait until so many calls wait for an answer of this router."""
        while self.waiting != count:
            self.waiting_event.clear()
            await asyncio.wait_for(self.waiting_event.wait(), PATIENCE_S)

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for outcome, _ in self.finishes]

    async def wait_finished(self, count: int) -> None:
        while len(self.finishes) < count:
            self.finished_event.clear()
            await asyncio.wait_for(self.finished_event.wait(), PATIENCE_S)


class FakeRuntime(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A grpcio server of raw bytes. ``/t.S/<kind>...`` is echoed by kind; others are scripted."""

    def __init__(self) -> None:
        self.server: grpc.aio.Server
        self.port = 0
        self.metadata: list[list[tuple[str, str | bytes]]] = []
        self.requests: list[bytes] = []
        self.scripts: dict[str, Callable[[bytes, Any], Any]] = {}
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()
        self.remaining_s: list[float | None] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = details.method.rpartition("/")[2]
        if name in self.scripts:
            return grpc.unary_unary_rpc_method_handler(self._scripted(self.scripts[name]))
        makers = {
            "Unary": (grpc.unary_unary_rpc_method_handler, self._unary),
            "Up": (grpc.stream_unary_rpc_method_handler, self._up),
            "Down": (grpc.unary_stream_rpc_method_handler, self._down),
            "Both": (grpc.stream_stream_rpc_method_handler, self._both),
            "Hang": (grpc.unary_unary_rpc_method_handler, self._hang),
        }
        make, method = makers[name]
        return make(method)

    def _note(self, context: grpc.aio.ServicerContext) -> None:
        self.metadata.append([tuple(item) for item in context.invocation_metadata() or ()])
        self.remaining_s.append(context.time_remaining())

    def _scripted(self, script: Callable[[bytes, Any], Any]) -> Any:
        async def method(request: bytes, context: Any) -> Any:
            self._note(context)
            self.requests.append(request)
            return await script(request, context)

        return method

    async def _unary(self, request: bytes, context: Any) -> bytes:
        self._note(context)
        self.requests.append(request)
        return b"echo:" + request

    async def _up(self, requests: Any, context: Any) -> bytes:
        self._note(context)
        return b"|".join([request async for request in requests])

    async def _down(self, request: bytes, context: Any) -> Any:
        self._note(context)
        for number in range(int(request)):
            yield b"%d" % number

    async def _both(self, requests: Any, context: Any) -> Any:
        self._note(context)
        async for request in requests:
            yield b"re:" + request

    async def _hang(self, request: bytes, context: Any) -> bytes:
        self._note(context)
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""


@dataclass
class Stand:
    """A proxy between a client's channel and a runtime."""

    router: FakeRouter
    runtime: FakeRuntime
    proxy: Proxy
    server: GrpcServer
    port: int
    channel: Channel
    peers: ChannelPool
    address: str = field(init=False)

    def __post_init__(self) -> None:
        self.address = f"127.0.0.1:{self.port}"

    def client(self, **options: Any) -> grpc.aio.Channel:
        settings = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        settings += options.pop("options", [])
        return grpc.aio.insecure_channel(self.address, options=settings, **options)

    def peer_route(self, model_id: str, **values: Any) -> Any:
        values.setdefault("hop", Hop.HIT_ONLY)
        values.setdefault("address", self.address)
        return PeerRoute(ModelId(model_id), InstanceId("peer"), **values)


def make_config(**values: Any) -> Config:
    values.setdefault("service_name", "test")
    values.setdefault("kv_store", "memory")
    values.setdefault("instance_id", InstanceId("me"))
    return Config(**values)


@asynccontextmanager
async def serve_runtime(path: str | None = None) -> AsyncIterator[FakeRuntime]:
    runtime = FakeRuntime()
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    runtime.server = grpc.aio.server(options=options)
    runtime.server.add_generic_rpc_handlers((runtime,))
    if path is None:
        runtime.port = runtime.server.add_insecure_port("127.0.0.1:0")
    else:
        runtime.server.add_insecure_port(f"unix:{path}")
    await runtime.server.start()
    try:
        yield runtime
    finally:
        await runtime.server.stop(None)


@asynccontextmanager
async def serve_proxy(
    *,
    external: bool = True,
    runtime_address: str | None = None,
    limits: TransportLimits | None = None,
    runtime_limits: TransportLimits = RUNTIME_LIMITS,
    **config: Any,
) -> AsyncIterator[Stand]:
    """A runtime and a proxy before it, on sockets of loopback."""
    router = FakeRouter()
    peers = ChannelPool(PEER_LIMITS)
    async with serve_runtime() as runtime:
        channel = Channel(runtime_address or f"127.0.0.1:{runtime.port}", runtime_limits)
        proxy = Proxy(
            router, runtime=channel, peers=peers, config=make_config(**config), external=external
        )
        limits = limits or (EXTERNAL_LIMITS if external else PEER_LIMITS)
        server = GrpcServer(proxy, limits=limits, external=external)
        port = await server.start("127.0.0.1", 0)
        stand = Stand(router, runtime, proxy, server, port, channel, peers)
        try:
            yield stand
        finally:
            await server.stop(0)
            await channel.close()
            await peers.close()

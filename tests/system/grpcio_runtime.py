"""A model runtime on grpcio's server, in the test's own process: it tells what it saw.

A runtime of the kind that others have: not on ``mm.runtime``, not on grpclib. What it says and does
is public attributes, for tests of runtimes that talk nonsense or are slow.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import betterproto2
import grpc

from mm.pb import mmesh

MIB = 2**20
WAIT_S = 60.0
#: Calls that may be held at a time.
THREADS = 24


class Held:
    """A call that stays in the runtime until the test releases it or its client is gone."""

    def __init__(self, context: grpc.ServicerContext, path: str = "") -> None:
        self.context = context
        #: Of the model that is to be loaded.
        self.path = path
        self.ended = threading.Event()
        #: What was left of the client's time.
        self.time_left_s: float | None = context.time_remaining()
        self._over = threading.Event()
        if not context.add_callback(self._context_ended):
            self._context_ended()

    def _context_ended(self) -> None:
        self.ended.set()
        self._over.set()

    def release(self) -> None:
        """Let it answer."""
        self._over.set()

    def wait(self) -> None:
        """Block its thread; the bound is for a test that failed."""
        self._over.wait(2 * WAIT_S)


class GrpcioRuntime:
    """The SPI, and ``test.Runtime``: echo, hold and holdStream."""

    def __init__(self, address: str, compression: grpc.Compression | None = None) -> None:
        self.address = address
        self.status = mmesh.RuntimeStatusResponse(
            status=mmesh.RuntimeStatusResponseStatus.READY,
            capacity_in_bytes=1024 * MIB,
            max_loading_concurrency=4,
            model_loading_timeout_ms=30_000,
            default_model_size_in_bytes=MIB,
        )
        #: What loading and measuring answer, and what has to happen before a load does.
        self.loaded_size_bytes = MIB
        self.measured_size_bytes = MIB
        #: What loading tells, for a runtime whose status says ``limit_model_concurrency``.
        self.model_concurrency_max = 0
        self.before_load: Callable[[Held], None] = lambda held: None
        #: What has to happen before an unload; it may abort the call.
        self.before_unload: Callable[[grpc.ServicerContext], None] = lambda context: None
        #: Requests and calls in order of arrival.
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.measurements: list[str] = []
        self.unloaded: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.held: queue.SimpleQueue[Held] = queue.SimpleQueue()
        self._models: set[str] = set()
        self._server = grpc.server(ThreadPoolExecutor(THREADS), compression=compression)
        self._server.add_generic_rpc_handlers((self._management(), self._serving()))
        self.port = self._server.add_insecure_port(address)

    def _management(self) -> grpc.GenericRpcHandler:
        def method(
            call: Callable[..., betterproto2.Message], request_type: type[betterproto2.Message]
        ) -> grpc.RpcMethodHandler[Any, Any]:
            return grpc.unary_unary_rpc_method_handler(
                call, request_deserializer=request_type.parse, response_serializer=bytes
            )

        return grpc.method_handlers_generic_handler(
            "mmesh.ModelRuntime",
            {
                "runtimeStatus": method(self._status, mmesh.RuntimeStatusRequest),
                "loadModel": method(self._load, mmesh.LoadModelRequest),
                "unloadModel": method(self._unload, mmesh.UnloadModelRequest),
                "modelSize": method(self._model_size, mmesh.ModelSizeRequest),
            },
        )

    def _serving(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "test.Runtime",
            {
                "echo": grpc.unary_unary_rpc_method_handler(self._echo),
                "hold": grpc.unary_unary_rpc_method_handler(self._hold),
                "holdStream": grpc.stream_stream_rpc_method_handler(self._hold_stream),
            },
        )

    def _status(
        self, request: mmesh.RuntimeStatusRequest, context: grpc.ServicerContext
    ) -> mmesh.RuntimeStatusResponse:
        del request, context
        return self.status

    def _load(
        self, request: mmesh.LoadModelRequest, context: grpc.ServicerContext
    ) -> mmesh.LoadModelResponse:
        self.loads.append(request.model_id)
        held = Held(context, request.model_path)
        self.before_load(held)
        if not held.ended.is_set():
            self._models.add(request.model_id)
        return mmesh.LoadModelResponse(
            size_in_bytes=self.loaded_size_bytes, max_concurrency=self.model_concurrency_max
        )

    def _unload(
        self, request: mmesh.UnloadModelRequest, context: grpc.ServicerContext
    ) -> mmesh.UnloadModelResponse:
        self.unloads.append(request.model_id)
        self.before_unload(context)
        self.unloaded.put(request.model_id)
        self._models.discard(request.model_id)
        return mmesh.UnloadModelResponse()

    def _model_size(
        self, request: mmesh.ModelSizeRequest, context: grpc.ServicerContext
    ) -> mmesh.ModelSizeResponse:
        del context
        size_bytes = self.measured_size_bytes
        self.measurements.append(request.model_id)
        return mmesh.ModelSizeResponse(size_in_bytes=size_bytes)

    def _require_model(self, context: grpc.ServicerContext) -> None:
        ids = [value for key, value in context.invocation_metadata() if key == "mm-model-id"]
        if not ids or ids[0] not in self._models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"model {ids} is not loaded")

    def _echo(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._require_model(context)
        return request

    def _hold(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._require_model(context)
        held = Held(context)
        self.held.put(held)
        held.wait()
        return request

    def _hold_stream(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        self._require_model(context)
        yield next(requests)
        held = Held(context)
        self.held.put(held)
        held.wait()

    def next_held(self) -> Held:
        """Answer the next call that is here to be held."""
        return self.held.get(timeout=WAIT_S)


@contextmanager
def grpcio_runtime(
    address: str, compression: grpc.Compression | None = None
) -> Iterator[GrpcioRuntime]:
    """Serve it at a place of grpcio's: ``unix:PATH`` or ``HOST:PORT``."""
    runtime = GrpcioRuntime(address, compression)
    runtime._server.start()
    try:
        yield runtime
    finally:
        runtime._server.stop(None).wait(10)

"""A model server and its adapter, with the habits of those that stand in real pods (interop 4).

Two grpcio servers in the test's process, one for management and one for inference, as the pods have
them. They forget everything when their status is asked, tell no sizes beforehand, answer most
failures UNKNOWN, and know models by the ids that they were loaded with.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

import grpc

from mm.core.protobuf_ids import extract_id
from mm.pb import mmesh
from tests.pod import tables

Code = grpc.StatusCode
MODEL_BYTES: Final = 345_387
MEASURED_BYTES: Final = 5_000_000
_WAIT_S: Final = 60.0
#: The server itself has no such limit: the mesh has.
_UNLIMITED: Final = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


class Adapter:
    """What it was asked, and what it has; paths of models say how they load.

    ``missing`` cannot be pulled, ``broken`` cannot be loaded, ``held-NAME`` is loaded when the test
    says ``release``.
    """

    def __init__(self, runtime: tables.Runtime) -> None:
        self.runtime = runtime
        self.models: set[str] = set()
        #: Calls of the management service in their order: (method, model id).
        self.calls: list[tuple[str, str]] = []
        self.cancelled: list[str] = []
        #: How it says that it does not know a model.
        self.unknown: Callable[[str], tuple[Code, str]] = lambda model_id: (
            Code.NOT_FOUND,
            f"Model {model_id} with version  not found",
        )
        self.unload_code: Code | None = None
        self._held: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def count(self, method: str, model_id: str | None = None) -> int:
        """Answer how often a method was called, for one model or at all."""
        return sum(1 for call in self.calls if call[0] == method and model_id in (None, call[1]))

    def release(self, path: str) -> None:
        """Let loads of a path end."""
        self._event(path).set()

    def _event(self, path: str) -> threading.Event:
        with self._lock:
            return self._held.setdefault(path, threading.Event())

    # --- management ---

    def management(self) -> grpc.GenericRpcHandler:
        """Serve the SPI, without ``predictModelSize``: no adapter has it."""
        methods = {
            "runtimeStatus": (self._status, mmesh.RuntimeStatusRequest),
            "loadModel": (self._load, mmesh.LoadModelRequest),
            "unloadModel": (self._unload, mmesh.UnloadModelRequest),
            "predictModelSize": (self._predict_size, mmesh.PredictModelSizeRequest),
            "modelSize": (self._model_size, mmesh.ModelSizeRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._noted(name, call), request_deserializer=kind.parse, response_serializer=bytes
            )
            for name, (call, kind) in methods.items()
        }
        return grpc.method_handlers_generic_handler("mmesh.ModelRuntime", handlers)

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(request: Any, context: grpc.ServicerContext) -> Any:
            self.calls.append((name, getattr(request, "model_id", "")))
            return call(request, context)

        return noted

    def _status(self, request: Any, context: Any) -> mmesh.RuntimeStatusResponse:
        del request, context
        self.models.clear()
        return mmesh.RuntimeStatusResponse(
            status=mmesh.RuntimeStatusResponseStatus.READY,
            capacity_in_bytes=tables.CAPACITY_BYTES,
            max_loading_concurrency=4,
            model_loading_timeout_ms=tables.LOAD_TIMEOUT_MS,
            default_model_size_in_bytes=tables.DEFAULT_MODEL_BYTES,
            runtime_version="1.6.1",
            method_infos={
                name: mmesh.RuntimeStatusResponseMethodInfo(id_injection_path=list(path))
                for name, path in self.runtime.methods.items()
            },
        )

    def _load(self, request: mmesh.LoadModelRequest, context: Any) -> mmesh.LoadModelResponse:
        try:
            json.loads(request.model_key)
        except ValueError as exc:
            text = "Invalid modelKey in LoadModelRequest. Error processing JSON "
            context.abort(Code.UNKNOWN, f"{text}'{request.model_key}': {exc}")
        if request.model_path.startswith("missing"):
            text = "Failed to pull model from storage due to error: no such object"
            context.abort(Code.UNKNOWN, text)
        if request.model_path.startswith("broken"):
            said = "rpc error: code = Internal desc = builtins.ValueError: bad archive"
            text = f"Failed to load Model due to MLServer runtime error: {said}"
            context.abort(Code.INTERNAL, text)
        if request.model_path.startswith("held"):
            held = self._event(request.model_path)
            if not context.add_callback(held.set):
                held.set()
            held.wait(_WAIT_S)
            if not context.is_active():
                self.cancelled.append(request.model_id)
                # It had begun, and what it left has to be unloaded.
                return mmesh.LoadModelResponse()
        self.models.add(request.model_id)
        size_bytes = 0 if self.runtime.measures_sizes else MODEL_BYTES
        return mmesh.LoadModelResponse(size_in_bytes=size_bytes)

    def _unload(self, request: mmesh.UnloadModelRequest, context: Any) -> mmesh.UnloadModelResponse:
        self.models.discard(request.model_id)
        if self.unload_code is not None:
            context.abort(self.unload_code, f"no model {request.model_id}")
        return mmesh.UnloadModelResponse()

    def _predict_size(self, request: Any, context: Any) -> Any:
        del request
        context.abort(Code.UNIMPLEMENTED, "method PredictModelSize not implemented")

    def _model_size(self, request: mmesh.ModelSizeRequest, context: Any) -> mmesh.ModelSizeResponse:
        del request
        if not self.runtime.measures_sizes:
            context.abort(Code.UNIMPLEMENTED, "method ModelSize not implemented")
        return mmesh.ModelSizeResponse(size_in_bytes=MEASURED_BYTES)

    # --- inference ---

    def serving(self) -> grpc.GenericRpcHandler:
        """Serve every method there is, as bytes: those that the mesh should not let through too."""
        return _Everything(self)

    def infer(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer the request, behind the id under which it came: what the tests look at."""
        path = self.runtime.methods.get(method.lstrip("/"), [1])
        model_id = extract_id(request, path) or ""
        if model_id not in self.models:
            context.abort(*self.unknown(model_id))
        if b"bad-input" in request:
            context.abort(Code.INTERNAL, "builtins.ValueError: cannot reshape array")
        if b"bad-shape" in request:
            context.abort(Code.INVALID_ARGUMENT, "Invalid number of shape dimensions")
        if b"test:unavailable" in request:
            context.abort(Code.UNAVAILABLE, "out of order")
        if b"answer-large" in request:
            return bytes(8 * 2**20)
        return model_id.encode() + b"\n" + request


class _Everything(grpc.GenericRpcHandler):
    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            return self._adapter.infer(method, request, context)

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def serving(adapter: Adapter, management: str, data: str) -> Iterator[tuple[int, int]]:
    """Serve it at two places of grpcio's; answers their ports, where they are ports."""
    servers = []
    ports = []
    try:
        for place, handler in ((management, adapter.management()), (data, adapter.serving())):
            server = grpc.server(ThreadPoolExecutor(16), options=_UNLIMITED)
            server.add_generic_rpc_handlers((handler,))
            ports.append(server.add_insecure_port(place))
            server.start()
            servers.append(server)
        yield ports[0], ports[1]
    finally:
        for server in servers:
            server.stop(None).wait(10)

"""Runtimes with the habits of modelmesh-runtime-adapter's (interop 4), on grpcio's server.

All of them reset on ``runtimeStatus``, answer ``predictModelSize`` UNIMPLEMENTED, keep the files of
a load that failed until they are told to unload it, and unload what they do not know. What sets one
apart is in ``ADAPTERS``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import grpc

from mm.pb import mmesh
from tests.system.grpcio_runtime import MIB, GrpcioRuntime

Status = mmesh.RuntimeStatusResponseStatus
#: What the stock container says: a GiB less 128 MiB.
CAPACITY_BYTES: Final = 1024 * MIB - 128 * MIB
USUAL_START: Final = (Status.STARTING, Status.STARTING, Status.READY)


@dataclass(frozen=True, slots=True)
class Habits:
    """What one kind does its own way."""

    #: Of what it does not have.
    missing_code: grpc.StatusCode
    missing_text: str
    #: TorchServe says 0 and has to be asked; the others reckon with what is on the disk.
    loaded_size_bytes: int = 1_250_000
    measures: bool = False
    load_failure_code: grpc.StatusCode = grpc.StatusCode.UNKNOWN


_NOT_FOUND: Final = grpc.StatusCode.NOT_FOUND
ADAPTERS: Final = {
    "triton": Habits(
        grpc.StatusCode.UNAVAILABLE, "Request for unknown model: 'm' is not found"
    ),
    "mlserver": Habits(
        grpc.StatusCode.INVALID_ARGUMENT,
        "Model m with version  not found",
        load_failure_code=grpc.StatusCode.INTERNAL,
    ),
    "ovms": Habits(
        _NOT_FOUND, "Model with requested name is not found",
        load_failure_code=grpc.StatusCode.ABORTED,
    ),
    "torchserve": Habits(
        _NOT_FOUND, "Model not found: m", loaded_size_bytes=0, measures=True
    ),
}  # fmt: skip


class AdapterRuntime(GrpcioRuntime):
    """One of them, which answers ``script`` when asked for its status, the last for ever."""

    def __init__(
        self,
        address: str,
        habits: Habits,
        script: Sequence[mmesh.RuntimeStatusResponseStatus] = USUAL_START,
        capacity_bytes: int = CAPACITY_BYTES,
    ) -> None:
        super().__init__(address)
        self.habits = habits
        self.statuses_count = 0
        #: Loads of what is there, in whatever state: adapters do not guard against them.
        self.violations: list[str] = []
        self._script = list(script)
        self._files: set[str] = set()
        self.loaded_size_bytes = habits.loaded_size_bytes
        self._ready = mmesh.RuntimeStatusResponse(
            status=Status.READY,
            capacity_in_bytes=capacity_bytes,
            max_loading_concurrency=1,
            model_loading_timeout_ms=90_000,
            default_model_size_in_bytes=1_000_000,
            method_infos={"test.Runtime/echo": mmesh.RuntimeStatusResponseMethodInfo()},
        )

    def _status(
        self, request: mmesh.RuntimeStatusRequest, context: grpc.ServicerContext
    ) -> mmesh.RuntimeStatusResponse:
        """Asking is a reset."""
        self.statuses_count += 1
        self._models.clear()
        self._files.clear()
        status = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if status is Status.READY:
            return self._ready
        return mmesh.RuntimeStatusResponse(status=status)

    def _load(
        self, request: mmesh.LoadModelRequest, context: grpc.ServicerContext
    ) -> mmesh.LoadModelResponse:
        if request.model_id in self._files:
            self.violations.append(request.model_id)
            context.abort(grpc.StatusCode.UNKNOWN, f"symlink {request.model_id}: file exists")
        self._files.add(request.model_id)
        if request.model_path == "broken":
            self.loads.append(request.model_id)
            context.abort(self.habits.load_failure_code, "Failed to load Model due to a test")
        return super()._load(request, context)

    def _unload(
        self, request: mmesh.UnloadModelRequest, context: grpc.ServicerContext
    ) -> mmesh.UnloadModelResponse:
        self._files.discard(request.model_id)
        return super()._unload(request, context)

    def _model_size(
        self, request: mmesh.ModelSizeRequest, context: grpc.ServicerContext
    ) -> mmesh.ModelSizeResponse:
        if not self.habits.measures:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "method ModelSize not implemented")
        return super()._model_size(request, context)

    def _require_model(self, context: grpc.ServicerContext) -> None:
        ids = [value for key, value in context.invocation_metadata() if key == "mm-model-id"]
        if not ids or ids[0] not in self._models:
            context.abort(self.habits.missing_code, self.habits.missing_text)

    def lose(self, model_id: str) -> None:
        """The server was restarted without its adapter."""
        self._models.discard(model_id)
        self._files.discard(model_id)

    @contextmanager
    def serving(self) -> Iterator[AdapterRuntime]:
        """Serve until the end, which is as sudden as a crash."""
        self._server.start()
        try:
            yield self
        finally:
            self._server.stop(None).wait(10)

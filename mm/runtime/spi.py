"""Serves a ``ModelRuntime`` to the mesh: the SPI, its clients' methods, the loaded models.

Owns the life of each model (loading, ready, unloading) and the threads in which the runtime's
blocking code runs. Spec around 8; interop 4 tells what the mesh's side relies on.

Invariants:

1. An id has at most one copy in the table, so at most one load or unload at a time.
2. A copy that is called (``callers`` > 0) is not unloaded: unloading waits.
3. A load that was given up by its caller still runs, because a thread cannot be stopped. Its
   model is kept until unloaded or purged: nothing is ever lost track of.
4. Unload wins over a load that is running (``is_doomed``): the load ends with ABORTED.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, TypeVar

import anyio
import anyio.to_thread

from mm.core.protobuf_ids import extract_id
from mm.edge.h2 import IncomingCall
from mm.edge.protobuf import encode
from mm.edge.unary import Reply, Request, parse_message, read_request, send_reply
from mm.errors import StatusCode
from mm.pb import mmesh
from mm.runtime.base import ModelRuntime, ModelT, ServedMethod
from mm.runtime.call import CallError, Methods, model_ids

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How long an unload waits for the calls in flight of its model. The mesh tries again.
UNLOAD_WAIT_S: Final = 30.0
#: How long a status request waits for the purge. The mesh asks again after STARTING.
PURGE_WAIT_S: Final = 1.0

#: Nothing was loaded and nothing will be by trying again.
_MISSING_FILE_ERRORS: Final = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class State(enum.Enum):
    """Where a copy stands. Absent ones are not in the table."""

    LOADING = enum.auto()
    READY = enum.auto()
    UNLOADING = enum.auto()
    #: The runtime's ``unload`` failed: not callable, unloaded again when asked to.
    STUCK = enum.auto()


@dataclass(slots=True)
class Copy(Generic[ModelT]):
    """One model in this process."""

    model_id: str
    #: Type, path, key.
    info: tuple[str, str, str]
    state: State = State.LOADING
    model: ModelT | None = None
    size_bytes: int = 0
    callers: int = 0
    #: Shall go as soon as it can.
    is_doomed: bool = False


class RuntimeService(Generic[ModelT]):
    """The gRPC methods of a runtime."""

    def __init__(self, runtime: ModelRuntime[ModelT]) -> None:
        runtime.check()
        self._runtime = runtime
        self._served = list(runtime.served_methods())
        self._copies: dict[str, Copy[ModelT]] = {}
        self._load_threads = anyio.CapacityLimiter(runtime.loading_concurrency_max)
        self._call_threads = anyio.CapacityLimiter(runtime.call_threads_max)
        # Unloads never wait behind loads: they make room for them.
        self._unload_threads = anyio.CapacityLimiter(runtime.loading_concurrency_max)
        # The mesh waits half a second for a prediction and then reserves the default size: it must
        # not wait behind calls.
        self._prediction_threads = anyio.CapacityLimiter(runtime.loading_concurrency_max)
        self._calls_waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()
        #: Set, and replaced, at each change of a copy's state.
        self._changed = anyio.Event()

    def methods(self) -> Methods:
        """Answer everything to serve."""
        methods = Methods()

        def add(
            name: str, request_type: type[Request], method: Callable[[Request], Awaitable[Reply]]
        ) -> None:
            async def answer(request: Request, call: IncomingCall) -> Reply:
                return await self._finished(method, request)

            methods.add_unary(f"/mmesh.ModelRuntime/{name}", request_type, answer)

        add("loadModel", mmesh.LoadModelRequest, self._load)
        add("unloadModel", mmesh.UnloadModelRequest, self._unload)
        add("predictModelSize", mmesh.PredictModelSizeRequest, self._predict_size)
        add("modelSize", mmesh.ModelSizeRequest, self._model_size)
        add("runtimeStatus", mmesh.RuntimeStatusRequest, self._status)
        for served in self._served:
            handle = self._call_model if served.needs_model else self._call_runtime
            methods.add(served.path, partial(handle, served))
        return methods

    def is_ready(self, model_id: str) -> bool:
        """Answer whether a model can be called."""
        copy = self._copies.get(model_id)
        return copy is not None and copy.state is State.READY and not copy.is_doomed

    # --- the SPI --------------------------------------------------------------------------------

    async def _load(self, request: mmesh.LoadModelRequest) -> mmesh.LoadModelResponse:
        info = (request.model_type, request.model_path, request.model_key)
        if not request.model_id:
            raise CallError(StatusCode.INVALID_ARGUMENT, "model_id is empty")
        while (copy := self._copies.get(request.model_id)) is not None:
            if copy.state is State.READY and copy.info == info and not copy.is_doomed:
                return self._loaded(copy)
            if copy.state in (State.READY, State.STUCK):
                await self._drop(copy)  # a leftover: another model under the same id
            else:
                await self._changed.wait()
        copy = self._copies[request.model_id] = Copy(request.model_id, info)
        try:
            copy.model, copy.size_bytes = await anyio.to_thread.run_sync(
                self._load_blocking, copy, limiter=self._load_threads
            )
        except BaseException:
            self._remove(copy)
            raise
        copy.state = State.READY
        self._announce()
        if copy.is_doomed:
            with anyio.CancelScope(shield=True):  # bounded by UNLOAD_WAIT_S and the runtime
                await self._drop(copy)
            text = f"model {copy.model_id} was unloaded while it was loading"
            raise CallError(StatusCode.ABORTED, text)
        return self._loaded(copy)

    async def _unload(self, request: mmesh.UnloadModelRequest) -> mmesh.UnloadModelResponse:
        while (copy := self._copies.get(request.model_id)) is not None:
            copy.is_doomed = True
            if copy.state in (State.READY, State.STUCK):
                await self._drop(copy)
            else:
                await self._changed.wait()
        return mmesh.UnloadModelResponse()

    async def _predict_size(
        self, request: mmesh.PredictModelSizeRequest
    ) -> mmesh.PredictModelSizeResponse:
        size_bytes = await anyio.to_thread.run_sync(
            partial(
                self._from_file,
                f"predict the size of model {request.model_id} at {request.model_path!r}",
                self._runtime.predict_size,
                request.model_id,
                request.model_type,
                request.model_path,
                request.model_key,
            ),
            limiter=self._prediction_threads,
        )
        if size_bytes is None:
            raise CallError(StatusCode.UNIMPLEMENTED, "this runtime predicts no sizes")
        return mmesh.PredictModelSizeResponse(size_in_bytes=size_bytes)

    async def _model_size(self, request: mmesh.ModelSizeRequest) -> mmesh.ModelSizeResponse:
        copy = self._ready_copy(request.model_id)
        return mmesh.ModelSizeResponse(size_in_bytes=copy.size_bytes)

    async def _status(self, request: mmesh.RuntimeStatusRequest) -> mmesh.RuntimeStatusResponse:
        del request
        if not await self._purge():
            return mmesh.RuntimeStatusResponse(status=mmesh.RuntimeStatusResponseStatus.STARTING)
        runtime = self._runtime
        return mmesh.RuntimeStatusResponse(
            status=mmesh.RuntimeStatusResponseStatus.READY,
            capacity_in_bytes=runtime.capacity_bytes,
            max_loading_concurrency=runtime.loading_concurrency_max,
            model_loading_timeout_ms=int(runtime.load_timeout_s * 1000),
            default_model_size_in_bytes=runtime.default_model_size_bytes,
            runtime_version=runtime.version,
            method_infos={
                served.path[1:]: mmesh.RuntimeStatusResponseMethodInfo(
                    id_injection_path=list(served.id_path)
                )
                for served in self._served
                if served.needs_model
            },
            limit_model_concurrency=runtime.model_concurrency_max > 0,
        )

    # --- what clients call ------------------------------------------------------------------------

    async def _call_model(self, served: ServedMethod, call: IncomingCall) -> None:
        data = await read_request(call)
        model_id = model_id_of(call, data, served.id_path)
        send_reply(call, await self._finished(self._call_copy, served, model_id, data))

    async def _call_copy(self, served: ServedMethod, model_id: str, data: bytes) -> bytes:
        copy = self._ready_copy(model_id)
        runtime = self._runtime
        if self._calls_waiting >= runtime.call_threads_max + runtime.call_queue_length_max:
            text = f"{runtime.call_queue_length_max} calls are waiting already"
            raise CallError(StatusCode.RESOURCE_EXHAUSTED, text)
        self._calls_waiting += 1
        copy.callers += 1
        try:
            return await anyio.to_thread.run_sync(
                self._call_blocking, served, copy, data, limiter=self._call_threads
            )
        finally:
            copy.callers -= 1
            self._calls_waiting -= 1
            if copy.state is State.UNLOADING:
                self._announce()

    async def _call_runtime(self, served: ServedMethod, call: IncomingCall) -> None:
        request = parse_message(served.request_type, await read_request(call))
        method = getattr(self._runtime, served.attribute)
        send_reply(call, bytes(self._translated(f"answer {served.path}", method, request)))

    async def _finished(self, work: Callable[..., Awaitable[T]], *args: object) -> T:
        """Answer what ``work`` answers. If the caller is cancelled it goes on till its thread ends.

        The server cancels a call by its task, and from that no scope shields: a thread that still
        runs would be forgotten. So ``work`` is a task of its own, cancelled by its scope.
        """
        scope = anyio.CancelScope()
        answers: list[T] = []

        async def run() -> None:
            with scope:
                answers.append(await work(*args))

        task = asyncio.create_task(run())
        self._tasks.add(task)  # the loop itself would let it be collected
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            scope.cancel()
            raise
        return answers[0]

    # --- in worker threads ------------------------------------------------------------------------

    def _load_blocking(self, copy: Copy[ModelT]) -> tuple[ModelT, int]:
        model_type, path, key = copy.info
        runtime = self._runtime
        what = f"load model {copy.model_id} from {path!r}"
        model = self._from_file(what, runtime.load, copy.model_id, model_type, path, key)
        try:
            size_bytes = self._translated(f"measure model {copy.model_id}", runtime.size, model)
        except CallError:
            self._translated(f"unload model {copy.model_id}", runtime.unload, model)
            raise
        return model, size_bytes

    def _call_blocking(self, served: ServedMethod, copy: Copy[ModelT], data: bytes) -> bytes:
        request = parse_message(served.request_type, data)
        method = getattr(self._runtime, served.attribute)
        answer = self._translated(f"call model {copy.model_id}", method, copy.model, request)
        return encode(answer)

    def _from_file(self, what: str, function: Callable[..., T], *args: object) -> T:
        """As ``_translated``; a missing file tells the mesh that no memory was taken."""

        def checked() -> T:
            try:
                return function(*args)
            except _MISSING_FILE_ERRORS as exc:
                text = f"cannot {what}: {exc.strerror or exc}"
                raise CallError(StatusCode.FAILED_PRECONDITION, text) from exc

        return self._translated(what, checked)

    def _translated(self, what: str, function: Callable[..., T], *args: object) -> T:
        """Call code of the runtime: its exceptions are answers to calls, not bugs of ours."""
        try:
            return function(*args)
        except CallError:
            raise
        except Exception as exc:
            logger.exception("cannot %s", what)
            text = f"cannot {what}: {type(exc).__name__}: {exc}"
            raise CallError(StatusCode.INTERNAL, text) from exc

    # --- the table --------------------------------------------------------------------------------

    def _ready_copy(self, model_id: str) -> Copy[ModelT]:
        if not self.is_ready(model_id):
            # The mesh takes this for "lost" and loads the model again.
            raise CallError(StatusCode.NOT_FOUND, f"model {model_id} is not loaded")
        return self._copies[model_id]

    def _loaded(self, copy: Copy[ModelT]) -> mmesh.LoadModelResponse:
        return mmesh.LoadModelResponse(
            size_in_bytes=copy.size_bytes, max_concurrency=self._runtime.model_concurrency_max
        )

    async def _purge(self) -> bool:
        """Drop everything; False if some of it needs longer."""
        for copy in self._copies.values():
            copy.is_doomed = True
        with anyio.move_on_after(PURGE_WAIT_S):
            async with anyio.create_task_group() as group:
                for copy in list(self._copies.values()):
                    if copy.state in (State.READY, State.STUCK):
                        group.start_soon(self._drop_or_log, copy)
            while self._copies:
                await self._changed.wait()
        return not self._copies

    async def _drop_or_log(self, copy: Copy[ModelT]) -> None:
        try:
            await self._drop(copy)
        except CallError as exc:
            logger.warning("purge: %s", exc.message)

    async def _drop(self, copy: Copy[ModelT]) -> None:
        """Unload a copy that is ready or stuck, once nobody calls it."""
        assert copy.state in (State.READY, State.STUCK)
        before, copy.state = copy.state, State.UNLOADING
        try:
            with anyio.fail_after(UNLOAD_WAIT_S):
                while copy.callers:
                    await self._changed.wait()
            await anyio.to_thread.run_sync(
                self._translated,
                f"unload model {copy.model_id}",
                self._runtime.unload,
                copy.model,
                limiter=self._unload_threads,
            )
        except TimeoutError as exc:
            copy.state = before
            self._announce()
            text = f"model {copy.model_id} still has {copy.callers} calls in flight"
            raise CallError(StatusCode.UNAVAILABLE, text) from exc
        except CallError:
            copy.state = State.STUCK
            self._announce()
            raise
        except BaseException:  # cancelled before the thread started: nothing was done
            copy.state = before
            self._announce()
            raise
        self._remove(copy)

    def _remove(self, copy: Copy[ModelT]) -> None:
        copy.model = None
        del self._copies[copy.model_id]
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def model_id_of(call: IncomingCall, data: bytes, id_path: tuple[int, ...]) -> str:
    """Answer the id that a call is about: of the metadata, else of the message."""
    from_metadata = model_ids(call)
    if len(from_metadata) > 1:
        text = f"the call names {len(from_metadata)} models; the mesh splits such calls"
        raise CallError(StatusCode.INVALID_ARGUMENT, text)
    model_id = from_metadata[0] if from_metadata else None
    if model_id is None and id_path:
        model_id = extract_id(data, id_path)
    if not model_id:
        raise CallError(StatusCode.INVALID_ARGUMENT, "the call names no model")
    return model_id

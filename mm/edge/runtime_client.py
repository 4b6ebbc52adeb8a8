"""The model runtime beside this instance: the client half of ``mmesh.ModelRuntime`` (around 8).

Owns the handshake at start and the translation of messages and errors. When to load and unload is
the mesh's. Inferences go to the same process but over the proxy's own channel.
"""

from __future__ import annotations

import logging
from typing import Final, TypeVar

import anyio
import betterproto2

from mm.config import Config
from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.edge.h2 import RUNTIME_LIMITS, Channel, UnreachableError
from mm.edge.unary import CallError, call_unary
from mm.endpoints import Endpoint
from mm.errors import MeshError, RuntimeUnavailableError, StartupError, StatusCode
from mm.mesh.ports import Loaded, Runtime, RuntimeCallError, RuntimeParameters
from mm.pb import mmesh

logger = logging.getLogger(__name__)

SERVICE: Final = "/mmesh.ModelRuntime/"
#: Runtimes of the first generation; the messages are the same.
LEGACY_SERVICE: Final = "/com.ibm.watson.tas.internal.proto.ModelServer/"
#: A load that the mesh cancels by its own timer needs no deadline on the wire; runtimes may refuse
#: long ones.
NO_DEADLINE: Final = None
#: Doubled for each further poll, up to `runtime_poll_s`: a quick start is not waited for.
FIRST_PAUSE_S: Final = 0.05
#: Runtimes that are still starting are told of this often in the log.
LOG_EVERY_S: Final = 20.0
LOG_FIRST_S: Final = 2.0

Status = mmesh.RuntimeStatusResponseStatus
Reply = TypeVar("Reply", bound=betterproto2.Message)


class GrpcRuntime(Runtime):
    """Calls the runtime's management methods.

    ``runtimeStatus`` unloads every model in many runtimes, so it is called until the first READY
    and never again (interop 0.22).
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._channels = {
            endpoint: Channel(str(endpoint), RUNTIME_LIMITS)
            for endpoint in config.runtime_endpoints
        }
        self._services = dict.fromkeys(self._channels, SERVICE)
        self._chosen: Endpoint | None = None
        self._can_predict = True
        self._can_measure = True

    @property
    def endpoint(self) -> Endpoint:
        """Where the runtime was found; only after ``wait_ready``."""
        assert self._chosen is not None, "wait_ready() first"
        return self._chosen

    async def close(self) -> None:
        """Drop the connections."""
        for channel in self._channels.values():
            await channel.close()

    async def wait_ready(self) -> RuntimeParameters:
        """Poll every endpoint until one is READY; raises ``StartupError``."""
        limit_s = self._config.runtime_start_timeout_s
        said = dict.fromkeys(self._channels, "not asked yet")
        with anyio.move_on_after(limit_s):
            # A person who started things in the wrong order should not have to wait for a word.
            logged_s = anyio.current_time() - LOG_EVERY_S + LOG_FIRST_S
            pause_s = FIRST_PAUSE_S
            while True:
                for endpoint in self._channels:
                    parameters = await self._poll(endpoint, said)
                    if parameters is not None:
                        await self._choose(endpoint)
                        return parameters
                if anyio.current_time() - logged_s >= LOG_EVERY_S:
                    logged_s = anyio.current_time()
                    logger.info("waiting for the model runtime: %s", _told(said))
                await anyio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._config.runtime_poll_s)
        raise StartupError(
            f"Model server container did not start after {limit_s:g} seconds ({_told(said)});"
            " see INTERNAL_GRPC_PORT and INTERNAL_GRPC_SOCKET_PATH"
        )

    async def load(self, model_id: ModelId, info: ModelInfo) -> Loaded:
        """Load a model; the caller's timer cancels it."""
        request = mmesh.LoadModelRequest(
            model_id=model_id, model_type=info.model_type, model_path=info.path, model_key=info.key
        )
        reply = await self._call("loadModel", request, mmesh.LoadModelResponse)
        return Loaded(reply.size_in_bytes, reply.max_concurrency)

    async def unload(self, model_id: ModelId) -> None:
        """Unload a model; one that is not there is a success."""
        request = mmesh.UnloadModelRequest(model_id=model_id)
        try:
            await self._call("unloadModel", request, mmesh.UnloadModelResponse)
        except RuntimeCallError as exc:
            if exc.code != StatusCode.NOT_FOUND:
                raise

    async def predict_size(self, model_id: ModelId, info: ModelInfo) -> int:
        """Answer the bytes to expect, 0 if the runtime cannot tell; it is not asked again then."""
        if not self._can_predict:
            return 0
        request = mmesh.PredictModelSizeRequest(
            model_id=model_id, model_type=info.model_type, model_path=info.path, model_key=info.key
        )
        try:
            reply = await self._call("predictModelSize", request, mmesh.PredictModelSizeResponse)
        except RuntimeCallError as exc:
            if exc.code != StatusCode.UNIMPLEMENTED:
                raise
            self._can_predict = False
            return 0
        return reply.size_in_bytes

    async def model_size(self, model_id: ModelId) -> int:
        """Answer the bytes that a loaded model takes, 0 if the runtime cannot tell."""
        if not self._can_measure:
            return 0
        request = mmesh.ModelSizeRequest(model_id=model_id)
        try:
            reply = await self._call("modelSize", request, mmesh.ModelSizeResponse)
        except RuntimeCallError as exc:
            if exc.code != StatusCode.UNIMPLEMENTED:
                raise
            self._can_measure = False
            return 0
        return reply.size_in_bytes

    async def _call(
        self, method: str, request: betterproto2.Message, reply_type: type[Reply]
    ) -> Reply:
        endpoint = self.endpoint
        try:
            return await call_unary(
                self._channels[endpoint],
                self._services[endpoint] + method,
                request,
                reply_type,
                timeout_s=NO_DEADLINE,
            )
        except UnreachableError as exc:
            raise RuntimeUnavailableError(
                f"the model runtime at {endpoint}: {exc.message}"
            ) from exc
        except CallError as exc:
            raise RuntimeCallError(exc.code, exc.message) from exc
        except MeshError as exc:  # an answer that is no answer: too long, not the message expected
            raise RuntimeCallError(StatusCode.INTERNAL, exc.message) from exc

    async def _poll(
        self, endpoint: Endpoint, said: dict[Endpoint, str]
    ) -> RuntimeParameters | None:
        """Ask one endpoint once; what it said is kept for the error."""
        try:
            reply = await call_unary(
                self._channels[endpoint],
                self._services[endpoint] + "runtimeStatus",
                mmesh.RuntimeStatusRequest(),
                mmesh.RuntimeStatusResponse,
                timeout_s=self._config.runtime_status_timeout_s,
            )
        except CallError as exc:
            if exc.code == StatusCode.UNIMPLEMENTED:
                self._try_legacy(endpoint, exc)
            said[endpoint] = f"{exc.code.name} {exc.message}"
            return None
        except MeshError as exc:
            said[endpoint] = exc.message
            return None
        if reply.status == Status.READY:
            return _parameters(reply)
        if reply.status != Status.STARTING:
            raise StartupError(
                f"the model runtime at {endpoint} says status {reply.status.name or reply.status}:"
                " it will not serve"
            )
        said[endpoint] = "STARTING"
        return None

    def _try_legacy(self, endpoint: Endpoint, error: CallError) -> None:
        if self._services[endpoint] == LEGACY_SERVICE:
            raise StartupError(
                f"the process at {endpoint} is no model runtime: neither {SERVICE}runtimeStatus"
                f" nor {LEGACY_SERVICE}runtimeStatus is implemented ({error.message})"
            ) from error
        self._services[endpoint] = LEGACY_SERVICE

    async def _choose(self, endpoint: Endpoint) -> None:
        self._chosen = endpoint
        logger.info("the model runtime at %s is ready", endpoint)
        for other, channel in self._channels.items():
            if other != endpoint:
                await channel.close()


def _parameters(reply: mmesh.RuntimeStatusResponse) -> RuntimeParameters:
    return RuntimeParameters(
        capacity_bytes=reply.capacity_in_bytes,
        default_model_size_bytes=reply.default_model_size_in_bytes,
        loading_concurrency_max=reply.max_loading_concurrency,
        load_timeout_ms=reply.model_loading_timeout_ms,
        methods={name: tuple(info.id_injection_path) for name, info in reply.method_infos.items()},
        allow_any_method=reply.allow_any_method,
        limit_model_concurrency=reply.limit_model_concurrency,
        runtime_version=reply.runtime_version,
    )


def _told(said: dict[Endpoint, str]) -> str:
    return "; ".join(f"{endpoint}: {text}" for endpoint, text in said.items())

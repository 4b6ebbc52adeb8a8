"""The model runtime beside this instance: the client half of ``mmesh.ModelRuntime`` (around 8).

Owns the handshake at start, noticing that the runtime is gone, the handshake when it is back, and
the translation of messages and errors. When to load and unload is the mesh's. Inferences go to the
same process but over the proxy's own channel.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
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
_UNIX: Final = "unix:"
#: Runtimes that are still starting are told of this often in the log.
LOG_EVERY_S: Final = 20.0
LOG_FIRST_S: Final = 2.0

Status = mmesh.RuntimeStatusResponseStatus
Reply = TypeVar("Reply", bound=betterproto2.Message)


class GrpcRuntime(Runtime):
    """Calls the runtime's management methods.

    ``runtimeStatus`` unloads every model in many runtimes, so it is called until the first READY,
    and again only after a loss (interop 0.22). A loss is: the connection for the watch ended, and
    nobody listens any more, or on another socket. A connection alone says nothing: servers end old
    and idle ones. Nor does silence: a runtime that loads may answer nothing for a minute.
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
        #: Why it cannot be called: it is gone, or not READY again. Empty: it can.
        self._away_because = ""
        #: Of somebody who needs it while it is away: ask now; and that it was asked, replaced.
        self._wanted = anyio.Event()
        self._asked = anyio.Event()

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

    async def wait_lost(self) -> str:
        """Watch a connection; whenever it ends, see whether somebody listens still."""
        endpoint = self.endpoint
        channel = Channel(str(endpoint), RUNTIME_LIMITS)
        try:
            while True:
                socket = _socket_of(endpoint)
                try:
                    await channel.wait_disconnected()
                except UnreachableError as exc:
                    if _nobody_listens(exc):
                        self._away_because = exc.message
                        return exc.message
                    await anyio.sleep(self._config.runtime_poll_s)
                    continue
                if socket is not None and _socket_of(endpoint) not in (None, socket):
                    self._away_because = f"another process listens at {endpoint}"
                    return self._away_because
        finally:
            await channel.close()

    async def wait_back(self, check: Callable[[RuntimeParameters], object]) -> RuntimeParameters:
        """Ask now and then, and whenever somebody needs it; the first READY that is sound ends
        that.
        """
        assert self._away_because, "wait_lost() first"
        endpoint, told, pause_s = self.endpoint, "", FIRST_PAUSE_S
        while True:
            said = {endpoint: self._away_because}
            try:
                parameters = await self._poll(endpoint, said)
                if parameters is not None:
                    check(parameters)
            except StartupError as exc:
                # At the start that ends the process; now it passes calls on, and may get better.
                parameters, said[endpoint] = None, str(exc)
                if str(exc) != told:
                    told = str(exc)
                    logger.error("nothing is loaded here until the runtime says otherwise: %s", exc)
            self._away_because = "" if parameters is not None else f"{endpoint}: {said[endpoint]}"
            self._asked.set()
            self._asked = anyio.Event()
            if parameters is not None:
                self._can_predict = self._can_measure = True
                return parameters
            with anyio.move_on_after(pause_s):
                await self._wanted.wait()
                await anyio.sleep(FIRST_PAUSE_S)  # those who need it come by the thousand
            self._wanted = anyio.Event()
            pause_s = min(2 * pause_s, self._config.runtime_poll_s)

    async def _require_there(self) -> None:
        """Have it asked now if it was away; raises ``RuntimeUnavailableError`` if it still is."""
        if self._away_because:
            asked = self._asked
            self._wanted.set()
            with anyio.move_on_after(self._config.runtime_status_timeout_s):
                await asked.wait()
        if self._away_because:
            raise RuntimeUnavailableError(
                f"the model runtime of instance {self._config.instance_id} is away:"
                f" {self._away_because}"
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
        if self._away_because:
            return  # it went with the runtime, or goes when that is asked for its status
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
        await self._require_there()
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


def _socket_of(endpoint: Endpoint) -> tuple[int, int] | None:
    """Answer which socket a path leads to, None for a port, or if none is there."""
    path = str(endpoint)
    if not path.startswith(_UNIX):
        return None
    try:
        found = os.stat(path.removeprefix(_UNIX))
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _nobody_listens(error: UnreachableError) -> bool:
    """Answer whether a connection was refused, or its socket is not there. What took too long, or
    failed for want of something on our side, says nothing of the runtime.
    """
    cause = error.__cause__
    # No number: several addresses were tried, each refused in its own words.
    refused = (None, errno.ECONNREFUSED, errno.ENOENT)
    return isinstance(cause, OSError) and cause.errno in refused


def _told(said: dict[Endpoint, str]) -> str:
    return "; ".join(f"{endpoint}: {text}" for endpoint, text in said.items())

"""The example runtime: a model server without models, for tests and demonstrations.

Behaves as the fake server of the Java mesh's tests (spec around 21.1); paths and texts steer it:

- path ``SIZE_<bytes>_<loadMs>_<unloadMs>``: a model of that size, loaded and unloaded in those
  times. Any other: 64 to 128 MiB, 100 to 1100 ms, up to 500 ms, at random.
- path ``FAIL_<text>``: the first load of the id fails with INTERNAL and the text; later ones work.
- text ``test:purge-models``: drops all models, then answers as usual.
- text ``test:error:code=<CODE>:message=<text>``: fails with that status.
- text ``test:delay:ms=<ms>``: answers after that time (ours).

Environment: ``RS_METHOD_INFOS`` (``pkg.Svc/method=1,2;pkg.Svc/other=``), ``RS_ALLOW_ANY=true``,
and, if set to anything, ``UNLOAD_RETURN_NOT_FOUND``, ``TRITON_NOT_FOUND_BEHAVIOUR``,
``MLSERVER_NOT_FOUND_BEHAVIOUR``. Also serves ``mm.testing.Echo`` (``echo.py``), all four kinds of
call.

Run: ``python -m mm.testing.example_runtime [ADDRESS] [MAX_CONCURRENCY] [options]`` or
``mm runtime example``. ADDRESS is a port, ``managementPort,servingPort`` or ``unix://path``.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypedDict

import anyio
import typer

from mm.edge.h2 import IncomingCall
from mm.errors import StartupError, StatusCode
from mm.pb import mmesh
from mm.runtime.address import Address
from mm.runtime.call import CallError, Methods, model_ids
from mm.runtime.process import Services, run
from mm.testing import echo

MIB = 2**20

_SIZED = re.compile(r"SIZE_(\d+)_(\d+)_(\d+)")
_ERROR = re.compile(r"test:error:code=(\w+):message=(.*)", re.DOTALL)
_DELAY = re.compile(r"test:delay:ms=(\d+)")

SERVICE = "mmesh.ModelRuntime"
#: What runtimes of old call the same service (spec around 9).
LEGACY_SERVICE = "com.ibm.watson.tas.internal.proto.ModelServer"


@dataclass(frozen=True, slots=True)
class Settings:
    """How the runtime presents itself; the defaults are those of spec around 21.1."""

    start_delay_s: float = 1.5
    capacity_bytes: int = 1024 * MIB
    default_model_size_bytes: int = 50 * MIB
    load_timeout_ms: int = 90_000
    loading_concurrency_max: int = 6
    #: Calls at a time for one model; 0: no limit, and none is told to the mesh.
    model_concurrency_max: int = 0
    #: Never READY: FAILING after the start delay.
    is_failing: bool = False
    #: Know the SPI under its old name only.
    is_legacy: bool = False
    #: Full method name without leading slash -> id injection path.
    method_infos: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    allow_any_method: bool = False
    unload_returns_not_found: bool = False
    triton_not_found: bool = False
    mlserver_not_found: bool = False
    #: Implement predictModelSize, and let loadModel tell the size that modelSize would measure.
    predicts_sizes: bool = False
    tells_loaded_sizes: bool = False


class _FromEnvironment(TypedDict):
    method_infos: Mapping[str, tuple[int, ...]]
    allow_any_method: bool
    unload_returns_not_found: bool
    triton_not_found: bool
    mlserver_not_found: bool


def settings_from_environment(env: Mapping[str, str]) -> _FromEnvironment:
    """Answer the ``Settings`` that the environment gives."""
    method_infos = {}
    for item in filter(None, env.get("RS_METHOD_INFOS", "").split(";")):
        method, equals, path = item.partition("=")
        numbers = [number for number in path.split(",") if number]
        if not equals or not all(number.isdecimal() for number in numbers):
            raise StartupError(f"RS_METHOD_INFOS: {item!r}; allowed is pkg.Service/method=1,2")
        method_infos[method] = tuple(int(number) for number in numbers)
    return {
        "method_infos": method_infos,
        "allow_any_method": env.get("RS_ALLOW_ANY") == "true",
        "unload_returns_not_found": bool(env.get("UNLOAD_RETURN_NOT_FOUND")),
        "triton_not_found": bool(env.get("TRITON_NOT_FOUND_BEHAVIOUR")),
        "mlserver_not_found": bool(env.get("MLSERVER_NOT_FOUND_BEHAVIOUR")),
    }


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What a path stands for."""

    size_bytes: int
    load_s: float
    unload_s: float

    @classmethod
    def of(cls, path: str, rng: random.Random) -> FakeModel:
        """Answer the model at a path."""
        if sized := _SIZED.fullmatch(path):
            size_bytes, load_ms, unload_ms = map(int, sized.groups())
            return cls(size_bytes, load_ms / 1000, unload_ms / 1000)
        return cls(
            size_bytes=rng.randint(64 * MIB, 128 * MIB),
            load_s=rng.uniform(0.1, 1.1),
            unload_s=rng.uniform(0.0, 0.5),
        )


class ExampleRuntime:
    """The state of the fake and its methods."""

    def __init__(self, settings: Settings, rng: random.Random | None = None) -> None:
        self.settings = settings
        self._rng = rng or random.Random()
        self._ready_at_s = time.monotonic() + settings.start_delay_s
        self._models: dict[str, FakeModel] = {}
        self._failed_ids: set[str] = set()

    def add_management(self, methods: Methods) -> None:
        """Serve the SPI."""
        service = LEGACY_SERVICE if self.settings.is_legacy else SERVICE
        methods.add_unary(f"/{service}/loadModel", mmesh.LoadModelRequest, self._load)
        methods.add_unary(f"/{service}/unloadModel", mmesh.UnloadModelRequest, self._unload)
        methods.add_unary(f"/{service}/modelSize", mmesh.ModelSizeRequest, self._model_size)
        methods.add_unary(f"/{service}/runtimeStatus", mmesh.RuntimeStatusRequest, self._status)
        if self.settings.predicts_sizes:
            request_type = mmesh.PredictModelSizeRequest
            methods.add_unary(f"/{service}/predictModelSize", request_type, self._predict_size)

    def add_serving(self, methods: Methods) -> None:
        """Serve what clients call."""
        predictor = "/mmesh.ExamplePredictor"
        methods.add_unary(f"{predictor}/predict", mmesh.PredictRequest, self._predict)
        methods.add_unary(f"{predictor}/multiPredict", mmesh.PredictRequest, self._multi_predict)
        echo.add_methods(methods, self.require_model)

    def require_model(self, call: IncomingCall) -> str:
        """Answer the id that a call names; ``CallError`` if no such model is loaded."""
        ids = model_ids(call)
        if not ids:
            raise CallError(StatusCode.INVALID_ARGUMENT, "the call names no model")
        return self._require_loaded(ids[0])

    def _require_loaded(self, model_id: str) -> str:
        if model_id in self._models:
            return model_id
        if self.settings.triton_not_found:
            text = f"Request for unknown model: '{model_id}' is not found"
            raise CallError(StatusCode.UNAVAILABLE, text)
        if self.settings.mlserver_not_found:
            raise CallError(StatusCode.INVALID_ARGUMENT, f"Model {model_id} not found")
        raise CallError(StatusCode.NOT_FOUND, f"model {model_id} is not loaded")

    # --- management -----------------------------------------------------------------------------

    async def _status(
        self, request: mmesh.RuntimeStatusRequest, call: IncomingCall
    ) -> mmesh.RuntimeStatusResponse:
        del request, call
        if time.monotonic() < self._ready_at_s:
            return mmesh.RuntimeStatusResponse(status=mmesh.RuntimeStatusResponseStatus.STARTING)
        if self.settings.is_failing:
            return mmesh.RuntimeStatusResponse(status=mmesh.RuntimeStatusResponseStatus.FAILING)
        self._models.clear()
        settings = self.settings
        return mmesh.RuntimeStatusResponse(
            status=mmesh.RuntimeStatusResponseStatus.READY,
            capacity_in_bytes=settings.capacity_bytes,
            max_loading_concurrency=settings.loading_concurrency_max,
            model_loading_timeout_ms=settings.load_timeout_ms,
            default_model_size_in_bytes=settings.default_model_size_bytes,
            runtime_version="example",
            method_infos={
                method: mmesh.RuntimeStatusResponseMethodInfo(id_injection_path=list(path))
                for method, path in settings.method_infos.items()
            },
            limit_model_concurrency=settings.model_concurrency_max > 0,
            allow_any_method=settings.allow_any_method,
        )

    async def _load(
        self, request: mmesh.LoadModelRequest, call: IncomingCall
    ) -> mmesh.LoadModelResponse:
        del call
        model = FakeModel.of(request.model_path, self._rng)
        await anyio.sleep(model.load_s)
        if request.model_path.startswith("FAIL_") and request.model_id not in self._failed_ids:
            self._failed_ids.add(request.model_id)
            raise CallError(StatusCode.INTERNAL, request.model_path.removeprefix("FAIL_"))
        self._models[request.model_id] = model
        # Size 0: the mesh asks modelSize.
        return mmesh.LoadModelResponse(
            size_in_bytes=model.size_bytes if self.settings.tells_loaded_sizes else 0,
            max_concurrency=self.settings.model_concurrency_max,
        )

    async def _unload(
        self, request: mmesh.UnloadModelRequest, call: IncomingCall
    ) -> mmesh.UnloadModelResponse:
        del call
        model = self._models.pop(request.model_id, None)
        if model is not None:
            await anyio.sleep(model.unload_s)
        elif self.settings.unload_returns_not_found:
            raise CallError(StatusCode.NOT_FOUND, f"model {request.model_id} is not loaded")
        return mmesh.UnloadModelResponse()

    async def _predict_size(
        self, request: mmesh.PredictModelSizeRequest, call: IncomingCall
    ) -> mmesh.PredictModelSizeResponse:
        del call
        sized = _SIZED.fullmatch(request.model_path)
        # Models of random size have none before they are loaded.
        size_bytes = int(sized[1]) if sized else self.settings.default_model_size_bytes
        return mmesh.PredictModelSizeResponse(size_in_bytes=size_bytes)

    async def _model_size(
        self, request: mmesh.ModelSizeRequest, call: IncomingCall
    ) -> mmesh.ModelSizeResponse:
        del call
        await anyio.sleep(0.05)
        model = self._models.get(request.model_id)
        if model is None:
            raise CallError(StatusCode.NOT_FOUND, f"model {request.model_id} is not loaded")
        return mmesh.ModelSizeResponse(size_in_bytes=model.size_bytes)

    # --- serving --------------------------------------------------------------------------------

    async def _predict(
        self, request: mmesh.PredictRequest, call: IncomingCall
    ) -> mmesh.PredictResponse:
        return await self._classify(self.require_model(call), request)

    async def _multi_predict(
        self, request: mmesh.PredictRequest, call: IncomingCall
    ) -> mmesh.MultiPredictResponse:
        ids = [self._require_loaded(model_id) for model_id in model_ids(call)]
        return mmesh.MultiPredictResponse(
            per_model_results={
                model_id: await self._classify(model_id, request) for model_id in ids
            }
        )

    async def _classify(
        self, model_id: str, request: mmesh.PredictRequest
    ) -> mmesh.PredictResponse:
        if request.text == "test:purge-models":
            self._models.clear()
        elif error := _ERROR.fullmatch(request.text):
            code = StatusCode.__members__.get(error[1])
            if code is None:
                allowed = ", ".join(StatusCode.__members__)
                text = f"{error[1]!r} is no status code; allowed: {allowed}"
                raise CallError(StatusCode.INVALID_ARGUMENT, text)
            raise CallError(code, error[2])
        elif delay := _DELAY.fullmatch(request.text):
            await anyio.sleep(int(delay[1]) / 1000)
        return mmesh.PredictResponse(
            results=[
                mmesh.CategoryAndConfidence(
                    category=f"classification for {request.text} by model {model_id}",
                    confidence=1.0,
                ),
                mmesh.CategoryAndConfidence(category=request.model_name),
            ]
        )


def services(runtime: ExampleRuntime, addresses: str) -> Services:
    """Answer what to serve where; ``addresses`` is one for everything or ``management,serving``."""
    management, comma, serving = addresses.partition(",")
    spi = Methods()
    runtime.add_management(spi)
    predictors = Methods() if comma else spi
    runtime.add_serving(predictors)
    both = [(Address.parse(management), spi)]
    if comma:
        both.append((Address.parse(serving), predictors))
    return both


def main(
    address: Annotated[
        str, typer.Argument(help="PORT, HOST:PORT, unix://PATH or MANAGEMENT,SERVING; port 0: any")
    ] = "8085",
    max_concurrency: Annotated[
        int, typer.Argument(help="Calls at a time for one model; 0: no limit", min=0)
    ] = 0,
    start_delay: Annotated[float, typer.Option(help="Seconds of STARTING", min=0.0)] = 1.5,
    capacity: Annotated[int, typer.Option(help="Bytes for models", min=0)] = 1024 * MIB,
    default_size: Annotated[int, typer.Option(help="Default model size, bytes", min=0)] = 50 * MIB,
    load_timeout_ms: Annotated[int, typer.Option(help="Time limit of a load", min=0)] = 90_000,
    loading_concurrency: Annotated[int, typer.Option(help="Loads at a time", min=0)] = 6,
    failing: Annotated[bool, typer.Option("--failing", help="Answer FAILING, not READY")] = False,
    legacy: Annotated[bool, typer.Option("--legacy", help="Old name of the SPI only")] = False,
    predict_sizes: Annotated[
        bool, typer.Option("--predict-sizes", help="Implement predictModelSize")
    ] = False,
    tell_sizes: Annotated[
        bool, typer.Option("--tell-sizes", help="Tell sizes in the answers of loadModel")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of random sizes and times")] = None,
) -> None:
    """Serve the example runtime: fake models of any size, for tests and demonstrations."""
    settings = Settings(
        start_delay_s=start_delay,
        capacity_bytes=capacity,
        default_model_size_bytes=default_size,
        load_timeout_ms=load_timeout_ms,
        loading_concurrency_max=loading_concurrency,
        model_concurrency_max=max_concurrency,
        is_failing=failing,
        is_legacy=legacy,
        predicts_sizes=predict_sizes,
        tells_loaded_sizes=tell_sizes,
        **settings_from_environment(os.environ),
    )
    run(services(ExampleRuntime(settings, random.Random(seed)), address))


if __name__ == "__main__":
    try:
        typer.run(main)
    except StartupError as exc:
        sys.exit(str(exc))

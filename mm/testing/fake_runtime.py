"""A model runtime that is not there: sizes, durations and faults as a test wants them.

Implements ``mm.mesh.ports.Runtime`` with anyio alone, so that it waits in virtual time under trio.
It is strict where a real runtime would be merciful or dead: it keeps memory that nobody unloaded,
notes every breach of the contract in ``violations``, and remembers how much it held at most. It
shows what it did in counters and answers ``wait_for``, so that no test needs to sleep.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import anyio
import anyio.lowlevel

from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.errors import RuntimeUnavailableError, StartupError, StatusCode
from mm.mesh.ports import Loaded, RuntimeCallError, RuntimeParameters

MIB: Final = 1024 * 1024

DEFAULT_PARAMETERS: Final = RuntimeParameters(
    capacity_bytes=64 * MIB,
    default_model_size_bytes=MIB,
    loading_concurrency_max=2,
    load_timeout_ms=90_000,
)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """How the runtime behaves for one model."""

    size_bytes: int = MIB
    #: What it guesses before loading; 0: it cannot tell.
    predicted_bytes: int = 0
    #: Whether the answer to the load tells the size; else it has to be asked for.
    is_size_told: bool = True
    load_s: float = 0.2
    unload_s: float = 0.05
    predict_size_s: float = 0.0
    model_size_s: float = 0.0
    concurrency_max: int = 0


class Held(enum.Enum):
    """What the runtime has of a model."""

    LOADING = "loading"
    LOADED = "loaded"
    #: A load failed or was given up; its memory is still taken.
    REMAINS = "remains"
    UNLOADING = "unloading"


@dataclass(slots=True)
class _Model:
    held: Held
    size_bytes: int
    #: How much of it came as a surprise, by the plan that it was loaded by.
    surprise_bytes: int
    #: Set to end what is being waited for, with ``error``.
    interrupted: anyio.Event = field(default_factory=anyio.Event)
    error: Exception | None = None

    def interrupt(self, error: Exception) -> None:
        self.error = error
        self.interrupted.set()


@dataclass(slots=True)
class _Faults:
    """Errors for the next calls; ``times`` None: for all."""

    error: RuntimeCallError
    times: int | None


class FakeRuntime:
    """The management half of the SPI, and ``predict`` in place of the data plane."""

    def __init__(
        self,
        parameters: RuntimeParameters = DEFAULT_PARAMETERS,
        *,
        default_plan: ModelPlan | None = None,
        start_s: float = 0.0,
        start_timeout_s: float = 180.0,
    ) -> None:
        self.parameters = parameters
        self.default_plan = default_plan or ModelPlan()
        self.start_s = start_s
        self.start_timeout_s = start_timeout_s
        #: Breaches of the contract by the mesh; a test expects none.
        self.violations: list[str] = []
        #: The models that they were about.
        self.violators: list[ModelId] = []
        #: Told of what happens to a model here.
        self.tell: Callable[[ModelId, str], None] = _tell_nobody
        #: Everything takes this many times as long.
        self.slowness = 1.0
        #: How often a model was lost behind the mesh's back.
        self.losses: Counter[ModelId] = Counter()
        self.loads_begun: Counter[ModelId] = Counter()
        self.loads_done: Counter[ModelId] = Counter()
        self.unloads_done: Counter[ModelId] = Counter()
        self.predictions: Counter[ModelId] = Counter()
        #: Calls being served, by model.
        self.calls: Counter[ModelId] = Counter()
        self.loads_at_once_max = 0
        self.memory_bytes_max = 0
        #: More than there is: only models larger than predicted excuse it.
        self.overcommitted_bytes_max = 0
        self._models: dict[ModelId, _Model] = {}
        self._plans: dict[ModelId, ModelPlan] = {}
        #: What was said last of a model's size, whatever its plan is now; 0: that it is unknown.
        self._told_bytes: dict[ModelId, int] = {}
        self._load_faults: dict[ModelId, _Faults] = {}
        self._unload_faults: dict[ModelId, _Faults] = {}
        self._is_up = True
        #: It went away, and was not asked for its status since: it is not to be called.
        self._is_lost = False
        self._changed = anyio.Event()

    # --- what a test arranges -----------------------------------------------------------------

    def plan(self, model_id: str, **changes: Any) -> None:
        """Change how the runtime behaves for one model; names are those of ``ModelPlan``."""
        key = ModelId(model_id)
        self._plans[key] = replace(self._plan(key), **changes)

    def fail_loads(
        self, model_id: str, code: int, message: str = "", times: int | None = None
    ) -> None:
        """Let the next loads of a model fail after their ``load_s``; ``times`` 0 ends that."""
        self._load_faults[ModelId(model_id)] = _Faults(RuntimeCallError(code, message), times)

    def fail_unloads(
        self, model_id: str, code: int, message: str = "", times: int | None = None
    ) -> None:
        """Let the next unloads of a model fail after their ``unload_s``."""
        self._unload_faults[ModelId(model_id)] = _Faults(RuntimeCallError(code, message), times)

    def lose(self, model_id: str) -> None:
        """Forget a loaded model, as a runtime does that was restarted behind the mesh's back."""
        assert self._models[ModelId(model_id)].held is Held.LOADED, model_id
        self.losses[ModelId(model_id)] += 1
        self.tell(ModelId(model_id), "lost by the runtime")
        self._drop(ModelId(model_id))

    def stop(self) -> None:
        """Crash: everything is gone, calls in progress break, and nothing answers."""
        self._is_up = False
        for model_id, model in self._models.items():
            self.losses[model_id] += 1
            model.interrupt(RuntimeUnavailableError("model runtime closed the connection"))
        self._models.clear()
        self._notify()

    def start(self) -> None:
        """Come back, empty."""
        self._is_up = True
        self._notify()

    # --- what a test looks at -----------------------------------------------------------------

    def held(self, model_id: str) -> Held | None:
        """Answer what the runtime has of a model."""
        model = self._models.get(ModelId(model_id))
        return None if model is None else model.held

    @property
    def loaded(self) -> set[ModelId]:
        """The models that can be called."""
        return {key for key, model in self._models.items() if model.held is Held.LOADED}

    @property
    def busy_with(self) -> list[ModelId]:
        """The models that are being loaded or unloaded."""
        return [m for m, model in self._models.items() if model.held is not Held.LOADED]

    @property
    def loads_at_once(self) -> int:
        """Loads that are running now."""
        return sum(model.held is Held.LOADING for model in self._models.values())

    @property
    def memory_bytes(self) -> int:
        """Memory taken by everything that is loaded, being loaded or unloaded, or left over."""
        return sum(model.size_bytes for model in self._models.values())

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Return once the condition holds; it is looked at after every change here."""
        with anyio.fail_after(timeout_s):
            while not condition():
                await self._changed.wait()

    # --- the SPI ------------------------------------------------------------------------------

    async def wait_ready(self) -> RuntimeParameters:
        """Answer the parameters, however senseless, with every model dropped (it is a reset)."""
        with anyio.move_on_after(self.start_timeout_s):
            await anyio.sleep(self.start_s)
            while not self._is_up:
                await self._changed.wait()
            for model_id in list(self._models):
                self._drop(model_id)
            return self.parameters
        raise StartupError(f"model runtime not ready after {self.start_timeout_s:g} s")

    async def wait_lost(self) -> str:
        """Return when it is stopped."""
        while self._is_up:
            await self._changed.wait()
        self._is_lost = True
        return "connection refused"

    async def wait_back(self, check: Callable[[RuntimeParameters], object]) -> RuntimeParameters:
        """Answer the parameters, which may be others now, once it is started again."""
        while True:
            while not self._is_up:
                await self._changed.wait()
            try:
                check(self.parameters)
            except StartupError:
                await self._changed.wait()
                continue
            self._is_lost = False
            return self.parameters

    async def load(self, model_id: ModelId, info: ModelInfo) -> Loaded:
        """Take the memory, wait, answer; a load that fails or is given up keeps its memory."""
        await self._reach()
        plan, present = self._plan(model_id), self._models.get(model_id)
        if present is not None:
            self.violated(model_id, f"load of {model_id} while {present.held.value}")
            raise RuntimeCallError(StatusCode.ALREADY_EXISTS, f"{model_id} is there already")
        model = self._models[model_id] = _Model(
            Held.LOADING, plan.size_bytes, self._surprise_bytes(model_id, plan)
        )
        self.loads_begun[model_id] += 1
        self.tell(model_id, "load begins")
        self._took_memory(model_id)
        try:
            await self._pass_time(model, plan.load_s)
            self._fail_if_arranged(self._load_faults, model_id)
        except BaseException as exc:
            model.held = Held.REMAINS
            self.tell(model_id, f"load ends with {_ending(exc)}")
            self._notify()
            raise
        model.held = Held.LOADED
        self.loads_done[model_id] += 1
        self.tell(model_id, "loaded")
        self._notify()
        if plan.is_size_told:
            self._told_bytes[model_id] = plan.size_bytes
        return Loaded(plan.size_bytes if plan.is_size_told else 0, plan.concurrency_max)

    async def unload(self, model_id: ModelId) -> None:
        """Free the memory after a while; a model that is not there is a success."""
        if self._is_lost:
            return
        await self._reach()
        model = self._models.get(model_id)
        if model is None:
            return
        if model.held is Held.UNLOADING:
            self.violated(model_id, f"unload of {model_id} while unloading")
        if model.held is Held.LOADING:
            model.interrupt(RuntimeCallError(StatusCode.ABORTED, f"{model_id} is unloaded"))
        before = Held.REMAINS if model.held is Held.LOADING else model.held
        model = self._models[model_id] = _Model(
            Held.UNLOADING, model.size_bytes, model.surprise_bytes
        )
        self.tell(model_id, "unload begins")
        self._notify()
        try:
            await self._pass_time(model, self._plan(model_id).unload_s)
            self._fail_if_arranged(self._unload_faults, model_id)
        except BaseException as exc:
            model.held = before
            self.tell(model_id, f"unload ends with {_ending(exc)}")
            self._notify()
            raise
        self.unloads_done[model_id] += 1
        self.tell(model_id, "unloaded")
        self._drop(model_id)

    async def predict_size(self, model_id: ModelId, info: ModelInfo) -> int:
        """Answer the planned guess."""
        await self._reach()
        await anyio.sleep(self.slowness * self._plan(model_id).predict_size_s)
        self._told_bytes[model_id] = self._plan(model_id).predicted_bytes
        return self._told_bytes[model_id]

    async def model_size(self, model_id: ModelId) -> int:
        """Answer the true size of a loaded model."""
        await self._reach()
        await anyio.sleep(self.slowness * self._plan(model_id).model_size_s)
        model = self._models.get(model_id)
        if model is None or model.held is not Held.LOADED:
            raise RuntimeCallError(StatusCode.NOT_FOUND, f"{model_id} is not loaded")
        # Of what is loaded, which another plan than the present one may have been for.
        self._told_bytes[model_id] = model.size_bytes
        return model.size_bytes

    async def predict(self, model_id: ModelId, seconds: float = 0.0) -> None:
        """Serve one call; raises like a runtime that does not have the model, or is gone."""
        await self._reach()
        model = self._models.get(model_id)
        if model is None or model.held is not Held.LOADED:
            raise RuntimeCallError(StatusCode.NOT_FOUND, f"model {model_id} is not loaded")
        self.calls[model_id] += 1
        try:
            await self._pass_time(model, seconds)
        finally:
            self.calls[model_id] -= 1
        self.predictions[model_id] += 1

    # --- inside -------------------------------------------------------------------------------

    def _plan(self, model_id: ModelId) -> ModelPlan:
        return self._plans.get(model_id, self.default_plan)

    async def _reach(self) -> None:
        await anyio.lowlevel.checkpoint()
        if not self._is_up or self._is_lost:
            raise RuntimeUnavailableError("model runtime: connection refused")

    async def _pass_time(self, model: _Model, seconds: float) -> None:
        """Wait, unless interrupted; even no time at all is a chance for others to run."""
        with anyio.move_on_after(self.slowness * seconds):
            await model.interrupted.wait()
        if model.error is not None:
            raise model.error

    def _fail_if_arranged(self, faults: dict[ModelId, _Faults], model_id: ModelId) -> None:
        fault = faults.get(model_id)
        if fault is None or fault.times == 0:
            return
        if fault.times is not None:
            fault.times -= 1
        raise RuntimeCallError(fault.error.code, fault.error.message)

    def _took_memory(self, model_id: ModelId) -> None:
        self.memory_bytes_max = max(self.memory_bytes_max, self.memory_bytes)
        self.loads_at_once_max = max(self.loads_at_once_max, self.loads_at_once)
        if self.loads_at_once > self.parameters.loading_concurrency_max:
            self.violated(model_id, f"{self.loads_at_once} loads at once")
        over_bytes = self.memory_bytes - self.parameters.capacity_bytes
        self.overcommitted_bytes_max = max(self.overcommitted_bytes_max, over_bytes)
        if over_bytes > sum(each.surprise_bytes for each in self._models.values()):
            held = ", ".join(f"{key} {each.held.value}" for key, each in self._models.items())
            self.violated(model_id, f"{over_bytes} bytes more than there are: {held}")
        self._notify()

    def _surprise_bytes(self, model_id: ModelId, plan: ModelPlan) -> int:
        """Answer by how much a model is larger than the mesh could know before it is loaded.

        What was never asked here is what the plan would say: the mesh knows it from another copy.
        """
        told_bytes = self._told_bytes.get(model_id, plan.predicted_bytes)
        expected_bytes = told_bytes or self.parameters.default_model_size_bytes
        return max(0, plan.size_bytes - expected_bytes)

    def violated(self, model_id: ModelId, what: str) -> None:
        """Note a breach of the contract."""
        self.violations.append(what)
        self.violators.append(model_id)
        self.tell(model_id, f"violation: {what}")

    def _drop(self, model_id: ModelId) -> None:
        self._models.pop(model_id, None)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _tell_nobody(model_id: ModelId, text: str) -> None:
    """Say nothing."""


def _ending(exc: BaseException) -> str:
    """Answer what ended something, in the same words in each run."""
    return repr(exc) if isinstance(exc, RuntimeCallError) else type(exc).__name__

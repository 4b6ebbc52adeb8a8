"""One instance of a cluster in one process: a real ``Node``, and all that is beside it.

Owns its start, its ends, and a data plane that calls objects instead of moving bytes: what a client
and what a peer can ask of it. The instances' world is ``mm.testing.cluster``'s.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import anyio
from anyio.abc import TaskStatus

from mm.config import Config
from mm.core.calls import Call, Hop, LocalRoute, NamedBy, Outcome, PeerRoute, Route
from mm.core.ids import InstanceId, ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.records import ModelInfo
from mm.edge.memory_store import Fault
from mm.edge.moves import Moves
from mm.errors import MeshError, NoRoomError, RuntimeUnavailableError, StatusCode
from mm.mesh.composition import Ports
from mm.mesh.models import NO_POLICY, EnsureRequest
from mm.mesh.node import Node
from mm.mesh.policies import PolicyState
from mm.mesh.ports import ModelStatus, PeerCallError, PeerIdentity, RuntimeCallError
from mm.testing.fake_runtime import FakeRuntime
from mm.testing.losses import LossesHeard

if TYPE_CHECKING:
    from mm.testing.cluster import Cluster

#: What an instance that stops has for moving its models: of the 90 s that Kubernetes gives it.
DRAIN_S: Final = 68.0
INFO: Final = ModelInfo("type", "path")


class ConnectionLostError(Exception):
    """The instance that a client called crashed before it answered."""


class RuntimeAnswerError(MeshError):
    """An error of the runtime itself, passed to the client untouched."""

    #: It is a NOT_FOUND that is to be taken for the model's own (decision 8).
    is_own_word = False


class Instance:
    """One instance and all that is beside it; at the same time what listens on its peer port."""

    def __init__(
        self, cluster: Cluster, config: Config, runtime: FakeRuntime, address: str
    ) -> None:
        self.cluster = cluster
        self.name = config.instance_id
        self.address = address
        self.runtime = runtime
        self.config = config
        self.store = cluster.make_store(config)
        self.clock = cluster.make_clock(config)
        self.node = Node(
            config,
            Ports(
                self.store,
                runtime,
                cluster.network.peers(self.address),
                self.clock,
                random.Random(f"{cluster.seed} {address}"),
            ),
        )
        self.is_serving = False
        self.has_crashed = False
        self._has_started = False
        self._prediction_fault: RuntimeCallError | None = None
        self._scope = anyio.CancelScope()
        self._stopping = anyio.Event()
        self._ended = anyio.Event()
        self._clients: set[anyio.CancelScope] = set()
        self._losses = LossesHeard()

    def __repr__(self) -> str:
        return f"<Instance {self.name}{' serving' if self.is_serving else ''}>"

    # --- life ---------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Start, serve until told otherwise; raises what ``Node.running`` raises."""
        try:
            with self._scope:
                async with self.node.running(self.address):
                    self.is_serving = self._has_started = True
                    task_status.started()
                    await self._stopping.wait()
                    await self.node.drain(DRAIN_S)
                    self.is_serving = False
        finally:
            self.is_serving = False
            self.cluster.network.close(self.address)
            self._ended.set()

    async def stop(self) -> None:
        """Stop in good order: as SIGTERM, without the wait for calls in flight."""
        self._stopping.set()
        await self.wait_ended()

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop, and may serve still."""
        return self._stopping.is_set()

    async def wait_ended(self) -> None:
        """Return once nothing of it is left."""
        await self._ended.wait()

    async def crash(self) -> None:
        """End at once: connections break, the lease runs out, nobody is told."""
        self.has_crashed, self.is_serving = True, False
        self.store.set_fault(Fault.REFUSED)
        self.cluster.network.close(self.address)
        for scope in list(self._clients):
            scope.cancel()
        self._scope.cancel()
        # Last: it dies at the same moment, so that nobody here is left to notice.
        self.runtime.stop()
        await self._ended.wait()

    def fail_predictions(self, code: int, message: str) -> None:
        """Let the runtime answer every inference with an error; code 0 ends that."""
        self._prediction_fault = RuntimeCallError(code, message) if code else None

    # --- what a client does -------------------------------------------------------------------

    async def invoke(self, model_id: str, method: str = "/pkg.Service/Method") -> InstanceId:
        """Call a model as a client does; answers which instance served. Raises ``MeshError``."""
        return await self.send(Call(ModelId(model_id), method=method))

    async def invoke_vmodel(self, vmodel_id: str, method: str = "/pkg.Service/Method") -> ModelId:
        """Call a vmodel as a client does; answers which model served. Raises ``MeshError``."""
        router = self.node.router
        model_id = await router.resolve(vmodel_id)
        call = Call(model_id, method=method, named_by=NamedBy(vmodel_id))

        async def attempt(call: Call) -> ModelId:
            await self.send(call)
            return call.model_id

        return await Moves(router, vmodel_id).serve(call, attempt)

    async def send(self, call: Call) -> InstanceId:
        """Serve a client's call; raises ``ConnectionLostError`` if this instance crashes."""
        with anyio.CancelScope() as scope:
            self._clients.add(scope)
            try:
                return await self.serve(call)
            finally:
                self._clients.discard(scope)
        raise ConnectionLostError(self.name)

    async def register(
        self,
        model_id: str,
        info: ModelInfo = INFO,
        *,
        load_now: bool = False,
        sync: bool = False,
        policy: ModelPolicy = NO_POLICY,
    ) -> ModelStatus:
        """Register a model."""
        return await self.node.models.register(
            ModelId(model_id), info, load_now=load_now, sync=sync, last_used_ms=0, policy=policy
        )

    async def set_policy(
        self, model_id: str, copies_min: int | None = None, pinned: bool | None = None
    ) -> PolicyState:
        """Change a model's policy, or ask for it."""
        return await self.node.models.set_policy(ModelId(model_id), copies_min, pinned)

    async def load(self, model_id: str, *, sync: bool = True) -> ModelStatus:
        """Ensure that a model is loaded somewhere."""
        return await self.node.models.ensure_loaded(EnsureRequest(ModelId(model_id), sync))

    async def load_here(self, model_id: str) -> ModelStatus:
        """Load a copy here, whatever placement would say."""
        call = Call(ModelId(model_id), hop=Hop.LOAD_LOCAL, hops_left=0)
        return await self.node.models.ensure_loaded(EnsureRequest(ModelId(model_id), True), call)

    async def status(self, model_id: str) -> ModelStatus:
        """Ask for the status of a model."""
        return await self.node.models.status(ModelId(model_id))

    # --- what peers do: fake_network.PeerServer -----------------------------------------------

    def identity(self) -> PeerIdentity:
        """Answer who this is."""
        return PeerIdentity(self.name, self.node.start_time_ms)

    async def ensure_loaded(self, call: Call, *, sync: bool) -> ModelStatus:
        """Load by a peer's order."""
        self._require_started()
        request = EnsureRequest(call.model_id, sync, last_used_ms=call.last_used_ms)
        return await self.node.models.ensure_loaded(request, call)

    async def model_status(self, model_id: ModelId) -> ModelStatus:
        """Answer for the copy here."""
        self._require_started()
        return await self.node.models.status(model_id, ask_peers=False)

    async def serve(self, call: Call) -> InstanceId:
        """Be the data plane: ask, send, and again, until there is an answer."""
        self._require_started()
        router = self.node.router
        while True:
            route = await router.route(call)
            outcome, error = Outcome.ABANDONED, None
            again = False
            try:
                served_by, outcome, error = await self._attempt(call, route)
            finally:
                message = "" if error is None else error.message
                again = router.finished(call, route, outcome, message)
                self._tell(route, outcome, message)
            if error is None:
                assert served_by is not None
                return served_by
            if not again:
                raise self._passed_on(call, outcome, error)

    def tell_load(self, call: Call) -> int:
        """Answer how busy the copy here is besides this call."""
        return self.node.router.tell_load(call) if self._has_started else 0

    def take_loads(self, sender: InstanceId, loads: Mapping[ModelId, int]) -> None:
        """Hear how busy the sender's copies are."""
        self._require_started()
        self.node.router.loads_pushed(sender, loads)

    def take_demand(self, sender: InstanceId, demands: Mapping[ModelId, tuple[int, int]]) -> None:
        """Hear of the calls at the sender's copies."""
        self._require_started()
        self.node.services.scaler.hear(sender, demands)

    async def withdraw_copy(self, model_id: ModelId) -> bool:
        """Give up the copy here."""
        self._require_started()
        return await self.node.services.scaler.give_up(model_id)

    def _tell(self, route: Route, outcome: Outcome, message: str) -> None:
        where = "here" if isinstance(route, LocalRoute) else f"{route.hop.value} {route.address}"
        text = f"sent {where}: {outcome.value} {message}".rstrip()
        self.cluster.tell(self.name, route.model_id, text)

    def _passed_on(self, call: Call, outcome: Outcome, error: MeshError) -> MeshError:
        if outcome is not Outcome.ANSWERED:
            if not isinstance(error, RuntimeAnswerError):
                error = call.failure or error
            if call.hop is not Hop.EXTERNAL and error.hop_result is None:
                error.hop_result = outcome.value
        return error

    async def _attempt(
        self, call: Call, route: Route
    ) -> tuple[InstanceId | None, Outcome, MeshError | None]:
        if isinstance(route, PeerRoute):
            return await self._attempt_there(call, route)
        assert isinstance(route, LocalRoute), route
        try:
            if self._prediction_fault is not None:
                raise self._prediction_fault
            await self.runtime.predict(route.model_id, self.cluster.call_s)
        except RuntimeCallError as exc:
            outcome = {
                StatusCode.NOT_FOUND: Outcome.LOST,
                StatusCode.UNAVAILABLE: Outcome.RUNTIME_UNAVAILABLE,
                StatusCode.RESOURCE_EXHAUSTED: Outcome.EXHAUSTED,
            }.get(StatusCode(exc.code), Outcome.ANSWERED)
            answer = RuntimeAnswerError(exc.message, code=StatusCode(exc.code))
            if outcome is Outcome.LOST:
                now_s = anyio.current_time()
                answer.is_own_word = self._losses.lost(route.model_id, route.load_id, now_s)
            elif outcome is Outcome.ANSWERED:
                self._losses.answered(route.model_id, route.load_id)
            return None, outcome, answer
        except RuntimeUnavailableError as exc:
            return None, Outcome.UNREACHABLE, exc
        self._losses.answered(route.model_id, route.load_id)
        return self.name, Outcome.ANSWERED, None

    async def _attempt_there(
        self, call: Call, route: PeerRoute
    ) -> tuple[InstanceId | None, Outcome, MeshError | None]:
        peers = self.cluster.network.peers(self.address)
        try:
            served_by = await peers.forward(
                route, call.method, lambda load: self.node.router.report_load(route, load)
            )
        except PeerCallError as exc:
            call.hear_retry(exc.retry_after_ms)
            if exc.hop_state is not None:
                self.node.router.report_state(call, route, exc.hop_state)
            cause = exc.__cause__
            if isinstance(cause, RuntimeAnswerError):
                return None, exc.outcome, cause.another()
            return None, exc.outcome, RuntimeUnavailableError(exc.message)
        except MeshError as exc:
            return None, Outcome.ANSWERED, exc
        return served_by, Outcome.ANSWERED, None

    def _require_started(self) -> None:
        if not self._has_started:
            error = NoRoomError("this instance is still starting")
            error.hop_result = Outcome.DRAINING.value
            raise error

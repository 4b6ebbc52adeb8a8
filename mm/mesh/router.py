"""The one question: where does this call go now? (spec core 2.4, design section 2)

Owns the order of attempts of one call: a copy that is ready here, a copy elsewhere, a load. Does
not move a byte, and does not choose where to load: ``placer`` does.
"""

from __future__ import annotations

import logging
import random

import anyio

from mm.config import Config
from mm.core.calls import Call, Hop, LocalRoute, Outcome, PeerRoute, Route
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.errors import (
    LoadFailedError,
    LoadTimeoutError,
    MeshError,
    MethodRefusedError,
    ModelNotFoundError,
    NoRoomError,
    QueueFullError,
    RuntimeUnavailableError,
)
from mm.mesh.copies import Copies
from mm.mesh.hop_errors import hop_error, hop_result, load_failure
from mm.mesh.loader import Loader
from mm.mesh.local_copy import LocalCopy
from mm.mesh.members import Members
from mm.mesh.placer import Placer
from mm.mesh.ports import RuntimeParameters
from mm.mesh.registry import Registry
from mm.mesh.vmodels import VModels
from mm.mesh.waiters import Waiters
from mm.table import LOCAL, NONE

logger = logging.getLogger(__name__)

#: The service that manages the runtime is never reachable through the mesh (around 6.4).
MANAGEMENT_SERVICES = ("/mmesh.ModelRuntime/", "/com.ibm.watson.tas.internal.proto.ModelServer/")


class Router:
    """Answers for every single-model call of this instance, whoever sent it.

    A call that came from a client may hop twice: to a copy, or to the instance that is to load, and
    from there once more to a copy that appeared meanwhile. Each failed attempt rules out the
    instance it failed at, so that a call ends after at most ``retry_iterations_max`` attempts.
    """

    def __init__(
        self,
        *,
        config: Config,
        parameters: RuntimeParameters,
        registry: Registry,
        vmodels: VModels,
        members: Members,
        copies: Copies,
        loader: Loader,
        waiters: Waiters,
        placer: Placer,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._me = config.instance_id
        self._parameters = parameters
        self._registry = registry
        self._vmodels = vmodels
        self._members = members
        self._copies = copies
        self._loader = loader
        self._waiters = waiters
        self._placer = placer
        self._rng = rng
        self._table = copies.table
        self._counters = copies.counters
        self._clock = copies.clock
        #: Calls between `route` and `finished`.
        self.routes_open = 0

    # --- the question ---

    async def route(self, call: Call) -> Route:
        """Answer where to send the call now; waits for loads. Raises ``MeshError``."""
        try:
            route = self._ready_here(call) or await self._look(call)
        except BaseException as exc:
            call.end_turn()
            if isinstance(exc, MeshError):
                self._refused(call, exc)
            raise
        self._opened(call, route)
        return route

    def request_grew(self, call: Call, size_bytes: int) -> None:
        """Hear of more bytes of a request that is kept; raises ``WaitersFullError``."""
        if call.waits:
            self._waiters.grew(call, size_bytes)
        else:
            call.request_bytes += size_bytes

    async def begin(self, call: Call) -> PeerRoute | LocalCopy:
        """Like ``route`` for ensure-loaded, but answer a copy of ours without waiting for its load.

        A ``PeerRoute`` must be given back by ``finished``; a copy goes on by itself.
        """
        try:
            begun = await self._begin(call)
        except MeshError as exc:
            self._refused(call, exc)
            raise
        if isinstance(begun, PeerRoute):
            self._opened(call, begun)
        return begun

    def _opened(self, call: Call, route: Route) -> None:
        self.routes_open += 1
        if isinstance(route, PeerRoute):
            self._counters.forwards += 1
        elif call.method:
            self._counters.calls += 1
            self._counters.hits += not call.has_waited
            self._counters.misses += call.has_waited

    def _refused(self, call: Call, error: MeshError) -> None:
        """Count an error, and translate it for a peer."""
        if call.hop is Hop.EXTERNAL:
            self._counters.failures += 1
            error.hop_result = None
        elif error.hop_result is None:
            error.hop_result = hop_result(error)

    def finished(self, call: Call, route: Route, outcome: Outcome, message: str = "") -> bool:
        """Give the route back; answers whether asking again makes sense."""
        self.routes_open -= 1
        call.end_turn()
        if isinstance(route, LocalRoute):
            self._table.unpin(route.model_id)
            self._copies.unloader.unpinned(route.model_id)
        elif outcome not in (Outcome.UNREACHABLE, Outcome.ABANDONED):
            self._members.mark_reachable(route.instance_id)
        if isinstance(route, PeerRoute) and route.hop is Hop.LOAD_LOCAL:
            self._members.note_ended(route.instance_id)
        if outcome is Outcome.ANSWERED:
            if isinstance(route, LocalRoute):
                self._copies.answered(route.model_id, route.load_id)
            return False
        if outcome is Outcome.ABANDONED:
            return False
        if isinstance(route, LocalRoute):
            return self._failed_here(call, route, outcome, message)
        return self._failed_there(call, route, outcome, message)

    async def resolve(self, vmodel_id: str) -> ModelId:
        """Answer the active model of a vmodel; raises ``ModelNotFoundError``."""
        return await self._vmodels.resolve(vmodel_id)

    def in_flight(self, model_id: ModelId) -> int:
        """Answer the calls that the local copy has in flight."""
        return self._table.in_flight(model_id) if model_id in self._table else 0

    def report_load(self, route: PeerRoute, in_flight: int) -> None:
        """Note the calls in flight that a peer's copy told of in its reply (``mm-hop-load``)."""
        handle = self._members.handle_if_known(route.instance_id)
        if handle is not None:
            self._table.report_load(handle, route.model_id, in_flight)

    # --- attempts, cheapest first ---

    def _ready_here(self, call: Call) -> LocalRoute | None:
        """The hit path: no await, no record, one look into the table."""
        if self._me in call.tried:
            return None
        copy = self._copies.get(call.model_id)
        if copy is None or not copy.serves:
            return None
        injection_path = self._permit(call)
        if not self._table.pin(call.model_id):
            return None
        now_ms = call.last_used_ms or self._clock.now_ms()
        self._table.touch(call.model_id, now_ms)
        call.attempts += 1
        if self._config.log_each_invoke and call.method:
            logger.info("model %s: invoking %s", call.model_id, call.method[1:])
        return LocalRoute(call.model_id, injection_path, copy.load_id)

    async def _look(self, call: Call) -> Route:
        while True:
            begun = await self._begin(call)
            if isinstance(begun, PeerRoute):
                return begun
            found = await self._when_ready(call, begun)
            if found is not None:
                return found

    async def _begin(self, call: Call) -> PeerRoute | LocalCopy:
        """One attempt: the copy to wait for here, or the instance to ask."""
        if call.attempts >= self._config.retry_iterations_max:
            raise call.failure or NoRoomError(
                f"{self._config.retry_iterations_max} retry iterations exhausted"
            )
        call.attempts += 1
        if call.hop is Hop.HIT_ONLY:
            return self._copy_here_only(call)
        record = await self._registry.find(call.model_id) if call.model_id else None
        if record is None:
            raise ModelNotFoundError
        route = self._hit_elsewhere(call, record)
        if route is not None:
            return route
        copy = self._copies.get(call.model_id)
        if copy is None or self._me in call.tried:
            return self._place(call, record)
        return copy

    def _copy_here_only(self, call: Call) -> LocalCopy:
        """A peer believes that the copy is here; its load may still be running."""
        copy = None if self._me in call.tried else self._copies.get(call.model_id)
        if copy is None:
            # Registered here but not here: an eviction whose write is under way, or a lost one.
            self._copies.registrar.disown(call.model_id)
            raise hop_error(Outcome.NOT_HERE, f"no copy of model {call.model_id} here")
        return copy

    def _hit_elsewhere(self, call: Call, record: ModelRecord) -> PeerRoute | None:
        """Send it to another instance's copy; two random choices on calls in flight as the copies
        count them.
        """
        if call.hops_left == 0:
            return None
        usable = {
            handle: instance_id
            for instance_id in record.copies
            if instance_id != self._me
            and instance_id not in call.tried
            and (handle := self._members.handle(instance_id)) is not None
        }
        if not usable:
            return None
        if len(call.tried) >= self._config.copies_tried_max:
            raise call.failure or NoRoomError(
                f"Failed to invoke model loaded in >={self._config.copies_tried_max} locations"
            )
        excluded = [LOCAL, *(h for h in self._table.peers(call.model_id) if h not in usable)]
        chosen = self._table.choose(call.model_id, self._rng.getrandbits(64), excluded)
        if chosen == NONE:
            chosen = self._rng.choice(sorted(usable))
        instance_id = usable[chosen]
        return self._route_to(call, instance_id, Hop.HIT_ONLY)

    def _route_to(self, call: Call, instance_id: InstanceId, hop: Hop) -> PeerRoute:
        return PeerRoute(
            call.model_id,
            instance_id,
            self._members.address(instance_id),
            hop,
            tried=frozenset(call.tried),
            excludes=frozenset(call.excludes - {instance_id}),
            hops_left=call.hops_left - 1,
            known_size_units=call.known_size_units,
        )

    def _place(self, call: Call, record: ModelRecord) -> PeerRoute | LocalCopy:
        """Choose who loads it: this instance answers with the copy on its way, another with a
        route.
        """
        now_ms = self._clock.now_ms()
        if call.hop is Hop.LOAD_LOCAL:
            self._placer.refuse_if_pointless(call, record, now_ms)
            if self._me in call.excludes:
                raise call.failure or hop_error(Outcome.STALE, "loading here was tried already")
            return self._load_here(call, record)
        while True:
            chosen = self._placer.choose(call, record, now_ms)
            if chosen != self._me:
                return self._route_to(call, chosen, Hop.LOAD_LOCAL)
            try:
                return self._load_here(call, record)
            except (NoRoomError, QueueFullError) as exc:
                call.failure = call.failure or exc

    def _load_here(self, call: Call, record: ModelRecord) -> LocalCopy:
        self._permit(call)
        call.excludes.add(self._me)
        call.tried.discard(self._me)
        return self._loader.ensure(
            call.model_id,
            record,
            last_used_ms=call.last_used_ms,
            known_size_units=call.known_size_units,
            awaited=bool(call.method),
        )

    async def _when_ready(self, call: Call, copy: LocalCopy) -> LocalRoute | None:
        """Wait for a load; None means "look again". A failure is remembered, and ends a load-local
        hop.
        """
        if call.method and not copy.settled.is_set():
            self._loader.ensure_awaited(copy)
            call.has_waited = True
        await self._waiters.wait(copy, call)
        if copy.failure is not None:
            call.failure = load_failure(copy.failure)
            call.excludes.add(self._me)
            if call.hop is not Hop.EXTERNAL or isinstance(copy.failure, ModelNotFoundError):
                raise call.failure
            if isinstance(copy.failure, LoadFailedError) and copy.failure.is_permanent:
                call.may_load = False
            return None
        call.excludes.discard(self._me)
        return self._ready_here(call)

    # --- what went wrong ---

    def _failed_here(self, call: Call, route: LocalRoute, outcome: Outcome, message: str) -> bool:
        match outcome:
            case Outcome.LOST:
                return self._copies.lost(call.model_id, route.load_id, anyio.current_time())
            case Outcome.RUNTIME_UNAVAILABLE:
                return self._try_other_copies(call, self._me, message)
            case _:
                call.tried.add(self._me)
                call.excludes.add(self._me)
                call.failure = RuntimeUnavailableError(
                    f"the model runtime of instance {self._me} does not answer: {message}"
                )
                if call.hop is not Hop.EXTERNAL:
                    call.failure.hop_result = Outcome.UNREACHABLE.value
                return call.hop is Hop.EXTERNAL

    def _failed_there(self, call: Call, route: PeerRoute, outcome: Outcome, message: str) -> bool:
        instance_id = route.instance_id
        if outcome is Outcome.RUNTIME_UNAVAILABLE:
            return self._try_other_copies(call, instance_id, message)
        call.tried.add(instance_id)
        if outcome is Outcome.NOT_HERE:
            return True  # it may load it yet; only as a copy it is out of the question
        call.excludes.add(instance_id)
        match outcome:
            case Outcome.UNREACHABLE:
                self._members.mark_unreachable(instance_id, anyio.current_time())
                call.failure = call.failure or NoRoomError(
                    f"instance {instance_id} is gone: {message}"
                )
            case Outcome.LOAD_FAILED:
                call.failure = LoadFailedError(message)
            case Outcome.LOAD_REFUSED:
                call.failure = LoadFailedError(message, is_permanent=True)
                call.may_load = False
            case Outcome.LOAD_TIMEOUT:
                call.failure = LoadTimeoutError(message)
        # The peer has reloaded a lost model, if that could help: it is the model's own answer.
        return outcome is not Outcome.LOST

    def _try_other_copies(self, call: Call, instance_id: InstanceId, message: str) -> bool:
        """The runtime's own answer: worth another copy, never another load (spec core 10.6)."""
        call.tried.add(instance_id)
        call.may_load = False
        call.failure = RuntimeUnavailableError(message)
        if call.hop is Hop.HIT_ONLY:
            return False
        copy = self._copies.get(call.model_id)
        if copy is not None and self._me not in call.tried:
            return True
        record = self._registry.get(call.model_id)
        others = set() if record is None else set(record.copies) - call.tried - {self._me}
        return call.hops_left > 0 and any(self._members.handle(i) is not None for i in others)

    # --- small things ---

    def _permit(self, call: Call) -> tuple[int, ...]:
        """Answer the injection path of the method; raises ``MethodRefusedError`` (around 6.4)."""
        if not call.method:
            return ()
        name = call.method[1:]
        methods = self._parameters.methods
        path = methods.get(name)
        if call.method.startswith(MANAGEMENT_SERVICES) or (
            path is None and methods and not self._parameters.allow_any_method
        ):
            raise MethodRefusedError(f"Method not found or not permitted: {name}")
        return path or ()

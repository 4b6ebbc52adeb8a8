"""The one question: where does this call go now? (spec core 2.4, design section 2)

Owns the order of attempts of one call: a copy that is ready here, a copy elsewhere, a load. Does
not move a byte, and does not choose where to load: ``placer`` does.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import anyio

from mm.config import Config
from mm.core.calls import (
    REFUSALS_MAX,
    Call,
    Hop,
    LocalRoute,
    Outcome,
    PeerRoute,
    Route,
)
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.core.routing import Action, Again
from mm.errors import (
    LoadFailedError,
    LoadTimeoutError,
    MeshError,
    ModelMovedError,
    ModelNotFoundError,
    NoRoomError,
    QueueFullError,
    StoreUnavailableError,
)
from mm.mesh.copies import Copies
from mm.mesh.decisions import Decisions
from mm.mesh.hop_errors import hop_error, hop_result, load_failure
from mm.mesh.hop_routes import HopRoutes
from mm.mesh.load_pusher import LoadPusher
from mm.mesh.loader import Loader
from mm.mesh.local_copy import LocalCopy
from mm.mesh.measures import MISS_MIN_MS
from mm.mesh.members import Members
from mm.mesh.outcomes import Outcomes
from mm.mesh.permissions import Permissions
from mm.mesh.placer import Placer
from mm.mesh.ports import RuntimeParameters
from mm.mesh.registry import Registry
from mm.mesh.retries import Retries
from mm.mesh.sentinel import Sentinel
from mm.mesh.vmodels import VModels
from mm.mesh.waiters import Waiters
from mm.table import LOCAL, NONE

logger = logging.getLogger(__name__)
_INVOKING = "model %s: invoking model runtime gRPC method: %s"  # as in the Java mesh


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
        pusher: LoadPusher,
        sentinel: Sentinel,
        rng: random.Random,
    ) -> None:
        self._me = config.instance_id
        self._registry = registry
        self._vmodels = vmodels
        self._members = members
        self._copies = copies
        self._loader = loader
        self._waiters = waiters
        self._placer = placer
        self._pusher = pusher
        self._sentinel = sentinel
        #: Copies that peers call: nobody wants to hear of the others.
        self._watched = pusher.watched
        self._rng = rng
        self._permissions = Permissions(parameters)
        self._retries = Retries(self._me, members, copies.counters)
        self._table, self._counters = copies.table, copies.counters
        self._call_limits = copies.call_limits
        self._clock = copies.clock
        self._hop_routes = HopRoutes(self._me, members)
        self._decisions = Decisions(
            config=config,
            registry=registry,
            members=members,
            copies=copies,
            limits_concurrency=parameters.limit_model_concurrency,
            rng=rng,
        )
        self._outcomes = Outcomes(self._me, members, copies, self._retries, self._decisions)
        #: Of attempts that the wire made by itself.
        self.tried, self.route_there = self._outcomes.tried, self._outcomes.route_there
        self.logs_each_call = config.logs.each_invoke
        #: Calls between `route` and `finished`.
        self.routes_open = 0
        for each in (waiters, copies.call_limits):
            if each is not None:
                vmodels.listen(partial(each.vmodel_changed, vmodels.has_moved))

    # --- the question ---

    async def route(self, call: Call) -> Route:
        """Answer where to send the call now; waits for loads. Raises ``MeshError``.

        A call that is to wait at a peer counts among those that wait until ``answer_began``, or
        ``finished``.
        """
        try:
            route = self._hit(call) or await self._look(call)
            while isinstance(route, LocalRoute) and self._call_limits is not None and call.method:
                if await self._has_slot(call, route):
                    break
                route = await self._look(call)
            if isinstance(route, PeerRoute):
                route = self._named(call, route)
                if route.may_wait:
                    call.end_turn()
                    self._waiters.enter(call)
        except ModelMovedError as exc:
            # It goes on as another call, in the same turn.
            if call.hop is not Hop.EXTERNAL:
                call.end_turn()
                self._refused(call, exc)
            raise
        except BaseException as exc:
            call.end_turn()
            if isinstance(exc, MeshError):
                self._refused(call, exc)
            raise
        self._opened(call, route)
        return route

    def _named(self, call: Call, route: PeerRoute) -> PeerRoute:
        """Tell a peer where the call may wait, for a load or a slot, which vmodel it is for."""
        if call.named_by is None or not (route.may_wait or self._call_limits is not None):
            return route
        # If it is refused, the load stays noted as sent there: others may have sent it.
        self._vmodels.refuse_if_moved(call.named_by, call.model_id)
        return replace(route, named_by=self._vmodels.as_mirrored(call.named_by))

    def request_grew(self, call: Call, size_bytes: int) -> None:
        """Hear of more bytes of a request that waits; raises ``WaitersFullError``."""
        self._waiters.grew(call, size_bytes)

    def request_passed_on(self, call: Call) -> None:
        """Hear that nothing of a request is kept here any more."""
        self._waiters.passed_on(call)

    def answer_began(self, call: Call) -> None:
        """Hear that an answer comes: if the call waited at a peer, that is over."""
        self._waiters.leave(call)

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
            self._sentinel.sent(route.instance_id)
            return
        call.is_here = True
        if call.sender is not None or self._watched:
            self._pusher.began(call)
        if call.method:
            self._counters.calls += 1
            self._counters.hits += not call.has_waited
            self._counters.misses += call.has_waited

    def _refused(self, call: Call, error: MeshError) -> None:
        """Count an error, and translate it for a peer."""
        call.tell_retry(error)
        if call.hop is Hop.EXTERNAL:
            self._counters.failures += 1
            error.hop_result = None
        elif error.hop_result is None:
            error.hop_result = hop_result(error)

    def finished(self, call: Call, route: Route, outcome: Outcome, message: str = "") -> bool:
        """Give the route back; answers whether asking again makes sense."""
        self.routes_open -= 1
        call.end_turn()
        self._waiters.leave(call)
        if isinstance(route, LocalRoute):
            if self._call_limits is not None and call.method:
                self._call_limits.leave(route.load_id)
            self._unpin(route)
            call.is_here = False
            if self._watched:
                self._pusher.ended(call)
        else:
            self._sentinel.ended(route.instance_id, outcome)
        if isinstance(route, PeerRoute) and route.hop is Hop.LOAD_LOCAL:
            self._placer.load_ended(call, route, outcome)
        return self._outcomes.weigh(call, route, outcome, message)

    async def resolve(
        self, vmodel_id: str, missing: Collection[ModelId] = (), *, fresh: bool = False
    ) -> ModelId:
        """Answer the model of a vmodel, not one that is ``missing``; raises ``MeshError``."""
        return await self._vmodels.resolve(vmodel_id, missing, fresh=fresh)

    def in_flight(self, model_id: ModelId) -> int:
        """Answer the calls that the local copy has in flight."""
        return self._table.in_flight(model_id) if model_id in self._table else 0

    def report_state(self, call: Call, route: PeerRoute, state: str) -> None:
        """Note what a peer told of itself as it refused a load (``mm-hop-state``)."""
        self._placer.refused(call, route, state)

    def tell_load(self, call: Call) -> int:
        """Answer the calls that the copy here has in flight besides this one; its sender is taken
        to know it from now on.
        """
        count = call.load_told = self.in_flight(call.model_id) - call.is_here
        if call.sender is not None and not call.is_here and count:
            self._pusher.sent_away(call.model_id, call.sender, count)
        return count

    def loads_pushed(self, sender: InstanceId, loads: Mapping[ModelId, int]) -> None:
        """Note the calls in flight that a peer's copies have, as it told of its own accord."""
        handle = self._members.handle_if_known(sender)
        if handle is not None:
            for model_id, in_flight in loads.items():
                if model_id in self._table:
                    self._table.report_load(handle, model_id, in_flight)

    def report_load(self, route: PeerRoute, in_flight: int) -> None:
        """Note the calls in flight that a peer's copy told of in its reply (``mm-hop-load``)."""
        handle = self._members.handle_if_known(route.instance_id)
        if handle is not None:
            self._table.report_load(handle, route.model_id, in_flight)

    # --- attempts, cheapest first ---

    def _hit(self, call: Call) -> Route | None:
        """The hit path: no await, no record, a look or two into the table; None if it takes more.

        It answers what ``routing.decide`` would.
        """
        if call.attempts or call.tried:
            return None
        model_id = call.model_id
        copy = self._copies.get(model_id)
        is_here = False
        if copy is not None and copy.serves:
            is_here = True
            if call.may_redirect and self._decisions.is_busy(model_id):
                raise hop_error(Outcome.REDIRECT, f"the copy of model {model_id} here is busy")
            # What `routing.stays` says, the cheapest question first.
            if (
                call.hop is not Hop.EXTERNAL
                or not self._table.in_flight(model_id)
                or self._decisions.favours_self(call)
            ):
                call.attempts += 1
                return self._pin(call, copy)
        elif call.hop is not Hop.EXTERNAL or model_id not in self._table:
            return None
        chosen = self._table.choose(model_id, self._rng.getrandbits(64))
        if chosen == LOCAL and copy is not None:
            call.attempts += 1
            return self._pin(call, copy)
        instance_id = None if chosen == NONE else self._members.instance_of(chosen)
        if instance_id is None:
            return None
        call.attempts += 1
        may_redirect = is_here or len(self._table.peers(model_id)) > 1
        return self._hop_routes.to(call, instance_id, Hop.HIT_ONLY, may_redirect=may_redirect)

    def _pin(self, call: Call, copy: LocalCopy) -> LocalRoute | None:
        """Send it to the copy here; None if that is about to leave."""
        injection_path = self._permissions.injection_path(call.method)
        if not self._table.pin(call.model_id):
            return None
        now_ms = call.last_used_ms or self._clock.now_ms()
        self._table.touch(call.model_id, now_ms)
        if self.logs_each_call and call.method:
            logger.info(_INVOKING, call.model_id, call.method[1:])
        return LocalRoute(call.model_id, injection_path, copy.load_id)

    def _unpin(self, route: LocalRoute) -> None:
        self._table.unpin(route.model_id)
        self._copies.unloader.unpinned(route.model_id)

    async def _has_slot(self, call: Call, route: LocalRoute) -> bool:
        """Wait for one of the few slots of the copy here; False if the call is to look again, the
        copy being gone or having too many calls. The route is given back then.
        """
        assert self._call_limits is not None
        has_slot, copy = False, self._copies.get(route.model_id)
        try:
            if copy is not None and copy.load_id == route.load_id:
                self._vmodels.refuse_if_moved(call.named_by, route.model_id)
                has_slot = await self._call_limits.enter(copy, call.named_by)
        except QueueFullError as exc:
            again = self._retries.failed_here(call, Outcome.EXHAUSTED, exc.message)
            if again is Again.NO or not self._decisions.has_copy(call):
                exc.hop_result = Outcome.EXHAUSTED.value
                raise
        finally:
            if not has_slot:
                self._unpin(route)
        return has_slot

    async def _look(self, call: Call) -> Route:
        while True:
            begun = await self._begin(call)
            if isinstance(begun, PeerRoute):
                return begun
            found = await self._when_ready(call, begun)
            if found is not None:
                return found

    async def _begin(self, call: Call) -> PeerRoute | LocalCopy:
        """One attempt: the copy to use, or wait for, here; or the instance to ask."""
        record = None
        if call.hop is not Hop.HIT_ONLY:
            is_known = call.hop is not Hop.EXTERNAL
            if call.model_id:
                record = await self._registry.find(call.model_id, is_known_to_peer=is_known)
            if record is None:
                raise ModelNotFoundError
        decision = self._decisions.decide(call, record)
        call.attempts += 1
        match decision.action:
            case Action.SERVE | Action.WAIT_HERE:
                copy = self._copies.get(call.model_id)
                assert copy is not None, decision
                return copy
            case Action.FORWARD | Action.WAIT_THERE | Action.RELAY:
                return self._hop_routes.by(call, decision)
            case Action.LOAD:
                assert record is not None, decision
                return self._place(call, record)
            case Action.FAIL:
                raise self._decisions.failure(call, decision.reason)

    def _place(self, call: Call, record: ModelRecord) -> PeerRoute | LocalCopy:
        """Choose who loads it: this instance answers with the copy on its way, another with a
        route.
        """
        now_ms = self._clock.now_ms()
        if call.hop is Hop.LOAD_LOCAL:
            self._placer.refuse_if_pointless(call, record, now_ms)
            if self._me in call.excludes:
                raise call.failure or hop_error(Outcome.STALE, "loading here was tried already")
            self._placer.check(call, record, now_ms)
            return self._load_here(call, record)
        while True:
            try:
                chosen = self._placer.choose(call, record, now_ms)
            except MeshError as exc:
                decision = self._decisions.last_resort(call, record)
                if decision.action is Action.FAIL:
                    raise
                call.failure = call.failure or exc
                return self._hop_routes.by(call, decision)
            if chosen != self._me:
                route = self._hop_routes.to(call, chosen, Hop.LOAD_LOCAL, may_wait=True)
                return replace(route, may_refuse=call.refusals_count < REFUSALS_MAX)
            try:
                return self._load_here(call, record)
            except (NoRoomError, QueueFullError) as exc:
                call.failure = call.failure or exc

    def _load_here(self, call: Call, record: ModelRecord) -> LocalCopy:
        self._permissions.injection_path(call.method)
        call.excludes.add(self._me)
        call.tried.discard(self._me)
        return self._loader.ensure(
            call.model_id,
            record,
            last_used_ms=call.last_used_ms,
            known_size_units=call.known_size_units,
            awaited=bool(call.method),
            # Asked for beside others, not for want of one: those may be too new to be known here.
            twins=frozenset() if call.method else frozenset(call.excludes),
        )

    async def _when_ready(self, call: Call, copy: LocalCopy) -> LocalRoute | None:
        """Wait for a load; None means "look again". A failure is remembered, and ends a load-local
        hop.
        """
        if copy.serves:
            return self._pin(call, copy)
        if call.method and not copy.settled.is_set():
            self._loader.ensure_awaited(copy)
            call.has_waited = True
        if not copy.settled.is_set():
            self._vmodels.refuse_if_moved(call.named_by, call.model_id)
        began_s = anyio.current_time()
        await self._waiters.wait(copy, call)
        if copy.failure is not None:
            call.failure = load_failure(copy.failure)
            is_store_away = isinstance(copy.failure, StoreUnavailableError)
            call.is_store_away = call.is_store_away or is_store_away
            if is_store_away or isinstance(copy.failure, LoadFailedError | LoadTimeoutError):
                call.load_failures_count += 1
            call.excludes.add(self._me)
            if call.hop is not Hop.EXTERNAL or isinstance(copy.failure, ModelNotFoundError):
                raise call.failure
            if isinstance(copy.failure, LoadFailedError) and copy.failure.is_permanent:
                call.may_load = False
            return None
        call.excludes.discard(self._me)
        route = self._pin(call, copy)
        waited_ms = 1000 * (anyio.current_time() - began_s)
        if route is not None and call.method and waited_ms > MISS_MIN_MS:
            self._copies.measures.miss_ms.observe(waited_ms, call.model_id)
        if route is None and call.waiting_since_s is not None and self._waiters.has_time(call):
            # It left before this call's turn: no view was wrong, and waiting has its own bound.
            call.attempts -= 1
        return route

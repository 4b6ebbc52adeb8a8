"""The management of models: register, unregister, status, ensure-loaded (spec core 2.10, around 5).

Owns the meaning of the calls; messages and field names are ``edge.management``'s, what a status
says ``statuses``'s.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Final

import anyio
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.calls import Call, Hop, LocalRoute, Outcome, PeerRoute
from mm.core.first_use import HOUR_MS, first_use_ms
from mm.core.ids import ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.records import ModelInfo, ModelRecord, RecordError
from mm.errors import (
    LimitError,
    LoadFailedError,
    LoadTimeoutError,
    MeshError,
    ModelExistsError,
    ModelNotFoundError,
    ModelReferencedError,
    NoEligibleInstanceError,
    StatusCode,
    StoreUnavailableError,
)
from mm.mesh.confirmations import Entry
from mm.mesh.copies import Copies
from mm.mesh.id_checks import check_length_of_new, check_model_id
from mm.mesh.local_copy import LocalCopy
from mm.mesh.new_models import check_new_model, check_type
from mm.mesh.policies import Policies, PolicyState
from mm.mesh.ports import Clock, ModelStatus, PeerCallError, Peers
from mm.mesh.registry import Registry
from mm.mesh.router import Router
from mm.mesh.seldom import FAILURES_LOUD_MAX, Seldom
from mm.mesh.statuses import Statuses
from mm.mesh.vmodels import VModels

logger = logging.getLogger(__name__)

#: A registration that says nothing of a policy.
NO_POLICY: Final = ModelPolicy()


@dataclass(frozen=True, slots=True)
class EnsureRequest:
    """An ensure-loaded, from a client, a peer or ourselves."""

    model_id: ModelId
    sync: bool
    last_used_ms: int = 0
    balanced: bool = False


class Models:
    """What clients manage. Every method raises ``MeshError`` for what the client must hear."""

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        vmodels: VModels,
        statuses: Statuses,
        policies: Policies,
        copies: Copies,
        router: Router,
        peers: Peers,
        clock: Clock,
    ) -> None:
        self._config = config
        self._me = config.instance_id
        self._registry = registry
        self._vmodels = vmodels
        self.statuses = statuses
        self._policies = policies
        self._copies = copies
        self._router = router
        self._peers = peers
        self._clock = clock
        self._group: TaskGroup | None = None
        self._failures_told = Seldom(loud_max=FAILURES_LOUD_MAX)
        #: Loads without a waiter that a task sees through.
        self._followed: set[ModelId] = set()

    def open(self, group: TaskGroup) -> None:
        """Name the task group for loads that nobody waits for: the node's."""
        self._group = group

    # --- the calls ---

    async def register(
        self,
        model_id: ModelId,
        info: ModelInfo,
        *,
        load_now: bool,
        sync: bool,
        last_used_ms: int,
        balanced: bool = False,
        policy: ModelPolicy = NO_POLICY,
    ) -> ModelStatus:
        """Create the record, or find it as asked for; with ``load_now`` load a first copy.

        A policy that is given replaces the one that a model has; none leaves it as it is.
        """
        check_model_id(model_id)
        check_type(info)
        created = await self._create(
            model_id, info, load_now=load_now, last_used_ms=last_used_ms, policy=policy
        )
        if load_now:
            return await self.ensure_loaded(
                EnsureRequest(model_id, sync, last_used_ms=last_used_ms, balanced=balanced)
            )
        return ModelStatus("NOT_LOADED") if created else await self.status(model_id)

    async def unregister(self, model_id: ModelId) -> None:
        """Delete the record; instances that hold a copy unload it. An unknown id is a success."""
        check_model_id(model_id)
        check_length_of_new(model_id, self._registry.mirror, self._config)
        references = self._vmodels.references
        if references.count(model_id):
            record = await self._registry.read(model_id)
            if record is None or record.references <= 0:  # wrong, or news that is not here yet
                await self._vmodels.look_at_references(model_id)

        def delete(record: ModelRecord | None) -> ModelRecord | None:
            if record is not None and (record.references > 0 or references.count(model_id)):
                raise ModelReferencedError(f"Model {model_id} has referents")
            if record is not None:
                self._require_writable()
            return None

        try:
            await self._registry.update(model_id, delete, fresh=True)
        except RecordError:
            self._require_writable()
            logger.warning("model %s is unregistered although its record is unreadable", model_id)
            await self._registry.delete_corrupt(model_id)

    async def set_policy(
        self, model_id: ModelId, copies_min: int | None, pinned: bool | None
    ) -> PolicyState:
        """Change what is given of a model's policy; with nothing given only tell it."""
        check_model_id(model_id)
        if copies_min is None and pinned is None:
            return await self._policies.get(model_id)
        self._require_writable()
        return await self._policies.set(model_id, copies_min, pinned)

    async def status(self, model_id: ModelId, *, ask_peers: bool = True) -> ModelStatus:
        """Answer where the model is; unknown is a status, not an error."""
        check_model_id(model_id)
        record = await self._registry.find(model_id)
        if record is None:
            return ModelStatus("NOT_FOUND")
        if ask_peers:
            return await self.statuses.find(model_id, record)
        return self.statuses.here(model_id, record)

    async def ensure_loaded(self, request: EnsureRequest, call: Call | None = None) -> ModelStatus:
        """See that a copy is loaded or loading somewhere. A failed load is a status, not an error.

        ``call`` is given for a request that came from a peer, with its hop.
        """
        check_model_id(request.model_id)
        is_known = call is not None and call.hop is not Hop.EXTERNAL
        record = await self._registry.find(request.model_id, is_known_to_peer=is_known)
        if record is None:
            raise ModelNotFoundError
        # Whoever says that it will be used in the future would keep it from eviction for ever.
        last_used_ms = min(request.last_used_ms, self._clock.now_ms())
        request = replace(request, last_used_ms=last_used_ms)
        if call is None:
            call = Call(request.model_id, balanced=request.balanced)
        call.last_used_ms = last_used_ms
        try:
            return await self._ensure(request, call)
        except (LoadFailedError, LoadTimeoutError) as exc:
            if exc.hop_result is not None:
                raise
            return await self._failed_status(request.model_id, exc)

    # --- behind them ---

    async def _create(
        self,
        model_id: ModelId,
        info: ModelInfo,
        *,
        load_now: bool,
        last_used_ms: int,
        policy: ModelPolicy = NO_POLICY,
    ) -> bool:
        now_ms = self._clock.now_ms()
        used_ms = min(last_used_ms, now_ms) or first_use_ms(now_ms, load_now=load_now)
        created = False

        def named_by() -> list[Entry]:
            mirror = self._vmodels.mirror
            return [(mirror, each) for each in self._vmodels.references.of(model_id)]

        def change(record: ModelRecord | None) -> ModelRecord:
            changed = wanted(record)
            if changed != record:
                self._require_writable()
            return changed

        def wanted(record: ModelRecord | None) -> ModelRecord:
            nonlocal created
            created = record is None
            if record is None:
                check_new_model(model_id, info, self._registry, self._config)
                # Vmodels may name one that vanished, or seem to: the store checks that they do.
                count = self._vmodels.references.count(model_id)
                record = ModelRecord(info, last_used_ms=used_ms, references=count)
                return self._policies.applied(model_id, record, policy)
            if record.info != info:
                raise ModelExistsError("Model already exists with different attribute values")
            if policy != NO_POLICY:
                record = self._policies.applied(model_id, record, policy)
            if not load_now and last_used_ms and used_ms > record.last_used_ms + HOUR_MS:
                return record.used(used_ms)
            return record

        try:
            try:
                await self._registry.update(model_id, change, relied_on=named_by)
            except ModelExistsError:
                created = False
            if not created:
                # The mirror may be a moment behind an unregistration: the store has the last word.
                await self._registry.update(model_id, change, fresh=True, relied_on=named_by)
        except RecordError as exc:
            raise MeshError(str(exc), code=StatusCode.FAILED_PRECONDITION) from exc
        return created

    async def _ensure(self, request: EnsureRequest, call: Call) -> ModelStatus:
        """The routing loop of a call without a method: a route to a ready copy is the goal."""
        if not request.sync:
            return await self._ensure_soon(request, call)
        while True:
            route = await self._router.route(call)
            if isinstance(route, LocalRoute):
                self._router.finished(call, route, Outcome.ABANDONED)
                return await self._present(request.model_id, "LOADED")
            answer, again = await self._ask_peer(request, call, route, sync=True)
            if answer is not None:
                return await self._present_new(request.model_id, answer)
            if not again:
                raise call.failure or LoadFailedError("no instance took the load")

    async def _ask_peer(
        self, request: EnsureRequest, call: Call, route: PeerRoute, *, sync: bool
    ) -> tuple[ModelStatus | None, bool]:
        """Forward it; answers the peer's status, or None and whether to try elsewhere."""
        config = self._config
        outcome, message, answer = Outcome.ABANDONED, "", None
        again = False
        try:
            answer = await self._peers.ensure_loaded(
                route,
                sync=sync,
                last_used_ms=request.last_used_ms,
                timeout_s=config.ensure_loaded_sync_timeout_s
                if sync
                else config.ensure_loaded_timeout_s,
            )
            outcome = Outcome.ANSWERED
        except PeerCallError as exc:
            outcome, message = exc.outcome, exc.message
            call.hear_retry(exc.retry_after_ms)
            if exc.hop_state is not None:
                self._router.report_state(call, route, exc.hop_state)
        finally:
            again = self._router.finished(call, route, outcome, message)
        return answer, again

    async def _ensure_soon(self, request: EnsureRequest, call: Call) -> ModelStatus:
        """Start it, and answer once it is known where; the load goes on without the caller."""
        copy = self._copies.get(request.model_id)
        if copy is not None and copy.serves:
            used_ms = request.last_used_ms or self._clock.now_ms()
            self._copies.table.touch(request.model_id, used_ms)
            return await self._present(request.model_id, "LOADED")
        while True:
            begun = await self._router.begin(call)
            if isinstance(begun, LocalCopy):
                with anyio.move_on_after(self._config.ensure_loaded_timeout_s):
                    await begun.started.wait()
                if not begun.settled.is_set():
                    assert self._group is not None, "open() first"
                    if request.model_id not in self._followed:
                        self._followed.add(request.model_id)
                        self._group.start_soon(self._follow, request, call)
                    return await self._present(request.model_id, "LOADING")
                if begun.serves:
                    return await self._present(request.model_id, "LOADED")
                call.failure = begun.failure or call.failure
                continue
            answer, again = await self._ask_peer(request, call, begun, sync=False)
            if answer is not None:
                return await self._present_new(request.model_id, answer)
            if not again:
                raise call.failure or LoadFailedError("no instance took the load")

    async def _follow(self, request: EnsureRequest, call: Call) -> None:
        """Go on with a load that nobody waits for: if it fails here, try elsewhere (spec core
        3.10).
        """
        if call.hop is not Hop.EXTERNAL:
            call = Call(
                call.model_id,
                last_used_ms=call.last_used_ms,
                known_size_units=call.known_size_units,
                excludes=set(call.excludes) - {self._me},
            )
        call.is_own = True
        try:
            await self._ensure(replace(request, sync=True), call)
        except ModelNotFoundError:
            logger.debug("model %s was unregistered before it was loaded", request.model_id)
        except MeshError as exc:
            level = self._failures_told.level(anyio.current_time())
            logger.log(level, "model %s is not loaded: %s", request.model_id, exc.message)
        finally:
            self._followed.discard(request.model_id)

    async def _present_new(self, model_id: ModelId, answer: ModelStatus) -> ModelStatus:
        """Present what a peer did a moment ago: the mirror need not have its record yet."""
        try:
            await self._registry.read(model_id)
        except (StoreUnavailableError, LimitError) as exc:
            logger.debug("model %s: presented from the mirror: %s", model_id, exc)
        return await self._present(model_id, answer.status, answer)

    async def _present(
        self, model_id: ModelId, status: str, answer: ModelStatus | None = None
    ) -> ModelStatus:
        record = await self._registry.find(model_id)
        if record is None:
            return ModelStatus("NOT_FOUND")
        return self.statuses.present(status, model_id, record, answer)

    async def _failed_status(self, model_id: ModelId, failure: MeshError) -> ModelStatus:
        status = await self._present(model_id, "LOADING_FAILED")
        if isinstance(failure, NoEligibleInstanceError) or not status.errors:
            # The controller reads the first error alone (interop 1.4).
            errors = (failure.message, *status.errors)
            return ModelStatus("LOADING_FAILED", errors, status.copies)
        return status

    def _require_writable(self) -> None:
        if self._config.kv_read_only:
            raise MeshError("model-mesh read-only mode", code=StatusCode.UNAVAILABLE)

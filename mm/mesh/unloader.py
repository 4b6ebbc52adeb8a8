"""Unloads: waits for the calls in flight, asks the runtime, and gives the memory back (spec core
3.13).

Owns what happens after a copy left the table. Does not decide what leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup

from mm.core.accounting import UnloadAccounting
from mm.core.ids import ModelId
from mm.errors import LoadFailedError, RuntimeUnavailableError
from mm.limits import Limits
from mm.mesh.measures import Measures
from mm.mesh.ports import Runtime, RuntimeCallError
from mm.mesh.seldom import Seldom
from mm.mesh.statistics import Counters
from mm.table import CopyState, Table

logger = logging.getLogger(__name__)

#: Calls in flight are looked at this often besides being told of: other threads pin copies too.
IN_FLIGHT_LOOK_S = 0.25
#: After a try that failed, if it was the first, or somebody has begun to wait for its end.
REST_MIN_S = 1.0


class Unloader:
    """One unload at a time for each model; ``on_freed`` is called when memory came free."""

    def __init__(
        self,
        table: Table,
        accounting: UnloadAccounting,
        runtime: Runtime,
        counters: Counters,
        measures: Measures,
        limits: Limits,
        on_freed: Callable[[], None],
        on_capacity: Callable[[], None],
        on_ended: Callable[[ModelId], None],
    ) -> None:
        self._table = table
        self._accounting = accounting
        self._runtime = runtime
        self._counters = counters
        self._measures = measures
        self._limits = limits
        self._on_freed = on_freed
        self._on_capacity = on_capacity
        self._on_ended = on_ended
        self._ended: dict[ModelId, anyio.Event] = {}
        self._idle: dict[ModelId, anyio.Event] = {}
        self._failures_told = Seldom()
        self._given_up_told = Seldom()
        self._at_once = anyio.CapacityLimiter(limits.unloads_at_once_max)
        #: When all unloads that failed were last tried again because one had succeeded.
        self._all_nudged_s: float | None = None
        self._lost: set[ModelId] = set()
        #: Set to try an unload that failed again at once: somebody wants to load the model.
        self._nudges: dict[ModelId, anyio.Event] = {}
        #: The same was wished while an unload was being tried: if that fails it rests shortly.
        self._wanted: set[ModelId] = set()

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._ended

    @property
    def count(self) -> int:
        """Unloads under way."""
        return len(self._ended)

    def unpinned(self, model_id: ModelId) -> None:
        """Hear that a call left; the last one lets a waiting unload go on."""
        idle = self._idle.get(model_id)
        if idle is not None and self._table.in_flight(model_id) == 0:
            idle.set()

    async def wait_ended(self, model_id: ModelId) -> None:
        """Return once no unload of this model is under way; a load of the same id must come after
        it.

        Raises ``LoadFailedError`` if the unload was given up: the runtime may still hold the old
        copy.
        """
        while (ended := self._ended.get(model_id)) is not None:
            self.nudge(model_id)
            if model_id in self._lost:
                raise LoadFailedError(f"Prior unload of model {model_id} failed unrecoverably")
            await ended.wait()

    def nudge(self, model_id: ModelId) -> None:
        """Have an unload that failed tried again now: somebody wants the model."""
        if (nudge := self._nudges.get(model_id)) is not None:
            nudge.set()
        elif model_id in self._ended:
            self._wanted.add(model_id)

    def begin(
        self,
        group: TaskGroup,
        model_id: ModelId,
        weight_units: int,
        *,
        delay_s: float = 0.0,
        in_flight_wait_s: float | None = None,
    ) -> None:
        """Unload a copy that left the table and return its memory to the accounting, however long
        that takes. From now on a load of the same model waits.
        """
        if in_flight_wait_s is None:
            in_flight_wait_s = self._limits.in_flight_wait_s
        # The state must have a place until the unload ended: who feeds the table forgets what is
        # ABSENT, and so is a copy that was evicted between its claim and its load.
        self._table.add(model_id)
        self._table.set_state(model_id, CopyState.UNLOADING)
        previous, ended = self._ended.get(model_id), anyio.Event()
        self._ended[model_id] = ended
        waits_s = (delay_s, in_flight_wait_s)
        group.start_soon(self._unload, model_id, weight_units, waits_s, previous, ended)

    async def _unload(
        self,
        model_id: ModelId,
        weight_units: int,
        waits_s: tuple[float, float],
        previous: anyio.Event | None,
        ended: anyio.Event,
    ) -> None:
        try:
            if previous is not None:
                await previous.wait()
            delay_s, in_flight_wait_s = waits_s
            if delay_s:
                await anyio.sleep(delay_s)
            await self._wait_idle(model_id, in_flight_wait_s)
            await self._ask(model_id, weight_units, ended)
        finally:
            if self._ended[model_id] is ended:
                del self._ended[model_id]
                self._wanted.discard(model_id)
            ended.set()
        self._on_ended(model_id)

    async def _wait_idle(self, model_id: ModelId, wait_max_s: float) -> None:
        """Return when no call uses the copy, or when that took too long."""
        idle = self._idle[model_id] = anyio.Event()
        try:
            with anyio.move_on_after(wait_max_s) as waited:
                while self._table.begin_unload(model_id) and not idle.is_set():
                    with anyio.move_on_after(IN_FLIGHT_LOOK_S):
                        await idle.wait()
        finally:
            self._idle.pop(model_id, None)
        if waited.cancelled_caught:
            logger.warning(
                "model %s is unloaded with %d calls in flight after %.0f s",
                model_id,
                self._table.in_flight(model_id),
                wait_max_s,
            )

    async def _rest(self, model_id: ModelId, seconds: float) -> None:
        """Wait before the next try, or until a load of the model begins to wait for it."""
        nudge = self._nudges[model_id] = anyio.Event()
        try:
            with anyio.move_on_after(seconds):
                await nudge.wait()
        finally:
            del self._nudges[model_id]

    def runtime_lost(self) -> None:
        """What is being unloaded went with the runtime: have all of it tried again, which finds
        that out.
        """
        self._wanted.update(self._ended)
        for nudge in self._nudges.values():
            nudge.set()

    def _nudge_all(self) -> None:
        """The runtime unloads again: let the others not wait out their rests, now and then."""
        now_s = anyio.current_time()
        if self._all_nudged_s is None or now_s - self._all_nudged_s >= self._limits.unload_retry_s:
            self._all_nudged_s = now_s
            for nudge in self._nudges.values():
                nudge.set()

    async def _ask(self, model_id: ModelId, weight_units: int, ended: anyio.Event) -> None:
        tries = 0
        while True:
            try:
                async with self._at_once:
                    self._wanted.discard(model_id)
                    began_s = anyio.current_time()
                    with anyio.fail_after(self._limits.unload_timeout_s):
                        await self._runtime.unload(model_id)
            except (RuntimeCallError, RuntimeUnavailableError, TimeoutError) as exc:
                tries += 1
                self._measures.unload_tries_failed += 1
                self._failed(model_id, weight_units, tries, exc)
                is_short = tries == 1 or model_id in self._wanted
                await self._rest(model_id, REST_MIN_S if is_short else self._limits.unload_retry_s)
            else:
                break
        self._measures.unload_ms.observe(1000 * (anyio.current_time() - began_s), model_id)
        if self._nudges:
            self._nudge_all()
        self._counters.unloads += 1
        if self._ended[model_id] is ended:
            self._table.set_state(model_id, CopyState.ABSENT)
        if model_id in self._lost:
            self._lost.discard(model_id)
            freed = self._accounting.unload_recovered(weight_units)
            self._on_capacity()
        else:
            freed = self._accounting.unload_completed(weight_units)
        if freed:
            self._on_freed()

    def _failed(self, model_id: ModelId, weight_units: int, tries: int, exc: Exception) -> None:
        """Tell of the first failure and of the last; after that the memory counts as lost, though
        it is tried on: a runtime that restarted answers that it has nothing to unload.
        """
        now_s = anyio.current_time()
        if tries == 1:
            logger.log(
                self._failures_told.level(now_s),
                "unload of model %s failed, will be tried again (others are told at DEBUG): %s",
                model_id,
                exc,
            )
        if tries == self._limits.unload_retries_max:
            level = self._given_up_told.level(now_s)
            logger.log(
                logging.ERROR if level == logging.WARNING else level,
                "unload of model %s given up after %d tries: capacity shrinks by %d units until it"
                " succeeds (others are told at DEBUG): %s",
                model_id,
                tries,
                weight_units,
                exc,
            )
            self._lost.add(model_id)
            self._counters.unload_failures += 1
            self._accounting.unload_failed(weight_units)
            self._on_capacity()

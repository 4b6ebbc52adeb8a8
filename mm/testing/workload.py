"""Those who use a simulated cluster: clients that call models, and one who manages them.

Owns what they do and how long they wait, and counts what they hear. Whether an answer was right is
``invariants``' affair.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Final

import anyio

from mm.core.calls import Call
from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.errors import MeshError, StatusCode
from mm.testing.instance import ConnectionLostError, Instance
from mm.testing.invariants import CALL_S_MAX, CallWatch
from mm.testing.simulated_cluster import SimulatedCluster

METHOD: Final = "/pkg.Service/Method"
#: Clients that call at a time.
CLIENTS_COUNT: Final = 5
#: A client gives up after one of these; the last stands for never.
PATIENCES_S: Final = (0.05, 2.0, CALL_S_MAX, CALL_S_MAX)
#: Between two calls of one client, and two registrations.
PAUSES_S: Final = (0.0, 0.3, 1.0, 3.0)
#: Calls of a model that is being loaded or unloaded, where it is: chance alone would seldom hit
#: those moments, which are the hard ones.
MEDDLING_SHARE: Final = 0.3
MANAGER_GAP_S: Final = 3.0
#: In one of so many runs somebody sets policies of models, so often.
POLICIES_EVERY: Final = 4
POLICIES_GAP_S: Final = 4.0


class Workload:
    """Zipf calls, ensure-loadeds, status questions; models that come and go."""

    def __init__(self, cluster: SimulatedCluster, models: list[str]) -> None:
        self._cluster = cluster
        self._models = models
        self._rng = random.Random(f"workload {cluster.seed}")
        exponent = self._rng.choice([0.5, 0.9, 1.2])
        weights = (rank**-exponent for rank in range(1, len(models) + 1))
        self._cumulative = list(itertools.accumulate(weights))
        self._is_over = False
        #: What clients heard.
        self.answers: Counter[str] = Counter()
        #: Registered as what; None: not at all, absent: the store took it or not.
        self.registered: dict[str, ModelInfo | None] = {}

    def end(self) -> None:
        """Begin nothing more; what is under way goes on."""
        self._is_over = True

    # --- clients --------------------------------------------------------------------------------

    async def client(self) -> None:
        """Call, and call again, until it is over."""
        rng = self._rng
        while not self._is_over:
            serving = self._cluster.serving
            if serving:
                entry, model_id = self._aim(serving)
                patience_s = rng.choice(PATIENCES_S)
                what = rng.choices(["call", "ensure", "status"], [16, 2, 1])[0]
                with self._cluster.at(entry.name):
                    await self._ask(entry, model_id, what, patience_s)
            await anyio.sleep(rng.choice(PAUSES_S))

    async def call(self, entry: Instance, model_id: str) -> None:
        """One call by a patient client; it must be served."""
        with self._cluster.at(entry.name):
            await self._ask(entry, model_id, "call", CALL_S_MAX)

    async def _ask(self, entry: Instance, model_id: str, what: str, patience_s: float) -> None:
        watch = CallWatch(self._cluster, entry, model_id)
        answer = "GAVE_UP"
        with anyio.move_on_after(patience_s) as scope:
            try:
                answer = await self._answer(entry, model_id, what)
            except ConnectionLostError:
                answer = "CRASH"
            except MeshError as exc:
                answer = exc.code.name
                self._cluster.log.tell(
                    entry.name, model_id, f"client: {what} fails with {answer} ({exc.message})"
                )
                if what == "call":
                    watch.failed(exc)
        if scope.cancelled_caught and patience_s == CALL_S_MAX:
            watch.never_ended()
        self.answers[answer if what == "call" else what] += 1

    async def _answer(self, entry: Instance, model_id: str, what: str) -> str:
        if what == "ensure":
            return (await entry.load(model_id, sync=self._rng.random() < 0.5)).status
        if what == "status":
            return (await entry.status(model_id)).status
        balanced = self._rng.random() < 0.5
        served_by = await entry.send(Call(ModelId(model_id), method=METHOD, balanced=balanced))
        self._cluster.log.tell(entry.name, model_id, f"client: served by {served_by}")
        return "SERVED"

    def _aim(self, serving: list[Instance]) -> tuple[Instance, str]:
        """Choose whom to call for what: by Zipf, or where something is going on just now."""
        if self._rng.random() < MEDDLING_SHARE:
            busy = [(each, model_id) for each in serving for model_id in each.runtime.busy_with]
            if busy:
                return self._rng.choice(busy)
        model_id = self._rng.choices(self._models, cum_weights=self._cumulative)[0]
        return self._rng.choice(serving), model_id

    # --- the manager ----------------------------------------------------------------------------

    async def manager(self) -> None:
        """Unregister models, and register them again, the same or other ones."""
        while not self._is_over:
            await anyio.sleep(self._rng.expovariate(1 / MANAGER_GAP_S))
            model_id = self._rng.choice(self._models)
            if self.registered.get(model_id) is None:
                await self.register(model_id)
            else:
                await self._manage(model_id, None)

    async def set_policies(self) -> None:
        """Say how many copies models are to have, and pin some, in some runs."""
        rng = random.Random(f"policies {self._cluster.seed}")
        while self._cluster.seed % POLICIES_EVERY == POLICIES_EVERY - 2:
            await anyio.sleep(rng.expovariate(1 / POLICIES_GAP_S))
            serving = self._cluster.serving
            if self._is_over or not serving:
                break
            entry, model_id = rng.choice(serving), rng.choice(self._models)
            copies_min, pinned = rng.choice([0, 1, 1, 2, 3]), rng.random() < 0.4
            with self._cluster.at(entry.name), anyio.move_on_after(30.0):
                try:
                    await entry.set_policy(model_id, copies_min, pinned)
                except MeshError as exc:
                    answer = f"{exc.code.name} ({exc.message})"
                else:
                    answer = "done"
                what = f"keep {copies_min}{', pinned' * pinned}"
                self._cluster.log.tell(entry.name, model_id, f"client: {what}: {answer}")

    async def register(self, model_id: str) -> bool:
        """Register a model; answers whether it is known to be."""
        info = self.registered.get(model_id)
        if info is None:
            info = ModelInfo("type", self._rng.choice(["path", "other"]))
        return await self._manage(model_id, info)

    async def _manage(self, model_id: str, info: ModelInfo | None) -> bool:
        serving = self._cluster.serving
        if not serving:
            return False
        entry = self._rng.choice(serving)
        what = "unregister" if info is None else f"register as {info.path}"
        self.registered.pop(model_id, None)
        with self._cluster.at(entry.name), anyio.move_on_after(30.0):
            try:
                if info is None:
                    await entry.node.models.unregister(ModelId(model_id))
                else:
                    load_now = self._rng.random() < 0.3
                    await entry.register(model_id, info, load_now=load_now)
            except MeshError as exc:
                answer = exc.code.name
                if exc.code is StatusCode.ALREADY_EXISTS:
                    # The answer to an earlier unregistration was lost, and it had no effect.
                    record = self._cluster.record(model_id)
                    self.registered[model_id] = None if record is None else record.info
            else:
                answer = "done"
                self.registered[model_id] = info
            self._cluster.log.tell(entry.name, model_id, f"client: {what}: {answer}")
        return self.registered.get(model_id) is not None

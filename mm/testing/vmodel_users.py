"""Those who use vmodels in a simulated cluster: one who exchanges their models, and callers.

Owns what they do, and what must hold of vmodels:

1. *A vmodel that exists is never called unknown*, and no call to one fails for want of its model,
   whatever goes wrong: a call that meets a model that has just gone goes where the vmodel went.
2. *A transition ends* once nothing is wrong any more, and then every instance calls the target.
3. *A second after a switch* nothing is answered by the model of before.
4. *The counts are right*: a model that no vmodel names is gone, the others are counted exactly.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Final

import anyio

from mm.core.ids import ModelId
from mm.core.records import ModelInfo, VModelRecord
from mm.core.transitions import Pair
from mm.core.vmodel_changes import SetVModel, references
from mm.errors import MeshError, StatusCode
from mm.testing.cluster import PREFIX
from mm.testing.instance import ConnectionLostError, Instance, RuntimeAnswerError
from mm.testing.invariants import CALL_S_MAX, InvariantError
from mm.testing.simulated_cluster import SimulatedCluster

VMODELS: Final = ("always0", "always1")
#: The models that each of them is exchanged among; they come and go with it.
VERSIONS: Final = ("a", "b", "c")
MODELS: Final = tuple(f"{vmodel}{version}" for vmodel in VMODELS for version in VERSIONS)
INFO: Final = ModelInfo("type", "path")
#: Between two exchanges, on average, and between two calls.
EXCHANGE_GAP_S: Final = 4.0
CALL_GAP_S: Final = 0.5
#: A transition ends at most so long after the last fault: failures are forgotten, a leader elected,
#: and what stands in the way unloaded.
TRANSITION_S_MAX: Final = 600.0
#: Nobody calls the model of before for longer than this.
OLD_S_MAX: Final = 1.0


class VModelUsers:
    """Exchange, and call."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._rng = random.Random(f"vmodel users {cluster.seed}")
        self._is_over = False
        #: What callers heard.
        self.answers: Counter[str] = Counter()

    def end(self) -> None:
        """Begin nothing more."""
        self._is_over = True

    async def create(self) -> None:
        """Have all vmodels there."""
        for vmodel_id in VMODELS:
            await self._set(self._cluster.serving[0], vmodel_id, f"{vmodel_id}a")

    # --- while things go wrong ------------------------------------------------------------------

    async def exchange(self) -> None:
        """Set new targets, or the old ones again, until it is over."""
        rng = self._rng
        while not self._is_over:
            await anyio.sleep(rng.expovariate(1 / EXCHANGE_GAP_S))
            serving = self._cluster.serving
            if not serving:
                continue
            vmodel_id, entry = rng.choice(VMODELS), rng.choice(serving)
            target, is_forced = f"{vmodel_id}{rng.choice(VERSIONS)}", rng.random() < 0.1
            with self._cluster.at(entry.name), anyio.move_on_after(30.0):
                try:
                    await self._set(entry, vmodel_id, target, force=is_forced)
                except MeshError as exc:
                    self._tell(entry, f"set to {target} fails with {exc.code.name}")

    async def client(self) -> None:
        """Call, and call again, until it is over."""
        while not self._is_over:
            serving = self._cluster.serving
            if serving:
                vmodel_id, entry = self._rng.choice(VMODELS), self._rng.choice(serving)
                with self._cluster.at(entry.name):
                    await self._call(entry, vmodel_id)
            await anyio.sleep(self._rng.expovariate(1 / CALL_GAP_S))

    async def _call(self, entry: Instance, vmodel_id: str) -> None:
        answer = "GAVE_UP"
        with anyio.move_on_after(CALL_S_MAX):
            try:
                await entry.invoke_vmodel(vmodel_id)
                answer = "SERVED"
            except ConnectionLostError:
                answer = "CRASH"
            except MeshError as exc:
                answer = exc.code.name
                text = f"a call for {vmodel_id} by {entry.name} fails with {answer} ({exc.message})"
                self._tell(entry, text)
                is_own_word = isinstance(exc, RuntimeAnswerError) and exc.is_own_word
                if exc.code in (StatusCode.NOT_FOUND, StatusCode.INTERNAL) and not is_own_word:
                    self._fail("a vmodel that exists is never called unknown", text, vmodel_id)
        self.answers[answer] += 1

    async def _set(
        self,
        entry: Instance,
        vmodel_id: str,
        target: str,
        *,
        force: bool = False,
        sync: bool = False,
    ) -> None:
        request = SetVModel(
            vmodel_id, ModelId(target), INFO, auto_delete=True, force=force, load_now=True
        )
        await entry.node.vmodels.set(request, sync=sync)

    # --- when nothing does any more -------------------------------------------------------------

    async def check(self) -> None:
        """Raise ``InvariantError`` unless all comes right; then delete all vmodels."""
        for vmodel_id in VMODELS:
            await self._expect_end(vmodel_id)
        await self._expect_calls("a transition ends")
        self._check_counts()
        for vmodel_id in VMODELS:
            entry, target = self._rng.choice(self._cluster.serving), self._next(vmodel_id)
            with self._cluster.at(entry.name):
                await self._set(entry, vmodel_id, target)
            await self._expect_end(vmodel_id)
        await anyio.sleep(OLD_S_MAX)
        await self._expect_calls("nothing is answered by the model of before")
        self._check_counts()
        await self._expect_succession(VMODELS[1])
        # The last, for whoever asks later is told of the failures, unless a copy serves.
        await self._expect_recovery(VMODELS[0])
        await self._expect_calls("a transition ends")
        self._check_counts()
        for vmodel_id in VMODELS:
            await self._rng.choice(self._cluster.serving).node.vmodels.delete(vmodel_id)
        left = [each for each in MODELS if self._cluster.record(each) is not None]
        if left:
            self._fail("the counts are right", f"{left} are left without a vmodel", left[0])

    def _next(self, vmodel_id: str) -> str:
        active = self._stored(vmodel_id).active_model_id
        return next(v for v in (f"{vmodel_id}{each}" for each in VERSIONS) if v != active)

    async def _expect_recovery(self, vmodel_id: str) -> None:
        """A target that cannot be loaded, and then can."""
        target, serving = self._next(vmodel_id), self._cluster.serving
        await serving[0].load(self._stored(vmodel_id).active_model_id)
        for each in serving:
            each.runtime.fail_loads(target, StatusCode.INVALID_ARGUMENT, "broken")
        await self._set(self._rng.choice(serving), vmodel_id, target)
        for _ in range(round(10 * TRANSITION_S_MAX)):
            vmodel = self._stored(vmodel_id)
            # One without copies is exchanged at once, whatever becomes of the target.
            if vmodel.failed or Pair.of(vmodel) is None:
                break
            await anyio.sleep(0.1)
        else:
            self._fail("a transition ends", f"{vmodel} is not said to have failed", vmodel_id)
        for each in serving:
            each.runtime.fail_loads(target, StatusCode.OK, times=0)
        await self._expect_end(vmodel_id)

    async def _expect_succession(self, vmodel_id: str) -> None:
        """The leader dies in the middle, at any step of it."""
        target, serving = self._next(vmodel_id), self._cluster.serving
        await serving[0].load(self._stored(vmodel_id).active_model_id)
        leader = next(each for each in serving if each.node.services.leader.is_leader)
        await self._set(self._rng.choice(serving), vmodel_id, target)
        await anyio.sleep(self._rng.choice([0.0, 0.01, 0.1, 0.5, 2.0]))
        await leader.crash()
        await self._expect_end(vmodel_id)
        await self._cluster.launch(leader.name)

    async def _expect_end(self, vmodel_id: str) -> None:
        for _ in range(round(10 * TRANSITION_S_MAX)):
            if Pair.of(self._stored(vmodel_id)) is None:
                return
            await anyio.sleep(0.1)
        self._fail(
            "a transition ends",
            f"{vmodel_id} is {self._stored(vmodel_id)} after {TRANSITION_S_MAX:g} s",
            vmodel_id,
        )

    async def _expect_calls(self, invariant: str) -> None:
        for vmodel_id in VMODELS:
            active = self._stored(vmodel_id).active_model_id
            for entry in self._cluster.serving:
                with self._cluster.at(entry.name):
                    try:
                        model_id = await entry.invoke_vmodel(vmodel_id)
                    except MeshError as exc:
                        model_id = ModelId(f"{exc.code.name} ({exc.message})")
                if model_id != active:
                    text = f"{vmodel_id} is {active}, a call by {entry.name} says {model_id}"
                    self._fail(invariant, text, vmodel_id)

    def _check_counts(self) -> None:
        counts = Counter(each for v in VMODELS for each in references(self._stored(v)))
        for name in MODELS:
            record = self._cluster.record(name)
            count = 0 if record is None else record.references
            if count != counts[ModelId(name)] or (record is not None and not count):
                text = f"{name} has {count} references, {counts[ModelId(name)]} are right: {record}"
                self._fail("the counts are right", text, name)

    def _stored(self, vmodel_id: str) -> VModelRecord:
        item = self._cluster.server.get(f"{PREFIX}/vmodels/{vmodel_id}")
        assert item is not None, f"nobody deleted {vmodel_id}"
        return VModelRecord.decode(item.value)

    def _tell(self, entry: Instance, text: str) -> None:
        self._cluster.log.tell(entry.name, "", f"vmodels: {text}")

    def _fail(self, invariant: str, text: str, name: str) -> None:
        names = [each.name for each in self._cluster.instances.values()]
        models = [each for each in MODELS if each[:-1] == name.rstrip("abc")]
        raise InvariantError(
            self._cluster.log, invariant, text, instances=names, models=[name, *models]
        )

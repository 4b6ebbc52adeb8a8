"""After the faults a simulated cluster must come right again, in bounded time.

Owns what "right" means: nothing is on its way, every view equals the store, the registry says what
the runtimes hold, every registered model is served at every place, and others are unknown.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Final

import anyio

from mm.core.ids import ModelId
from mm.errors import MeshError, ModelNotFoundError
from mm.mesh.ports import Item
from mm.testing.cluster import PREFIX
from mm.testing.instance import Instance
from mm.testing.invariants import InvariantError
from mm.testing.simulated_cluster import SimulatedCluster
from mm.testing.workload import Workload

#: From the end of faults, or of calls, until nothing is on its way: looks, one a second. The
#: longest of what may be is an unload that waited for calls in flight and failed since.
REST_LOOKS_MAX: Final = 600
#: Everything that instances remember of bad times is over after this: recorded failures, copies
#: of the vanished (``simulator`` shortens both), peers that could not be reached.
FORGET_S: Final = 300.0
#: An instance says what it has at most so long after a change.
PUBLISH_S: Final = 45.0
#: For each copy that a policy asks for, while all is quiet: what faults took, and what came to
#: nothing at first.
POLICY_LOADS_MAX: Final = 5
#: Calls of a model that must be served, in all: at so many instances each.
ENTRIES_COUNT: Final = 2
#: News of instances are waited for this long at most, in so many looks.
HEAR_S: Final = 0.02
HEAR_LOOKS_MAX: Final = 5


class Convergence:
    """The second part of a run."""

    def __init__(self, cluster: SimulatedCluster, workload: Workload, models: list[str]) -> None:
        self._cluster = cluster
        self._workload = workload
        self._models = models
        self._rng = random.Random(f"convergence {cluster.seed}")

    async def run(self) -> float:
        """Raise ``InvariantError`` unless all comes right; answers the seconds until rest."""
        begun_s = anyio.current_time()
        await self._rest()
        rest_s = anyio.current_time() - begun_s
        begun = self._loads_begun()
        await anyio.sleep(FORGET_S)
        await self._rest()
        self._check(losses_unnoticed=True)
        self._check_policies()
        self._check_loads(begun)
        await self._register_all()
        for model_id in self._models:
            for entry in self._rng.sample(self._cluster.serving, ENTRIES_COUNT):
                await self._expect_answer(entry, model_id)
        # A runtime that lost models shows it at their next calls: there must be one for each copy.
        for entry in self._cluster.serving:
            for model_id in sorted(copy.model_id for copy in entry.node.parts.copies):
                await self._expect_answer(entry, model_id)
        await self._rest()
        await anyio.sleep(PUBLISH_S)
        self._check(losses_unnoticed=False)
        await self._hear_of_instances()
        self._check_instances()
        self._check_policies()
        return rest_s

    async def _rest(self) -> None:
        """Return once nothing is on its way; if that takes too long, say what is."""
        for _ in range(REST_LOOKS_MAX):
            if self._cluster.is_at_rest():
                return
            await anyio.sleep(1.0)
        self._fail(f"not at rest {REST_LOOKS_MAX} s later: {self._cluster.unrest()}")

    async def _register_all(self) -> None:
        """Have all models registered but some, of which none is served afterwards."""
        for model_id in self._models:
            record = self._cluster.record(model_id)
            if model_id in self._workload.registered:
                expected = self._workload.registered[model_id]
                if expected != (None if record is None else record.info):
                    text = f"{model_id} was registered as {expected}, the store has {record}"
                    self._fail(text, models=[model_id])
            if record is None:
                await self._expect_unknown(self._rng.choice(self._cluster.serving), model_id)
                if not await self._workload.register(model_id):
                    self._fail(f"{model_id} could not be registered", models=[model_id])

    async def _expect_answer(self, entry: Instance, model_id: str) -> None:
        with self._cluster.at(entry.name), anyio.move_on_after(60.0):
            try:
                await entry.invoke(model_id)
            except MeshError as exc:
                self._fail(
                    f"a call for {model_id} by {entry.name} fails with {exc.code.name}"
                    f" ({exc.message})",
                    instances=[entry.name],
                    models=[model_id],
                )
            return
        self._fail(
            f"a call for {model_id} by {entry.name} takes more than a minute",
            instances=[entry.name],
            models=[model_id],
        )

    async def _expect_unknown(self, entry: Instance, model_id: str) -> None:
        try:
            with self._cluster.at(entry.name):
                await entry.invoke(model_id)
        except ModelNotFoundError:
            return
        self._fail(
            f"{model_id} is served by {entry.name}, although it is not registered",
            instances=[entry.name],
            models=[model_id],
        )

    def _check(self, *, losses_unnoticed: bool) -> None:
        """The registry says what there is."""
        try:
            self._cluster.check(losses_unnoticed=losses_unnoticed)
        except AssertionError as exc:
            self._fail(f"the registry, the books and the runtimes differ: {exc}")

    async def _hear_of_instances(self) -> None:
        """Somebody may have published this very moment; news are on their way for milliseconds."""
        for _ in range(HEAR_LOOKS_MAX):
            stored = self._stored_instances()
            views = (each.node.parts.members.mirror for each in self._cluster.serving)
            if all(dict(view.items()) == stored for view in views):
                return
            await anyio.sleep(HEAR_S)

    def _stored_instances(self) -> dict[str, Item]:
        prefix = f"{PREFIX}/instances/"
        items = self._cluster.server.table(prefix).items
        return {item.key[len(prefix) :]: item for item in items}

    def _check_instances(self) -> None:
        """Every instance has the same view of the others; nothing of the bad times is left."""
        stored = self._stored_instances()
        names = sorted(each.name for each in self._cluster.serving)
        if sorted(stored) != names:
            self._fail(f"the store has the instances {sorted(stored)}, there are {names}")
        for each in self._cluster.serving:
            node = each.node
            if dict(node.parts.members._mirror.items()) != stored:
                self._fail(
                    f"{each.name} sees other instances than the store", instances=[each.name]
                )
            record = self._cluster.instance_record(each.name)
            assert record is not None
            copy_count = len(node.parts.copies)
            if record.count != copy_count:
                text = f"{each.name} says that it has {record.count} copies, not {copy_count}"
                self._fail(text, instances=[each.name])
            accounting = node.parts.accounting
            if (accounting.lost_units, accounting.deficit_units) != (0, 0):
                self._fail(f"{each.name} has not all of its memory back", instances=[each.name])
            if node.models._followed:
                self._fail(f"{each.name} follows {node.models._followed}", instances=[each.name])
            if each.runtime.memory_bytes > each.runtime.parameters.capacity_bytes:
                self._fail(f"the runtime of {each.name} holds too much", instances=[each.name])
            for copy in node.parts.copies:
                self._check_copy(each, copy.model_id)

    def _check_policies(self) -> None:
        """Every model has the copies that its policy asks for, as far as there is room for them,
        or one at each instance.
        """
        serving = self._cluster.serving
        policies = serving[0].node.parts.policies
        for model_id, record in self._cluster.records().items():
            copies = [each.node.parts.copies.get(ModelId(model_id)) for each in serving]
            ready_count = sum(copy is not None and copy.serves for copy in copies)
            if ready_count < min(policies.kept_count(ModelId(model_id)), len(serving)):
                text = f"{model_id} has {ready_count} ready copies, its policy is {record.policy}"
                self._fail(text, models=[model_id])

    def _loads_begun(self) -> Counter[str]:
        loads: Counter[str] = Counter()
        for each in self._cluster.serving:
            loads.update(each.runtime.loads_begun)
        return loads

    def _check_loads(self, before: Counter[str]) -> None:
        """While nobody called, policies had each copy loaded a few times at most."""
        now, records = self._loads_begun(), self._cluster.records()
        for model_id, record in records.items():
            needed_count, count = record.policy.copies_needed, now[model_id] - before[model_id]
            if needed_count and count > POLICY_LOADS_MAX * needed_count:
                text = f"{model_id} was loaded {count} times for its policy, {record.policy}"
                self._fail(text, models=[model_id])

    def _check_copy(self, each: Instance, model_id: ModelId) -> None:
        copy, record = each.node.parts.copies.get(model_id), self._cluster.record(model_id)
        assert copy is not None
        assert record is not None
        state = record.copy_state(each.name)
        if copy.info != record.info:
            text = f"{each.name} has {model_id} as {copy.info}, registered is {record.info}"
        elif state is None or not state.is_ready:
            text = f"the record of {model_id} says that {each.name} has it {state}"
        else:
            return
        self._fail(text, instances=[each.name], models=[model_id])

    def _fail(
        self, text: str, *, instances: list[str] | None = None, models: list[str] | None = None
    ) -> None:
        raise InvariantError(
            self._cluster.log,
            "after the faults all comes right",
            text,
            instances=instances or [],
            models=models or [],
        )

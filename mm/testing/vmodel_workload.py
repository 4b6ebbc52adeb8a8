"""One who sets and deletes vmodels of a simulated cluster, and what must hold for them.

While things go wrong any answer may do. Once nothing does, the numbers of references are right,
every instance sees the vmodels as they are stored, each can be set, comes to an end and can be
deleted, and no model is left that was to go with its last reference.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Final, NoReturn

import anyio

from mm.core.ids import ModelId
from mm.core.records import ModelInfo, VModelRecord
from mm.core.vmodel_changes import SetVModel, is_in_transition, references
from mm.errors import MeshError
from mm.testing.cluster import PREFIX
from mm.testing.instance import Instance
from mm.testing.invariants import InvariantError
from mm.testing.simulated_cluster import SimulatedCluster

#: Models of their own, so that nobody else registers or unregisters them.
MODELS_COUNT: Final = 8
GAP_S: Final = 1.5
#: A change is answered in this time at worst: tries at a store that does not answer, in line.
ANSWER_S_MAX: Final = 120.0
#: Until all is right: the leader counts references each minute, and a load takes its time.
RIGHT_S_MAX: Final = 300


class VModelWorkload:
    """Sets a few vmodels to a few models again and again, at whichever instance serves."""

    def __init__(self, cluster: SimulatedCluster, count: int) -> None:
        self._cluster = cluster
        self._names = [f"v{number}" for number in range(count)]
        self._rng = random.Random(f"vmodels {cluster.seed}")
        self._is_over = False
        #: What was heard.
        self.answers: Counter[str] = Counter()

    def end(self) -> None:
        """Begin nothing more."""
        self._is_over = True

    async def run(self) -> None:
        """Set and delete, until it is over; often two at a time."""
        async with anyio.create_task_group() as group:
            while not self._is_over:
                serving = self._cluster.serving
                if serving and self._names:
                    for _ in range(self._rng.choice([1, 1, 2])):
                        group.start_soon(self._change, self._rng.choice(serving))
                await anyio.sleep(self._rng.expovariate(1 / GAP_S))

    async def _change(self, entry: Instance) -> None:
        name = self._rng.choice(self._names)
        is_delete = self._rng.random() < 0.15
        request = self._request(name)
        what = f"delete {name}" if is_delete else f"set {name} to {request.target_id}"
        answer = "GAVE_UP"
        with self._cluster.at(entry.name), anyio.move_on_after(ANSWER_S_MAX) as scope:
            try:
                if is_delete:
                    await entry.node.vmodels.delete(name)
                    answer = "DELETED"
                else:
                    answer = (await entry.node.vmodels.set(request)).status
            except MeshError as exc:
                answer = exc.code.name
        self._cluster.log.tell(entry.name, request.target_id, f"client: {what}: {answer}")
        self.answers[answer] += 1
        if scope.cancelled_caught and entry.is_serving:
            self._fail(f"{what} by {entry.name} had no answer in {ANSWER_S_MAX:g} s")

    def _request(self, name: str) -> SetVModel:
        number = self._rng.randrange(MODELS_COUNT)
        return SetVModel(
            name,
            ModelId(f"x{number}"),
            info=ModelInfo("type", "path"),
            # One half of them goes with the last reference, the other stays.
            auto_delete=number % 2 == 0,
            force=self._rng.random() < 0.1,
            load_now=self._rng.random() < 0.5,
        )

    # --- when nothing goes wrong any longer ------------------------------------------------------

    async def converge(self) -> None:
        """Raise ``InvariantError`` unless all comes right."""
        await self._until_right()
        for name in self._names:
            entry, other = self._rng.choices(self._cluster.serving, k=2)
            request = self._request(name)
            try:
                with self._cluster.at(entry.name):
                    status = await entry.node.vmodels.set(request)
                await self._until_right()
                told = await other.node.vmodels.status(name)
            except MeshError as exc:
                self._fail(f"{name} cannot be set at {entry.name}: {exc.message}")
            targets = status.target_model_id, told.target_model_id
            if targets != (request.target_id, request.target_id):
                self._fail(f"{name} was set to {request.target_id}, and has the targets {targets}")
        await self._until_right(is_end=True)
        for name in self._names:
            with self._cluster.at(self._cluster.serving[0].name):
                await self._cluster.serving[0].node.vmodels.delete(name)
        await self._until_right()
        left = [each for each in self._cluster.records() if each in ("x0", "x2", "x4", "x6")]
        if self._stored() or left:
            self._fail(f"left are the vmodels {self._stored()} and the models {left}")

    async def _until_right(self, *, is_end: bool = False) -> None:
        wrong = ""
        for _ in range(RIGHT_S_MAX):
            wrong = self._wrong(is_end=is_end)
            if not wrong:
                return
            await anyio.sleep(1.0)
        self._fail(wrong)

    def _wrong(self, *, is_end: bool) -> str:
        """Say what is not right; ``is_end``: neither is a transition under way."""
        vmodels = self._stored()
        expected = Counter(i for vmodel in vmodels.values() for i in references(vmodel))
        for model_id, record in self._cluster.records().items():
            if record.references != expected[ModelId(model_id)]:
                right = expected[ModelId(model_id)]
                return f"{model_id} has {record.references} references, {right} is right"
        for each in self._cluster.serving:
            mirror = each.node.parts.vmodels.mirror
            seen = {key_id: each.node.parts.vmodels.get(key_id) for key_id in mirror}
            if seen != vmodels:
                return f"{each.name} sees the vmodels {seen}, stored are {vmodels}"
        under_way = [n for n, each in vmodels.items() if is_in_transition(each) and is_end]
        return f"in transition are {under_way}" if under_way else ""

    def _stored(self) -> dict[str, VModelRecord]:
        prefix = f"{PREFIX}/vmodels/"
        items = self._cluster.server.table(prefix).items
        return {item.key[len(prefix) :]: VModelRecord.decode(item.value) for item in items}

    def _fail(self, text: str) -> NoReturn:
        models = [f"x{number}" for number in range(MODELS_COUNT)]
        log = self._cluster.log
        raise InvariantError(log, "vmodels are as they were set", text, models=models)

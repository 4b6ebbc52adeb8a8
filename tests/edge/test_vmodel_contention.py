"""Vmodels set by many at a time, over connections of their own to a real etcd: each change gets a
definite answer, and the counts of references are right when it is quiet.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import anyio
import pytest

from mm.config import Config
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelInfo, ModelRecord, VModelRecord
from mm.core.vmodel_changes import (
    Facts,
    ModelRecords,
    SetVModel,
    VModelChange,
    plan_complete,
    plan_delete,
    plan_set,
    references,
)
from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import EtcdTarget
from mm.mesh.registry import Registry
from mm.mesh.statistics import Counters
from mm.mesh.vmodel_writer import VModelWriter
from mm.mesh.vmodels import VModels

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

INFO = ModelInfo("type", "path")
MODELS = [ModelId(f"m{number}") for number in range(5)]
#: Changes at a time for each writer, and how many in all.
AT_ONCE, CHANGES = 16, 160

_numbers = itertools.count(1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True, slots=True)
class Writer:
    """What one instance has for vmodels."""

    store: EtcdStore
    registry: Registry
    vmodels: VModels
    counters: Counters
    writer: VModelWriter

    async def change(self, rng: random.Random) -> None:
        vmodel_id, target_id = f"v{rng.randrange(3)}", rng.choice(MODELS)
        # One that serves with two copies is not exchanged at once.
        request = SetVModel(vmodel_id, target_id, info=INFO, auto_delete=target_id != "m0")
        kind = rng.random()

        def plan(vmodel: VModelRecord | None, models: ModelRecords) -> VModelChange | None:
            if kind < 0.1:
                return plan_delete("", vmodel, models)
            if kind < 0.4:
                return None if vmodel is None else plan_complete(vmodel, models)
            change = plan_set(request, vmodel, models, Facts(1, target_is_loaded=False))
            if change is None or (target := change.models.get(target_id)) is None:
                return change
            served = ModelRecord(
                INFO,
                copies={InstanceId("i"): 1, InstanceId("j"): 1},
                references=target.references,
                auto_delete=target.auto_delete,
            )
            return replace(change, models={**change.models, target_id: served})

        await self.writer.change(vmodel_id, plan, target_id=None if kind < 0.4 else target_id)


@asynccontextmanager
async def running_writers(etcd: EtcdProcess, count: int) -> AsyncIterator[list[Writer]]:
    target = EtcdTarget((etcd.endpoint,), root_prefix=f"/contention-{next(_numbers)}")
    config = Config(service_name="s", kv_store="memory", instance_id=InstanceId("i"))
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        writers = []
        for number in range(count):
            store = await stack.enter_async_context(EtcdStore(target))
            registry, vmodels = Registry(store, "/r/", config), VModels(store, "/v/", config)
            await group.start(registry.run)
            await group.start(vmodels.run)
            counters = Counters()
            writer = VModelWriter(
                config=config,
                store=store,
                registry=registry,
                vmodels=vmodels,
                counters=counters,
                rng=random.Random(number),
            )
            writers.append(Writer(store, registry, vmodels, counters, writer))
        yield writers
        group.cancel_scope.cancel()


async def stored(store: EtcdStore) -> tuple[dict[str, VModelRecord], dict[str, ModelRecord]]:
    vmodels = await store.list("/v/")
    models = await store.list("/r/")
    return (
        {item.key[3:]: VModelRecord.decode(item.value) for item in vmodels.items},
        {item.key[3:]: ModelRecord.decode(item.value) for item in models.items},
    )


async def test_three_writers_at_once(shared_etcd: EtcdProcess) -> None:
    async with running_writers(shared_etcd, 3) as writers:

        async def work(writer: Writer, seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(CHANGES // AT_ONCE):
                await writer.change(rng)

        async with anyio.create_task_group() as group:
            for number, writer in enumerate(writers):
                for line in range(AT_ONCE):
                    group.start_soon(work, writer, 100 * number + line)
        vmodels, models = await stored(writers[0].store)
        expected = Counter(i for vmodel in vmodels.values() for i in references(vmodel))
        assert {i: m.references for i, m in models.items() if m.references} == expected
        assert set(models) - set(expected) <= {"m0"}, "all others go with their last reference"
        assert sum(each.counters.vmodel_conflicts for each in writers) > 0

"""Whole nodes of the simulator's kind over one real etcd, and all that happened in it meanwhile.

A helper of the tests of vmodels: who counts references has to be right at every revision, not only
in the end.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import anyio
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.records import ModelRecord, VModelRecord
from mm.core.vmodel_changes import references
from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.edge.memory_store import MemoryStore
from mm.mesh.ports import Delete, Put, Resync, WatchEvent, Write
from mm.testing.cluster import PREFIX, Cluster
from mm.testing.fake_runtime import ModelPlan
from mm.testing.losing_proxy import LosingProxy

#: Ends what hangs; no test asserts how fast anything is by it.
PATIENCE_S = 240.0
VMODELS, MODELS = f"{PREFIX}/vmodels/", f"{PREFIX}/registry/"
_END = f"{PREFIX}/end"

_numbers = itertools.count(1)


class EtcdCluster(Cluster):
    """Instances over stores that are open; what they do to break a store these cannot."""

    def __init__(
        self, group: TaskGroup, stores: Mapping[str, EtcdStore], observer: EtcdStore
    ) -> None:
        super().__init__(group, plan=ModelPlan(load_s=0.003, unload_s=0.001))
        self.stores = stores
        #: A connection of its own, for what is stored.
        self.observer = observer

    def make_store(self, config: Config) -> MemoryStore:
        """Answer the store of an instance."""
        return cast(MemoryStore, self.stores[config.instance_id])


@dataclass(slots=True)
class History:
    """What two tables had after each revision: folded from one watch, revision by revision."""

    vmodels: dict[str, VModelRecord] = field(default_factory=dict)
    models: dict[str, ModelRecord] = field(default_factory=dict)
    revisions_count: int = 0

    def check(self) -> None:
        """Every number is that of the vmodels that name the model, and all that are named exist."""
        expected = Counter(i for each in self.vmodels.values() for i in references(each))
        told = {model_id: record.references for model_id, record in self.models.items()}
        assert {i: count for i, count in told.items() if count} == expected, (told, self.vmodels)
        left = [i for i, each in self.models.items() if each.auto_delete and not each.references]
        assert not left, "these go with their last reference"

    def fold(self, batch: Sequence[WatchEvent]) -> bool:
        """Take events over, and check after each transaction; answers whether it was the last."""
        for _, events in itertools.groupby(batch, _revision_of):
            for event in events:
                if isinstance(event, Put):
                    self._take(event.item.key, event.item.value)
                    if event.item.key == _END:
                        return True
                elif isinstance(event, Delete):
                    self._take(event.key, None)
                else:
                    assert not self.revisions_count, "no event was missed"
                    for item in event.items:
                        self._take(item.key, item.value)
            self.revisions_count += 1
            self.check()
        return False

    def _take(self, key: str, value: bytes | None) -> None:
        table: dict[str, Any]
        for prefix, table, decode in (
            (VMODELS, self.vmodels, VModelRecord.decode),
            (MODELS, self.models, ModelRecord.decode),
        ):
            if key.startswith(prefix):
                if value is None:
                    del table[key.removeprefix(prefix)]
                else:
                    table[key.removeprefix(prefix)] = decode(value)


def _revision_of(event: WatchEvent) -> int:
    match event:
        case Put(item):
            return item.mod_revision
        case Delete(_, revision) | Resync(_, revision):
            return revision


@asynccontextmanager
async def running_nodes(
    etcd: EtcdProcess, *names: str, proxies: Mapping[str, LosingProxy] | None = None
) -> AsyncIterator[EtcdCluster]:
    """Run instances in a root prefix of their own; those behind proxies soon give up waiting."""
    root_prefix = f"/vmodel-nodes-{next(_numbers)}"
    async with AsyncExitStack() as stack:

        async def opened(proxy: LosingProxy | None = None) -> EtcdStore:
            place = etcd.endpoint if proxy is None else Endpoint(proxy.host, proxy.port)
            target = EtcdTarget((place,), root_prefix=root_prefix)
            options = {} if proxy is None else {"timeout_s": 1.6, "silence_s": 1.2}
            return await stack.enter_async_context(EtcdStore(target, **options))

        stores = {name: await opened((proxies or {}).get(name)) for name in names}
        observer = await opened()
        async with anyio.create_task_group() as group:
            cluster = EtcdCluster(group, stores, observer)
            for name in names:
                await cluster.start(name)
            yield cluster
            group.cancel_scope.cancel()


@asynccontextmanager
async def recorded(store: EtcdStore) -> AsyncIterator[History]:
    """Watch from now until the end of the block; then all of it is in the history, and right."""
    history = History()

    async def follow(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with store.watch(f"{PREFIX}/") as batches:
            task_status.started()
            async for batch in batches:
                if history.fold(batch):
                    return

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as group:
            await group.start(follow)
            yield history
            await store.write(Write(_END, b"", if_revision=None))


async def stored_vmodels(store: EtcdStore) -> dict[str, VModelRecord]:
    """Answer all vmodels."""
    items = (await store.list(VMODELS)).items
    return {item.key.removeprefix(VMODELS): VModelRecord.decode(item.value) for item in items}


async def until_stored(
    store: EtcdStore, condition: Callable[[dict[str, VModelRecord]], bool]
) -> None:
    """Return when the vmodels are so."""
    with anyio.fail_after(PATIENCE_S):
        async with store.watch(VMODELS) as batches:
            async for _ in batches:
                if condition(await stored_vmodels(store)):
                    return

"""Vmodels changed at several nodes at once over one real etcd, which may be lost in the middle of a
transaction: every answer is true, and the references are counted right at every revision.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.core.ids import ModelId
from mm.core.vmodel_changes import SetVModel, is_in_transition
from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.errors import (
    ModelNotFoundError,
    ModelReferencedError,
    StoreUnavailableError,
    TargetConflictError,
)
from mm.mesh.ports import Item, Write
from mm.mesh.vmodel_manager import VModelStatus
from mm.testing.cluster import INFO, Instance, until
from mm.testing.losing_proxy import LosingProxy, losing_proxy
from tests.edge.store_world import wait_answers
from tests.edge.vmodel_nodes import (
    MODELS,
    PATIENCE_S,
    VMODELS,
    EtcdCluster,
    recorded,
    running_nodes,
    stored_vmodels,
    until_stored,
)

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

T = TypeVar("T")

#: By each of two instances, so many of them at a time. By hand, a long one now and then:
#:     MM_CONTENTION_SETS=1000 pytest THIS_FILE -k contend
SETS, AT_ONCE = int(os.environ.get("MM_CONTENTION_SETS", "100")), 10


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def set_vmodel(
    instance: Instance, target: str, vmodel_id: str = "v", **wishes: Any
) -> VModelStatus:
    request = SetVModel(vmodel_id, ModelId(target), info=INFO, auto_delete=True, **wishes)
    return await instance.node.vmodels.set(request)


# --- many at once --------------------------------------------------------------------------------


async def test_two_instances_contend_for_a_vmodel(shared_etcd: EtcdProcess) -> None:
    """Nobody serves, so each is answered with what it asked for; the last one stays."""

    async def work(instance: Instance) -> None:
        for _ in range(SETS // AT_ONCE):
            status = await set_vmodel(instance, f"of-{instance.name}")
            assert (status.status, status.active_model_id) == ("DEFINED", f"of-{instance.name}")

    async with running_nodes(shared_etcd, "a", "b") as cluster:
        async with recorded(cluster.observer) as history:
            async with anyio.create_task_group() as group:
                for each in cluster.serving:
                    for _ in range(AT_ONCE):
                        group.start_soon(work, each)
        (last,) = history.models
        assert last == history.vmodels["v"].active_model_id
        assert history.models[ModelId(last)].references == 1
        changes = [each.node.parts.counters.vmodel_changes for each in cluster.serving]
        assert min(changes) >= SETS // 10, "they took it from each other"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a writer."""

    kind: str
    vmodel_id: str
    model_id: ModelId

    async def do(self, instance: Instance) -> None:
        node, model_id = instance.node, self.model_id
        request = SetVModel(self.vmodel_id, model_id, info=INFO, auto_delete=model_id != "m0")
        match self.kind:
            case "set":
                await node.vmodels.set(request)
            case "set and load":
                await set_vmodel(instance, model_id, self.vmodel_id, load_now=True)
            case "force":
                await set_vmodel(instance, model_id, self.vmodel_id, force=True)
            case "set as it is":
                await node.vmodels.set(SetVModel(self.vmodel_id, model_id))
            case "delete":
                await node.vmodels.delete(self.vmodel_id)
            case "register":
                await instance.register(model_id)
            case "unregister":
                await node.models.unregister(model_id)


KINDS = ("set", "set", "set and load", "force", "set as it is", "delete", "register", "unregister")
OPERATIONS = st.builds(
    Operation,
    st.sampled_from(KINDS),
    st.sampled_from(["v0", "v1"]),
    st.sampled_from([ModelId(f"m{number}") for number in range(4)]),
)
#: What six writers do, two at each of three instances.
PLANS = st.lists(st.lists(OPERATIONS, min_size=4, max_size=16), min_size=6, max_size=6)


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plans=PLANS)
async def test_whatever_writers_do_at_once_references_are_counted_right(
    shared_etcd: EtcdProcess, plans: Sequence[Sequence[Operation]]
) -> None:
    """The model is a count of the vmodels that name each model, after every transaction; the leader
    carries transitions out meanwhile.
    """

    async def work(instance: Instance, operations: Sequence[Operation]) -> None:
        for operation in operations:
            try:
                await operation.do(instance)
            except ModelNotFoundError:
                assert operation.kind == "set as it is"
            except ModelReferencedError:
                assert operation.kind == "unregister"

    async with running_nodes(shared_etcd, "a", "b", "c") as cluster:
        async with recorded(cluster.observer) as history:
            async with anyio.create_task_group() as group:
                for number, plan in enumerate(plans):
                    group.start_soon(work, cluster.serving[number % 3], plan)
            await until_stored(
                cluster.observer, lambda found: not any(map(is_in_transition, found.values()))
            )
        for vmodel_id in ("v0", "v1"):
            record = history.vmodels.get(vmodel_id)
            for each in cluster.serving:
                status = await each.node.vmodels.status(vmodel_id)
                assert status.active_model_id == (record.active_model_id if record else "")


# --- etcd lost in the middle ---------------------------------------------------------------------


async def losing(
    store: EtcdStore,
    lose: Callable[[], None],
    call: Callable[[], Awaitable[object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Make a call that loses the connection when its transaction is about to be sent, and hears
    that nobody knows what became of it.
    """
    transact = store.transact
    is_sent = False

    async def lose_and_transact(writes: Sequence[Write]) -> tuple[bool, Sequence[Item | None]]:
        nonlocal is_sent
        is_sent = True
        lose()
        return await transact(writes)

    with monkeypatch.context() as patch:
        patch.setattr(store, "transact", lose_and_transact)
        while not is_sent:
            with pytest.raises(StoreUnavailableError):
                await call()


async def revisions(store: EtcdStore) -> dict[str, int]:
    tables = [await store.list(prefix) for prefix in (VMODELS, MODELS)]
    return {item.key: item.mod_revision for table in tables for item in table.items}


async def again(store: EtcdStore, call: Callable[[], Awaitable[T]]) -> T:
    """Do it until the store answers, as clients do that are told UNAVAILABLE."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            try:
                return await call()
            except StoreUnavailableError:
                await wait_answers(store)


@asynccontextmanager
async def cut_off_at_will(etcd: EtcdProcess) -> AsyncIterator[tuple[LosingProxy, EtcdCluster]]:
    """Have "v" stand for "old" at two nodes, of which "a" has etcd behind a proxy. Whoever uses it
    leaves nothing: no model may be left that a transaction counted for nobody.
    """
    async with (
        losing_proxy(etcd.endpoint.host, etcd.endpoint.port) as proxy,
        running_nodes(etcd, "a", "b", proxies={"a": proxy}) as cluster,
        recorded(cluster.observer) as history,
    ):
        await set_vmodel(cluster["b"], "old")
        await until(lambda: cluster["a"].node.parts.vmodels.get("v") is not None)
        yield proxy, cluster
    assert not history.models


async def test_the_answer_of_a_transaction_is_lost(
    shared_etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has come about, and whoever asked is told that nobody knows; asked again, what is there is
    found, and nothing written twice.
    """
    async with cut_off_at_will(shared_etcd) as (proxy, cluster):
        a, b, store = cluster["a"], cluster["b"], cluster.stores["a"]
        retarget = partial(set_vmodel, a, "new", expected_target_id="old")
        await losing(store, proxy.lose_replies, retarget, monkeypatch)
        await until_stored(cluster.observer, lambda found: found["v"].active_model_id == "new")
        written = await revisions(cluster.observer)
        await proxy.restore()
        status = await again(store, retarget)
        assert (status.status, status.active_model_id) == ("DEFINED", "new")
        assert await revisions(cluster.observer) == written

        # Meanwhile somebody else wants another one: the retry must not undo that.
        retarget = partial(set_vmodel, a, "newer", expected_target_id="new")
        await losing(store, proxy.lose_replies, retarget, monkeypatch)
        await until_stored(cluster.observer, lambda found: found["v"].active_model_id == "newer")
        await set_vmodel(b, "newest")
        await proxy.restore()
        with pytest.raises(TargetConflictError):
            await again(store, retarget)

        delete = partial(a.node.vmodels.delete, "v")
        await losing(store, proxy.lose_replies, delete, monkeypatch)
        await until_stored(cluster.observer, lambda found: not found)
        await proxy.restore()
        await again(store, delete)
        assert (await a.node.vmodels.status("v")).status == "NOT_FOUND"


async def test_a_transaction_is_lost_on_its_way(
    shared_etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not come about when nobody waits for it any more; the proxy lets go of it afterwards,
    and whether etcd still takes it then, nothing that came between is undone.
    """
    async with cut_off_at_will(shared_etcd) as (proxy, cluster):
        a, b, store = cluster["a"], cluster["b"], cluster.stores["a"]
        await losing(store, proxy.lose, partial(set_vmodel, a, "new"), monkeypatch)
        written = await stored_vmodels(cluster.observer)
        assert written["v"].active_model_id == "old"
        await proxy.restore()
        status = await again(store, partial(set_vmodel, a, "new"))
        assert (status.status, status.active_model_id) == ("DEFINED", "new")

        await losing(store, proxy.lose, partial(set_vmodel, a, "newer"), monkeypatch)
        await set_vmodel(b, "newest")
        await proxy.restore()
        status = await again(store, partial(a.node.vmodels.status, "v"))
        assert (status.status, status.active_model_id) == ("DEFINED", "newest")
        await again(store, partial(a.node.vmodels.delete, "v"))

"""Set, delete and status of vmodels, at one instance and across several."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelInfo, VModelRecord
from mm.core.vmodel_changes import SetVModel
from mm.edge.memory_store import Fault
from mm.errors import (
    InvalidRequestError,
    LoadTimeoutError,
    MeshError,
    ModelExistsError,
    ModelNotFoundError,
    ModelReferencedError,
    StatusCode,
    StoreUnavailableError,
    TargetConflictError,
)
from mm.mesh.ports import Item, Write
from mm.mesh.vmodel_manager import VModelStatus
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from mm.testing.fake_runtime import ModelPlan
from mm.testing.instance import Instance
from tests.mesh.calls import FAST

pytestmark = pytest.mark.anyio

OTHER = ModelInfo("type", "another path")


async def set_vmodel(
    instance: Instance,
    target: str,
    vmodel_id: str = "v",
    *,
    info: ModelInfo | None = INFO,
    sync: bool = False,
    deadline_s: float | None = None,
    **wishes: Any,
) -> VModelStatus:
    request = SetVModel(vmodel_id, ModelId(target), info=info, **wishes)
    return await instance.node.vmodels.set(request, sync=sync, deadline_s=deadline_s)


def stored(cluster: Cluster, vmodel_id: str = "v") -> VModelRecord | None:
    item = cluster.server.get(f"{PREFIX}/vmodels/{vmodel_id}")
    return None if item is None else VModelRecord.decode(item.value)


def store(cluster: Cluster, record: VModelRecord | bytes | None, vmodel_id: str = "v") -> None:
    """Write behind everybody's back."""
    value = record.encode() if isinstance(record, VModelRecord) else record
    cluster.server.transact([Write(f"{PREFIX}/vmodels/{vmodel_id}", value, if_revision=None)])


def written(cluster: Cluster) -> list[Item]:
    """Answer all that a change of a vmodel could touch."""
    tables = [cluster.server.table(f"{PREFIX}/{name}/") for name in ("vmodels", "registry")]
    return [item for table in tables for item in table.items]


def counts(cluster: Cluster) -> dict[str, int]:
    return {model_id: record.references for model_id, record in cluster.records().items()}


def brief(status: VModelStatus) -> str:
    """Answer "status active/its status target/its status"."""
    parts = [status.status]
    for model_id, model in (
        (status.active_model_id, status.active),
        (status.target_model_id, status.target),
    ):
        parts.append(f"{model_id}/{model.status if model is not None else '-'}")
    return " ".join(parts)


async def test_a_life_without_copies() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a, b = cluster["a"], cluster["b"]
        assert brief(await set_vmodel(a, "m", auto_delete=True)) == "DEFINED m/NOT_LOADED m/-"
        with pytest.raises(ModelReferencedError, match="Model m has referents"):
            await a.node.models.unregister(ModelId("m"))
        # The other one hears of it later than it asks.
        assert brief(await b.node.vmodels.status("v")) == "DEFINED m/NOT_LOADED m/-"
        assert brief(await set_vmodel(b, "n")) == "DEFINED n/NOT_LOADED n/-"
        assert counts(cluster) == {"n": 1}, "m was of the kind that goes"
        await a.node.vmodels.delete("v")
        assert stored(cluster) is None
        assert counts(cluster) == {"n": 0}
        for each in (a, b):
            vmodels = each.node.parts.vmodels
            await until(lambda known=vmodels: known.get("v") is None)  # type: ignore[misc]
            assert await each.node.vmodels.status("v") == VModelStatus("NOT_FOUND")
            await each.node.vmodels.delete("v")
        await b.node.models.unregister(ModelId("n"))


@pytest.mark.virtual_time
async def test_set_and_set_back_elsewhere() -> None:
    """However late the other instance hears of the change, it does not take the vmodel for what it
    was, neither to leave it alone nor to tell of it.
    """
    async with running_cluster(plan=FAST) as cluster:
        for name, delay_s in (("a", 0.03), ("b", 10.0)):
            cluster.watch_delay_s = delay_s
            await cluster.start(name)
        a, b = cluster["a"], cluster["b"]
        await set_vmodel(a, "m")
        await until(lambda: b.node.parts.vmodels.get("v") is not None)
        for _ in range(5):
            await set_vmodel(a, "n")
            assert (await b.node.vmodels.status("v")).active_model_id == "n"
            await set_vmodel(a, "o")
            assert (await set_vmodel(b, "m")).active_model_id == "m"
            assert stored(cluster) == VModelRecord(ModelId("m"), ModelId("m"))


@pytest.mark.virtual_time
async def test_what_became_of_a_model_elsewhere_is_told_at_once() -> None:
    """A controller asks any instance when a record has changed, and not again until it changes once
    more: what it is told of the model is not what it was before (interop 1.5).
    """
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a, b = cluster["a"], cluster["b"]
        await set_vmodel(a, "m")
        await cluster.settle()
        b.store._watch_delay_s = 10_000.0  # from now on it hears of nothing
        await a.load_here("m")
        await anyio.sleep(10)  # it is told that it serves
        assert brief(await b.node.vmodels.status("v")) == "DEFINED m/LOADED m/-"
        assert brief(await set_vmodel(b, "m")) == "DEFINED m/LOADED m/-"
        for each in (a, b):
            each.runtime.fail_loads("n", StatusCode.INVALID_ARGUMENT, "no such path")
        await set_vmodel(a, "n", sync=True)
        assert brief(await b.node.vmodels.status("v")) == (
            "TRANSITION_FAILED m/LOADED n/LOADING_FAILED"
        )
        copies = a.node.parts.copies
        copy = copies.get(ModelId("m"))
        assert copy is not None
        await set_vmodel(a, "m")
        copies.remove(copy)
        await anyio.sleep(10)
        assert brief(await b.node.vmodels.status("v")) == "DEFINED m/NOT_LOADED m/-"
        assert brief(await set_vmodel(b, "m")) == "DEFINED m/NOT_LOADED m/-"


@pytest.mark.virtual_time
async def test_what_is_deleted_elsewhere_is_set_anew_and_with_its_new_owner() -> None:
    async with running_cluster(plan=FAST) as cluster:
        for name, delay_s in (("a", 0.03), ("b", 10.0)):
            cluster.watch_delay_s = delay_s
            await cluster.start(name)
        a, b = cluster["a"], cluster["b"]
        await set_vmodel(a, "m", owner="one")
        await until(lambda: b.node.parts.vmodels.get("v") is not None)
        await a.node.vmodels.delete("v", "one")
        await set_vmodel(b, "m", owner="one")
        assert stored(cluster) == VModelRecord(ModelId("m"), ModelId("m"), owner="one")
        await anyio.sleep(11)
        await a.node.vmodels.delete("v", "one")
        await set_vmodel(a, "m", owner="two")
        assert await b.node.vmodels.status("v", "one") == VModelStatus("NOT_FOUND")
        assert (await b.node.vmodels.status("v", "two")).owner == "two"
        await b.node.vmodels.delete("v", "one")
        assert stored(cluster) is not None
        await b.node.vmodels.delete("v", "two")
        assert stored(cluster) is None


async def test_what_is_as_asked_for_is_not_written() -> None:
    """That it is so is on the word of the store; without a store only the status is told."""
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await set_vmodel(a, "m", owner="o")
        before = written(cluster)
        for _ in range(3):
            assert brief(await set_vmodel(a, "m", owner="o")) == "DEFINED m/NOT_LOADED m/-"
            assert (await set_vmodel(a, "m", info=None)).owner == "o"
        a.store.set_fault(Fault.REFUSED)
        assert brief(await a.node.vmodels.status("v", "o")) == "DEFINED m/NOT_LOADED m/-"
        with pytest.raises(StoreUnavailableError):
            await set_vmodel(a, "m", owner="o")
        with pytest.raises(StoreUnavailableError):
            await a.node.vmodels.delete("v", "somebody else")
        with pytest.raises(StoreUnavailableError):
            await set_vmodel(a, "m", info=OTHER)
        with pytest.raises(StoreUnavailableError):
            await set_vmodel(a, "n")
        assert written(cluster) == before


async def test_with_load_now_it_is_loaded() -> None:
    plan = ModelPlan(load_s=30.0)
    async with running_cluster("a", "b", plan=plan, vmodel_answer_s=60.0) as cluster:
        status = await set_vmodel(cluster["a"], "m", load_now=True)
        assert brief(status) == "DEFINED m/LOADING m/-"
        record = cluster.record("m")
        assert record is not None
        assert len(record.copies) == 1
        assert status.active is not None
        assert [copy.status for copy in status.active.copies] == ["LOADING"]


async def test_with_sync_it_is_loaded_when_the_answer_comes() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        status = await set_vmodel(cluster["a"], "m", load_now=True, sync=True)
        assert brief(status) == "DEFINED m/LOADED m/-"


@pytest.mark.usefixtures("no_transitions")
async def test_a_changed_target_of_one_that_serves() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a, b = cluster["a"], cluster["b"]
        await set_vmodel(a, "m", load_now=True, sync=True, auto_delete=True)
        await cluster.settle()
        for each in (a, b, a):
            assert brief(await set_vmodel(each, "n", info=OTHER)) == (
                "TRANSITIONING m/LOADED n/LOADING"
            )
            assert brief(await each.node.vmodels.status("v")) == "TRANSITIONING m/LOADED n/LOADING"
        assert counts(cluster) == {"m": 1, "n": 1}
        # As it is when the leader could not load it.
        store(cluster, VModelRecord(ModelId("m"), ModelId("n"), failed=True))
        assert brief(await set_vmodel(b, "n", info=OTHER)) == (
            "TRANSITION_FAILED m/LOADED n/LOADING"
        )
        assert brief(await set_vmodel(b, "n", info=OTHER, force=True)) == ("DEFINED n/LOADING n/-")
        await until(lambda: counts(cluster) == {"n": 1})


@pytest.mark.usefixtures("no_transitions")
async def test_sync_waits_for_the_switch() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await set_vmodel(cluster["a"], "m", load_now=True, sync=True)
        await cluster.settle()
        found: list[str] = []

        async def wait(name: str) -> None:
            found.append(brief(await set_vmodel(cluster[name], "n", info=OTHER, sync=True)))

        async with anyio.create_task_group() as group:
            for name in "abab":
                group.start_soon(wait, name)
            await until(lambda: stored(cluster) == VModelRecord(ModelId("m"), ModelId("n")))
            store(cluster, VModelRecord(ModelId("n"), ModelId("n")))
        assert found == ["DEFINED n/NOT_LOADED n/-"] * 4


@pytest.mark.virtual_time
@pytest.mark.usefixtures("no_transitions")
async def test_sync_waits_no_longer_than_the_caller() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=1000.0)) as cluster:
        a = cluster["a"]
        record = VModelRecord(ModelId("m"), ModelId("n"))
        for name in "mn":
            await a.register(name)
        store(cluster, record)
        await until(lambda: a.node.parts.vmodels.get("v") == record)
        for deadline_s, waited_s in ((None, 240.0), (20.0, 19.0), (1.0, 0.9)):
            began_s = anyio.current_time()
            until_s = None if deadline_s is None else began_s + deadline_s
            with pytest.raises(LoadTimeoutError, match="for vmodel v to switch to model n"):
                await set_vmodel(a, "n", sync=True, deadline_s=until_s)
            assert anyio.current_time() - began_s == pytest.approx(waited_s)
        until_s = anyio.current_time() + 20.0
        with pytest.raises(LoadTimeoutError, match="for model o to be loaded"):
            await set_vmodel(a, "o", "w", sync=True, load_now=True, deadline_s=until_s)


@pytest.mark.parametrize(
    ("error", "text", "wishes"),
    [
        (InvalidRequestError, "non-empty vModelId", {"vmodel_id": ""}),
        (InvalidRequestError, "non-empty targetModelId", {"target": ""}),
        (InvalidRequestError, "non-empty model type", {"info": ModelInfo("", "path")}),
        (InvalidRequestError, "at most 4096 bytes, this one 4097", {"vmodel_id": "é" * 2048 + "e"}),
        (InvalidRequestError, "at most 4096 bytes, this one 5000", {"target": "t" * 5000}),
        (
            InvalidRequestError,
            "owner of a vmodel has at most",
            {"vmodel_id": "x", "owner": "o" * 5000},
        ),
        (ModelExistsError, 'different owner "me"', {"owner": "you"}),
        (ModelExistsError, "Target model m already exists", {"info": OTHER}),
        (ModelNotFoundError, "Target model x not found", {"target": "x", "info": None}),
        (ModelNotFoundError, "vmodel x not found", {"vmodel_id": "x", "update_only": True}),
        (TargetConflictError, "is m, not k", {"target": "n", "expected_target_id": "k"}),
    ],
)
async def test_refusals(error: type[MeshError], text: str, wishes: dict[str, Any]) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await set_vmodel(cluster["a"], "m", owner="me")
        before = written(cluster)
        for name in "ba":
            with pytest.raises(error, match=text):
                await set_vmodel(cluster[name], **{"target": "m", **wishes})
        assert written(cluster) == before


@pytest.mark.parametrize("name", ["a/b", "../registry/m", "..", "a b", "größe", "💥", "x" * 4096])
async def test_ids_are_any_text(name: str) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await set_vmodel(cluster["a"], name, name)
        assert stored(cluster, name) == VModelRecord(ModelId(name), ModelId(name))
        status = await cluster["b"].node.vmodels.status(name)
        assert brief(status) == f"DEFINED {name}/NOT_LOADED {name}/-"
        await cluster["b"].node.vmodels.delete(name)
        assert stored(cluster, name) is None
        assert list(cluster.records()) == [name]


async def test_owners() -> None:
    async with running_cluster("a", plan=FAST, default_vmodel_owner="us") as cluster:
        vmodels = cluster["a"].node.vmodels
        assert (await set_vmodel(cluster["a"], "m", "theirs", owner="them")).owner == "them"
        assert (await set_vmodel(cluster["a"], "m", "ours")).owner == "us"
        assert await vmodels.status("ours", "them") == VModelStatus("NOT_FOUND")
        await vmodels.delete("ours", "them")
        assert stored(cluster, "ours") is not None
        assert await vmodels.status("ours") == await vmodels.status("ours", "us")
        await vmodels.delete("ours", "us")
        assert stored(cluster, "ours") is None


async def test_read_only() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await set_vmodel(cluster["a"], "m")
        reader = await cluster.start("reader", kv_read_only=True)
        assert (await set_vmodel(reader, "m")).status == "DEFINED", "nothing to write"
        await reader.node.vmodels.delete("unknown")
        for call in (set_vmodel(reader, "n"), reader.node.vmodels.delete("v")):
            with pytest.raises(MeshError, match="model-mesh is in read-only mode") as caught:
                await call
            assert caught.value.code == StatusCode.UNAVAILABLE
        with pytest.raises(ModelNotFoundError):
            await set_vmodel(reader, "n", info=None)


async def test_unreadable_records(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        store(cluster, b"{")
        with pytest.raises(
            MeshError, match="record of vmodel v is unreadable; delete it"
        ) as caught:
            await set_vmodel(a, "m")
        assert caught.value.code == StatusCode.FAILED_PRECONDITION
        assert await a.node.vmodels.status("v") == VModelStatus("NOT_FOUND")
        with pytest.raises(MeshError, match="without an owner: it may not be us's") as caught:
            await a.node.vmodels.delete("v", "us")
        assert caught.value.code == StatusCode.FAILED_PRECONDITION
        assert cluster.server.get(f"{PREFIX}/vmodels/v") is not None
        await a.node.vmodels.delete("v")
        assert cluster.server.get(f"{PREFIX}/vmodels/v") is None
        key = f"{PREFIX}/registry/m"
        cluster.server.transact([Write(key, b"[]", if_revision=None)])
        with pytest.raises(MeshError, match="record of model m is unreadable; unregister it"):
            await set_vmodel(a, "m")


@pytest.mark.parametrize("sync", [True, False])
async def test_who_spreads_calls_itself_has_the_target_loaded_where_it_asks(sync: bool) -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for number, name in enumerate("abcabc"):
            target = ModelId(f"m{number}")
            request = SetVModel(f"v{number}", target, info=INFO, load_now=True)
            await cluster[name].node.vmodels.set(request, sync=sync, balanced=True)
            runtime = cluster[name].runtime
            await until(lambda t=target, r=runtime: t in r.loaded)  # type: ignore[misc]

"""Vmodels whose records, models or ids are not as they should be; and loads without room."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import anyio
import pytest

from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.core.vmodel_changes import SetVModel
from mm.edge.management import status_message
from mm.edge.memory_store import Fault
from mm.edge.vmodel_management import encode_status
from mm.errors import (
    InvalidRequestError,
    MeshError,
    ModelReferencedError,
    NoRoomError,
    StatusCode,
    StoreUnavailableError,
)
from mm.mesh.models import EnsureRequest
from mm.mesh.ports import ModelStatus, Write
from mm.mesh.vmodel_manager import VModelStatus
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from mm.testing.instance import Instance
from tests.mesh.calls import FAST

pytestmark = pytest.mark.anyio

M, N = ModelId("m"), ModelId("n")


async def set_vmodel(
    instance: Instance, target: str, vmodel_id: str = "v", *, sync: bool = False, load: bool = False
) -> VModelStatus:
    request = SetVModel(vmodel_id, ModelId(target), info=INFO, load_now=load)
    return await instance.node.vmodels.set(request, sync=sync)


def write(cluster: Cluster, key: str, record: ModelRecord | VModelRecord | None) -> None:
    """Do so behind everybody's back."""
    value = None if record is None else record.encode()
    cluster.server.transact([Write(f"{PREFIX}/{key}", value, if_revision=None)])


async def vanish(cluster: Cluster, model_id: ModelId) -> None:
    write(cluster, f"registry/{model_id}", None)
    for each in cluster.serving:
        registry = each.node.parts.registry
        await until(lambda known=registry: known.get(model_id) is None)  # type: ignore[misc]


async def test_a_wrong_count_does_not_let_go_of_a_model_that_is_named() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await set_vmodel(a, "m")
        known = a.node.parts.registry
        for count in (0, -1):
            write(cluster, "registry/m", replace(cluster.records()[M], references=count))
            await until(lambda c=count: known.get(M).references == c)  # type: ignore
            with pytest.raises(ModelReferencedError):
                await a.node.models.unregister(M)
            assert M in cluster.records()


@pytest.mark.virtual_time
async def test_a_vmodel_deleted_elsewhere_does_not_keep_its_model() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        cluster.watch_delay_s = 10.0
        b = await cluster.start("b")
        await set_vmodel(cluster["a"], "m")
        await until(lambda: b.node.parts.vmodels.get("v") is not None)
        await cluster["a"].node.vmodels.delete("v")
        await b.node.models.unregister(M)
        assert not cluster.records()


@pytest.mark.parametrize("by_vmodel", [True, False])
async def test_a_model_that_comes_back_counts_all_who_name_it(by_vmodel: bool) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a = cluster["a"]
        for name in "uvw":
            await set_vmodel(a, "m", name)
        await vanish(cluster, M)
        if by_vmodel:
            await set_vmodel(a, "m", "v")
        else:
            await a.register("m")
        assert cluster.records()[M].references == 3
        for name in "uvw":
            await a.node.vmodels.delete(name)
        assert cluster.records()[M].references == 0


@pytest.mark.usefixtures("no_transitions")
async def test_a_target_that_comes_back_is_waited_for_once_more() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await set_vmodel(a, "m", sync=True, load=True)
        await cluster.settle()
        await set_vmodel(a, "n")
        write(cluster, "vmodels/v", VModelRecord(M, N, failed=True))
        await vanish(cluster, N)
        assert (await set_vmodel(a, "n")).status == "TRANSITIONING"
        record = a.node.parts.vmodels.get("v")
        assert record == VModelRecord(M, N)


@pytest.mark.parametrize("target", ["***GETSTATE***", "***LOGCACHE***"])
async def test_debug_ids_are_no_targets(target: str) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        with pytest.raises(InvalidRequestError, match="is a debug id"):
            await set_vmodel(cluster["a"], target)
        assert not cluster.records()


@pytest.mark.parametrize("sync", [True, False])
async def test_want_of_room_is_a_status_once_the_vmodel_is_set(
    sync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(_request: EnsureRequest) -> ModelStatus:
        raise NoRoomError("nowhere to load it")

    async with running_cluster("a", plan=FAST, vmodel_answer_s=60.0) as cluster:
        a = cluster["a"]
        monkeypatch.setattr(a.node.models, "ensure_loaded", refuse)
        status = await set_vmodel(a, "m", sync=sync, load=True)
        assert (status.status, status.active_model_id) == ("DEFINED", "m")
        assert status.active == ModelStatus("LOADING_FAILED", ("nowhere to load it",))


async def test_a_long_id_that_is_there_can_be_deleted() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        vmodels = cluster["a"].node.vmodels
        long = "x" * 5000
        with pytest.raises(InvalidRequestError, match="at most 4096 bytes"):
            await vmodels.delete(long)
        write(cluster, "registry/m", ModelRecord(INFO, references=1))
        write(cluster, f"vmodels/{long}", VModelRecord(M, M))
        await until(lambda: cluster["a"].node.parts.vmodels.get(long) is not None)
        await vmodels.delete(long)
        assert cluster.server.get(f"{PREFIX}/vmodels/{long}") is None
        assert cluster.records()[M].references == 0


async def test_ids_that_nothing_can_have_are_asked_of_nobody() -> None:
    """Not even a store that would not bear them."""
    async with running_cluster("a", plan=FAST) as cluster:
        a, long = cluster["a"], "\u00e9" * 2049
        await set_vmodel(a, "m")
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: a.node.vmodels.set(SetVModel(long, M, update_only=True)),
            lambda: a.node.vmodels.set(SetVModel("v", ModelId(long))),
            lambda: a.node.vmodels.set(SetVModel("v", M, expected_target_id=long)),
            lambda: a.node.vmodels.delete(long),
            lambda: a.node.models.unregister(ModelId(long)),
        )
        a.store.set_fault(Fault.REFUSED)
        for call in calls:
            with pytest.raises(InvalidRequestError, match="at most 4096 bytes, this one 4098"):
                await call()


async def test_times_that_cannot_be_are_told_as_none() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await set_vmodel(a, "m", sync=True, load=True)
        await cluster.settle()
        record = cluster.records()[M]
        gone = InstanceId("gone")
        write(cluster, "registry/m", replace(record, copies={**record.copies, gone: -5}))
        known = a.node.parts.registry
        await until(lambda: gone in known.get(M).copies)  # type: ignore[union-attr]
        status = await a.node.vmodels.status("v")
        assert status.active is not None
        assert min(copy.time_ms for copy in status.active.copies) == -5
        assert encode_status(status)
        assert bytes(status_message(status.active))


@pytest.mark.virtual_time
async def test_without_sync_the_answer_has_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that the store took is not added to that for a load to begin."""

    async def hang(_request: EnsureRequest) -> ModelStatus:
        await anyio.sleep_forever()
        raise AssertionError

    async with running_cluster(plan=FAST) as cluster:
        cluster.store_delay_s = 0.03
        a = await cluster.start("a")
        monkeypatch.setattr(a.node.models, "ensure_loaded", hang)
        for name in "vw":  # written, and found
            await set_vmodel(a, "m", name)
        for name in ("v", "x"):
            began_s = anyio.current_time()
            status = await set_vmodel(a, "m", name, load=True)
            assert anyio.current_time() - began_s <= 0.1
            assert status.active is not None
            assert status.active.status == "LOADING"


@pytest.mark.virtual_time
async def test_a_change_that_a_slow_store_does_not_make_is_told_after_a_while() -> None:
    """Whoever does it, or waits for who does it for him; and it can be made again."""
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await set_vmodel(a, "m", "old")
        await cluster.settle()

        async def expect_late(call: Callable[[], Awaitable[object]]) -> None:
            began_s = anyio.current_time()
            with pytest.raises(MeshError, match="could not be changed within 10 s") as caught:
                await call()
            assert caught.value.code == StatusCode.UNAVAILABLE
            assert anyio.current_time() - began_s == pytest.approx(10.0)

        a.store._call_delay_s = 60.0
        async with anyio.create_task_group() as group:
            for name in "uvw":  # changed
                group.start_soon(expect_late, lambda v=name: set_vmodel(a, "m", v))  # type: ignore
            group.start_soon(expect_late, lambda: set_vmodel(a, "m", "old"))  # as it is
            group.start_soon(expect_late, lambda: a.node.vmodels.delete("old"))
        assert a.node.parts.counters.vmodel_changes_late == 5
        a.store._call_delay_s = 0.0
        for name in "uvw":
            await set_vmodel(a, "m", name)
        assert cluster.records()[M].references == 4


@pytest.mark.virtual_time
async def test_loads_that_do_not_begin_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_request: EnsureRequest) -> ModelStatus:
        await anyio.sleep_forever()
        raise AssertionError

    async with running_cluster("a", plan=FAST, vmodel_loads_begun_max=2) as cluster:
        a = cluster["a"]
        monkeypatch.setattr(a.node.models, "ensure_loaded", hang)
        told = [await set_vmodel(a, each, f"v{each}", load=True) for each in ("m", "n", "o", "m")]
        active = [each.active for each in told if each.active is not None]
        assert [each.status for each in active] == ["LOADING", "LOADING", "NOT_LOADED", "LOADING"]
        assert active[2].errors == ("2 loads are being begun already: set the vmodel again",)
        assert a.node.parts.counters.vmodel_loads_refused == 1


@pytest.mark.virtual_time
async def test_switches_of_the_leader_do_not_keep_clients_waiting() -> None:
    """However many end at a time, and however few changes of clients are made at a time."""
    async with running_cluster(
        plan=FAST, vmodel_changes_at_once_max=1, vmodel_switches_at_once_max=1
    ) as cluster:
        cluster.store_delay_s = 0.02
        a = await cluster.start("a")
        await set_vmodel(a, "m")
        for number in range(50):  # nobody is served by "m", so each is to be switched
            write(cluster, f"vmodels/v{number}", VModelRecord(M, N))
        write(cluster, "registry/n", ModelRecord(INFO, references=50))
        await until(lambda: a.node.transitions.count == 50)
        began_s = anyio.current_time()
        await set_vmodel(a, "other", "w")
        assert anyio.current_time() - began_s < 0.1
        assert a.node.transitions.count > 30
        await until(lambda: a.node.transitions.count == 0)


@pytest.mark.virtual_time
async def test_many_sets_to_one_model_are_answered_soon() -> None:
    """Each changes how often the model is referred to; and a tenth of them finds nothing to do."""
    async with running_cluster(plan=FAST) as cluster:
        cluster.store_delay_s = 0.008
        a = await cluster.start("a")
        await set_vmodel(a, "old", "v0")
        took_s: list[float] = []

        async def set_one(number: int, target: str) -> None:
            began_s = anyio.current_time()
            status = await set_vmodel(a, target, f"v{number}")
            assert (status.status, status.active_model_id) == ("DEFINED", target)
            took_s.append(anyio.current_time() - began_s)

        changes_before = a.node.parts.counters.vmodel_changes
        for target in ("old", "m", "n", "n"):
            async with anyio.create_task_group() as group:
                for number in range(64):
                    group.start_soon(set_one, number, target)
        assert max(took_s) < 0.1
        assert cluster.records()[N].references == 64
        assert cluster.records()[M].references == 0
        assert a.node.parts.counters.vmodel_changes - changes_before == 63 + 64 + 64


@pytest.mark.virtual_time
async def test_one_of_many_that_is_refused_is_refused_alone() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await a.node.vmodels.set(SetVModel("v3", N, info=INFO, owner="other"))
        refused: list[int] = []

        async def set_one(number: int) -> None:
            try:
                await a.node.vmodels.set(SetVModel(f"v{number}", M, info=INFO, owner="me"))
            except MeshError:
                refused.append(number)

        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(set_one, number)
        assert refused == [3]
        assert cluster.records()[M].references == 9
        assert cluster.records()[N].references == 1


@pytest.mark.virtual_time
async def test_a_set_that_was_overtaken_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has set the vmodel; the next change took the model away before its load began. It is told
    as it was set: that the vmodel stands for a model that is not there was never so.
    """
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a, b = cluster["a"], cluster["b"]
        ensure_loaded = a.node.models.ensure_loaded

        async def overtaken(request: EnsureRequest) -> ModelStatus:
            await b.node.vmodels.delete("v")
            await until(lambda: a.node.parts.registry.get(ModelId("m")) is None)
            return await ensure_loaded(request)

        monkeypatch.setattr(a.node.models, "ensure_loaded", overtaken)
        request = SetVModel("v", ModelId("m"), info=INFO, auto_delete=True, load_now=True)
        status = await a.node.vmodels.set(request)
        assert (status.status, status.active_model_id) == ("DEFINED", "m")
        assert status.active == ModelStatus("NOT_LOADED")
        assert not cluster.records()


@pytest.mark.virtual_time
async def test_many_that_come_to_one_model_are_told_soon_that_the_store_is_silent() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await set_vmodel(a, "m", "u")
        a.store.set_fault(Fault.SILENT)
        told_s = []
        begin_s = anyio.current_time()

        async def change(number: int) -> None:
            with pytest.raises(StoreUnavailableError, match=r"did not answer|cannot be reached"):
                await set_vmodel(a, "m", f"v{number}")
            told_s.append(anyio.current_time() - begin_s)

        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(change, number)
        assert max(told_s) <= a.config.store_timeout_s
        a.store.set_fault(None)
        await until(lambda: a.store.connected)
        await set_vmodel(a, "m", "w")

"""Register, unregister, status and ensure-loaded, at one instance and across several."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from mm.core.calls import Call, Hop
from mm.core.first_use import HOUR_MS
from mm.core.ids import ModelId
from mm.core.records import ModelInfo, ModelRecord
from mm.edge.memory_store import Fault
from mm.errors import (
    InvalidRequestError,
    LimitError,
    MeshError,
    ModelExistsError,
    ModelNotFoundError,
    ModelReferencedError,
    NoRoomError,
    StatusCode,
    StoreUnavailableError,
)
from mm.mesh.id_checks import DEBUG_IDS
from mm.mesh.models import EnsureRequest
from mm.mesh.ports import Write
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST, METHOD, A, B, M, loaded_at, loads

pytestmark = pytest.mark.anyio

OTHER = ModelInfo("type", "another path")
MODEL_KEY = f"{PREFIX}/registry/m"


def store(cluster: Cluster, record: ModelRecord | bytes | None) -> None:
    """Write the record of "m" behind everybody's back."""
    value = record.encode() if isinstance(record, ModelRecord) else record
    cluster.server.transact([Write(MODEL_KEY, value, if_revision=None)])


def stored(cluster: Cluster) -> ModelRecord:
    record = cluster.record("m")
    assert record is not None
    return record


# --- register ------------------------------------------------------------------------------------


async def test_registering_twice_is_one_registration() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        assert (await cluster["a"].register("m")).status == "NOT_LOADED"
        written = cluster.server.get(f"{PREFIX}/registry/m")
        for name in "ab":
            assert (await cluster[name].register("m")).status == "NOT_LOADED"
        assert cluster.server.get(f"{PREFIX}/registry/m") == written
        with pytest.raises(ModelExistsError, match="already exists with different attribute"):
            await cluster["b"].register("m", OTHER)
        with pytest.raises(ModelExistsError):
            await cluster["b"].register("m", replace(INFO, key="other"), load_now=True)
        assert stored(cluster).info == INFO
        await cluster["a"].invoke("m")
        assert (await cluster["b"].register("m")).status == "LOADED"


@pytest.mark.parametrize("info", [INFO, OTHER])
async def test_the_mirror_may_be_behind_an_unregistration(info: ModelInfo) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["b"].register("m")
        await until(lambda: M in list(cluster["a"].node.parts.registry))
        store(cluster, None)
        assert (await cluster["a"].register("m", info)).status == "NOT_LOADED"
        await cluster.settle()
        assert stored(cluster).info == info


@pytest.mark.virtual_time
async def test_what_counts_as_the_last_use_of_a_new_model() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a, now_ms = cluster["a"], cluster["a"].clock.now_ms()
        cases = [(False, 0, 6 * HOUR_MS), (True, 0, HOUR_MS), (False, now_ms - 7, 7)]
        cases += [(True, now_ms - 7, 7), (False, now_ms + 99_000, 0)]
        for number, (load_now, last_used_ms, age_ms) in enumerate(cases):
            model_id = ModelId(f"m{number}")
            began_ms = a.clock.now_ms()
            await a.node.models._create(
                model_id, INFO, load_now=load_now, last_used_ms=last_used_ms
            )
            record = cluster.record(model_id)
            assert record is not None
            expected_ms = (now_ms if last_used_ms and age_ms else began_ms) - age_ms
            assert record.last_used_ms == expected_ms, cases[number]


@pytest.mark.virtual_time
async def test_registering_again_raises_the_last_use_by_an_hour_or_not_at_all() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        models, now_ms = cluster["a"].node.models, cluster["a"].clock.now_ms()

        async def register(last_used_ms: int) -> int:
            await models.register(M, INFO, load_now=False, sync=False, last_used_ms=last_used_ms)
            return now_ms - stored(cluster).last_used_ms

        assert await register(now_ms - 5 * HOUR_MS) == 5 * HOUR_MS
        assert await register(now_ms - 4 * HOUR_MS) == 5 * HOUR_MS
        assert await register(0) == 5 * HOUR_MS
        assert await register(now_ms - 9 * HOUR_MS) == 5 * HOUR_MS
        assert await register(now_ms - 3 * HOUR_MS) == 3 * HOUR_MS


async def test_ids_and_types_are_needed() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a, models = cluster["a"], cluster["a"].node.models
        with pytest.raises(InvalidRequestError, match="non-empty model type"):
            await a.register("m", ModelInfo(""))
        for empty in (a.register(""), a.status(""), a.load(""), models.unregister(ModelId(""))):
            with pytest.raises(InvalidRequestError, match="must provide non-empty modelId"):
                await empty
        assert cluster.records() == {}


async def test_no_more_models_than_the_limit() -> None:
    async with running_cluster("a", "b", plan=FAST, models_max=2) as cluster:
        for name in ("m", "n"):
            await cluster["a"].register(name)
        for name in "ab":
            registry = cluster[name].node.parts.registry
            await until(lambda registry=registry: len(registry) == 2)  # type: ignore[misc]
            with pytest.raises(LimitError, match="is 2: unregister some, or set MM_MAX") as caught:
                await cluster[name].register("o")
            assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED
            assert (await cluster[name].register("m")).status == "NOT_LOADED", "it is there"
        await cluster["b"].node.models.unregister(M)
        await cluster["b"].register("o")
    async with running_cluster("a", plan=FAST, models_max=0) as cluster:
        for name in ("m", "n"):
            await cluster["a"].register(name)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (ModelInfo("ü" * 2049), "the type of a model has at most 4096 bytes, this one 4098"),
        (ModelInfo("t", "p" * 3_000_000), "the path of a model has at most 65536 bytes"),
        (ModelInfo("t", "p", "k" * 3_000_000), "the key of a model has at most 131072 bytes"),
    ],
)
async def test_what_is_too_large_to_be_registered_is_named(info: ModelInfo, message: str) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        with pytest.raises(InvalidRequestError) as caught:
            await cluster["a"].register("m", info)
        assert caught.value.message.startswith(message)
        assert len(caught.value.message) < 200
        assert cluster.records() == {}


async def test_what_others_registered_may_be_large() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        info = ModelInfo("t", "p" * 70_000)
        store(cluster, ModelRecord(info))
        await until(lambda: M in list(cluster["a"].node.parts.registry))
        assert (await cluster["a"].register("m", info)).status == "NOT_LOADED"
        assert await cluster["a"].invoke("m") == "a"


async def test_a_read_only_mesh_changes_nothing() -> None:
    async with running_cluster("a", plan=FAST, kv_read_only=True) as cluster:
        models = cluster["a"].node.models
        with pytest.raises(MeshError, match="model-mesh read-only mode") as caught:
            await cluster["a"].register("m")
        assert caught.value.code == StatusCode.UNAVAILABLE
        await models.unregister(M)
        for value in (ModelRecord(INFO, last_used_ms=1), b"{"):
            store(cluster, value)
            before = cluster.server.revision
            with pytest.raises(MeshError, match="model-mesh read-only mode"):
                await models.unregister(M)
            assert cluster.server.revision == before
        # What writes nothing is allowed: clients repeat their registrations while a store moves.
        store(cluster, ModelRecord(INFO, last_used_ms=1))
        await until(lambda: cluster["a"].node.parts.registry.get(M) is not None)
        assert (await cluster["a"].register("m")).status == "NOT_LOADED"
        with pytest.raises(ModelExistsError):
            await cluster["a"].register("m", ModelInfo("other"))
        with pytest.raises(MeshError, match="model-mesh read-only mode"):
            await models.register(
                M, INFO, load_now=False, sync=False, last_used_ms=cluster["a"].clock.now_ms()
            )
        assert (await cluster["a"].register("m", load_now=True, sync=True)).status == "LOADED"


@pytest.mark.parametrize("debug_id", sorted(DEBUG_IDS))
async def test_the_debug_ids_of_java_are_refused(debug_id: str) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a, model_id = cluster["a"], ModelId(debug_id)
        for call in (
            a.status(debug_id),
            a.register(debug_id),
            a.load(debug_id),
            a.node.models.unregister(model_id),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                await call
            assert caught.value.message.startswith(f"{debug_id} is a debug id of the Java")
        assert cluster.records() == {}


@pytest.mark.parametrize("model_id", ["/", "a/b", "../m", "..", " m ", "mø日本", "x" * 4096])
async def test_any_text_may_be_an_id(model_id: str) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register(model_id)
        assert set(cluster.records()) == {model_id}, "the key is the id as it is"
        for name in "ab":
            await cluster[name].invoke(model_id)
            assert (await cluster[name].status(model_id)).status == "LOADED"
        await cluster["b"].node.models.unregister(ModelId(model_id))
        assert cluster.records() == {}


async def test_loading_now_and_waiting_for_it() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        status = await cluster["a"].register("m", load_now=True, sync=True)
        assert status.status == "LOADED"
        assert len(status.copies) == 1
        assert loads(cluster) == 1
        cluster.check()


async def test_loading_now_without_waiting_for_it() -> None:
    async with running_cluster("a", "b", plan=ModelPlan(load_s=0.02, unload_s=0.01)) as cluster:
        status = await cluster["a"].register("m", load_now=True)
        assert status.status == "LOADING"
        assert [copy.status for copy in status.copies] == ["LOADING"]
        for name in "ab":
            registry = cluster[name].node.parts.registry
            await until(lambda registry=registry: bool(registry.holders()))  # type: ignore[misc]
            assert (await cluster[name].status("m")).status == "LOADING"
        await cluster.settle()
        for name in "ab":
            assert (await cluster[name].status("m")).status == "LOADED"
        assert loads(cluster) == 1


@pytest.mark.virtual_time
async def test_a_failed_load_is_a_status() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        for each in cluster.serving:
            each.runtime.fail_loads("m", StatusCode.INTERNAL, f"boom at {each.name}")
        status = await cluster["a"].register("m", load_now=True, sync=True)
        assert status.status == "LOADING_FAILED"
        assert {copy.instance_id for copy in status.copies} == {A, B}
        assert {copy.status for copy in status.copies} == {"LOADING_FAILED"}
        await cluster.settle()
        again = await cluster["b"].status("m")
        assert again.status == "LOADING_FAILED"
        newest_first = [copy.instance_id for copy in again.copies]
        assert list(again.errors) == [f"INTERNAL: boom at {name}" for name in newest_first]


async def test_a_load_that_nobody_waits_for_goes_on_elsewhere_when_it_fails() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for name in "ab":
            cluster[name].runtime.fail_loads("m", StatusCode.INTERNAL, "boom")
        assert (await cluster["a"].register("m", load_now=True)).status in ("LOADING", "LOADED")
        await until(lambda: cluster["c"].runtime.loaded == {M})
        await cluster.settle()
        assert (await cluster["b"].status("m")).status == "LOADED"
        assert not any(each.node.models._followed for each in cluster.serving)


@pytest.mark.virtual_time
async def test_many_that_do_not_wait_are_followed_once() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=0.02)) as cluster:
        await cluster["a"].register("m")
        for _ in range(20):
            assert (await cluster["a"].load("m", sync=False)).status == "LOADING"
        tasks = [task.name or "" for task in anyio.get_running_tasks()]
        assert len([name for name in tasks if "Models._follow" in name]) == 1
        await cluster.settle()
        assert (await cluster["a"].load("m", sync=False)).status == "LOADED"
        await until(lambda: not cluster["a"].node.models._followed)


# --- ensure-loaded -------------------------------------------------------------------------------


async def test_an_unknown_model_cannot_be_loaded() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        for sync in (True, False):
            with pytest.raises(ModelNotFoundError):
                await cluster["a"].load("m", sync=sync)


@pytest.mark.parametrize("sync", [True, False])
async def test_a_copy_anywhere_is_enough(sync: bool) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        status = await cluster["a"].load("m", sync=sync)
        assert status.status == "LOADED"
        assert [copy.instance_id for copy in status.copies] == [B]
        assert loads(cluster) == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("asked", ["a", "b"])
async def test_asking_for_a_copy_is_a_use(sync: bool, asked: str) -> None:
    """Whoever wants it loaded does not want it evicted first (spec core 2.3)."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        table = cluster["a"].node.parts.copies.table
        await loaded_at(cluster, "a")
        before_ms = table.last_used("m") or 0
        for last_used_ms in (0, before_ms):  # now, and a time that has passed
            await anyio.sleep(5)
            request = EnsureRequest(M, sync, last_used_ms=last_used_ms)
            await cluster[asked].node.models.ensure_loaded(request)
        assert before_ms + 5_000 <= (table.last_used("m") or 0) < before_ms + 10_000


async def test_a_hit_only_order_from_a_peer_never_loads() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        for sync in (True, False):
            call = Call(M, hop=Hop.HIT_ONLY, hops_left=1)
            with pytest.raises(NoRoomError) as caught:
                await cluster["a"].node.models.ensure_loaded(EnsureRequest(M, sync), call)
            assert caught.value.hop_result == "not-here"
        assert loads(cluster) == 0


async def test_a_load_ordered_by_a_peer_that_fails_is_an_error_for_it() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", StatusCode.INTERNAL, "boom")
        call = Call(M, hop=Hop.LOAD_LOCAL, hops_left=1)
        with pytest.raises(MeshError, match="boom") as caught:
            await cluster["a"].node.models.ensure_loaded(EnsureRequest(M, sync=True), call)
        assert caught.value.hop_result == "load-failed"


@pytest.mark.parametrize("registers", [True, False])
async def test_who_spreads_calls_itself_has_it_loaded_where_it_asks(registers: bool) -> None:
    """mm-balanced, for registerModel with loadNow and for ensureLoaded (around 5)."""
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for number, name in enumerate("abcabc"):
            models, model_id = cluster[name].node.models, ModelId(f"m{number}")
            status = await models.register(
                model_id, INFO, load_now=registers, sync=True, last_used_ms=0, balanced=True
            )
            if not registers:
                status = await models.ensure_loaded(
                    EnsureRequest(model_id, sync=True, balanced=True)
                )
            assert [copy.instance_id for copy in status.copies] == [name]


# --- unregister ----------------------------------------------------------------------------------


async def test_unregistering_unloads_everywhere() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        await cluster["c"].node.models.unregister(M)
        await cluster["c"].node.models.unregister(M)
        await cluster.settle()
        assert cluster.record("m") is None
        assert [each.runtime.loaded for each in cluster.serving] == [set(), set(), set()]
        cluster.check()
        for each in cluster.serving:
            with pytest.raises(ModelNotFoundError):
                await each.invoke("m", METHOD)


async def test_a_referenced_model_stays() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        store(cluster, ModelRecord(INFO, references=1))
        with pytest.raises(ModelReferencedError, match="Model m has referents"):
            await cluster["a"].node.models.unregister(M)
        assert stored(cluster).references == 1


async def test_a_record_that_cannot_be_read_can_be_unregistered() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        store(cluster, b"{")
        with pytest.raises(MeshError, match="record of model m is unreadable") as caught:
            await cluster["a"].register("m")
        assert caught.value.code == StatusCode.FAILED_PRECONDITION
        assert (await cluster["a"].status("m")).status == "NOT_FOUND"
        with pytest.raises(ModelNotFoundError):
            await cluster["a"].invoke("m")
        await cluster["a"].node.models.unregister(M)
        assert cluster.server.get(MODEL_KEY) is None
        await cluster["a"].register("m")
        assert await cluster["a"].invoke("m") == "a"


@pytest.mark.virtual_time
async def test_without_a_store_changes_fail_fast_and_what_is_loaded_is_told() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        for each in cluster.serving:
            each.store.set_fault(Fault.SILENT)
        for change in (
            cluster["a"].register("n"),
            cluster["a"].register("m"),
            cluster["a"].node.models.unregister(M),
        ):
            with anyio.fail_after(3.6), pytest.raises(StoreUnavailableError) as caught:
                await change
            assert caught.value.code == StatusCode.UNAVAILABLE
        for name in "ab":
            assert (await cluster[name].status("m")).status == "LOADED"
            assert (await cluster[name].load("m")).status == "LOADED"
            assert await cluster[name].invoke("m") == "b"

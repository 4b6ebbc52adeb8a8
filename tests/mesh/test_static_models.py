"""Models that the deployment itself names: registered at the start, and as the list changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest

from mm.core.constraints import parse_type_constraints
from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.core.static_models import StaticModel
from mm.core.vmodel_changes import SetVModel
from mm.edge.memory_store import Fault
from mm.errors import StartupError, StatusCode
from mm.mesh.static_models import StaticModels
from mm.testing.cluster import Instance, running_cluster, until
from tests.mesh.calls import FAST

pytestmark = pytest.mark.anyio

INFO = ModelInfo("type", "path")


def entry(model_id: str, info: ModelInfo = INFO, **rest: Any) -> StaticModel:
    return StaticModel(ModelId(model_id), info, **rest, place="entry 1 of X")


def static_models(instance: Instance, *entries: StaticModel) -> StaticModels:
    config = replace(instance.config, static_models=entries)
    return StaticModels(config, instance.node.models, instance.node.vmodels)


@asynccontextmanager
async def following(
    instance: Instance, entries: Sequence[StaticModel]
) -> AsyncIterator[StaticModels]:
    """An instance that serves, and whose list may change."""
    static = static_models(instance, *entries)
    await static.register_first()
    async with anyio.create_task_group() as group:
        group.start_soon(static.run)
        yield static
        group.cancel_scope.cancel()


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# --- the start -----------------------------------------------------------------------------------


async def test_what_is_awaited_serves_when_the_start_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with running_cluster("a", plan=FAST) as cluster:
        entries = [entry("m"), entry("n", is_awaited=True), entry("o", is_awaited=True)]
        await static_models(cluster["a"], *entries).register_first()
        assert set(cluster.records()) == {"m", "n", "o"}
        assert [(await cluster["a"].status(each)).status for each in "mno"] == [
            "NOT_LOADED",
            "LOADED",
            "LOADED",
        ]
    assert '1 of 2 static models are loaded: entry 1 of X (model "o")' in log_of(caplog)


async def test_all_instances_may_register_the_same_at_once() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        entries = [entry(f"m{number}", is_awaited=True) for number in range(5)]
        async with anyio.create_task_group() as group:
            for instance in cluster.serving:
                group.start_soon(static_models(instance, *entries).register_first)
        await cluster.settle()
        records = cluster.records()
        assert {each: len(record.copies) for each, record in records.items()} == {
            f"m{number}": 1 for number in range(5)
        }
        revision = cluster.server.revision
        await static_models(cluster["b"], *entries).register_first()
        assert cluster.server.revision == revision, "a restart writes nothing"


async def test_a_contradiction_ends_the_start() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m", ModelInfo("another type"))
        with pytest.raises(
            StartupError,
            match=r'^entry 1 of X \(model "m"\): Model already exists with different attribute',
        ):
            await static_models(cluster["a"], entry("n"), entry("m")).register_first()


async def test_a_load_that_fails_ends_the_start() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        cluster["a"].runtime.fail_loads("m", StatusCode.INVALID_ARGUMENT, "no such path")
        with pytest.raises(StartupError, match=r'\(model "m"\) cannot be loaded: .*no such path'):
            await static_models(cluster["a"], entry("m", is_awaited=True)).register_first()


async def test_properties_that_mean_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster(plan=FAST) as cluster:
        a = await cluster.start("a")
        async with following(a, [entry("m", unknown_properties=("ensureloaded",))]) as static:
            static.tell([entry("m"), entry("n", unknown_properties=("keys",))])
            await anyio.wait_all_tasks_blocked()
    assert 'entry 1 of X (model "m"): these mean nothing, and are not read: ens' in log_of(caplog)
    assert 'entry 1 of X (model "n"): these mean nothing, and are not read: keys' in log_of(caplog)


async def test_a_read_only_mesh_registers_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster(plan=FAST, kv_read_only=True) as cluster:
        a = await cluster.start("a")
        async with following(a, [entry("m", is_awaited=True)]) as static:
            static.tell([entry("n")])
            await anyio.wait_all_tasks_blocked()
        assert not cluster.records()
    assert "1 static models are not registered: the store is read-only" in log_of(caplog)


@pytest.mark.virtual_time
async def test_a_slow_load_is_waited_for_with_a_word_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with running_cluster("a") as cluster:
        cluster["a"].runtime.plan("m", load_s=35.0)
        began_s = anyio.current_time()
        await static_models(cluster["a"], entry("m", is_awaited=True)).register_first()
        assert anyio.current_time() - began_s == pytest.approx(35, abs=1)
        assert cluster["a"].runtime.loads_begun.total() == 1
    assert log_of(caplog).count('still waiting for entry 1 of X (model "m"): it is being') == 3


@pytest.mark.virtual_time
async def test_an_instance_with_the_labels_may_come_later() -> None:
    constraints = parse_type_constraints('{"type": {"required": ["gpu"]}}')
    async with running_cluster("a", plan=FAST, type_constraints=constraints) as cluster:
        async with anyio.create_task_group() as group:
            static = static_models(cluster["a"], entry("m", is_awaited=True))
            group.start_soon(static.register_first)
            await anyio.sleep(60)
            assert not cluster.records()["m"].copies
            await cluster.start("b", labels=("gpu",))
        assert set(cluster.records()["m"].copies) == {"b"}


@pytest.mark.virtual_time
async def test_what_never_comes_is_not_waited_for_for_ever() -> None:
    constraints = parse_type_constraints('{"type": {"required": ["gpu"]}}')
    async with running_cluster("a", type_constraints=constraints) as cluster:
        began_s = anyio.current_time()
        with pytest.raises(StartupError, match=r"not loaded after 600 s: There are no running"):
            await static_models(cluster["a"], entry("m", is_awaited=True)).register_first()
        assert anyio.current_time() - began_s == pytest.approx(600, abs=1)


# --- a list that changes -------------------------------------------------------------------------


async def test_what_is_new_is_registered_and_nothing_is_taken_away() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        async with following(cluster["a"], [entry("m"), entry("n")]) as static:
            static.tell([entry("n"), entry("o", is_awaited=True)])
            await until(lambda: "o" in cluster.records() and bool(cluster.records()["o"].copies))
        assert set(cluster.records()) == {"m", "n", "o"}


async def test_what_cannot_be_is_named_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        async with following(cluster["a"], [entry("m")]) as static:
            static.tell([entry("m", ModelInfo("another", key="secret")), entry("n")])
            await until(lambda: "n" in cluster.records())
            await anyio.wait_all_tasks_blocked()
            assert cluster.records()["m"].info == INFO
        assert 'entry 1 of X (model "m") is skipped: Model already exists' in log_of(caplog)
        assert "secret" not in log_of(caplog)


@pytest.mark.virtual_time
async def test_a_load_of_a_new_entry_that_fails_names_the_entry(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        cluster["a"].runtime.plan("slow", load_s=14.0)
        cluster["a"].runtime.plan("bad", load_s=14.0)
        cluster["a"].runtime.fail_loads("bad", StatusCode.INTERNAL, "the archive is damaged")
        async with following(cluster["a"], []) as static:
            static.tell([entry("slow", is_awaited=True), entry("bad", is_awaited=True)])
            await anyio.sleep(60)
            assert (await cluster["a"].status("slow")).status == "LOADED"
            static.tell([entry("other")])
            await until(lambda: "other" in cluster.records(), what="it goes on after a failure")
    text = 'entry 1 of X (model "bad") cannot be loaded: INTERNAL: the archive is damaged'
    errors = [each for each in caplog.records if each.levelname == "ERROR"]
    assert [each.getMessage() for each in errors].count(text) == 1
    assert '(model "slow") cannot' not in log_of(caplog)


@pytest.mark.virtual_time
async def test_without_a_store_it_is_tried_until_there_is_one() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        async with following(cluster["a"], []) as static:
            cluster["a"].store.set_fault(Fault.REFUSED)
            static.tell([entry("m")])
            await anyio.sleep(30)
            static.tell([entry("m"), entry("n")])
            await anyio.sleep(30)
            cluster["a"].store.set_fault(None)
            await until(lambda: set(cluster.records()) == {"m", "n"})


async def test_what_somebody_unregistered_does_not_come_back_with_another_entry() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        async with following(cluster["a"], [entry("m")]) as static:
            await cluster["a"].node.models.unregister(ModelId("m"))
            static.tell([entry("m"), entry("n")])
            await until(lambda: "n" in cluster.records())
        assert set(cluster.records()) == {"n"}


async def test_an_entry_with_a_vmodel_sets_it_and_a_changed_one_sets_it_on() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        kept = entry("kept", vmodel_id="w", is_retained=True)
        first = entry("v1", vmodel_id="v", is_awaited=True)
        async with following(a, [kept, first]) as static:
            assert (await a.node.vmodels.status("v")).active_model_id == "v1"
            assert (await a.status("v1")).status == "LOADED"
            assert not cluster.records()["kept"].auto_delete
            assert cluster.records()["v1"].auto_delete
            static.tell([kept, entry("v2", vmodel_id="v")])
            await until(lambda: "v2" in cluster.records())
            assert (await a.node.vmodels.status("v")).target_model_id == "v2"


async def test_a_vmodel_of_somebody_else_ends_the_start() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        request = SetVModel("v", ModelId("m"), INFO, owner="other")
        await cluster["a"].node.vmodels.set(request)
        changed = entry("m", ModelInfo("another"), vmodel_id="v")
        text = r'\(model "m" of vmodel "v"\): Target model m already exists'
        with pytest.raises(StartupError, match=text):
            await static_models(cluster["a"], changed).register_first()


@pytest.mark.virtual_time
async def test_who_sets_its_vmodel_to_something_else_meanwhile_means_it() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        for each in cluster.serving:
            each.runtime.plan("m", load_s=14.0)
        static = static_models(cluster["a"], entry("m", vmodel_id="v", is_awaited=True))
        async with anyio.create_task_group() as group:
            group.start_soon(static.register_first)
            await anyio.sleep(1)
            request = SetVModel("v", ModelId("hotfix"), info=INFO, force=True)
            await cluster["b"].node.vmodels.set(request)
            await anyio.sleep(30)
            vmodel = cluster["b"].node.parts.vmodels.get("v")
            assert vmodel is not None
            assert (vmodel.active_model_id, vmodel.target_model_id) == ("hotfix", "hotfix")
        assert "m" not in cluster.records()

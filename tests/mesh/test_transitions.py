"""Transitions of vmodels, carried out by whoever leads (spec core 6.5)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from mm.core.constraints import parse_type_constraints
from mm.core.ids import ModelId
from mm.core.records import ModelInfo, ModelRecord, VModelRecord
from mm.core.vmodel_changes import SetVModel
from mm.edge.memory_server import Watcher
from mm.edge.memory_store import Fault
from mm.errors import StatusCode
from mm.mesh.ports import WatchEvent, Write
from mm.mesh.preloader import Asked
from mm.mesh.vmodel_manager import VModelStatus
from mm.testing.cluster import PREFIX, Cluster, Instance, running_cluster, until
from tests.mesh.calls import FAST, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

INFO = ModelInfo("type", "path")


async def set_vmodel(
    instance: Instance,
    target: str,
    vmodel_id: str = "v",
    *,
    sync: bool = False,
    force: bool = False,
) -> VModelStatus:
    request = SetVModel(
        vmodel_id, ModelId(target), info=INFO, auto_delete=True, force=force, load_now=True
    )
    return await instance.node.vmodels.set(request, sync=sync)


def stored(cluster: Cluster, vmodel_id: str = "v") -> VModelRecord:
    item = cluster.server.get(f"{PREFIX}/vmodels/{vmodel_id}")
    assert item is not None
    return VModelRecord.decode(item.value)


def pair(cluster: Cluster, vmodel_id: str = "v") -> tuple[str, str, bool]:
    record = stored(cluster, vmodel_id)
    return record.active_model_id, record.target_model_id, record.failed


def put(cluster: Cluster, table: str, key: str, value: bytes | None) -> None:
    """Write behind everybody's back."""
    cluster.server.transact([Write(f"{PREFIX}/{table}/{key}", value, if_revision=None)])


def leader(cluster: Cluster) -> Instance:
    return next(each for each in cluster.serving if each.node.services.leader.is_leader)


async def served(cluster: Cluster, count: int, vmodel_id: str = "v") -> None:
    """Have "v" served by "m", in so many copies."""
    first = cluster.serving[0]
    await set_vmodel(first, "m", vmodel_id, sync=True)
    for instance in cluster.serving:
        record = cluster.record("m")
        assert record is not None
        if len(record.copies) < count and instance.name not in record.copies:
            await instance.load_here("m")
            await cluster.settle()
    await cluster.settle()


async def vanished(cluster: Cluster) -> None:
    """Have the record of "n", which takes long to load, vanish while "v" is on its way there."""
    await served(cluster, 1)
    for each in cluster.serving:
        each.runtime.plan("n", load_s=80.0)
    await set_vmodel(cluster["a"], "n")
    await anyio.sleep(2)
    put(cluster, "registry", "n", None)
    await until(lambda: pair(cluster) == ("m", "n", True), 100.0)


def drop(instance: Instance, model_id: str) -> None:
    copies = instance.node.parts.copies
    copy = copies.get(ModelId(model_id))
    assert copy is not None
    copies.remove(copy)


@contextmanager
def models_unheard_of(instance: Instance) -> Iterator[None]:
    """Have an instance hear nothing of models, but all of vmodels."""
    store, heard = instance.store, anyio.Event()
    take = store._take

    async def take_later(watcher: Watcher) -> Sequence[WatchEvent]:
        if watcher.prefix.endswith("/registry/"):
            await heard.wait()
        return await take(watcher)

    store._take = take_later  # type: ignore[method-assign]
    yield
    heard.set()


# --- the switch ----------------------------------------------------------------------------------


async def test_the_target_takes_over_once_it_serves_and_the_old_model_goes() -> None:
    async with running_cluster("a", "b") as cluster:
        await served(cluster, 1)
        assert (await set_vmodel(cluster["b"], "n")).status == "TRANSITIONING"
        status = await set_vmodel(cluster["b"], "n", sync=True)
        assert (status.status, status.active_model_id) == ("DEFINED", "n")
        assert status.active is not None
        assert status.active.status == "LOADED"
        assert pair(cluster) == ("n", "n", False)
        await cluster.settle()
        assert set(cluster.records()) == {"n"}
        assert leader(cluster).node.statistics().counters.transitions_completed == 1
        assert leader(cluster).node.statistics().transitions == 0


async def test_it_takes_over_with_as_many_copies_as_serve() -> None:
    async with running_cluster("a", "b", "c", "d") as cluster:
        await served(cluster, 3)
        cluster.plan = FAST
        for each in cluster.serving:
            each.runtime.plan("n", load_s=5.0)
        most = 0
        await set_vmodel(cluster["d"], "n")
        while pair(cluster)[0] == "m":
            record = cluster.record("n")
            assert record is not None
            most = max(most, len(record.copies))
            await anyio.sleep(0.1)
        assert most == 3, "asked for together, and no more of them than are needed"
        await cluster.settle()
        record = cluster.record("n")
        assert record is not None
        assert len(record.copies) == 3


async def test_where_there_is_no_place_for_as_many_those_that_there_are_must_do() -> None:
    constraints = parse_type_constraints('{"small": {"required": ["one"]}}')
    async with running_cluster("a", "b", type_constraints=constraints) as cluster:
        await cluster.start("c", labels=("one",))
        await served(cluster, 3)
        await cluster["a"].register("n", ModelInfo("small"))
        request = SetVModel("v", ModelId("n"))
        status = await cluster["a"].node.vmodels.set(request, sync=True)
        assert status.status == "DEFINED"
        record = cluster.record("n")
        assert record is not None
        assert set(record.copies) == {"c"}


async def test_copies_that_never_come_are_not_waited_for_for_ever() -> None:
    async with running_cluster("a", "b", transition_scale_max_s=60.0) as cluster:
        await served(cluster, 2)
        await cluster["a"].register("n")
        await cluster["a"].load("n")
        await cluster.settle()
        (holder,) = cluster.records()["n"].copies
        other = cluster["b" if holder == "a" else "a"]
        other.runtime.plan("n", load_s=89.0)
        began_s = anyio.current_time()
        await set_vmodel(cluster["a"], "n")
        await until(lambda: pair(cluster) == ("n", "n", False), 200.0)
        assert anyio.current_time() - began_s == pytest.approx(60, abs=3)


async def test_an_active_model_without_copies_is_not_waited_for() -> None:
    async with running_cluster("a") as cluster:
        await served(cluster, 1)
        cluster["a"].runtime.plan("n", load_s=80.0)
        await set_vmodel(cluster["a"], "n")
        await anyio.sleep(5)
        assert pair(cluster) == ("m", "n", False)
        drop(cluster["a"], "m")
        await until(lambda: pair(cluster) == ("n", "n", False), 2.0)


@pytest.mark.parametrize("was_ready", [False, True])
async def test_a_leader_that_is_behind_does_not_switch_to_a_target_that_nobody_has(
    was_ready: bool,
) -> None:
    """For all that it has heard, the active model has no copy, or the target still has one. In the
    first case its transaction is refused, in the second nothing that it writes would tell.
    """
    async with running_cluster("a", "b", plan=FAST) as cluster:
        first = leader(cluster)
        (other,) = (each for each in cluster.serving if each is not first)
        await other.node.vmodels.set(SetVModel("v", ModelId("m"), info=INFO))
        if was_ready:
            await served(cluster, 1)
            # Its count of references then tells nothing either.
            await other.node.vmodels.set(SetVModel("w", ModelId("n"), info=INFO))
            await other.load_here("n")
        await cluster.settle()
        for each in cluster.serving:
            each.runtime.plan("n", load_s=60.0)
        with models_unheard_of(first):
            if was_ready:
                drop(other, "n")
                await anyio.sleep(5)
            else:
                await other.load_here("m")
            await set_vmodel(other, "n")
            await anyio.sleep(20)
            assert pair(cluster) == ("m", "n", False)
        await until(lambda: pair(cluster) == ("n", "n", False), 120.0)
        assert any("n" in each.runtime.loaded for each in cluster.serving)


# --- other targets -------------------------------------------------------------------------------


async def test_a_newer_target_replaces_one_that_is_loading() -> None:
    async with running_cluster("a", "b") as cluster:
        await served(cluster, 1)
        for each in cluster.serving:
            each.runtime.plan("n", load_s=80.0)
        await set_vmodel(cluster["a"], "n")
        await anyio.sleep(5)
        await set_vmodel(cluster["b"], "o")
        await until(lambda: pair(cluster) == ("o", "o", False), 5.0)
        await cluster.settle()
        assert set(cluster.records()) == {"o"}
        assert leader(cluster).node.statistics().counters.transitions_completed == 1


async def test_a_revert_ends_it() -> None:
    async with running_cluster("a", "b") as cluster:
        await served(cluster, 1)
        for each in cluster.serving:
            each.runtime.plan("n", load_s=80.0)
        await set_vmodel(cluster["a"], "n")
        await anyio.sleep(5)
        await set_vmodel(cluster["b"], "m")
        await anyio.sleep(100)
        assert pair(cluster) == ("m", "m", False)
        await cluster.settle()
        assert set(cluster.records()) == {"m"}
        assert cluster.records()["m"].references == 1
        assert leader(cluster).node.statistics().transitions == 0


async def test_a_vmodel_deleted_in_mid_transition_leaves_nothing() -> None:
    async with running_cluster("a", "b") as cluster:
        await served(cluster, 1)
        await set_vmodel(cluster["a"], "n")
        await cluster["b"].node.vmodels.delete("v")
        await anyio.sleep(30)
        await cluster.settle()
        assert not cluster.records()
        assert leader(cluster).node.statistics().transitions == 0


# --- blocked -------------------------------------------------------------------------------------


async def test_a_load_that_fails_blocks_it_until_the_failure_expires() -> None:
    async with running_cluster("a", "b", load_failure_expiry_ms=100_000) as cluster:
        await served(cluster, 1)
        for each in cluster.serving:
            each.runtime.fail_loads("n", StatusCode.INVALID_ARGUMENT, "no such path")
        status = await set_vmodel(cluster["b"], "n", sync=True)
        assert status.status == "TRANSITION_FAILED"
        assert status.target is not None
        assert (status.target.status, status.target.errors[0][-12:]) == (
            "LOADING_FAILED",
            "no such path",
        )
        assert pair(cluster) == ("m", "n", True)
        said = cluster.server.get(f"{PREFIX}/vmodels/v"), cluster.record("n")
        await anyio.sleep(20)
        assert said == (cluster.server.get(f"{PREFIX}/vmodels/v"), cluster.record("n"))
        assert leader(cluster).node.statistics().transitions_blocked == 1
        for each in cluster.serving:
            each.runtime.fail_loads("n", 0, times=0)
        # Half of the expiry, for a model that is asked for.
        await until(lambda: pair(cluster) == ("n", "n", False), 40.0)
        await until(lambda: leader(cluster).node.statistics().transitions_blocked == 0, 1.0)


async def test_a_target_that_vanished_blocks_it_until_it_is_there_again() -> None:
    async with running_cluster("a", "b") as cluster:
        await vanished(cluster)
        await anyio.sleep(60)
        for each in cluster.serving:
            each.runtime.plan("n", load_s=0.1)
        put(cluster, "registry", "n", ModelRecord(INFO, references=1, auto_delete=True).encode())
        await until(lambda: pair(cluster) == ("n", "n", False), 40.0)
        assert await cluster["b"].invoke("n")


@pytest.mark.parametrize("away_s", [60, 65, 75])
async def test_a_target_that_is_there_again_is_no_longer_said_to_have_failed(away_s: float) -> None:
    async with running_cluster("a", "b") as cluster:
        await vanished(cluster)
        await anyio.sleep(away_s)
        put(cluster, "registry", "n", ModelRecord(INFO, references=1, auto_delete=True).encode())
        await until(lambda: pair(cluster) == ("m", "n", False), 1.0)
        await until(lambda: pair(cluster) == ("n", "n", False), 120.0)


async def test_one_refusal_is_not_taken_for_want_of_room() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await served(cluster, 2)
        preloader = leader(cluster).node.parts.preloader
        ask, asked = preloader.ask, 0

        async def refuse_once(*args: Any, **options: Any) -> Asked:
            nonlocal asked
            asked += 1
            return Asked(None) if asked == 1 else await ask(*args, **options)

        preloader.ask = refuse_once  # type: ignore[method-assign]
        await set_vmodel(cluster["a"], "n")
        await until(lambda: pair(cluster) == ("n", "n", False), 60.0)
        assert asked == 2
        record = cluster.record("n")
        assert record is not None
        assert set(record.copies) == {"a", "b"}


@pytest.mark.parametrize(("silent_s", "copies_count"), [(40.0, 2), (300.0, 1)])
async def test_silence_is_not_taken_for_want_of_room_at_once(
    silent_s: float, copies_count: int
) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await served(cluster, 2)
        first = leader(cluster)
        (other,) = (each for each in cluster.serving if each is not first)
        cluster.network.split([first.address], [other.address])
        began_s = anyio.current_time()
        await set_vmodel(first, "n")
        with anyio.move_on_after(silent_s):
            await until(lambda: pair(cluster)[0] == "n", 300.0)
        assert (pair(cluster)[0] == "n") is (copies_count == 1)
        cluster.network.heal()
        await until(lambda: pair(cluster)[0] == "n", 30.0)
        took_s = anyio.current_time() - began_s
        assert took_s == pytest.approx(40 if copies_count == 2 else 75, abs=15)
        record = cluster.record("n")
        assert record is not None
        assert len(record.copies) == copies_count


async def test_without_an_instance_with_the_labels_it_is_blocked_until_one_comes() -> None:
    constraints = parse_type_constraints('{"gpu": {"required": ["gpu"]}}')
    async with running_cluster("a", type_constraints=constraints) as cluster:
        await served(cluster, 1)
        await cluster["a"].register("n", ModelInfo("gpu"))
        status = await cluster["a"].node.vmodels.set(SetVModel("v", ModelId("n")), sync=True)
        assert status.status == "TRANSITION_FAILED"
        await anyio.sleep(100)
        await cluster.start("b", labels=("gpu",))
        await until(lambda: pair(cluster) == ("n", "n", False), 40.0)


# --- who leads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["stop", "crash"])
async def test_the_next_leader_goes_on(ends: str) -> None:
    async with running_cluster("a", "b", "c") as cluster:
        await served(cluster, 1)
        first = leader(cluster)
        for each in cluster.serving:
            each.runtime.plan("n", load_s=30.0)
        await set_vmodel(cluster["c"], "n")
        await anyio.sleep(5)
        await getattr(first, ends)()
        await until(lambda: pair(cluster) == ("n", "n", False), 120.0)
        assert leader(cluster) is not first


async def test_a_leader_without_a_store_goes_on_when_it_is_back() -> None:
    async with running_cluster("a", "b") as cluster:
        await served(cluster, 1)
        for each in cluster.serving:
            each.runtime.plan("n", load_s=4.0)
        await set_vmodel(cluster["b"], "n")
        await anyio.sleep(2)
        leader(cluster).store.set_fault(Fault.REPLIES_LOST)
        await anyio.sleep(10)
        for each in cluster.serving:
            each.store.set_fault(None)
        await until(lambda: pair(cluster) == ("n", "n", False), 60.0)
        await cluster.settle()
        assert cluster.records()["n"].references == 1


async def test_many_at_once_end_and_then_nothing_is_written() -> None:
    async with running_cluster("a", "b", transitions_at_once_max=4, plan=FAST) as cluster:
        await loaded_at(cluster, "a", model_id="x")
        names = [f"v{number}" for number in range(40)]
        for name in names:
            request = SetVModel(name, ModelId(f"m-{name}"), info=INFO, load_now=True)
            await cluster["a"].node.vmodels.set(request, sync=True)
        await cluster.settle()
        for name in names:
            await cluster["b"].node.vmodels.set(SetVModel(name, ModelId(f"n-{name}"), info=INFO))
        await until(
            lambda: all(pair(cluster, name)[0] == f"n-{name}" for name in names), 60.0, "switched"
        )
        await cluster.settle()
        # What an instance has of its own to tell, it has told.
        await anyio.sleep(120)
        revision = cluster.server.revision
        await anyio.sleep(3600)
        assert cluster.server.revision == revision


async def test_waiters_at_every_instance_hear_of_it_and_none_is_left() -> None:
    async with running_cluster("a", "b", "c") as cluster:
        await served(cluster, 1)
        answers: list[str] = []

        async def wait(instance: Instance) -> None:
            answers.append((await set_vmodel(instance, "n", sync=True)).status)

        async with anyio.create_task_group() as group:
            for instance, _ in itertools.product(cluster.serving, range(3)):
                group.start_soon(wait, instance)
        assert answers == ["DEFINED"] * 9
        for each in cluster.serving:
            assert not each.node.vmodels._switch_waits._waits
            assert not each.node.vmodels._switch_waits._count

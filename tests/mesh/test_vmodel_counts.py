"""Numbers of references that many change at a time: right, whoever was quicker, and soon."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.core.vmodel_changes import references
from mm.mesh.ports import Item, Part, Write
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from tests.mesh.calls import FAST
from tests.mesh.test_vmodel_manager import counts, set_vmodel, store, stored

pytestmark = pytest.mark.anyio


async def test_many_setters_count_right_whatever_they_have_heard() -> None:
    """Mirrors that are behind have made references leak: of models that were not known yet, or
    known with a count of before.
    """
    async with running_cluster(plan=FAST) as cluster:
        cluster.store_delay_s, cluster.watch_delay_s = 0.002, 0.01
        for name in "abc":
            await cluster.start(name)

        async def change_all(name: str, seed: int) -> None:
            rng, vmodels = random.Random(seed), cluster[name].node.vmodels
            for _ in range(40):
                vmodel_id = f"v{rng.randrange(3)}"
                if rng.random() < 0.2:
                    await vmodels.delete(vmodel_id)
                else:
                    target = f"m{rng.randrange(4)}"
                    await set_vmodel(cluster[name], target, vmodel_id, auto_delete=target != "m0")

        async with anyio.create_task_group() as group:
            for number, name in enumerate("abcabc"):
                group.start_soon(change_all, name, number)
        expected: dict[str, int] = {"m0": 0} if "m0" in counts(cluster) else {}
        for number in range(3):
            vmodel = stored(cluster, f"v{number}")
            for model_id in references(vmodel):
                expected[model_id] = expected.get(model_id, 0) + 1
        assert counts(cluster) == expected
        assert all(not len(each.node.vmodels.writer.locks) for each in cluster.serving)


def forestall(cluster: Cluster, name: str, *parts: Part) -> None:
    """Have these be written at the moment when an instance's next change of a vmodel arrives."""
    instance_store = cluster[name].store
    apply = instance_store._apply

    def apply_late(own: Sequence[Part]) -> tuple[bool, Sequence[Item | None]]:
        if any(each.key.startswith(f"{PREFIX}/vmodels/") for each in own):
            instance_store._apply = apply  # type: ignore[method-assign]
            assert cluster.server.transact(parts)[0]
        return apply(own)

    instance_store._apply = apply_late  # type: ignore[method-assign]


async def test_who_leaves_a_missing_target_before_it_comes_back_does_not_count() -> None:
    """Its number of references is made from those who named it, as far as they still do."""
    async with running_cluster("a", plan=FAST) as cluster:
        for number in range(3):
            store(cluster, VModelRecord(ModelId("m"), ModelId("m")), f"v{number}")
        await cluster.settle()
        forestall(cluster, "a", Write(f"{PREFIX}/vmodels/v1", None, None))
        await set_vmodel(cluster["a"], "m", "v2")
        assert counts(cluster) == {"m": 2}


async def test_a_missing_model_that_comes_back_as_it_is_left_does_not_count_it() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        record = VModelRecord(ModelId("m"), ModelId("m"))
        store(cluster, record)
        await cluster.settle()
        came_back = ModelRecord(INFO, references=2).encode()
        forestall(
            cluster,
            "a",
            Write(f"{PREFIX}/vmodels/w", record.encode(), 0),
            Write(f"{PREFIX}/registry/m", came_back, 0),
        )
        await set_vmodel(cluster["a"], "n")
        assert counts(cluster) == {"m": 1, "n": 1}


@pytest.mark.parametrize("count", [0, 1, -3])
async def test_a_low_count_does_not_let_go_of_a_model_in_use(count: int) -> None:
    """The number comes to none, whatever it was before: others who name the model are asked for."""
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        for name in "uv":
            await set_vmodel(a, "m", name, auto_delete=True)
        await cluster.settle()
        await miscount(cluster, count)
        await set_vmodel(a, "m", "w")
        await a.node.vmodels.delete("w")
        await a.node.vmodels.delete("u")
        assert counts(cluster) == {"m": 1}, "v still names it"
        await a.node.vmodels.delete("v")
        assert counts(cluster) == {}


@pytest.mark.parametrize("count", [2**31 - 1, 2**63 - 1])
async def test_a_count_that_cannot_be_is_put_right_by_the_next_change(count: int) -> None:
    """One more would be none of Java's numbers, or leave a record that nobody can read."""
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await set_vmodel(a, "m", "u")
        await miscount(cluster, count)
        await set_vmodel(a, "m", "v")
        assert counts(cluster) == {"m": 2}


@pytest.mark.virtual_time
async def test_who_is_only_thought_to_name_a_model_does_not_keep_it() -> None:
    """The mirror of the vmodels may be behind that of the models."""
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        cluster.watch_delay_s = 60.0
        b = await cluster.start("b", is_known_by_all=False)
        for name in "uvw":
            await set_vmodel(a, "m", name, auto_delete=True)
        await b.node.parts.vmodels.mirror.read("u")
        await b.node.parts.vmodels.mirror.read("v")
        for name in "uw":
            await a.node.vmodels.delete(name)
        await b.node.vmodels.delete("v")
        assert counts(cluster) == {}


@pytest.mark.virtual_time
@pytest.mark.parametrize("is_known", [True, False])
async def test_who_registers_a_model_counts_no_vmodel_that_is_gone(is_known: bool) -> None:
    """Whether or not the model is thought to be there, the mirrors are behind its deletion."""
    async with running_cluster("a", plan=FAST) as cluster:
        cluster.watch_delay_s = 5.0
        a, b = cluster["a"], await cluster.start("b")
        for name in "uvw":
            await set_vmodel(a, "m", name, auto_delete=True)
        vmodels, registry = b.node.parts.vmodels, b.node.parts.registry
        await until(lambda: len(vmodels) == 3 and registry.get(ModelId("m")) is not None)
        for name in "uvw":
            await a.node.vmodels.delete(name)
        if not is_known:
            await registry.mirror.read("m")
        assert (registry.get(ModelId("m")) is not None) == is_known
        assert len(vmodels) == 3
        await b.register("m")
        assert counts(cluster) == {"m": 0}
        await b.node.models.unregister(ModelId("m"))


@pytest.mark.virtual_time
async def test_who_leaves_while_it_is_looked_for_does_not_count() -> None:
    """A number taken for wrong is put right only if the model is as it was before the look."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a = cluster["a"]
        for name in "uv":
            await set_vmodel(a, "m", name, auto_delete=True)
        await cluster.settle()
        await miscount(cluster, 1)
        look = a.node.parts.vmodels.look_at_references
        looks = []

        async def look_late(model_id: ModelId) -> None:
            await look(model_id)
            if not looks:
                # Somebody who counts right leaves; only the mirror of the models tells of it yet.
                cluster.server.transact(
                    [
                        Write(f"{PREFIX}/vmodels/u", None, None),
                        Write(f"{PREFIX}/registry/m", record_of_one, None),
                    ]
                )
                item = cluster.server.get(f"{PREFIX}/registry/m")
                assert item is not None
                a.node.parts.registry.mirror.written(item)
            looks.append(model_id)

        record_of_one = cluster.records()[ModelId("m")].encode()
        a.node.parts.vmodels.look_at_references = look_late  # type: ignore[method-assign]
        await a.node.vmodels.delete("v")
        assert looks
        assert counts(cluster) == {}


async def test_a_wrong_count_that_stays_the_same_is_written_all_the_same() -> None:
    """Whoever counts again at that moment relies on the record: it would be given back a reference
    that has just gone.
    """
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await set_vmodel(a, "m")
        await miscount(cluster, 0)
        table = f"{PREFIX}/registry/m"
        before = cluster.server.get(table)
        await a.node.vmodels.delete("v")
        after = cluster.server.get(table)
        assert before is not None
        assert after is not None
        assert (after.value, after.mod_revision > before.mod_revision) == (before.value, True)


async def miscount(cluster: Cluster, count: int) -> None:
    """Write a number by hand, and have everybody know of it."""
    wrong = replace(cluster.records()[ModelId("m")], references=count)
    cluster.server.transact([Write(f"{PREFIX}/registry/m", wrong.encode(), if_revision=None)])
    for each in cluster.serving:
        registry = each.node.parts.registry
        await until(lambda r=registry: r.get(ModelId("m")).references == count)  # type: ignore


@pytest.mark.virtual_time
@pytest.mark.parametrize("change", ["delete", "set to one each", "set to new ones", "set to one"])
async def test_many_leave_one_model_and_do_not_wait_for_each_other_one_by_one(change: str) -> None:
    """What each has to change is the number of references of that model."""
    async with running_cluster("a", plan=FAST) as cluster:
        a, names = cluster["a"], [f"v{number:02}" for number in range(60)]
        targets = {name: "all" if change == "set to one" else f"to-{name}" for name in names}
        for name in names:
            await set_vmodel(a, "m", name, auto_delete=True)
            if change == "set to one each":
                await a.register(targets[name])
        await cluster.settle()
        assert counts(cluster)["m"] == 60
        a.store._call_delay_s = 0.008
        took_s = []

        async def leave(name: str) -> None:
            began_s = anyio.current_time()
            if change == "delete":
                await a.node.vmodels.delete(name)
            else:
                await set_vmodel(a, targets[name], name, auto_delete=True)
            took_s.append(anyio.current_time() - began_s)

        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(leave, name)
        assert max(took_s) < 0.1
        expected = Counter(targets.values()) if change != "delete" else Counter()
        assert counts(cluster) == expected

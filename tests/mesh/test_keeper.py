"""Copies that policies ask for: there, called or not, and there again however one was lost."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.model_policy import ModelPolicy
from mm.edge.memory_store import Fault
from mm.errors import MeshError, StatusCode
from mm.testing.cluster import Cluster, Instance, running_cluster, small_parameters, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST, M, loaded_at, loads

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

PARAMETERS = small_parameters(20, loading_concurrency_max=4)


def ready(cluster: Cluster, model_id: str = "m") -> set[str]:
    return {each.name for each in cluster.serving if model_id in each.runtime.loaded}


async def registered(cluster: Cluster, copies_min: int, **more: bool) -> None:
    name = cluster.serving[0].name
    await cluster[name].register("m", policy=ModelPolicy(copies_min, **more))
    await until(lambda: len(ready(cluster)) == copies_min, 5, "they are there")
    await cluster.settle()


async def sweep(instance: Instance, count: int) -> None:
    """Have so many other models loaded at one instance, one after the other."""
    for number in range(count):
        await instance.register(f"s{number}")
        assert (await instance.load_here(f"s{number}")).status == "LOADED"
        await anyio.sleep(0.1)


def leader(cluster: Cluster) -> Instance:
    return next(i for i in cluster.serving if i.node.services.leader.is_leader)


async def test_a_model_that_nobody_calls_gets_its_copies_and_no_more() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await registered(cluster, 2)
        await anyio.sleep(100)
        assert loads(cluster) == 2
        state = await cluster["b"].set_policy("m")
        assert (state.ready_count, state.unmet_because) == (2, "")
        await cluster["c"].set_policy("m", copies_min=3)
        await until(lambda: len(ready(cluster)) == 3, 5, "one more")
        cluster.check()


async def test_pinned_alone_means_one_copy() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["b"].register("m")
        await cluster["b"].set_policy("m", pinned=True)
        await until(lambda: len(ready(cluster)) == 1, 5)
        await anyio.sleep(60)
        assert loads(cluster) == 1


async def test_the_copy_of_an_instance_that_crashed_is_replaced() -> None:
    async with running_cluster("a", "b", "c", "d", plan=FAST) as cluster:
        await registered(cluster, 2)
        lost = next(name for name in ready(cluster) if cluster[name] is not leader(cluster))
        await cluster[lost].crash()
        # The lease runs out after 20 s; from then on it is seconds.
        await until(lambda: len(ready(cluster)) == 2, 25, "two again")
        await cluster.settle()
        await anyio.sleep(700)
        assert loads(cluster) == 3
        cluster.check()


@pytest.mark.parametrize("between_s", [0.0, 1.0, 4.0])
async def test_no_copy_is_loaded_because_the_store_was_away(between_s: float) -> None:
    """All leases run out; the first to come back leads, and finds the records of few."""
    async with running_cluster(*"abcd", plan=FAST, parameters=PARAMETERS) as cluster:
        cluster.watch_delay_s, cluster.store_delay_s = 0.05, 0.02
        for number in range(8):
            await cluster["a"].register(f"p{number}", policy=ModelPolicy(2))
        await until(lambda: loads(cluster) == 16, 60)
        await cluster.settle()
        await anyio.sleep(10)
        for each in cluster.serving:
            each.store.set_fault(Fault.REFUSED)
        await anyio.sleep(60)
        for each in cluster.serving:
            each.store.set_fault(None)
            await anyio.sleep(between_s)
        await anyio.sleep(120)
        assert loads(cluster) == 16
        cluster.check()


async def test_who_leads_again_asks_for_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster("a", "b", "c", "d", plan=FAST) as cluster:
        leads = leader(cluster)
        keepers_leader = leads.node.services.leader
        asked: list[str] = []
        request = leads.node.parts.preloader.request

        async def slow(model_id: ModelId, **more: Any) -> Any:
            asked.append(model_id)
            await anyio.sleep(3)
            return await request(model_id, **more)

        monkeypatch.setattr(leads.node.parts.preloader, "request", slow)
        await leads.register("m", policy=ModelPolicy(1))
        await until(lambda: bool(asked), 5)
        for leader_id in (None, keepers_leader.leader_id):
            keepers_leader.leader_id = leader_id
            keepers_leader.changed.set()
            keepers_leader.changed = anyio.Event()
            await anyio.sleep(0.5)
        await until(lambda: len(ready(cluster)) == 1, 20)
        await anyio.sleep(20)
        assert (asked, loads(cluster)) == (["m"], 1)


async def test_whoever_leads_next_goes_on() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, leader(cluster).name)
        await cluster["b"].set_policy("m", copies_min=1)
        await leader(cluster).crash()
        await until(lambda: len(ready(cluster)) == 1, 30, "by the next leader")
        await cluster.settle()
        assert sum(bool(i.node.parts.policies.unmet) for i in cluster.serving) == 0


async def test_a_copy_that_was_evicted_comes_back() -> None:
    async with running_cluster("a", plan=FAST, parameters=PARAMETERS) as cluster:
        await registered(cluster, 1)
        begun = cluster["a"].runtime.loads_begun["m"]
        await anyio.sleep(60)
        await sweep(cluster["a"], 25)
        await until(lambda: "m" in cluster["a"].runtime.loaded, 5, "it is back")
        assert cluster["a"].runtime.loads_begun["m"] == begun + 1


@pytest.mark.parametrize("eviction", ["lru", "cost"])
async def test_a_pinned_copy_survives_what_evicts_everything_else(eviction: str) -> None:
    async with running_cluster("a", plan=FAST, parameters=PARAMETERS, eviction=eviction) as cluster:
        a = cluster["a"]
        await registered(cluster, 1, pinned=True)
        await loaded_at(cluster, "a", model_id="other")
        await anyio.sleep(3600)
        await sweep(a, 45)
        assert "other" not in a.runtime.loaded
        assert "m" in a.runtime.loaded
        assert a.runtime.loads_begun["m"] == 1
        assert a.node.statistics().pinned_units == a.node.parts.copies.table.weight("m") > 0
        cluster.check()
        await a.set_policy("m", pinned=False, copies_min=0)
        await sweep(a, 45)
        assert "m" not in a.runtime.loaded
        assert a.node.statistics().pinned_units == 0
        cluster.check()


async def test_pinned_models_leave_half_of_an_instance_to_others() -> None:
    async with running_cluster("a", plan=FAST, parameters=PARAMETERS) as cluster:
        a = cluster["a"]
        for number in range(8):
            await a.register(f"p{number}", policy=ModelPolicy(pinned=True))
        await until(lambda: loads(cluster) == 8, 5)
        await cluster.settle()
        await a.register("one", load_now=True, sync=True)
        for copies_min in (0, 1):
            await a.set_policy("one", copies_min=copies_min, pinned=True)
        with pytest.raises(MeshError, match=r"half of the memory .* take policies") as caught:
            await a.register("more", policy=ModelPolicy(pinned=True))
        assert caught.value.code is StatusCode.FAILED_PRECONDITION
        await until(lambda: a.node.parts.copies.table.kept_units == 9 * 128, 5)
        # And the others are served, in what is left.
        await sweep(a, 45)
        assert sum(each[0] != "s" for each in a.runtime.loaded) == 9
        assert a.node.statistics().pins_unmet == 0
        cluster.check()


async def test_what_grew_beyond_the_half_is_told_and_evicted_like_others() -> None:
    # Loaded without a word of its size, it turns out to take most of the instance.
    plan = ModelPlan(load_s=0.003, is_size_told=False, model_size_s=0.01, predicted_bytes=1 << 20)
    async with running_cluster("a", plan=plan, parameters=PARAMETERS) as cluster:
        a = cluster["a"]
        a.runtime.plan("m", is_size_told=False, predicted_bytes=1 << 20, size_bytes=12 << 20)
        await registered(cluster, 1, pinned=True)
        await anyio.sleep(1)
        assert (a.node.statistics().pins_unmet, a.node.statistics().pinned_units) == (1, 0)
        with pytest.raises(MeshError, match="2, but 1 instance may hold"):
            await a.set_policy("m", copies_min=2)
        cluster.check()


@pytest.mark.parametrize("eviction", ["lru", "cost"])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("size_mib", [5, 8])
async def test_a_copy_that_turns_out_larger_displaces_none_that_policies_ask_for(
    eviction: str, pinned: bool, size_mib: int
) -> None:
    parameters = small_parameters(10)
    async with running_cluster("a", plan=FAST, parameters=parameters, eviction=eviction) as cluster:
        a, models = cluster["a"], ["p0", "p1", "p2"]
        for model_id in models:
            await a.register(model_id, policy=ModelPolicy(1, pinned))
        await until(lambda: loads(cluster) == 3, 5)
        for model_id in ("u0", "u1"):
            await loaded_at(cluster, "a", model_id=model_id)
            await anyio.sleep(1)
        a.runtime.plan("z", is_size_told=False, predicted_bytes=1 << 20, size_bytes=size_mib << 20)
        await a.register("z", policy=ModelPolicy(1, pinned))
        await anyio.sleep(120)
        assert [a.runtime.loads_begun[model_id] for model_id in models] == [1, 1, 1]
        # What is called makes way for what is asked for, as far as that helps.
        assert a.runtime.loads_begun["z"] <= 7, "with longer and longer pauses"
        assert ("z" in a.runtime.loaded) == (size_mib == 5)
        assert a.node.parts.counters.pins_evicted == 0
        assert ("z" in a.node.parts.policies.unmet) == (size_mib == 8)
        cluster.check()


async def test_when_instances_leave_the_policy_stays_and_is_met_again() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await registered(cluster, 3)
        await cluster["c"].stop()
        await until(lambda: bool(leader(cluster).node.parts.policies.unmet), 10, "it is told")
        state = await cluster["a"].set_policy("m")
        assert state.policy == ModelPolicy(3)
        assert state.unmet_because == "2 of 3 copies are ready: only 2 instances may hold it"
        assert leader(cluster).node.statistics().policies_unmet == 1
        await cluster.start("d")
        await until(lambda: len(ready(cluster)) == 3, 10, "the third again")
        await until(lambda: not leader(cluster).node.parts.policies.unmet, 10, "and told")
        assert (await cluster["a"].set_policy("m")).unmet_because == ""


@pytest.mark.parametrize("pinned", [False, True])
async def test_what_no_longer_fits_displaces_nothing_and_comes_back_with_room(pinned: bool) -> None:
    parameters = small_parameters(10, loading_concurrency_max=2)
    plan = ModelPlan(load_s=1.0)
    async with running_cluster("a", "b", "c", plan=plan, parameters=parameters) as cluster:
        a, models = cluster["a"], [f"p{number:02}" for number in range(12)]
        for model_id in models:
            await a.register(model_id, policy=ModelPolicy(1, pinned))
            await anyio.sleep(3)
        users = ["u0", "u1", "u2"]
        for model_id in users:
            await loaded_at(cluster, "a", model_id=model_id)
        for name in "cb":
            await cluster[name].crash()
        for _ in range(90):
            await anyio.sleep(1)
            for model_id in users:
                await a.invoke(model_id)
        begun = a.runtime.loads_begun.copy()
        for _ in range(60):
            await anyio.sleep(1)
            for model_id in users:
                await a.invoke(model_id)
        assert a.runtime.loads_begun == begun
        # Half of nine: the first ones, whatever was there before.
        assert a.runtime.loaded >= {*models[:4], *users}
        unmet = a.node.parts.policies.unmet
        assert unmet.keys() == set(models) - a.runtime.loaded
        assert all("others come first" in because for because in unmet.values())
        cluster.check()
        await cluster.start("d")
        await cluster.start("e")
        await until(lambda: not leader(cluster).node.parts.policies.unmet, 60, "all are met")
        assert set().union(*(each.runtime.loaded for each in cluster.serving)) >= set(models)


@pytest.mark.parametrize("pinned", [False, True])
async def test_more_than_fits_asked_at_all_instances_at_once_is_told_and_loads_little(
    pinned: bool,
) -> None:
    """Each finds room for its own: it cannot know yet what the others promise."""
    parameters = small_parameters(10, loading_concurrency_max=2)
    plan = ModelPlan(load_s=0.5)
    async with running_cluster("a", "b", "c", plan=plan, parameters=parameters) as cluster:
        cluster.watch_delay_s = 3.0
        refused: list[MeshError] = []

        async def ask(name: str, number: int) -> None:
            try:
                await cluster[name].register(f"{number:02}{name}", policy=ModelPolicy(1, pinned))
            except MeshError as exc:
                refused.append(exc)

        async with anyio.create_task_group() as group:
            for number in range(15):
                for name in "abc":
                    group.start_soon(ask, name, number)
        assert {each.code for each in refused} <= {StatusCode.FAILED_PRECONDITION}
        models = set(cluster.records())
        cluster.watch_delay_s = 0.01
        await anyio.sleep(120)
        begun, policies = loads(cluster), leader(cluster).node.parts.policies
        loaded = set().union(*(each.runtime.loaded for each in cluster.serving))
        # Half of nine at each of three.
        assert len(models) > 12
        assert loaded >= set(sorted(models)[:12])
        assert begun <= len(models) + 12
        assert policies.unmet.keys() == models - loaded
        for model_id in policies.unmet:
            state = await cluster["b"].set_policy(model_id)
            assert "policies keep half of the memory" in state.unmet_because
        await anyio.sleep(300)
        assert loads(cluster) == begun, "and that was it"
        cluster.check()


async def test_no_copy_is_given_up_below_the_policy() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b", "c")
        await cluster["a"].set_policy("m", copies_min=2)
        await cluster.settle()
        gave_up = [await cluster[name].node.services.scaler.give_up(M) for name in "abc"]
        assert gave_up == [True, False, False]
        await cluster.settle()
        cluster.check()


async def test_of_two_that_give_up_at_a_time_one_is_told_no() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b", "c")
        await cluster["a"].set_policy("m", copies_min=2)
        await cluster.settle()
        gave_up: list[bool] = []

        async def give_up(name: str) -> None:
            gave_up.append(await cluster[name].node.services.scaler.give_up(M))

        async with anyio.create_task_group() as group:
            for name in "abc":
                group.start_soon(give_up, name)
        assert sum(gave_up) <= 1
        await anyio.sleep(10)
        assert len(ready(cluster)) >= 2


async def test_a_drain_moves_what_has_to_be_somewhere_first_and_however_old() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "a", "b")
        await cluster["a"].set_policy("m", copies_min=2)
        await cluster.settle()
        await anyio.sleep(3660)
        await loaded_at(cluster, "a", model_id="young")
        await cluster["a"].stop()
        assert ready(cluster) == {"b", "c"}
        await anyio.sleep(60)
        assert loads(cluster) >= 4
        record = cluster.record("m")
        assert record is not None
        assert set(record.copies) == {"b", "c"}
        cluster.check()


async def test_loads_that_fail_are_tried_with_pauses_and_elsewhere() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        for each in cluster.instances.values():
            each.runtime.fail_loads("m", StatusCode.UNAVAILABLE, "no network")
        await cluster["a"].register("m", policy=ModelPolicy(1))
        await anyio.sleep(600)
        assert 2 <= loads(cluster) <= 40, loads(cluster)
        state = await cluster["b"].set_policy("m")
        assert (
            state.unmet_because == "0 of 1 copies are ready: loads failed: UNAVAILABLE: no network"
        )
        for each in cluster.instances.values():
            each.runtime.fail_loads("m", StatusCode.UNAVAILABLE, times=0)
        await until(lambda: len(ready(cluster)) == 1, 1000, "it goes well in the end")


async def test_a_runtime_that_loses_a_pinned_copy_gets_it_again() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        await cluster["a"].set_policy("m", pinned=True)
        await cluster.settle()
        cluster["b"].runtime.lose("m")
        copies = cluster["b"].node.parts.copies
        copy = copies.get(M)
        assert copy is not None
        assert copies.lost(M, copy.load_id, anyio.current_time())
        await until(lambda: len(ready(cluster)) == 1, 10, "it is back")


async def test_many_policies_are_met_a_few_at_a_time() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        for number in range(60):
            await cluster["a"].register(f"m{number}", policy=ModelPolicy(1 + number % 2))
        await until(lambda: loads(cluster) == 90, 20, "all are there")
        await cluster.settle()
        await anyio.sleep(60)
        assert loads(cluster) == 90
        policies = cluster["b"].node.parts.registry.policies
        policies.check_invariants()
        assert len(policies) == 60
        for number in range(60):
            await cluster["c"].set_policy(f"m{number}", copies_min=0)
        await cluster.settle()
        assert len(policies) == 0
        assert policies.units_by_type(1) == {}

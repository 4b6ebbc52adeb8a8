"""Beside instances of the Java mesh on one store: nobody is called in vain, pruned or overwritten,
and there is one leader (spec core 1.3-1.8, 5.6, 6.5; issue 9 part 9).

The other side is a stand-in, ``tests.mesh.java_instance``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from mm.core.constraints import parse_type_constraints
from mm.core.ids import InstanceId, ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.records import InstanceRecord, ModelInfo, ModelRecord, VModelRecord
from mm.core.vmodel_changes import SetVModel
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import LoadFailedError, NoEligibleInstanceError
from mm.mesh.ports import Write
from mm.testing.cluster import PREFIX, Cluster, running_cluster, until
from mm.testing.fake_clock import FakeClock
from tests.mesh.calls import FAST, A, loaded_at
from tests.mesh.java_instance import INSTANCE, MODEL, JavaInstance, java_json

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

J, K = InstanceId("j"), InstanceId("k")
INFO = ModelInfo("type", "path")


@dataclass
class Mixed:
    """A cluster of ours, and Java instances on the same store."""

    cluster: Cluster
    group: anyio.abc.TaskGroup
    stores: dict[str, MemoryStore] = field(default_factory=dict)
    scopes: dict[str, anyio.CancelScope] = field(default_factory=dict)
    java: dict[str, JavaInstance] = field(default_factory=dict)

    async def start(self, name: str, **options: Any) -> JavaInstance:
        """Start a Java instance, and have everybody know of it."""
        store = self.stores[name] = MemoryStore(self.cluster.server)
        self.java[name] = JavaInstance(store, name, PREFIX, FakeClock().now_ms, **options)
        scope = self.scopes[name] = anyio.CancelScope()

        async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            with scope:
                await self.java[name].run(task_status=task_status)
            del self.java[name]

        await self.group.start(run)
        await until(lambda: all(name in i.node.parts.members for i in self.cluster.serving))
        return self.java[name]

    async def stop(self, name: str) -> None:
        """Have one leave in order."""
        self.java[name].stop()
        await until(lambda: name not in self.java)

    def crash(self, name: str) -> None:
        """Have one vanish; its lease runs out."""
        self.stores[name].set_fault(Fault.REFUSED)
        self.scopes[name].cancel()

    def put(self, key: str, value: bytes | None) -> None:
        """Write behind everybody's back, without a lease."""
        self.cluster.server.transact([Write(f"{PREFIX}/{key}", value, if_revision=None)])

    def raw(self, key: str) -> dict[str, Any]:
        """Answer a record's attributes as the store has them."""
        item = self.cluster.server.get(f"{PREFIX}/{key}")
        assert item is not None, key
        attributes = json.loads(item.value)
        assert isinstance(attributes, dict)
        return attributes

    def record(self, model_id: str) -> ModelRecord:
        found = self.cluster.record(model_id)
        assert found is not None
        return found

    def leaders(self) -> set[str | None]:
        """Who leads, in the eyes of everybody."""
        ours = {each.node.services.leader.leader_id for each in self.cluster.serving}
        return ours | {each.leader for each in self.java.values()}


@asynccontextmanager
async def mixed(*names: str, java: tuple[str, ...] = (), **options: Any) -> AsyncIterator[Mixed]:
    """Run both kinds, Java's first: theirs is the lead."""
    async with (
        running_cluster(plan=FAST, **options) as cluster,
        anyio.create_task_group() as group,
    ):
        world = Mixed(cluster, group)
        for name in java:
            await world.start(name)
        for name in names:
            await cluster.start(name)
        yield world
        group.cancel_scope.cancel()


async def target(world: Mixed, model_id: str, *, sync: bool = False) -> str:
    """Set the vmodel "v" by one of ours; answers its status."""
    request = SetVModel("v", ModelId(model_id), info=INFO, auto_delete=True, load_now=True)
    return (await world.cluster["a"].node.vmodels.set(request, sync=sync)).status


# --- records -------------------------------------------------------------------------------------


def test_the_stand_in_writes_as_java_does() -> None:
    """Order, omitted defaults, and what it does not know behind all the rest."""
    model = {
        "copies": {"a": {"ts": 5}},
        "lu": 7,
        "refs": 0,
        "autoDel": False,
        "failedIn": {},
        "instanceIds": {"j": 5, "k": 0},
        "mPath": "models/m",
        "type": "rt:triton",
        "encKey": "",
    }
    expected = b'{"type":"rt:triton","mPath":"models/m","instanceIds":{"j":5},"lu":7,'
    assert java_json(model, MODEL) == expected + b'"copies":{"a":{"ts":5}}}'
    instance = {"cap": 9, "lruTime": 2**63 - 1, "used": 0, "actionable": True, "addr": "a:1"}
    expected = b'{"actionable":true,"lruTime":9223372036854775807,"cap":9,"addr":"a:1"}'
    assert java_json(instance, INSTANCE) == expected


async def test_what_each_side_does_not_know_survives_the_other() -> None:
    async with mixed("a", java=("j",)) as world:
        java, a = world.java["j"], world.cluster["a"]
        await a.register("m", policy=ModelPolicy(1))
        await loaded_at(world.cluster, "a")
        state = world.record("m").copy_state(A)
        assert state is not None
        assert state.is_ready
        await java.load("m")
        await java.fail("m", "theirs")
        await java.touch("m")
        assert world.record("m").copy_state(A) == state
        assert world.record("m").policy == ModelPolicy(1)
        assert world.record("m").failure_text(J) == "theirs"
        # And theirs, in a record that we write: attributes of a release that nobody knows.
        attributes = world.raw("registry/m") | {"actionable": True, "future": {"x": [1, 2]}}
        attributes["fails"]["j"]["code"] = 13
        world.put("registry/m", java_json(attributes, MODEL))
        await a.set_policy("m", 0)
        a.node.parts.copies.remove(next(iter(a.node.parts.copies)))
        await until(lambda: not world.record("m").copies)
        after = world.raw("registry/m")
        assert (after["actionable"], after["future"]) == (True, {"x": [1, 2]})
        assert after["fails"]["j"] == {"msg": "theirs", "code": 13}
        assert after["failedIn"].keys() == {"j"}


async def test_a_failure_of_ours_keeps_its_kind_when_java_writes_the_record() -> None:
    async with mixed("a", java=("j",)) as world:
        a = world.cluster["a"]
        a.runtime.fail_loads("m", 99)
        await a.register("m")
        with pytest.raises(LoadFailedError):
            await a.invoke("m")
        before = world.raw("registry/m")["fails"]["a"]
        assert before.keys() > {"msg"}, "more than Java knows of"
        await world.java["j"].fail("m", "there, too")
        await world.java["j"].touch("m")
        assert world.raw("registry/m")["fails"]["a"] == before


async def test_our_record_is_back_within_a_second_and_leased() -> None:
    """Deleted, as Java's leader deletes what has no lease; written over; or without its lease."""
    async with mixed("a", "b", java=("j",)) as world:
        key = f"{PREFIX}/instances/a"
        item = world.cluster.server.get(key)
        assert item is not None
        for value in (None, item.value, b'{"actionable":true}', b"no record"):
            for pause_s in (0.0, 0.3, 2.5, 60.0):
                await anyio.sleep(pause_s)
                world.put("instances/a", value)
                await anyio.sleep(1.0)
                found = world.cluster.server.get(key)
                assert found is not None, (value, pause_s)
                assert found.lease_id == item.lease_id != 0, (value, pause_s)
                assert InstanceRecord.decode(found.value).address == "a:8080"
        assert world.java["j"].table("instances").keys() == {"a", "b", "j"}


async def test_whoever_deletes_our_record_all_the_time_costs_four_writes_a_second() -> None:
    async with mixed("a") as world:
        begun = world.cluster.server.revision
        for _ in range(1000):
            world.put("instances/a", None)
            await anyio.sleep(0.01)
        # A key that is gone cannot be deleted: no revision.
        assert world.cluster.server.revision - begun <= 2 * (4 * 10 + 2)


# --- who is called, and counts -------------------------------------------------------------------


async def test_java_is_never_called_and_its_memory_is_not_ours() -> None:
    constraints = parse_type_constraints(b'{"theirs": {"required": ["gpu"]}}')
    async with mixed("a", java=("j",), type_constraints=constraints) as world:
        cluster, a = world.cluster, world.cluster["a"]
        await world.start("k", labels=["gpu"], version=2**40)
        await a.register("m")
        assert await world.java["j"].load("m")
        await anyio.sleep(60)
        assert (await a.status("m")).status == "LOADED", "its clients are served"
        assert await a.invoke("m") == "a"
        assert world.record("m").copies.keys() == {"a", "j"}
        own, parts = cluster.instance_record("a"), a.node.parts
        assert own is not None
        assert parts.cluster.statistics_of("type").instance_count == 1
        assert parts.cluster.statistics_of("type").capacity_units == own.capacity_units
        # As long as Java alone has such instances, a controller is told to wait for ours.
        await a.register("n", ModelInfo("theirs", "path"))
        with pytest.raises(NoEligibleInstanceError, match=r"There are no running instances that"):
            await a.invoke("n")


async def test_a_copy_of_java_is_none_that_a_policy_asks_for() -> None:
    async with mixed("a", "b") as world:
        await world.start("j")
        await world.cluster["a"].register("m")
        await world.java["j"].load("m")
        state = await world.cluster["a"].set_policy("m", 2)
        assert state.ready_count == 0
        await until(lambda: world.record("m").copies.keys() == {"a", "b", "j"})


async def test_a_drain_leaves_no_model_to_java_alone() -> None:
    async with mixed("a", "b", java=("j",)) as world:
        await world.cluster["a"].register("m")
        await world.java["j"].load("m")
        await anyio.sleep(60)
        assert await world.cluster["a"].invoke("m") in "ab"
        await world.cluster.settle()
        holder = next(each for each in "ab" if each in world.record("m").copies)
        await world.cluster[holder].stop()
        other = "b" if holder == "a" else "a"
        assert world.record("m").copies.keys() == {other, "j"}
        assert await world.cluster[other].invoke("m") == other


async def test_the_last_of_ours_stops_at_once_beside_java() -> None:
    async with mixed("a", java=("j",)) as world:
        await loaded_at(world.cluster, "a")
        begun_s = anyio.current_time()
        await world.cluster["a"].stop()
        assert anyio.current_time() - begun_s < 1.0, "nobody can take over what is here"
        assert not world.record("m").copies
        await until(lambda: world.java["j"].table("instances").keys() == {"j"})


async def test_no_instance_of_ours_is_ready_while_one_of_java_stops() -> None:
    """As among themselves: one at a time gives its models away (spec core 7.1)."""
    async with mixed(java=("j",)) as world:
        record = java_json(world.java["j"].record() | {"shutdown": True}, INSTANCE)
        key = f"{PREFIX}/instances/j"
        item = world.cluster.server.get(key)
        assert item is not None
        world.cluster.server.transact([Write(key, record, None, item.lease_id)])
        a = await world.cluster.start("a")
        assert a.node.unready is not None
        await world.stop("j")
        await until(lambda: a.node.unready is None, 5)


# --- one leader ----------------------------------------------------------------------------------


async def test_there_is_one_leader_whoever_comes_and_goes() -> None:
    async with mixed("a", "b", java=("j", "k")) as world:
        await until(lambda: world.leaders() == {"j"})
        await world.stop("j")
        await until(lambda: world.leaders() == {"k"})
        world.crash("k")
        await until(lambda: world.leaders() == {"a"}, 30)
        await world.start("j")
        await anyio.sleep(60)
        assert world.leaders() == {"a"}, "who comes later stands behind"
        await world.cluster["a"].stop()
        await until(lambda: world.leaders() == {"b"})
        await world.cluster["b"].crash()
        await until(lambda: world.leaders() == {"j"}, 30)
        for name in ("j", "b"):
            item = world.cluster.server.get(f"{PREFIX}/leaderLatch/_{name}")
            assert (item is None) == (name == "b")


@pytest.mark.parametrize("java_leads", [True, False])
async def test_nobody_who_lives_is_pruned(java_leads: bool) -> None:
    """For longer than either side takes to prune who does not."""
    async with mixed(java=("j",) if java_leads else ()) as world:
        await world.cluster.start("a")
        if not java_leads:
            await world.start("j")
        await loaded_at(world.cluster, "a")
        await world.java["j"].load("m")
        await until(lambda: world.leaders() == {"j" if java_leads else "a"})
        await anyio.sleep(33 * 60 if java_leads else 13 * 60)
        assert world.record("m").copies.keys() == {"a", "j"}
        assert not world.java["j"].pruned
        assert world.java["j"].table("instances").keys() == {"a", "j"}


async def test_whom_java_prunes_stays_pruned(nothing_ahead: None) -> None:
    """An instance of ours crashes while Java leads: its copies go by Java's rule and time."""
    async with mixed("a", "b", java=("j",)) as world:
        await loaded_at(world.cluster, "a", "b")
        await world.cluster["b"].crash()
        await anyio.sleep(11 * 60)
        assert world.record("m").copies.keys() == {"a", "b"}, "we do not lead"
        await until(lambda: world.java["j"].pruned == [("m", "b")], 25 * 60)
        await anyio.sleep(60)
        assert world.record("m").copies.keys() == {"a"}
        assert world.record("m").copy_state(InstanceId("b")) is None
        assert await world.cluster["a"].invoke("m") == "a"


async def test_a_java_instance_that_crashed_is_pruned_by_us_after_ten_minutes(
    nothing_ahead: None,
) -> None:
    async with mixed("a") as world:
        await world.start("j")
        await world.cluster["a"].register("m")
        await world.java["j"].load("m")
        await world.java["j"].load("m")
        world.crash("j")
        await anyio.sleep(9 * 60)
        assert world.record("m").copies.keys() == {"j"}, "it may come back"
        await until(lambda: not world.record("m").copies, 150)


# --- vmodels -------------------------------------------------------------------------------------


async def test_a_switch_by_java_is_followed_as_it_comes() -> None:
    async with mixed("a", "b", java=("j",)) as world:
        assert await target(world, "m", sync=True) == "DEFINED"
        await world.java["j"].load("m")
        assert await target(world, "n", sync=True) == "DEFINED", "told by whoever was called"
        assert world.java["j"].switched == ["v"]
        vmodel = VModelRecord.decode(json.dumps(world.raw("vmodels/v")).encode())
        assert (vmodel.active_model_id, vmodel.target_model_id) == ("n", "n")
        assert world.cluster.record("m") is None, "its last reference is gone"
        assert world.record("n").references == 1
        for name in "ab":
            assert await world.cluster[name].invoke_vmodel("v") == "n"


async def test_what_java_set_is_switched_by_us_when_we_lead() -> None:
    async with mixed("a") as world:
        java = await world.start("j")
        await java.set_vmodel("v", "m", type="type", mPath="path")
        await java.load("m")
        await until(lambda: world.cluster["a"].node.parts.vmodels.get("v") is not None)
        assert await world.cluster["a"].invoke_vmodel("v") == "m"
        await java.set_vmodel("v", "n", type="type", mPath="path")
        await until(lambda: world.raw("vmodels/v")["amid"] == "n")
        assert "a" in world.record("n").copies
        assert world.cluster.record("m") is None
        assert world.raw("vmodels/v")["o"] == "ksp"


async def test_models_that_java_alone_may_load_are_switched_once_java_has_them() -> None:
    constraints = parse_type_constraints(b'{"theirs": {"required": ["gpu"]}}')
    async with mixed("a", type_constraints=constraints) as world:
        java = await world.start("j", labels=["gpu"])
        await java.set_vmodel("v", "m", type="theirs")
        await java.load("m")
        await java.set_vmodel("v", "n", type="theirs")
        await until(lambda: world.raw("vmodels/v").get("failed") is True)
        await java.load("n")
        await until(lambda: world.raw("vmodels/v")["amid"] == "n", 120)
        assert "failed" not in world.raw("vmodels/v")
        assert world.cluster.record("m") is None


# --- from one to the other and back --------------------------------------------------------------


def essence(world: Mixed) -> dict[str, dict[str, Any]]:
    """What nobody may lose: all of both tables but copies, failures and last uses."""
    moving = {"instanceIds", "copies", "failedIn", "fails", "lu", "lul"}
    found = {}
    for table in ("registry/", "vmodels/"):
        for item in world.cluster.server.table(f"{PREFIX}/{table}").items:
            attributes = json.loads(item.value)
            kept = {name: value for name, value in attributes.items() if name not in moving}
            found[item.key.removeprefix(PREFIX)] = kept
    return found


async def test_a_rolling_replacement_and_back_keeps_every_registration() -> None:
    async with mixed(java=("j0", "j1", "j2")) as world:
        first = world.java["j0"]
        for number in range(12):
            await first.set_vmodel(f"v{number}", f"m{number}", type="type", mPath=f"p/{number}")
            await world.java[f"j{number % 3}"].load(f"m{number}")
        world.put("registry/old", b'{"type":"type","encKey":"{}","refs":0,"future":[1]}')
        before = essence(world)
        assert len(before) == 25
        for number in range(3):
            await world.cluster.start(f"a{number}")
            await world.stop(f"j{number}")
            await until(lambda: len(world.leaders()) == 1)
            await everything_serves(world)
            assert essence(world) == before
        assert not world.java
        names = {i for record in world.cluster.records().values() for i in record.copies}
        assert names <= {"a0", "a1", "a2"}
        for number in range(3):
            await world.start(f"j{number}")
            await world.java[f"j{number}"].load(f"m{number}")
            await world.cluster[f"a{number}"].stop()
            await until(lambda: len(world.leaders()) == 1)
            await everything_serves(world)
            assert essence(world) == before
        assert world.leaders() == {"j0"}
        names = {i for record in world.cluster.records().values() for i in record.copies}
        assert names == {"j0", "j1", "j2"}
        keys = [item.key for item in world.cluster.server.table(f"{PREFIX}/instances/").items]
        assert keys == [f"{PREFIX}/instances/j{number}" for number in range(3)]


async def everything_serves(world: Mixed) -> None:
    for each in world.cluster.serving:
        for number in range(12):
            assert await each.invoke_vmodel(f"v{number}") == f"m{number}"
    await world.cluster.settle()

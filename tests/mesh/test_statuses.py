"""Where a model is, as clients are told: by the record, and by peers only where it matters."""

from __future__ import annotations

import anyio
import pytest

from mm.core.calls import Call, Hop
from mm.core.copy_record import CopyStage
from mm.core.ids import InstanceId, ModelId
from mm.core.records import InstanceRecord, ModelRecord
from mm.errors import NoRoomError
from mm.mesh.models import EnsureRequest
from mm.mesh.ports import CopyStatus, ModelStatus, Write
from mm.mesh.statuses import ASKED_MAX
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST, A, B, C, M, loaded_at

pytestmark = pytest.mark.anyio

JAVA = InstanceId("java")


def put(cluster: Cluster, key: str, value: bytes) -> None:
    """Write behind everybody's back."""
    cluster.server.transact([Write(f"{PREFIX}/{key}", value, if_revision=None)])


async def told(cluster: Cluster, record: ModelRecord, model_id: ModelId = M) -> None:
    """Store a record, and wait until "a" has it."""
    put(cluster, f"registry/{model_id}", record.encode())
    await until(lambda: cluster["a"].node.parts.registry.get(model_id) == record)


async def with_java(cluster: Cluster) -> None:
    """Have an instance of the Java mesh: it has no address of ours, and says nothing of states."""
    put(cluster, f"instances/{JAVA}", InstanceRecord(capacity_units=100).encode())
    await until(lambda: JAVA in cluster["a"].node.parts.members)


class Asked:
    """Counts who is asked for a status, and may answer instead."""

    def __init__(self, cluster: Cluster, answer: ModelStatus | None = None, *names: str) -> None:
        self.names: list[str] = []
        for each in [cluster[name] for name in names] or cluster.serving:
            each.model_status = self._counting(each.name, each.model_status, answer)  # type: ignore

    def _counting(self, name, real, answer):  # type: ignore[no-untyped-def]
        async def model_status(model_id: ModelId) -> ModelStatus:
            self.names.append(name)
            found: ModelStatus = answer or await real(model_id)
            return found

        return model_status


async def test_the_status_of_an_unknown_model_is_no_error() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        assert (await cluster["a"].status("m")).status == "NOT_FOUND"


async def test_copies_are_told_newest_first() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await told(cluster, ModelRecord(INFO, copies={B: 20, C: 40}, failures={A: 30}))
        await loaded_at(cluster, "a")
        copies = (await cluster["a"].status("m")).copies
        assert copies[1:] == (CopyStatus(C, "UNKNOWN", 40), CopyStatus(B, "UNKNOWN", 20))
        assert (copies[0].instance_id, copies[0].status) == (A, "LOADED")


@pytest.mark.virtual_time
async def test_of_a_model_that_is_there_only_failures_that_count_are_told() -> None:
    """The controller shows the first error of a model, whatever its status (interop 1.2)."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a = cluster["a"]
        now_ms, expiry_ms = a.clock.now_ms(), a.config.load_failure_expiry_ms
        record = ModelRecord(INFO)
        for instance_id, age_ms in ((B, 1000), (C, 5000), (A, expiry_ms + 1000)):
            record = record.with_failure(instance_id, now_ms - age_ms, f"of {instance_id}")
        await told(cluster, record)
        await a.load_here("m")
        status = await a.status("m")
        assert (status.status, status.errors) == ("LOADED", ("of b", "of c"))
        failed = [c.instance_id for c in status.copies if c.status == "LOADING_FAILED"]
        assert failed == [B, C], "newest first"
        await anyio.sleep(expiry_ms / 1000)
        status = await a.load("m")
        assert (status.status, status.errors, len(status.copies)) == ("LOADED", (), 1)


async def test_a_copy_that_is_said_to_be_ready_is_not_asked() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        await cluster.settle()
        asked = Asked(cluster)
        for name in "abc":
            status = await cluster[name].status("m")
            assert status.status == "LOADED"
            assert [(c.instance_id, c.status) for c in status.copies] == [(B, "LOADED")]
        assert asked.names == []


async def test_one_that_is_ready_is_enough_although_another_is_loading() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        await cluster.settle()
        record = cluster.record("m")
        assert record is not None
        cluster["c"].runtime.plan("m", load_s=3600)
        asked = Asked(cluster)
        call = Call(M, hop=Hop.LOAD_LOCAL, hops_left=0)
        await cluster["c"].node.models.ensure_loaded(EnsureRequest(M, sync=False), call)
        registries = [cluster[name].node.parts.registry for name in "abc"]
        await until(lambda: all(M in registry.held_by(C) for registry in registries))
        for name in "abc":
            status = await cluster[name].status("m")
            assert status.status == "LOADED"
            states = {copy.instance_id: copy.status for copy in status.copies}
            assert states == {B: "LOADED", C: "LOADING"}
        assert asked.names == []


async def test_what_became_ready_since_it_was_told_is_loaded() -> None:
    """Whoever was told LOADED by "b" must not hear LOADING from "a" now."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        await cluster.settle()
        record = cluster.record("m")
        assert record is not None
        for stage in (CopyStage.QUEUED, CopyStage.LOADING):
            await told(cluster, record.with_copy_state(B, stage, 1))
            status = await cluster["a"].status("m")
            assert status.status == "LOADED"
            assert [copy.status for copy in status.copies] == ["LOADED"]


@pytest.mark.parametrize(
    ("answer", "status", "copies"),
    [
        (ModelStatus("LOADING"), "LOADING", ["LOADING"]),
        (ModelStatus("NOT_LOADED"), "NOT_LOADED", []),
        (ModelStatus("LOADING_FAILED"), "NOT_LOADED", []),
        (None, "LOADING", ["LOADING"]),
    ],
)
async def test_what_a_copy_on_its_way_answers(
    answer: ModelStatus | None, status: str, copies: list[str]
) -> None:
    """The last of them: nobody answers, and the record is all there is to go by."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        await cluster.settle()
        record = cluster.record("m")
        assert record is not None
        await told(cluster, record.with_copy_state(B, CopyStage.LOADING, 1))
        asked = Asked(cluster, answer)
        if answer is None:
            cluster.network.close("b:8080")
        found = await cluster["a"].status("m")
        assert (found.status, [copy.status for copy in found.copies]) == (status, copies)
        assert asked.names == (["b"] if answer is not None else [])


async def test_no_more_than_a_few_are_asked() -> None:
    names = [f"i{number}" for number in range(ASKED_MAX + 2)]
    async with running_cluster("a", *names, plan=FAST) as cluster:
        for name in names:
            registrar = cluster[name].node.parts.registrar
            registrar.disown = lambda model_id: None  # type: ignore[method-assign]
        asked = Asked(cluster, ModelStatus("LOADING"))
        record = ModelRecord(INFO)
        for number, name in enumerate(names):
            record = record.with_copy(InstanceId(name), 100 - number, 0)
        await told(cluster, record)
        assert (await cluster["a"].status("m")).status == "LOADING"
        assert set(asked.names) == set(names[2:])


@pytest.mark.virtual_time
async def test_a_copy_of_java_is_loaded_after_the_usual_time() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await with_java(cluster)
        usual_ms = a.node.parts.load_times.assumed_ms(INFO.model_type)
        for age_ms, status in ((usual_ms - 1000, "LOADING"), (usual_ms + 1000, "LOADED")):
            await told(cluster, ModelRecord(INFO, copies={JAVA: a.clock.now_ms() - age_ms}))
            found = await a.status("m")
            assert found.status == status
            assert [copy.status for copy in found.copies] == [status]


@pytest.mark.virtual_time
async def test_the_usual_time_is_that_of_our_own_loads() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=0.5)) as cluster:
        a = cluster["a"]
        await with_java(cluster)
        for number in range(4):
            await a.register(f"n{number}")
            await a.invoke(f"n{number}")
        assert 500 <= a.node.parts.load_times.assumed_ms(INFO.model_type) < 600
        await told(cluster, ModelRecord(INFO, copies={JAVA: a.clock.now_ms() - 700}))
        assert (await a.status("m")).status == "LOADED"


async def test_a_copy_of_an_instance_that_is_not_there_is_unknown() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        record = ModelRecord(INFO).with_copy(B, 1, 0).with_copy_state(B, CopyStage.READY, 2)
        await told(cluster, record)
        assert (await cluster["a"].status("m")).status == "NOT_LOADED"
        await loaded_at(cluster, "a")
        states = {c.instance_id: c.status for c in (await cluster["a"].status("m")).copies}
        assert states == {A: "LOADED", B: "UNKNOWN"}


@pytest.mark.virtual_time
async def test_one_that_answers_is_not_kept_waiting_by_one_that_does_not() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "b", "c")
        record = cluster.record("m")
        assert record is not None
        for instance_id in (B, C):
            record = record.with_copy_state(instance_id, CopyStage.LOADING, 1)
        await told(cluster, record)
        cluster.network.cut("a:8080", "b:8080")
        with anyio.fail_after(0.1):
            assert (await cluster["a"].status("m")).status == "LOADED"
        cluster.network.cut("a:8080", "c:8080")
        with anyio.fail_after(cluster["a"].config.ensure_loaded_timeout_s + 0.1):
            assert (await cluster["a"].status("m")).status == "LOADING"


async def test_one_that_has_gone_is_unknown_beside_one_that_is_coming() -> None:
    async with running_cluster("a", "b", "c", plan=FAST) as cluster:
        await loaded_at(cluster, "c", "b")
        record = cluster.record("m")
        assert record is not None
        for instance_id in (B, C):
            record = record.with_copy_state(instance_id, CopyStage.LOADING, 1)
        await told(cluster, record)
        Asked(cluster, ModelStatus("LOADING"))
        Asked(cluster, ModelStatus("NOT_LOADED"), "b")
        status = await cluster["a"].status("m")
        assert status.status == "LOADING"
        assert {c.instance_id: c.status for c in status.copies} == {B: "UNKNOWN", C: "LOADING"}


async def test_whoever_had_it_loaded_elsewhere_is_told_that_it_is() -> None:
    """The record that says so may be on its way still."""
    plan = ModelPlan(load_s=0.003, is_size_told=False, model_size_s=0.1)
    async with running_cluster("a", "b", plan=plan) as cluster:
        cluster["a"].node.parts.copies.close(NoRoomError("full"))
        await cluster["a"].register("m")
        status = await cluster["a"].load("m")
        assert status.status == "LOADED"
        assert [(copy.instance_id, copy.status) for copy in status.copies] == [(B, "LOADED")]

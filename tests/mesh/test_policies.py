"""Policies of models: set at any instance, kept by every writer, refused where they cannot be."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.model_policy import COPIES_MIN_MAX, ModelPolicy
from mm.core.records import ModelInfo
from mm.edge.memory_store import Fault
from mm.errors import (
    InvalidRequestError,
    MeshError,
    ModelExistsError,
    ModelNotFoundError,
    StatusCode,
    StoreUnavailableError,
)
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, small_parameters, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST

pytestmark = pytest.mark.anyio

KEY = f"{PREFIX}/registry/m"


def stored(cluster: Cluster) -> ModelPolicy:
    record = cluster.record("m")
    assert record is not None
    return record.policy


async def test_any_instance_sets_a_policy_and_tells_it() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m")
        state = await cluster["b"].set_policy("m", copies_min=2)
        assert state.policy == ModelPolicy(2)
        await cluster["a"].set_policy("m", pinned=True)
        # What is not given stays as it is.
        assert stored(cluster) == ModelPolicy(2, pinned=True)
        await cluster.settle()
        assert (await cluster["b"].set_policy("m")).policy == ModelPolicy(2, pinned=True)
        written = cluster.server.get(KEY)
        await cluster["b"].set_policy("m", copies_min=2, pinned=True)
        assert cluster.server.get(KEY) == written
        await cluster["b"].set_policy("m", copies_min=0, pinned=False)
        assert stored(cluster) == ModelPolicy()


async def test_a_registration_says_a_policy_or_leaves_it_alone() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await cluster["a"].register("m", policy=ModelPolicy(1))
        assert stored(cluster) == ModelPolicy(1)
        written = cluster.server.get(KEY)
        await cluster["a"].register("m")
        await cluster["b"].register("m", policy=ModelPolicy(1))
        assert cluster.server.get(KEY) == written
        await cluster["b"].register("m", policy=ModelPolicy(2, pinned=True))
        assert stored(cluster) == ModelPolicy(2, pinned=True)
        with pytest.raises(ModelExistsError):
            await cluster["a"].register("m", replace(INFO, path="other"), policy=ModelPolicy(1))
        assert stored(cluster) == ModelPolicy(2, pinned=True)


async def test_nonsense_is_refused_and_nothing_is_registered() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        for count in (-1, COPIES_MIN_MAX + 1):
            with pytest.raises(InvalidRequestError, match=f"{count}; allowed: 0 to 10000"):
                await cluster["a"].register("m", policy=ModelPolicy(count))
        assert cluster.record("m") is None
        await cluster["a"].register("m")
        with pytest.raises(InvalidRequestError, match="-1; allowed"):
            await cluster["a"].set_policy("m", copies_min=-1)


async def test_unknown_models_have_no_policy() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        with pytest.raises(ModelNotFoundError):
            await cluster["a"].set_policy("m")
        with pytest.raises(ModelNotFoundError):
            await cluster["a"].set_policy("m", pinned=True)
        with pytest.raises(InvalidRequestError, match="non-empty modelId"):
            await cluster["a"].set_policy("", pinned=True)


async def test_more_copies_than_instances_may_hold_are_refused() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        with pytest.raises(MeshError, match=r"min_copies is 3, but 2 instances may hold") as caught:
            await cluster["a"].register("m", policy=ModelPolicy(3))
        assert caught.value.code is StatusCode.FAILED_PRECONDITION
        assert "start more instances" in caught.value.message
        assert cluster.record("m") is None
        await cluster["a"].register("m", ModelInfo("t", "p"), policy=ModelPolicy(2))
        await cluster.start("c")
        await cluster["a"].set_policy("m", copies_min=3)
        assert stored(cluster) == ModelPolicy(3)


@pytest.mark.virtual_time
async def test_models_whose_size_nobody_knows_yet_count_as_much_as_the_usual_one() -> None:
    """Many are registered at once, before the first of them is loaded."""
    plan = ModelPlan(load_s=5.0)
    async with running_cluster("a", plan=plan, parameters=small_parameters(20)) as cluster:
        a = cluster["a"]
        for number in range(4):
            await a.register(f"p{number}", policy=ModelPolicy(1))
        for number in range(4):
            await a.register(f"q{number}", policy=ModelPolicy(1, pinned=True))
        await a.register("last", policy=ModelPolicy(1))
        with pytest.raises(MeshError, match=r"1 copies take .* half of the memory") as caught:
            await a.register("more", policy=ModelPolicy(1))
        assert caught.value.code is StatusCode.FAILED_PRECONDITION
        assert cluster.record("more") is None


@pytest.mark.virtual_time
async def test_what_was_just_accepted_has_its_place_at_once() -> None:
    parameters = small_parameters(10)
    async with running_cluster("a", "b", plan=FAST, parameters=parameters) as cluster:
        for number in range(8):
            await cluster["a"].register(f"p{number}", policy=ModelPolicy(1))
            await anyio.sleep(1)
        await cluster["b"].crash()
        policies = cluster["a"].node.parts.policies
        await until(lambda: policies.kept_count(ModelId("p7")) == 0, 30, "half of one is left")
        for number in range(2, 8):
            await cluster["a"].set_policy(f"p{number}", copies_min=0)
        await cluster["a"].register("new")
        await anyio.sleep(0.01)
        state = await cluster["a"].set_policy("new", copies_min=1)
        assert state.unmet_because == "0 of 1 copies are ready, 0 on their way"
        assert policies.kept_count(ModelId("new")) == 1


async def test_a_policy_is_not_changed_without_the_store_or_by_who_may_only_read() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        await cluster.start("r", kv_read_only=True)
        with pytest.raises(MeshError, match="read-only"):
            await cluster["r"].set_policy("m", pinned=True)
        assert (await cluster["r"].set_policy("m")).policy == ModelPolicy()
        cluster["a"].store.set_fault(Fault.REFUSED)
        with pytest.raises(StoreUnavailableError):
            await cluster["a"].set_policy("m", pinned=True)
        cluster["a"].store.set_fault(None)

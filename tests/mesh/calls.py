"""Calls, copies and counts that several tests of the mesh share."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from mm.core.calls import Call, Outcome
from mm.core.ids import InstanceId, ModelId
from mm.testing.cluster import Cluster, Instance
from mm.testing.fake_runtime import ModelPlan

FAST: Final = ModelPlan(load_s=0.003, unload_s=0.001)
METHOD: Final = "/pkg.Service/Method"
A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")
M = ModelId("m")


def call_for(model_id: str = "m", **changes: object) -> Call:
    return replace(Call(ModelId(model_id), method=METHOD), **changes)  # type: ignore[arg-type]


async def loaded_at(cluster: Cluster, *names: str, model_id: str = "m") -> None:
    """Register a model and load it at these instances; all of them know of it."""
    await cluster[names[0]].register(model_id)
    for name in names:
        assert (await cluster[name].load_here(model_id)).status == "LOADED"
    await cluster.settle()


def loads(cluster: Cluster) -> int:
    return sum(each.runtime.loads_begun.total() for each in cluster.instances.values())


async def give_back(instance: Instance, call: Call, outcome: Outcome, message: str = "") -> bool:
    """Ask, and end the attempt with an outcome of the test's choice."""
    route = await instance.node.router.route(call)
    return instance.node.router.finished(call, route, outcome, message)

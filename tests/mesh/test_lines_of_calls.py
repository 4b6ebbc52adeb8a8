"""Long lines of calls before copies of a whole instance, with more models wanted than fit."""

from __future__ import annotations

import anyio
import pytest

from mm.mesh.local_copy import LocalCopy, Phase
from mm.testing.cluster import running_cluster, small_parameters, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import M, call_for

pytestmark = pytest.mark.anyio


def is_loading(copy: LocalCopy | None) -> bool:
    return copy is not None and copy.phase is Phase.LOADING


@pytest.mark.virtual_time
async def test_a_copy_is_not_evicted_before_those_who_waited_had_their_turn() -> None:
    """Three times as many models as fit, and long lines for each: no line is waited in twice."""
    names = [f"m{number}" for number in range(30)]
    plan = ModelPlan(load_s=0.02, unload_s=0.01)
    async with running_cluster("a", plan=plan, parameters=small_parameters(10)) as cluster:
        a = cluster["a"]
        cluster.call_s = 0.01
        for model_id in names:
            await a.register(model_id)
        async with anyio.create_task_group() as group:
            for model_id in names * 40:
                group.start_soon(a.send, call_for(model_id))
        # Without that 120 more, or so.
        assert a.runtime.loads_begun.total() <= 1.5 * len(names)
        await cluster.settle()
        cluster.check()


@pytest.mark.virtual_time
async def test_loads_that_leave_before_a_call_has_its_turn_are_no_attempts_of_its() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=0.02, unload_s=0.01)) as cluster:
        a, call = cluster["a"], call_for("m")
        await a.register("m")
        copies = a.node.parts.copies
        async with anyio.create_task_group() as group:
            group.start_soon(a.send, call)
            for _ in range(3 * a.config.retry_iterations_max):
                await until(lambda: is_loading(copies.get(M)))
                copy = copies.get(M)
                assert copy is not None
                copies.remove(copy)
        assert call.attempts <= 2
        await cluster.settle()
        cluster.check()

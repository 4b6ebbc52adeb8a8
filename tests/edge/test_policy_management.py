"""``setModelPolicy`` and the policy of a registration, as messages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mm.core.model_policy import ModelPolicy
from mm.edge.management import Management
from mm.edge.policy_management import PolicyManagement
from mm.pb import mmesh
from mm.testing.cluster import running_cluster
from mm.testing.fake_runtime import ModelPlan

pytestmark = pytest.mark.anyio


CALL = cast(Any, SimpleNamespace(head=SimpleNamespace(mesh=[])))


async def test_what_is_not_set_is_left_alone_and_zero_is_something() -> None:
    async with running_cluster("a", plan=ModelPlan(load_s=0.001)) as cluster:
        models = cluster["a"].node.models
        served = PolicyManagement(models)
        request = mmesh.RegisterModelRequest(
            model_id="m",
            model_info=mmesh.ModelInfo(type="t"),
            min_copies=1,
            pinned=True,
        )
        assert b"\xa0\x06\x01\xa8\x06\x01" in bytes(request), "fields 100 and 101"
        await Management(models, external=True).register_model(request, CALL)
        record = cluster.record("m")
        assert record is not None
        assert record.policy == ModelPolicy(1, pinned=True)
        for change, told in (
            (mmesh.SetModelPolicyRequest("m"), (1, True)),
            (mmesh.SetModelPolicyRequest("m", min_copies=0), (0, True)),
            (mmesh.SetModelPolicyRequest("m", pinned=False), (0, False)),
            (mmesh.SetModelPolicyRequest("m", min_copies=1, pinned=True), (1, True)),
        ):
            asked = mmesh.SetModelPolicyRequest.parse(bytes(change))
            answer = await served.set_model_policy(asked, CALL)
            assert (answer.min_copies, answer.pinned) == told, change

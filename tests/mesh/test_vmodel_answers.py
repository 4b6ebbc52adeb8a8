"""Without ``sync`` every answer comes within 100 ms, however many ask and whatever is said; and
one that takes longer comes before its caller leaves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.core.vmodel_changes import SetVModel
from mm.errors import (
    MeshError,
    ModelExistsError,
    ModelNotFoundError,
    StoreUnavailableError,
    TargetConflictError,
)
from mm.mesh.models import EnsureRequest
from mm.mesh.ports import ModelStatus
from mm.mesh.vmodel_manager import VModelManager, VModelStatus
from mm.testing.cluster import INFO, running_cluster, until
from tests.mesh.calls import FAST

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

AT_ONCE = 64
ROUND_TRIP_S = 0.005
ASYNC_S_MAX = 0.1

Work = Callable[[VModelManager, str], Awaitable[object]]


async def set_vmodel(
    manager: VModelManager, name: str, target: str, info: ModelInfo | None = INFO, **wishes: Any
) -> VModelStatus:
    return await manager.set(SetVModel(name, ModelId(target), info=info, **wishes))


@pytest.mark.parametrize("is_one", [False, True], ids=["many", "one"])
@pytest.mark.parametrize(
    ("work", "error", "requests_max"),
    [
        (lambda m, name: set_vmodel(m, name, "m", owner="they"), MeshError, 1),
        (lambda m, name: set_vmodel(m, name, "m", ModelInfo("type", "p")), ModelExistsError, 1),
        (lambda m, name: set_vmodel(m, name, "none", None), ModelNotFoundError, 1),
        (
            lambda m, name: set_vmodel(m, name, "n", expected_target_id="x"),
            TargetConflictError,
            1,
        ),
        (lambda m, name: set_vmodel(m, name, "m", owner="me"), None, 1),
        (lambda m, name: set_vmodel(m, name, "n", owner="me"), None, AT_ONCE),
        (lambda m, name: m.delete(name), None, AT_ONCE),
        (lambda m, name: m.delete(f"no-{name}"), None, 1),
    ],
    ids=[
        *("another owner", "another path", "no model", "another target"),
        *("unchanged", "same target", "deleted", "not there"),
    ],
)
async def test_many_at_once(
    work: Work, error: type[MeshError] | None, requests_max: int, is_one: bool
) -> None:
    """Of one vmodel, and of many that share a model; who has nothing to write shares one read."""
    async with running_cluster(plan=FAST) as cluster:
        cluster.store_delay_s = ROUND_TRIP_S
        manager = (a := await cluster.start("a")).node.vmodels
        names = [f"v{0 if is_one else number}" for number in range(AT_ONCE)]
        for name in dict.fromkeys(names):
            await set_vmodel(manager, name, "m", owner="me")
        await cluster.settle()
        took_s: list[float] = []
        asked_before = a.node.parts.counters.vmodel_confirmations

        async def ask(name: str) -> None:
            began_s = anyio.current_time()
            if error is None:
                await work(manager, name)
            else:
                with pytest.raises(error):
                    await work(manager, name)
            took_s.append(anyio.current_time() - began_s)

        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(ask, name)
        assert max(took_s) < ASYNC_S_MAX
        asked = a.node.parts.counters.vmodel_confirmations - asked_before
        assert asked <= requests_max


async def test_a_refusal_is_that_of_the_store() -> None:
    """The mirror is behind: the owner has let go of the vmodel."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        mine, other = cluster["a"].node.vmodels, cluster["b"].node.vmodels
        await set_vmodel(mine, "v", "m", owner="me")
        await until(lambda: cluster["b"].node.parts.vmodels.get("v") is not None)
        cluster["b"].store._watch_delay_s = 60.0
        await mine.delete("v")
        status = await set_vmodel(other, "v", "n", owner="they")
        assert (status.owner, status.active_model_id) == ("they", "n")


async def test_what_came_after_a_set_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        manager = cluster["a"].node.vmodels

        async def hang(_vmodel_id: str) -> None:
            await anyio.sleep_forever()

        monkeypatch.setattr(manager._snapshots, "take", hang)
        began_s = anyio.current_time()
        status = await set_vmodel(manager, "v", "m")
        assert (status.status, status.active_model_id) == ("DEFINED", "m")
        assert anyio.current_time() - began_s < ASYNC_S_MAX


async def test_nor_is_a_model_that_was_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        a, other = cluster["a"], cluster["b"].node.vmodels

        async def overtaken(_request: EnsureRequest) -> ModelStatus:
            await other.delete("v")
            await until(lambda: a.node.parts.registry.get(ModelId("m")) is None)
            a.store._call_delay_s = 60.0
            await anyio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(a.node.models, "ensure_loaded", overtaken)
        began_s = anyio.current_time()
        status = await set_vmodel(a.node.vmodels, "v", "m", auto_delete=True, load_now=True)
        assert (status.status, status.active_model_id) == ("DEFINED", "m")
        assert anyio.current_time() - began_s < ASYNC_S_MAX


async def test_a_slow_store_is_told_before_the_caller_leaves() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        manager = cluster["a"].node.vmodels
        await set_vmodel(manager, "v", "m")
        cluster["a"].store._call_delay_s = 60.0
        deadline_s = anyio.current_time() + 5.0

        async def change() -> None:
            request = SetVModel("v", ModelId("n"), info=INFO)
            await manager.set(request, deadline_s=deadline_s)

        async def delete() -> None:
            await manager.delete("v", deadline_s=deadline_s)

        async with anyio.create_task_group() as group:
            for call in (change, delete):
                group.start_soon(expect_late, call, 4.5)


async def expect_late(call: Callable[[], Awaitable[None]], after_s: float) -> None:
    began_s = anyio.current_time()
    with pytest.raises(StoreUnavailableError, match=f"within {after_s:g} s"):
        await call()
    assert anyio.current_time() - began_s == pytest.approx(after_s)

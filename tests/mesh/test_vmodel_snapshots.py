"""An answer about a vmodel tells what was so at one moment, however late the watches are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.edge.memory_store import Fault
from mm.errors import ContendedError, StoreUnavailableError
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Write
from mm.mesh.vmodel_manager import VModelStatus
from mm.mesh.vmodel_snapshots import TRIES_MAX
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster
from mm.testing.instance import Instance
from tests.mesh.calls import FAST
from tests.mesh.test_vmodel_manager import brief, set_vmodel

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.virtual_time,
    pytest.mark.usefixtures("no_transitions"),
]

TRANSITION = VModelRecord(ModelId("m"), ModelId("n"))
SWITCHED = VModelRecord(ModelId("n"), ModelId("n"))
REPLACED = VModelRecord(ModelId("m"), ModelId("o"))
MOVES = {"switched": SWITCHED, "target replaced": REPLACED, "deleted": None}
#: Which tables are heard of as soon as something happens.
HEARD = [[], ["registry"], ["vmodels"]]
#: More than any answer takes: the last ones happen after it.
POINTS_MAX = 40

Ask = Callable[[Instance], Awaitable[VModelStatus]]


def told(vmodel: VModelRecord | None) -> str:
    """Answer how ``brief`` tells of one without copies."""
    if vmodel is None:
        return "NOT_FOUND /- /-"
    active_id, target_id = vmodel.active_model_id, vmodel.target_model_id
    if active_id == target_id:
        return f"DEFINED {active_id}/NOT_LOADED {active_id}/-"
    return f"TRANSITIONING {active_id}/NOT_LOADED {target_id}/LOADING"


async def ask_status(instance: Instance) -> VModelStatus:
    return await instance.node.vmodels.status("v")


async def ask_set(instance: Instance) -> VModelStatus:
    """As a controller does again and again."""
    return await set_vmodel(instance, "n", auto_delete=True)


async def ask_load(instance: Instance) -> VModelStatus:
    return await set_vmodel(instance, "n", auto_delete=True, load_now=True)


def become(cluster: Cluster, vmodel: VModelRecord | None) -> None:
    """Write behind everybody's back, in one transaction, a vmodel that owns its models: those that
    it does not name are deleted.
    """
    named = set() if vmodel is None else {vmodel.active_model_id, vmodel.target_model_id}
    of_vmodel = None if vmodel is None else vmodel.encode()
    writes = [Write(f"{PREFIX}/vmodels/v", of_vmodel, if_revision=None)]
    for model_id in map(ModelId, "mno"):
        key = f"{PREFIX}/registry/{model_id}"
        if (model_id in named) != (cluster.server.get(key) is not None):
            record = ModelRecord(INFO, references=1, auto_delete=True)
            value = record.encode() if model_id in named else None
            writes.append(Write(key, value, if_revision=None))
    assert cluster.server.transact(writes)[0]


class _World:
    """An instance that hears what a test tells it of the tables, and no more; and something that
    happens just before or after one of its requests to the store reaches that.
    """

    def __init__(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster, self.instance = cluster, cluster["a"]
        self.store = self.instance.store
        self._mirrors: dict[str, Mirror] = {
            "vmodels": self.instance.node.parts.vmodels.mirror,
            "registry": self.instance.node.parts.registry.mirror,
        }
        self._points = 0
        self._at: dict[int, Callable[[], None]] = {}
        for mirror in self._mirrors.values():
            monkeypatch.setattr(mirror, "fold", lambda events: None)
        for name in ("get", "revisions", "transact"):
            self._spy(name, monkeypatch)

    def hear(self, *names: str) -> None:
        """Tell it of tables as they are now."""
        for name in names:
            mirror = self._mirrors[name]
            Mirror.fold(mirror, [self.cluster.server.table(mirror.prefix)])

    def happen(self, vmodel: VModelRecord | None, heard: Sequence[str]) -> None:
        become(self.cluster, vmodel)
        self.hear(*heard)

    async def begin_again(self, vmodel: VModelRecord | None = TRANSITION) -> None:
        self._at = {}
        self.happen(vmodel, ["vmodels", "registry"])
        await anyio.sleep(1.1)  # whatever was remembered of an unknown id
        self._points = 0

    def happen_at(self, point: int, vmodel: VModelRecord | None, heard: Sequence[str]) -> None:
        """Two points are a request's: when it is sent, and when the answer has come."""
        self._at[point] = lambda: self.happen(vmodel, heard)

    def is_still_to_happen(self) -> bool:
        return bool(self._at)

    def _reach(self) -> None:
        self._at.pop(self._points, lambda: None)()
        self._points += 1

    def _spy(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        request = getattr(self.store, name)

        async def spied(argument: Any) -> Any:
            self._reach()
            answer = await request(argument)
            self._reach()
            return answer

        monkeypatch.setattr(self.store, name, spied)


@asynccontextmanager
async def world_of_one(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[_World]:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster.settle()
        yield _World(cluster, monkeypatch)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
async def test_one_mirror_is_ahead_of_the_other(
    move: VModelRecord | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world_of_one(monkeypatch) as world:
        for heard in HEARD:
            await world.begin_again()
            world.happen(move, heard)
            assert brief(await ask_status(world.instance)) == told(move), heard


@pytest.mark.parametrize("ask", [ask_status, ask_set, ask_load])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
async def test_something_happens_while_the_answer_is_looked_for(
    ask: Ask, move: VModelRecord | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment, and whatever is heard of it: at the start all is known, or nothing of what has
    just happened.
    """
    possible = {told(each) for each in (TRANSITION, SWITCHED, move)}
    possible |= {"DEFINED n/LOADED n/-", "DEFINED n/LOADING n/-"} if ask is ask_load else set()
    async with world_of_one(monkeypatch) as world:
        for before in (TRANSITION, REPLACED):
            for heard in HEARD if ask is ask_status else [["registry"]]:
                for point in range(POINTS_MAX):
                    await world.begin_again(before)
                    become(world.cluster, TRANSITION)
                    world.happen_at(point, move, heard)
                    answer = brief(await ask(world.instance))
                    assert answer in possible, (heard, before, point)
                    if world.is_still_to_happen():
                        break
                else:
                    raise AssertionError("more points than thought of")


async def test_without_a_store_no_missing_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world_of_one(monkeypatch) as world:
        await world.begin_again()
        world.store.set_fault(Fault.SILENT)
        assert brief(await ask_status(world.instance)) == told(TRANSITION)
        world.happen(SWITCHED, ["registry"])
        with pytest.raises(StoreUnavailableError):
            await ask_status(world.instance)


async def test_a_vmodel_that_changes_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world_of_one(monkeypatch) as world:
        await world.begin_again()
        for point in range(10 * TRIES_MAX):
            world.happen_at(point, (SWITCHED, TRANSITION)[point % 2], ["registry"])
        with pytest.raises(ContendedError, match=f"v changed {TRIES_MAX} times"):
            await ask_status(world.instance)
        # One that was set is told as it was set.
        await world.begin_again()
        for point in range(2, 10 * TRIES_MAX):  # after the transaction
            world.happen_at(point, (SWITCHED, TRANSITION)[point % 2], ["registry"])
        assert brief(await set_vmodel(world.instance, "m")) == "DEFINED m/NOT_LOADED m/-"


async def test_a_model_that_is_really_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world_of_one(monkeypatch) as world:
        await world.begin_again()
        key = f"{PREFIX}/registry/m"
        world.cluster.server.transact([Write(key, None, if_revision=None)])
        for heard in HEARD:
            world.hear(*heard)
            answer = await ask_status(world.instance)
            assert brief(answer) == "TRANSITIONING m/NOT_FOUND n/LOADING"

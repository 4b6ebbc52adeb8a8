"""Ids that nobody knows: what they cost the store, and what is told to those who ask for many."""

from __future__ import annotations

from dataclasses import replace

import anyio
import anyio.lowlevel
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelRecord
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import (
    InvalidRequestError,
    LimitError,
    ModelNotFoundError,
    StatusCode,
    StoreUnavailableError,
)
from mm.limits import Limits
from mm.mesh.look_ups import ANSWER_S, LookUps
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Item, Write
from mm.testing.cluster import INFO, running_cluster
from tests.mesh.calls import FAST, loaded_at

pytestmark = pytest.mark.anyio

PREFIX = "/r/"
LIMITS = replace(Limits(), look_ups_per_s_max=10, look_ups_in_flight_max=3, look_ups_waiting_max=4)


class World:
    """Look-ups of a table whose watch is far behind; counts what the store is asked."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.store = MemoryStore(MemoryServer(), timeout_s=3.5)
        self.mirror = Mirror(self.store, PREFIX, lambda _id, _item: None)
        self.look_ups = LookUps(self.store, self.mirror, limits)
        self.asked: list[str] = []
        self.is_open = anyio.Event()
        self.is_open.set()
        self._get = self.store.get
        self.store.get = self.get  # type: ignore[method-assign]

    async def get(self, key: str) -> Item | None:
        self.asked.append(key.removeprefix(PREFIX))
        await self.is_open.wait()
        return await self._get(key)

    def put(self, key_id: str) -> None:
        self.store.server.transact([Write(PREFIX + key_id, b"{}", if_revision=None)])


@pytest.mark.virtual_time
async def test_an_unknown_id_is_asked_for_once_a_second() -> None:
    world = World()
    for _ in range(4):
        for _ in range(100):
            assert await world.look_ups.find("m") is None
        await anyio.sleep(ANSWER_S / 2)
    assert world.asked == ["m", "m"]
    assert world.look_ups.count == 2


async def test_one_that_comes_meanwhile_is_found_at_once() -> None:
    world = World()
    assert await world.look_ups.find("m") is None
    world.put("m")
    assert await world.look_ups.find("m") is None
    world.mirror.fold([(await world.store.list(PREFIX))])
    assert await world.look_ups.find("m") is not None
    assert world.asked == ["m"]


async def test_one_that_is_there_is_known_from_then_on() -> None:
    world = World()
    world.put("m")
    for _ in range(5):
        assert await world.look_ups.find("m") is not None
    assert world.asked == ["m"]


async def test_many_that_want_the_same_share_the_answer() -> None:
    world = World()
    world.is_open = anyio.Event()
    found: list[Item | None] = []

    async def find() -> None:
        found.append(await world.look_ups.find("m"))

    async with anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(find)
        await anyio.wait_all_tasks_blocked()
        world.is_open.set()
    assert (len(found), set(found), world.asked) == (100, {None}, ["m"])


async def test_when_the_one_that_asks_gives_up_another_goes_on() -> None:
    world = World()
    world.is_open = anyio.Event()
    found: list[Item | None] = []

    async def find() -> None:
        found.append(await world.look_ups.find("m"))

    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as first:
                first.start_soon(find)
                await anyio.wait_all_tasks_blocked()
                for _ in range(3):
                    group.start_soon(find)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        await anyio.wait_all_tasks_blocked()
        world.is_open.set()
    assert (found, world.asked) == ([None] * 3, ["m", "m"])


@pytest.mark.virtual_time
async def test_all_together_are_bounded_in_a_second() -> None:
    world = World()
    await anyio.sleep(100)
    for number in range(10):
        await world.look_ups.find(f"a{number}")
    with pytest.raises(LimitError, match="10 were looked up in the last second") as caught:
        await world.look_ups.find("one too many")
    assert (caught.value.code, caught.value.retry_after_ms) == (StatusCode.RESOURCE_EXHAUSTED, 1000)
    assert await world.look_ups.find("a0") is None
    await anyio.sleep(0.31)
    for number in range(3):
        await world.look_ups.find(f"b{number}")
    with pytest.raises(LimitError):
        await world.look_ups.find("one too many")
    assert (len(world.asked), world.look_ups.refused_count) == (13, 2)


@pytest.mark.virtual_time
async def test_those_that_wait_are_bounded() -> None:
    world = World(replace(LIMITS, look_ups_per_s_max=1000))
    world.is_open = anyio.Event()
    refused = []

    async def find(number: int) -> None:
        try:
            await world.look_ups.find(f"m{number}")
        except LimitError as exc:
            refused.append(exc.message)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(find, number)
        await anyio.wait_all_tasks_blocked()
        assert (len(world.asked), len(refused)) == (3, 13)
        assert "4 look-ups wait already" in refused[0]
        world.is_open.set()
    assert len(world.asked) == 7


@pytest.mark.virtual_time
async def test_strong_reads_stand_in_the_same_line() -> None:
    world = World()
    world.is_open = anyio.Event()
    refused = []

    async def read(number: int) -> None:
        try:
            await world.look_ups.read(f"m{number}")
        except LimitError as exc:
            refused.append(exc.message)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(read, number)
        await anyio.wait_all_tasks_blocked()
        assert (len(world.asked), len(refused)) == (3, 13)
        assert "4 look-ups wait already" in refused[0]
        assert world.look_ups.refused_count == 13
        world.is_open.set()
    assert len(world.asked) == 7


@pytest.mark.virtual_time
async def test_nobody_queues_for_a_store_that_went_away() -> None:
    """Each would wait for the time limit of all those before it."""
    world = World()
    world.is_open = anyio.Event()
    failed_s = []

    async def find(number: int) -> None:
        with pytest.raises(StoreUnavailableError):
            await world.look_ups.find(f"m{number}")
        failed_s.append(anyio.current_time())

    began_s = anyio.current_time()
    async with anyio.create_task_group() as group:
        for number in range(7):
            group.start_soon(find, number)
        await anyio.wait_all_tasks_blocked()
        world.store.set_fault(Fault.SILENT)
        group.start_soon(find, 7)
        await anyio.wait_all_tasks_blocked()
        assert len(failed_s) == 1, "all that may be under way are"
        world.is_open.set()
    assert max(failed_s) - began_s < 7.1, "once more, to see whether it is back"


@pytest.mark.virtual_time
async def test_what_is_remembered_is_bounded() -> None:
    world = World()
    for number in range(100):
        await world.look_ups.find(f"m{number}")
        await anyio.sleep(0.11)
    assert len(world.look_ups._answers) <= 11


@pytest.mark.virtual_time
async def test_a_store_that_does_not_answer_is_asked_once_a_second() -> None:
    world = World()
    world.store.set_fault(Fault.SILENT)
    for _ in range(50):
        with pytest.raises(StoreUnavailableError):
            await world.look_ups.find("m")
    assert world.asked == ["m"]
    await anyio.sleep(ANSWER_S)
    with pytest.raises(StoreUnavailableError):
        await world.look_ups.find("m")
    assert world.asked == ["m", "m"]
    world.store.set_fault(None)
    assert await world.look_ups.find("m") is None, "it is back"


async def test_an_id_that_is_too_long_costs_nothing() -> None:
    world = World()
    for key_id in ("x" * 4097, "ü" * 2049):
        with pytest.raises(InvalidRequestError, match="an id has at most 4096 bytes, this one 409"):
            await world.look_ups.find(key_id)
    assert world.asked == []
    assert await world.look_ups.find("ü" * 2048) is None


# --- in a node -----------------------------------------------------------------------------------


async def test_hits_never_touch_the_store() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        for each in cluster.serving:
            each.store.set_fault(Fault.SILENT)
        before = [each.node.statistics().look_ups for each in cluster.serving]
        with anyio.fail_after(3):
            for name in "ab":
                for _ in range(50):
                    assert await cluster[name].invoke("m") == "b"
        assert [each.node.statistics().look_ups for each in cluster.serving] == before
        for each in cluster.serving:
            each.store.set_fault(None)
        with pytest.raises(ModelNotFoundError):
            await cluster["a"].invoke("unknown")
        assert cluster["a"].node.statistics().look_ups == before[0] + 1


async def test_a_long_id_that_others_registered_is_served() -> None:
    """Java knows no limit but etcd's own."""
    async with running_cluster("a", plan=FAST) as cluster:
        long = "x" * 5000
        with pytest.raises(InvalidRequestError, match="at most 4096 bytes"):
            await cluster["a"].register(long)
        with pytest.raises(InvalidRequestError, match="at most 4096 bytes"):
            await cluster["a"].invoke(long)
        registry = cluster["a"].node.parts.registry
        await registry.update(ModelId(long), lambda _record: ModelRecord(INFO))
        assert await cluster["a"].invoke(long) == "a"
        await cluster["a"].node.models.unregister(ModelId(long))
        assert cluster.records() == {}


async def test_a_peer_that_knows_of_it_is_believed_more_than_an_older_answer() -> None:
    world = World()
    assert await world.look_ups.find("m") is None
    world.put("m")
    assert await world.look_ups.find("m") is None
    assert await world.look_ups.find("m", is_known_to_peer=True) is not None
    assert world.asked == ["m", "m"]

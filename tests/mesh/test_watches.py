"""Watches: each change is told, the last of several at least, and what is kept is bounded."""

from __future__ import annotations

import anyio
import pytest

from mm.core.records import ModelRecord
from mm.errors import LimitError
from mm.mesh import watches
from mm.mesh.ports import Write
from mm.mesh.watches import Watcher, Watches
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from tests.mesh.calls import FAST, M, loaded_at

pytestmark = pytest.mark.anyio


def watches_at(cluster: Cluster) -> Watches:
    parts = cluster["a"].node.parts
    held_by = parts.registry.held_by
    return Watches(parts.counters, parts.registry.mirror, parts.members.mirror, held_by)


def put(cluster: Cluster, model_id: str, record: ModelRecord | None) -> None:
    value = None if record is None else record.encode()
    cluster.server.transact([Write(f"{PREFIX}/registry/{model_id}", value, if_revision=None)])


async def test_changes_of_the_ids_wanted_are_told_in_order() -> None:
    async with running_cluster("a") as cluster:
        found = watches_at(cluster)
        with found.open() as every, found.open("m2") as one, found.open(prefix="m") as some:
            for model_id in ("n", "m1", "m2", "m1"):
                put(cluster, model_id, ModelRecord(INFO, last_used_ms=1))
            await until(lambda: len(cluster["a"].node.parts.registry) == 3)
            assert [await every.next() for _ in range(3)] == ["n", "m1", "m2"]
            assert await one.next() == "m2"
            assert [await some.next() for _ in range(2)] == ["m1", "m2"]
            put(cluster, "m2", None)
            assert (await every.next(), await one.next()) == ("m2", "m2")


async def test_a_slow_reader_is_told_of_the_last_change_only() -> None:
    async with running_cluster("a") as cluster:
        with watches_at(cluster).open() as watch:
            for number in range(1, 100):
                put(cluster, "m", ModelRecord(INFO, last_used_ms=number))
            registry = cluster["a"].node.parts.registry
            last = ModelRecord(INFO, last_used_ms=99)
            await until(lambda: registry.get(M) == last)
            assert await watch.next() == "m"
            with anyio.move_on_after(1) as scope:
                await watch.next()
            assert scope.cancelled_caught


@pytest.mark.virtual_time  # its lease has to run out
async def test_what_an_instance_holds_changes_with_its_coming_and_going() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        with watches_at(cluster).open() as watch:
            await cluster["b"].crash()
            assert await watch.next() == "m"


async def test_who_is_too_far_behind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "PENDING_MAX", 3)
    async with running_cluster("a") as cluster:
        with watches_at(cluster).open() as watch:
            for number in range(4):
                put(cluster, f"m{number}", ModelRecord(INFO))
            await until(lambda: len(cluster["a"].node.parts.registry) == 4)
            with pytest.raises(LimitError, match="reads too slowly"):
                await watch.next()
        assert cluster["a"].node.parts.counters.watches_behind == 1


async def test_one_connection_does_not_take_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "WATCHES_OF_CLIENT_MAX", 2)
    one, other = Watcher(object()), Watcher(object())
    async with running_cluster("a") as cluster:
        found = watches_at(cluster)
        with found.open(who=one), found.open(who=one):
            with pytest.raises(LimitError, match="this connection has 2 watches open"):
                found.open(who=one).__enter__()
            with found.open(who=other), found.open(), found.open(), found.open():
                assert len(found) == 6
        with found.open(who=one):
            assert len(found) == 1
        assert cluster["a"].node.parts.counters.watches_refused == 1


async def test_one_identity_does_not_take_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "WATCHES_OF_CALLER_MAX", 2)
    async with running_cluster("a") as cluster:
        found = watches_at(cluster)
        with found.open(who=Watcher("c1", "board")), found.open(who=Watcher("c2", "board")):
            with pytest.raises(LimitError, match='"board" has 2 watches open'):
                found.open(who=Watcher("c3", "board")).__enter__()
            with found.open(who=Watcher("c1", "ops")), found.open(), found.open(), found.open():
                assert len(found) == 6
        with found.open(who=Watcher("c3", "board")):
            assert cluster["a"].node.parts.counters.watches_refused == 1


async def test_watches_are_bounded_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "WATCHES_MAX", 1)
    async with running_cluster("a") as cluster:
        found = watches_at(cluster)
        with found.open():
            with pytest.raises(LimitError, match="1 watches are open"):
                found.open().__enter__()
        assert len(found) == 0
        counters = cluster["a"].node.parts.counters
        assert (counters.watches_begun, counters.watches_ended) == (1, 1)
        assert (counters.watches_refused, counters.watches_behind) == (1, 0)
        found.open().__enter__()

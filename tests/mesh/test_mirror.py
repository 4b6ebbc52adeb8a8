"""The mirror's fold: whatever order events, answers and snapshots come in, the newest wins."""

from __future__ import annotations

import random

import anyio
import pytest

from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault, MemoryStore
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Delete, Item, Put, Resync, Write
from mm.table import ID_BYTES_MAX

pytestmark = pytest.mark.anyio

PREFIX = "/t/"


def item(key: str, revision: int) -> Item:
    return Item(PREFIX + key, b"%d" % revision, revision)


class Told:
    """A mirror that nobody feeds, and what its listener was told."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, int | None]] = []
        self.mirror = Mirror(MemoryStore(), PREFIX, self._hear)

    def _hear(self, key: str, found: Item | None) -> None:
        self.changes.append((key, None if found is None else found.mod_revision))
        assert self.mirror.get(key) is found, "told after the change"

    def put(self, key: str, revision: int) -> None:
        self.mirror.fold([Put(item(key, revision))])

    def delete(self, key: str, revision: int) -> None:
        self.mirror.fold([Delete(PREFIX + key, revision)])

    def resync(self, revision: int, **items: int) -> None:
        self.mirror.fold([Resync([item(k, r) for k, r in items.items()], revision)])

    def other_store(self, revision: int, **items: int) -> None:
        table = [item(k, r) for k, r in items.items()]
        self.mirror.fold([Resync(table, revision, is_of_other_store=True)])

    def revision(self, key: str) -> int | None:
        found = self.mirror.get(key)
        return None if found is None else found.mod_revision


async def test_an_event_older_than_what_is_known_changes_nothing() -> None:
    told = Told()
    told.put("a", 5)
    told.put("a", 4)
    told.put("a", 5)
    told.delete("a", 3)
    assert told.changes == [("a", 5)]
    assert list(told.mirror) == ["a"]


NO_IDS = ["", "\udcff\udcfe", "x" * (ID_BYTES_MAX + 1), "é" * (ID_BYTES_MAX // 2 + 1)]


@pytest.mark.parametrize("key", NO_IDS)
async def test_what_cannot_be_an_id_is_skipped(key: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the table nor a header could hold it, and whoever asked would fail."""
    told = Told()
    told.mirror.fold([Resync([item(key, 1), item("a", 2)], 2)])
    told.put(key, 3)
    told.mirror.written(item(key, 4))
    assert told.changes == [("a", 2)]
    assert list(told.mirror) == ["a"]
    assert told.mirror.skipped_count == 1
    assert [record.message for record in caplog.records] == [
        f"a key of {len(key)} characters, {key[:64]!a}, is no id: skipped"
    ]
    told.delete(key, 5)
    assert told.mirror.skipped_count == 0
    told.put(key, 6)
    told.resync(7, a=2)
    assert told.mirror.skipped_count == 0
    assert told.changes == [("a", 2)]


async def test_our_own_write_is_seen_at_once_and_told_once() -> None:
    told = Told()
    told.mirror.written(item("a", 7))
    told.put("a", 7)
    assert told.changes == [("a", 7)]


async def test_a_record_that_we_deleted_does_not_come_back_with_its_late_event() -> None:
    told = Told()
    told.put("a", 5)
    told.mirror.deleted_by_us("a", 5)
    told.put("a", 5)
    assert told.changes == [("a", 5), ("a", None)]
    told.delete("a", 6)
    told.put("a", 9)
    assert told.changes[2:] == [("a", 9)]
    assert not told.mirror._deleted


async def test_a_deletion_of_what_the_mirror_has_not_seen_yet_counts_too() -> None:
    told = Told()
    told.mirror.deleted_by_us("a", 5)
    told.put("a", 5)
    assert told.revision("a") is None
    told.delete("a", 6)
    assert not told.mirror._deleted


async def test_a_deletion_whose_event_came_first_leaves_nothing_behind() -> None:
    told = Told()
    told.put("a", 5)
    told.delete("a", 6)
    told.mirror.deleted_by_us("a", 5)
    assert not told.mirror._deleted
    told.put("a", 7)
    assert told.revision("a") == 7


async def test_our_deletion_does_not_take_what_was_created_after_it() -> None:
    """The answer to our delete is late: somebody else has registered the id anew meanwhile."""
    told = Told()
    told.put("a", 5)
    told.delete("a", 6)
    told.put("a", 7)
    told.mirror.deleted_by_us("a", 5)
    assert told.revision("a") == 7


async def test_an_answer_from_before_a_deletion_is_no_news() -> None:
    """A read or write is answered late: its record has been seen, and seen deleted, meanwhile."""
    told = Told()
    told.put("a", 5)
    told.delete("a", 6)
    told.mirror.written(item("a", 5))
    assert told.revision("a") is None
    told.mirror.written(item("a", 8))
    assert told.revision("a") == 8


async def test_a_resync_tells_only_what_differs() -> None:
    told = Told()
    for key, revision in (("a", 1), ("b", 2), ("c", 3)):
        told.put(key, revision)
    told.changes.clear()
    told.resync(9, a=1, b=5, d=9)
    assert sorted(told.changes, key=str) == [("b", 5), ("c", None), ("d", 9)]


async def test_a_resync_older_than_our_writes_does_not_undo_them() -> None:
    told = Told()
    told.resync(5, a=3, b=4)
    told.mirror.written(item("c", 20))
    told.mirror.deleted_by_us("a", 3)
    told.resync(10, a=3, b=4)
    assert {key: told.revision(key) for key in "abc"} == {"a": None, "b": 4, "c": 20}
    told.delete("a", 21)
    assert not told.mirror._deleted


async def test_a_resync_ends_the_wait_for_events_that_it_replaces() -> None:
    told = Told()
    told.put("a", 3)
    told.mirror.deleted_by_us("a", 3)
    told.resync(10)
    assert not told.mirror._deleted


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.virtual_time
async def test_it_follows_a_store_through_outages(seed: int) -> None:
    """Random writes by two clients, late events, faults and compactions: in the end, the truth."""
    rng = random.Random(seed)
    server = MemoryServer()
    # Answers overtake events in half of the runs, events overtake answers in the others.
    delay_s = (0.05, 0.1) if seed % 2 else (0.4, 0.01)
    mine = MemoryStore(server, call_delay_s=delay_s[0], watch_delay_s=delay_s[1])
    others = MemoryStore(server)
    known: dict[str, int] = {}

    def hear(key: str, found: Item | None) -> None:
        if found is None:
            del known[key]
        else:
            assert found.mod_revision > known.get(key, 0)
            known[key] = found.mod_revision

    mirror = Mirror(mine, PREFIX, hear)

    async def change(store: MemoryStore, key: str, remove: bool) -> None:
        before = await store.get(PREFIX + key)
        revision = 0 if before is None else before.mod_revision
        value = None if remove else b"x"
        result = await store.write(Write(PREFIX + key, value, revision))
        if store is not mine or not result.succeeded:
            return
        if result.item is not None:
            mirror.written(result.item)
        elif before is not None:
            mirror.deleted_by_us(key, before.mod_revision)

    async with anyio.create_task_group() as group:
        await group.start(mirror.run)
        for _ in range(30):
            for _ in range(10):
                key = rng.choice("ab")
                group.start_soon(change, rng.choice([mine, others]), key, rng.random() < 0.5)
                await anyio.sleep(rng.choice([0, 0.1, 0.3]))
            await anyio.sleep(2)
            if rng.random() < 0.3:
                mine.set_fault(Fault.REFUSED)
                await change(others, rng.choice("ab"), rng.random() < 0.5)
                if rng.random() < 0.5:
                    server.forget_history()
                mine.set_fault(None)
                await anyio.sleep(1)
            truth = {i.key[len(PREFIX) :]: i.mod_revision for i in server.table(PREFIX).items}
            assert known == truth == {key: told.mod_revision for key, told in mirror.items()}
            assert not mirror._deleted
        group.cancel_scope.cancel()


async def test_another_store_does_not_empty_the_mirror() -> None:
    told = Told()
    told.resync(10, a=3, b=10)
    told.delete("b", 11)
    replaced = told.mirror.store_replaced
    told.other_store(2, c=2)
    assert replaced.is_set()
    assert {key: told.revision(key) for key in told.mirror} == {"a": 0, "c": 2}
    assert told.mirror.unconfirmed() == ["a"]
    told.put("a", 3)  # written anew, with the revisions of the new store
    assert told.revision("a") == 3
    assert not told.mirror.unconfirmed()
    told.resync(4, c=2)
    assert list(told.mirror) == ["c"], "what the new store once had, it may lose"


async def test_another_store_may_have_come_further() -> None:
    told = Told()
    told.resync(10, a=3, b=10)
    told.other_store(50, b=4)
    assert {key: told.revision(key) for key in told.mirror} == {"a": 0, "b": 4}
    told.put("b", 5)
    assert told.revision("b") == 5


async def test_an_unconfirmed_entry_is_restored_once_and_over_nothing() -> None:
    server = MemoryServer()
    mirror = Mirror(MemoryStore(server), PREFIX, lambda key, found: None)
    table = [item("a", 3), item("b", 4), item("c", 5)]
    mirror.fold([Resync(table, 10), Resync([], 1, is_of_other_store=True)])
    server.transact([Write(PREFIX + "b", b"of somebody else", 0)])

    assert await mirror.restore("a")
    assert not await mirror.restore("a"), "it is there now"
    assert not await mirror.restore("b"), "somebody was quicker"
    assert not await mirror.restore("unknown")

    values = {i.key[len(PREFIX) :]: i.value for i in server.table(PREFIX).items}
    assert values == {"a": b"3", "b": b"of somebody else"}
    assert mirror.unconfirmed() == ["c"]
    assert mirror.get("b") == server.get(PREFIX + "b")
    mirror.forget_unconfirmed()
    assert list(mirror) == ["a", "b"]

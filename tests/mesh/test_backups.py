"""A store that was restored from a backup: what was changed or deleted since stays so."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from typing import Any

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.edge.memory_server import Backup, MemoryServer
from mm.edge.memory_store import Fault
from mm.errors import ModelNotFoundError
from mm.mesh.backups import PAST_MAX, OutOfDate, Past, out_of_date
from mm.mesh.ports import Item, Write
from mm.testing.cluster import PREFIX, Cluster, running_cluster, until
from mm.testing.fake_runtime import ModelPlan

PLAN = ModelPlan(load_s=0.1, unload_s=0.05)
GRACE_S = 15.0
NOTHING = OutOfDate((), ())


def item(revision: int, text: str = "", lease_id: int = 0) -> Item:
    return Item("key", (text or f"{revision}").encode(), revision, 1, lease_id)


def past(changed: Item | None = None, **deleted: Item) -> Past:
    made = Past()
    if changed is not None:
        made.changed("a", changed)
    for key_id, each in deleted.items():
        made.deleted(key_id, each)
    return made


# --- what is out of date -------------------------------------------------------------------------

SAME = item(20)


@pytest.mark.parametrize(
    ("table", "known", "expected"),
    [
        ({}, {"a": item(5)}, NOTHING),
        ({"s": SAME, "a": item(5)}, {"s": SAME, "a": item(9)}, OutOfDate(("a",), ())),
        # Nothing shows that it is a backup of ours.
        ({"s": item(20, "other"), "a": item(5)}, {"s": SAME, "a": item(9)}, NOTHING),
        # It was changed after the newest record that is in both: perhaps in the new store.
        ({"s": SAME, "a": item(21)}, {"s": SAME, "a": item(30)}, NOTHING),
        ({"s": SAME, "a": item(5)}, {"s": SAME, "a": item(5)}, NOTHING),
        # The same text with other revisions: nothing is to be written.
        ({"s": SAME, "a": item(5, "x")}, {"s": SAME, "a": item(9, "x")}, NOTHING),
        # Its holder writes it.
        ({"s": SAME, "a": item(5, "", 7)}, {"s": SAME, "a": item(9, "", 7)}, NOTHING),
        ({"s": SAME, "gone": item(5)}, {"s": SAME}, OutOfDate((), ("gone",))),
        # What was deleted is itself in the backup, just as it was: no other proof is needed.
        ({"gone": item(12)}, {}, OutOfDate((), ("gone",))),
        ({"gone": item(12, "another")}, {}, NOTHING),
        # The backup's text is itself one that we saw changed.
        ({"a": item(17)}, {"a": item(19)}, OutOfDate(("a",), ())),
        ({"a": item(17, "other")}, {"a": item(19)}, NOTHING),
        ({"s": SAME, "never": item(5)}, {"s": SAME}, NOTHING),
    ],
)
def test_what_is_out_of_date(
    table: dict[str, Item], known: dict[str, Item], expected: OutOfDate
) -> None:
    assert out_of_date(table, known, (), past(item(17), gone=item(12))) == expected


def test_what_a_backup_did_not_take_before_the_next_one_is_still_newer() -> None:
    known = {"s": SAME, "a": item(5, "newer")}
    table = {"s": SAME, "a": item(5)}
    assert out_of_date(table, known, ["a"], past()) == OutOfDate(("a",), ())
    assert out_of_date(table, known, [], past()) == NOTHING


def test_only_the_last_changes_are_remembered() -> None:
    made = past(first=item(1), leased=item(2, "", 7), restored=item(0))
    assert made.has_seen_go("first")
    assert made.has_seen("first", item(1))
    assert not made.has_seen("another", item(1))
    assert not made.has_seen_go("leased")
    assert not made.has_seen("restored", item(0))
    for number in range(PAST_MAX):
        made.deleted(f"{number}", item(3 + number))
    assert not made.has_seen_go("first")
    assert not made.has_seen("first", item(1))
    made.created("0")
    assert not made.has_seen_go("0")
    assert made.has_seen("0", item(3)), "that it was there remains true"


def test_what_is_remembered_of_changes_takes_little_however_many_they_are() -> None:
    made = Past()
    tracemalloc.start()
    try:
        for number in range(2 * PAST_MAX):
            made.changed(f"model-{number}", item(1 + number))
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken_bytes < 20 * PAST_MAX
    assert made.has_seen(f"model-{PAST_MAX}", item(1 + PAST_MAX))
    assert not made.has_seen(f"model-{PAST_MAX - 1}", item(PAST_MAX))


# --- in a mesh -----------------------------------------------------------------------------------

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]
KEPT = [f"kept{number}" for number in range(5)]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Write]:
    """The writes that had an effect, by anybody."""
    done: list[Write] = []
    transact = MemoryServer.transact

    def noting(self: MemoryServer, writes: Any) -> tuple[bool, list[Item | None]]:
        succeeded, items = transact(self, writes)
        done.extend(writes if succeeded else ())
        return succeeded, items

    monkeypatch.setattr(MemoryServer, "transact", noting)
    return done


async def register(cluster: Cluster, model_id: str, path: str = "") -> None:
    await cluster["a"].node.models.register(
        ModelId(model_id), ModelInfo("type", path), load_now=False, sync=False, last_used_ms=0
    )


async def backed_up(cluster: Cluster) -> Backup:
    """Register models, make a backup, then unregister, change and register some."""
    for model_id in ("gone", "anew", "moved", *KEPT):
        await register(cluster, model_id, "old")
    await cluster["b"].invoke("anew")
    await cluster.settle()
    await anyio.sleep(5)
    backup = cluster.server.backup()
    for model_id in ("gone", "anew"):
        await cluster["a"].node.models.unregister(ModelId(model_id))
    await register(cluster, "anew", "new")
    await register(cluster, "since", "new")
    await cluster["b"].invoke("moved")
    await cluster.settle()
    await anyio.sleep(5)
    return backup


async def restore(cluster: Cluster, backup: Backup) -> None:
    for each in cluster.serving:
        each.store.set_fault(Fault.REFUSED)
    cluster.server.wipe(backup)
    await anyio.sleep(5.0)
    for each in cluster.serving:
        each.store.set_fault(None)


def model_values(cluster: Cluster) -> dict[str, bytes]:
    return {each.key: each.value for each in cluster.server.table(f"{PREFIX}/registry/").items}


async def test_a_backup_and_what_is_known_make_what_was(writes: list[Write]) -> None:
    async with running_cluster("a", "b", "c", plan=PLAN) as cluster:
        backup = await backed_up(cluster)
        before = model_values(cluster)
        writes.clear()
        await restore(cluster, backup)
        assert cluster.record("gone") is not None, "the backup has it"
        await anyio.sleep(5)
        with pytest.raises(ModelNotFoundError):
            await cluster["c"].invoke("gone")
        await anyio.sleep(GRACE_S + 10)
        await cluster.settle()
        assert model_values(cluster) == before
        written = Counter(w.key for w in writes if "/registry/" in w.key)
        names = {key.rpartition("/")[2] for key in written}
        assert names == {"gone", "anew", "since", "moved"}
        assert set(written.values()) == {1}
        assert not any(e.node.statistics().records_unconfirmed for e in cluster.serving)
        cluster.check()


async def test_what_a_backup_brings_back_can_be_registered_at_once(writes: list[Write]) -> None:
    async with running_cluster("a", "b", plan=PLAN) as cluster:
        backup = await backed_up(cluster)
        await restore(cluster, backup)
        await until(lambda: cluster["a"].node.statistics().records_unconfirmed > 0)
        await register(cluster, "gone", "new")
        await anyio.sleep(GRACE_S + 10)
        await cluster.settle()
        record = cluster.record("gone")
        assert record is not None
        assert record.info.path == "new"
        cluster.check()


async def test_whoever_missed_a_registration_does_not_undo_it(writes: list[Write]) -> None:
    """The first in line knows only that the model was unregistered, not that it is there again."""
    async with running_cluster("a", "b", "c", plan=PLAN) as cluster:
        await register(cluster, "m", "old")
        for model_id in KEPT:
            await register(cluster, model_id)
        backup = cluster.server.backup()
        await cluster["b"].node.models.unregister(ModelId("m"))
        await cluster.settle()
        cluster["a"].store.set_fault(Fault.REFUSED)
        await cluster["b"].node.models.register(
            ModelId("m"), ModelInfo("type", "new"), load_now=False, sync=False, last_used_ms=0
        )
        await anyio.sleep(2)
        await restore(cluster, backup)
        await anyio.sleep(GRACE_S + 20)
        record = cluster.record("m")
        assert record is not None
        assert record.info.path == "new"
        await cluster.settle()
        cluster.check()


@pytest.mark.parametrize("seed", range(4))
async def test_any_backup_of_a_busy_mesh_becomes_what_was(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"m{number}" for number in range(12)]
    async with running_cluster("a", "b", "c", plan=PLAN) as cluster:
        for model_id in KEPT:
            await register(cluster, model_id)
        backups = []
        for _ in range(60):
            model_id = rng.choice(names)
            if cluster.record(model_id) is None:
                await register(cluster, model_id, f"{rng.random()}")
            elif rng.random() < 0.4:
                await cluster["a"].node.models.unregister(ModelId(model_id))
            else:
                await cluster["b"].invoke(model_id)
            await anyio.sleep(rng.random() * 3)
            backups.append(cluster.server.backup())
        await cluster.settle()
        before = {m: (r.info, r.copies) for m, r in cluster.records().items()}
        await restore(cluster, rng.choice(backups))
        await anyio.sleep(GRACE_S + 10)
        await cluster.settle()
        assert {m: (r.info, r.copies) for m, r in cluster.records().items()} == before
        cluster.check()

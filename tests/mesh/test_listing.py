"""Pages of models and vmodels from the mirrors: filters, limits, and what one costs the others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import anyio
import pytest

from mm.core.calls import Call, Hop
from mm.core.copy_record import CopyStage
from mm.core.ids import InstanceId, ModelId
from mm.core.records import InstanceRecord, ModelInfo, ModelRecord, VModelRecord
from mm.edge.memory_store import Fault, MemoryStore
from mm.errors import InvalidRequestError, LimitError
from mm.limits import Limits
from mm.mesh import listing
from mm.mesh.listing import ListedModel, Listing, PageRequest
from mm.mesh.mirror import Mirror
from mm.mesh.models import EnsureRequest
from mm.mesh.ports import Delete, Item, Put, Write
from mm.mesh.vmodels import VModels
from mm.testing.cluster import INFO, PREFIX, Cluster, running_cluster, until
from tests.mesh.calls import FAST, A, B, M, loaded_at
from tests.mesh.test_statuses import Asked

pytestmark = pytest.mark.anyio


def listing_at(cluster: Cluster, vmodels: VModels | None = None) -> Listing:
    parts = cluster["a"].node.parts
    return Listing(parts.registry, vmodels or parts.vmodels, parts.models.statuses)


def no_vmodels() -> VModels:
    """A table that nobody but the test changes: a leader would carry transitions out."""
    return VModels(MemoryStore(), "/v/", Limits())


def told(vmodels: VModels, **records: VModelRecord | bytes | None) -> None:
    """Tell of changes, as the watch of the store does."""
    mirror = vmodels.mirror
    for name, record in records.items():
        revision = mirror.revision + 1
        if record is None:
            mirror.fold([Delete(mirror.key(name), revision)])
        else:
            value = record if isinstance(record, bytes) else record.encode()
            mirror.fold([Put(Item(mirror.key(name), value, revision))])


async def stored(cluster: Cluster, **records: ModelRecord | None) -> None:
    """Store records behind everybody's back, and wait until "a" has heard of them."""
    mirror = cluster["a"].node.parts.registry.mirror
    for name, record in records.items():
        value = None if record is None else record.encode()
        cluster.server.transact([Write(f"{PREFIX}/registry/{name}", value, if_revision=None)])
        await until(partial(_is_stored, mirror, name, value))
    await cluster.settle()


def _is_stored(mirror: Mirror, name: str, value: bytes | None) -> bool:
    return (mirror.get(name) is None) == (value is None)


def vmodel(active: str, target: str = "", *, owner: str = "", failed: bool = False) -> VModelRecord:
    return VModelRecord(ModelId(active), ModelId(target or active), owner, failed)


def ids(entries: Sequence[ListedModel]) -> list[str]:
    return [entry.model_id for entry in entries]


async def test_a_model_is_told_with_all_that_a_table_shows() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "b")
        record = cluster.record("m")
        assert record is not None
        used = record.used(cluster["a"].clock.now_ms() + 5)
        failed = used.with_failure(A, cluster["a"].clock.now_ms(), "out of memory")
        referred = ModelRecord(**{**_fields(failed), "references": 2})
        await stored(cluster, m=referred)
        vmodels = no_vmodels()
        told(vmodels, v1=vmodel("m"), v2=vmodel("other", "m"))
        (entry,) = (await listing_at(cluster, vmodels).models(PageRequest())).entries
        state = record.copy_state(B)
        assert state is not None
        assert (entry.model_id, entry.model_type, entry.path) == ("m", INFO.model_type, INFO.path)
        assert (entry.status.status, entry.status.errors) == ("LOADED", ("out of memory",))
        copies = {copy.instance_id: copy.status for copy in entry.status.copies}
        assert copies == {A: "LOADING_FAILED", B: "LOADED"}
        assert entry.last_used_ms == used.last_used_ms
        assert entry.size_bytes == state.size_units * 8192 > 0
        assert (entry.references, entry.vmodel_ids) == (2, ("v1", "v2"))


async def test_a_page_of_models_that_many_vmodels_name_is_no_larger_than_others() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        models = [f"m{number}" for number in range(10)]
        await stored(cluster, **{name: ModelRecord(INFO, references=100) for name in models})
        vmodels = no_vmodels()
        for name in models:
            told(vmodels, **{f"{name}-{n}".ljust(4096, "x"): vmodel(name) for n in range(100)})
        listing, after, counts = listing_at(cluster, vmodels), "", []
        while not counts or after:
            page = await listing.models(PageRequest(after=after))
            counts.append(len(page.entries))
            after = page.next_after
        assert counts == [2] * 5, "400 KiB each, and 1 MiB a page"


def _fields(record: ModelRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in ModelRecord.__dataclass_fields__}


async def test_no_store_and_no_peer_is_asked() -> None:
    """Not even about a copy on its way, about which a status call would ask."""
    async with running_cluster("a", "b", plan=FAST) as cluster:
        cluster["b"].runtime.plan("m", load_s=3600)
        await cluster["a"].register("m")
        call = Call(M, hop=Hop.LOAD_LOCAL, hops_left=0)
        await cluster["b"].node.models.ensure_loaded(EnsureRequest(M, sync=False), call)
        await until(lambda: M in cluster["a"].node.parts.registry.held_by(B))
        asked = Asked(cluster)
        cluster["a"].store.set_fault(Fault.REFUSED)
        (entry,) = (await listing_at(cluster).models(PageRequest())).entries
        copies = [(copy.instance_id, copy.status) for copy in entry.status.copies]
        assert (entry.status.status, copies) == ("LOADING", [(B, "LOADING")])
        assert asked.names == []
        cluster["a"].store.set_fault(None)


async def test_pages_follow_the_ids_to_the_end() -> None:
    async with running_cluster("a") as cluster:
        await stored(cluster, **{f"m{n:02}": ModelRecord(INFO) for n in range(25)})
        pages = listing_at(cluster)
        after, told, sizes = "", [], []
        while True:
            page = await pages.models(PageRequest(size=10, after=after))
            told += ids(page.entries)
            sizes.append(len(page.entries))
            if not page.next_after:
                break
            after = page.next_after
        assert told == [f"m{n:02}" for n in range(25)]
        assert sizes == [10, 10, 5]
        page = await pages.models(PageRequest(size=25))
        assert page.next_after == "", "nothing follows a page that happens to be full"


async def test_a_place_holds_when_its_model_goes_and_others_come() -> None:
    async with running_cluster("a") as cluster:
        await stored(cluster, **{name: ModelRecord(INFO) for name in ("ma", "mc", "md", "me")})
        pages = listing_at(cluster)
        first = await pages.models(PageRequest(size=2))
        assert ids(first.entries) == ["ma", "mc"]
        await stored(cluster, mc=None, mb=ModelRecord(INFO), mcc=ModelRecord(INFO))
        second = await pages.models(PageRequest(size=2, after=first.next_after))
        assert ids(second.entries) == ["mcc", "md"]


async def test_filters() -> None:
    async with running_cluster("a") as cluster:
        other = ModelRecord(ModelInfo("other"))
        failed = ModelRecord(INFO).with_failure(A, cluster["a"].clock.now_ms(), "broken")
        await stored(cluster, m1=ModelRecord(INFO), m2=other, n1=other, n2=failed)
        pages = listing_at(cluster)
        assert ids((await pages.models(PageRequest(prefix="m"))).entries) == ["m1", "m2"]
        assert ids((await pages.models(PageRequest(), model_type="other")).entries) == ["m2", "n1"]
        found = await pages.models(PageRequest(), status="LOADING_FAILED")
        assert ids(found.entries) == ["n2"]
        found = await pages.models(PageRequest(prefix="n"), model_type="other", status="NOT_LOADED")
        assert ids(found.entries) == ["n1"]


@pytest.mark.usefixtures("no_transitions")
async def test_vmodels_and_their_filters() -> None:
    async with running_cluster("a") as cluster:
        vmodels = no_vmodels()
        told(
            vmodels,
            v1=vmodel("m1", owner="ksp"),
            v2=vmodel("m1", "m2", owner="isvc"),
            v3=vmodel("m1", "m2", failed=True),
        )
        pages = listing_at(cluster, vmodels)
        page = await pages.vmodels(PageRequest())
        assert [(e.vmodel_id, e.owner, e.active_model_id, e.target_model_id, e.status)
                for e in page.entries] == [
            ("v1", "ksp", "m1", "m1", "DEFINED"),
            ("v2", "isvc", "m1", "m2", "TRANSITIONING"),
            ("v3", "", "m1", "m2", "TRANSITION_FAILED"),
        ]  # fmt: skip
        assert [e.vmodel_id for e in (await pages.vmodels(PageRequest(), owner="ksp")).entries] == [
            "v1"
        ]
        blocked = await pages.vmodels(PageRequest(), status="TRANSITION_FAILED")
        assert [e.vmodel_id for e in blocked.entries] == ["v3"]


async def test_a_search_ends_after_so_many_records_and_goes_on_with_the_next_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listing, "PAGE_LOOKED_AT_MAX", 10)
    monkeypatch.setattr(listing, "IN_A_ROW", 5)
    async with running_cluster("a") as cluster:
        wanted = ModelRecord(ModelInfo("wanted"))
        await stored(cluster, **{f"m{n:02}": ModelRecord(INFO) for n in range(24)}, m24=wanted)
        pages = listing_at(cluster)
        first = await pages.models(PageRequest(), model_type="wanted")
        assert (first.entries, first.next_after) == ((), "m09")
        second = await pages.models(PageRequest(after="m09"), model_type="wanted")
        third = await pages.models(PageRequest(after=second.next_after), model_type="wanted")
        assert (ids(third.entries), third.next_after) == (["m24"], "")


async def test_a_page_is_bounded_in_bytes() -> None:
    async with running_cluster("a") as cluster:
        large = ModelRecord(ModelInfo("t", "x" * 400_000))
        await stored(cluster, m1=large, m2=large, m3=large, m4=large)
        pages = listing_at(cluster)
        first = await pages.models(PageRequest())
        assert (ids(first.entries), first.next_after) == (["m1", "m2"], "m2")
        second = await pages.models(PageRequest(after="m2"))
        assert (ids(second.entries), second.next_after) == (["m3", "m4"], "")


async def test_others_have_turns_while_a_page_is_made() -> None:
    async with running_cluster("a") as cluster:
        await stored(cluster, **{f"m{n:03}": ModelRecord(INFO) for n in range(300)})
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        async with anyio.create_task_group() as group:
            group.start_soon(count)
            page = await listing_at(cluster).models(PageRequest(size=300))
            group.cancel_scope.cancel()
        assert len(page.entries) == 300
        assert turns >= 3


async def test_who_lists_too_much_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "WAITING_MAX", 2)
    async with running_cluster("a") as cluster:
        await stored(cluster, **{f"m{n:03}": ModelRecord(INFO) for n in range(120)})
        pages = listing_at(cluster)
        refused: list[LimitError] = []

        async def look() -> None:
            try:
                await pages.models(PageRequest(size=1000))
            except LimitError as exc:
                refused.append(exc)

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(look)
        assert len(refused) == 2
        with pytest.raises(InvalidRequestError, match="page_size is -1"):
            await pages.models(PageRequest(size=-1))


async def test_an_unreadable_record_is_left_out() -> None:
    async with running_cluster("a") as cluster:
        cluster.server.transact([Write(f"{PREFIX}/registry/m1", b"[]", if_revision=None)])
        await stored(cluster, m2=ModelRecord(INFO))
        vmodels = no_vmodels()
        told(vmodels, v1=b"[]", v2=vmodel("m2"))
        pages = listing_at(cluster, vmodels)
        assert ids((await pages.models(PageRequest())).entries) == ["m2"]
        assert [e.vmodel_id for e in (await pages.vmodels(PageRequest())).entries] == ["v2"]


@pytest.mark.usefixtures("no_transitions")
async def test_who_refers_to_a_model_is_followed() -> None:
    referred = ModelRecord(INFO, references=1)
    async with running_cluster("a") as cluster:
        await stored(cluster, m1=referred, m2=referred)
        vmodels = no_vmodels()
        told(vmodels, v1=vmodel("m1"))
        pages = listing_at(cluster, vmodels)
        told(vmodels, v2=vmodel("m1", "m2"))
        assert pages.model(ModelId("m1")).vmodel_ids == ("v1", "v2")
        assert pages.model(ModelId("m2")).vmodel_ids == ("v2",)
        told(vmodels, v1=None, v2=vmodel("m2"))
        assert pages.model(ModelId("m1")).vmodel_ids == ()
        assert pages.model(ModelId("m2")).vmodel_ids == ("v2",)
        assert pages.model(ModelId("gone")).status.status == "NOT_FOUND"


async def test_copies_of_an_instance_that_is_gone_are_unknown() -> None:
    gone = InstanceId("gone")
    async with running_cluster("a") as cluster:
        cluster.server.transact(
            [Write(f"{PREFIX}/instances/{gone}", InstanceRecord().encode(), if_revision=None)]
        )
        cluster.server.transact([Write(f"{PREFIX}/instances/{gone}", None, if_revision=None)])
        ready = ModelRecord(INFO).with_copy(gone, 1, 1).with_copy_state(gone, CopyStage.READY, 1)
        await stored(cluster, m=ready)
        entry = listing_at(cluster).model(ModelId("m"))
        assert entry.status.status == "NOT_LOADED"

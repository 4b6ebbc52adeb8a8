"""Grouped writes and what etcd refuses, against a real etcd."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator

import anyio
import pytest

from mm.edge import etcd_grouping
from mm.edge.embedded_etcd import embedded_etcd
from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.etcd_txn import OPS_MAX
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Put, Write, WriteResult
from mm.testing.losing_proxy import losing_proxy

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]


@pytest.fixture
async def store(shared_etcd: EtcdProcess) -> AsyncIterator[EtcdStore]:
    target = EtcdTarget((shared_etcd.endpoint,), root_prefix=uuid.uuid4().hex)
    async with EtcdStore(target) as store:
        yield store


async def _write_all(store: EtcdStore, writes: list[Write]) -> list[WriteResult]:
    results: dict[int, WriteResult] = {}

    async def write(number: int) -> None:
        results[number] = await store.write(writes[number])

    async with anyio.create_task_group() as tg:
        for number in range(len(writes)):
            tg.start_soon(write, number)
    return [results[number] for number in range(len(writes))]


async def test_concurrent_writes_share_transactions(store: EtcdStore) -> None:
    writes = [Write(f"/t/{i:04}", b"v", 0) for i in range(300)]

    results = await _write_all(store, writes)

    revisions = [result.item.mod_revision for result in results if result.item]
    assert len(revisions) == 300
    groups = len(set(revisions))
    # Two groups leave at once with one write each; the others wait for them and fill theirs.
    assert groups <= 2 + -(-298 // etcd_grouping.GROUP_WRITES_MAX)
    assert max(revisions) - min(revisions) == groups - 1


async def test_ungrouped_writes_do_not(shared_etcd: EtcdProcess) -> None:
    target = EtcdTarget((shared_etcd.endpoint,), root_prefix=uuid.uuid4().hex)
    async with EtcdStore(target, group_writes=False) as store:
        results = await _write_all(store, [Write(f"/t/{i}", b"v", 0) for i in range(50)])
    assert len({result.item.mod_revision for result in results if result.item}) == 50


async def test_all_kinds_of_writes_fill_a_group_to_the_brim(store: EtcdStore) -> None:
    """Each takes two operations at most; etcd counts those on top of the group's own."""
    first = await _write_all(store, [Write(f"/t/{i:03}", b"1", 0) for i in range(200)])
    writes = []
    for i, result in enumerate(first):
        assert result.item is not None
        revision = result.item.mod_revision if i % 2 else 1
        writes.append(Write(f"/t/{i:03}", b"2" if i % 3 else None, revision))

    second = await _write_all(store, writes)

    table = {item.key: item for item in (await store.list("/t/")).items}
    for i, result in enumerate(second):
        key = f"/t/{i:03}"
        assert result.succeeded == bool(i % 2)
        assert result.item == table.get(key)
        if result.succeeded:
            assert (key in table) == bool(i % 3)
        else:
            assert result.item == first[i].item


async def test_writes_to_one_key_are_made_in_the_order_they_came(store: EtcdStore) -> None:
    writes = [Write(f"/t/{i % 3}", b"%d" % i, None) for i in range(60)]
    results = await _write_all(store, writes)
    for key in range(3):
        revisions = [result.item.mod_revision for result in results[key::3] if result.item]
        assert revisions == sorted(set(revisions))
        item = await store.get(f"/t/{key}")
        assert item is not None
        assert item.value == b"%d" % (57 + key)


async def test_groups_stay_below_etcds_limit_of_bytes(store: EtcdStore) -> None:
    writes = [Write(f"/t/{i}", b"x" * 400_000, 0) for i in range(12)]
    results = await _write_all(store, [*writes, Write("/t/large", b"x" * 1_400_000, 0)])
    assert all(result.succeeded for result in results)


async def test_a_value_that_etcd_refuses_fails_alone(store: EtcdStore) -> None:
    failed = []

    async def write_large() -> None:
        with pytest.raises(StoreUnavailableError, match="too large"):
            await store.write(Write("/t/large", b"x" * 2_000_000, 0))
        failed.append(True)

    async with anyio.create_task_group() as tg:
        tg.start_soon(write_large)
        results = await _write_all(store, [Write(f"/t/{i}", b"v", 0) for i in range(200)])
    assert failed
    assert all(result.succeeded for result in results)


async def test_a_lost_lease_fails_alone(store: EtcdStore) -> None:
    failed = []

    async def write_leased() -> None:
        with pytest.raises(StoreUnavailableError, match="lease is lost"):
            await store.write(Write("/t/leased", b"", None, lease_id=12345))
        failed.append(True)

    async with anyio.create_task_group() as tg:
        tg.start_soon(write_leased)
        results = await _write_all(store, [Write(f"/t/{i}", b"v", 0) for i in range(50)])
    assert failed
    assert all(result.succeeded for result in results)


async def test_an_error_of_a_group_is_everybodys(shared_etcd: EtcdProcess) -> None:
    endpoint = shared_etcd.endpoint
    async with losing_proxy(endpoint.host, endpoint.port) as proxy:
        target = EtcdTarget((Endpoint(proxy.host, proxy.port),), root_prefix=uuid.uuid4().hex)
        async with EtcdStore(target, timeout_s=1.5) as store:
            await store.check()
            proxy.lose()
            errors = []

            async def write(number: int) -> None:
                with pytest.raises(StoreUnavailableError) as caught:
                    await store.write(Write(f"/t/{number}", b"", 0))
                errors.append(caught.value)

            async with anyio.create_task_group() as tg:
                for number in range(40):
                    tg.start_soon(write, number)
    assert len(set(map(id, errors))) == 40, "each caller has an error of its own"


async def test_a_write_given_up_before_it_was_sent_is_not_sent(shared_etcd: EtcdProcess) -> None:
    endpoint = shared_etcd.endpoint
    async with losing_proxy(endpoint.host, endpoint.port) as proxy:
        target = EtcdTarget((Endpoint(proxy.host, proxy.port),), root_prefix=uuid.uuid4().hex)
        async with EtcdStore(target, timeout_s=60) as store:
            await store.check()
            proxy.lose()
            async with anyio.create_task_group() as tg, store.watch("/t/") as batches:
                for number in range(etcd_grouping.GROUPS_IN_FLIGHT_MAX):
                    tg.start_soon(store.write, Write(f"/t/{number}", b"", 0))
                await anyio.wait_all_tasks_blocked()
                with anyio.move_on_after(0.1) as scope:
                    await store.write(Write("/t/given-up", b"", 0))
                assert scope.cancelled_caught
                await proxy.restore()
                last = await store.write(Write("/t/last", b"", 0))
                assert last.item is not None
                seen = []
                with anyio.fail_after(60):
                    while Put(last.item) not in seen and last.item not in seen:
                        for event in await anext(batches):
                            seen += [event] if isinstance(event, Put) else list(event.items)
            keys = {item.key for item in (await store.list("/t/")).items}
            assert keys == {"/t/0", "/t/1", "/t/last"}


async def test_a_full_etcd_says_so() -> None:
    # Quota is checked against pages of the file, so it takes some writing to reach it.
    async with embedded_etcd(["--quota-backend-bytes=200000"]) as etcd, EtcdStore(etcd.target) as s:

        async def fill() -> None:
            for i in range(100):
                await s.write(Write(f"/t/{i}", b"x" * 50_000, 0))

        async def wait_alarm() -> None:
            # Until etcd has raised it, small writes may still find room.
            with anyio.fail_after(60):
                for i in itertools.count():
                    await s.write(Write(f"/v/{i}", b"", 0))

        with pytest.raises(StoreUnavailableError, match=r"etcd at .*: etcd is out of space"):
            await fill()
        with pytest.raises(StoreUnavailableError, match="out of space"):
            await wait_alarm()
        await s.check()
        assert s.connected
        results = []

        async def write(number: int) -> None:
            with pytest.raises(StoreUnavailableError, match="out of space"):
                await s.write(Write(f"/u/{number}", b"", 0))
            results.append(number)

        async with anyio.create_task_group() as tg:
            for number in range(10):
                tg.start_soon(write, number)
        assert len(results) == 10


async def test_a_transaction_of_too_many_writes_is_a_bug(store: EtcdStore) -> None:
    succeeded, _ = await store.transact([Write(f"/t/{i}", b"", None) for i in range(OPS_MAX // 2)])
    assert succeeded
    with pytest.raises(ValueError, match="130 operations in one transaction"):
        await store.transact([Write(f"/t/{i}", b"", None) for i in range(OPS_MAX // 2 + 1)])

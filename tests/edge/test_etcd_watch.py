"""Watches of a real etcd across everything that can happen to it (design section 6)."""

from __future__ import annotations

import logging
import uuid

import aetcd.rpc
import anyio
import pytest

from mm.edge import etcd_watch
from mm.edge.embedded_etcd import embedded_etcd
from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Delete, Item, Put, Write
from mm.testing.losing_proxy import LosingProxy, losing_proxy
from tests.edge.store_world import assert_quiet, put, resync, until, wait_answers

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]


async def _put(store: EtcdStore, key: str, value: bytes = b"1") -> Item:
    await wait_answers(store)
    return await put(store, key, value)


async def _compact(etcd: EtcdProcess, revision: int) -> None:
    channel = aetcd.rpc.insecure_channel(str(etcd.endpoint))
    request = aetcd.rpc.CompactionRequest(revision=revision, physical=True)
    await aetcd.rpc.KVStub(channel).Compact(request)
    await channel.close()


def _through(proxy: LosingProxy, root_prefix: str, silence_s: float = 10.0) -> EtcdStore:
    target = EtcdTarget((Endpoint(proxy.host, proxy.port),), root_prefix=root_prefix)
    return EtcdStore(target, timeout_s=2.0, silence_s=silence_s)


async def test_etcd_away_for_three_seconds() -> None:
    async with (
        embedded_etcd() as etcd,
        EtcdStore(etcd.target) as store,
        store.watch("/t/") as batches,
        store.session(60) as session,
    ):
        await resync(batches)
        lease_id = session.lease_id
        first = await _put(store, "/t/a", b"1")
        seen = await until(batches, Put(first))

        away_until_s = anyio.current_time() + 3
        await etcd.stop()
        failures = 0
        while anyio.current_time() < away_until_s:
            start_s = anyio.current_time()
            with pytest.raises(StoreUnavailableError, match=r"etcd at 127\.0\.0\.1:\d+: "):
                await store.write(Write("/t/b", b"", None))
            assert anyio.current_time() - start_s < 2, "writes fail long before their limit"
            failures += 1
            with anyio.move_on_after(0.05) as pause:
                await session.wait_change(lease_id)
            assert pause.cancelled_caught, "a lease is not lost by not being heard of"
        assert failures > 2
        assert not store.connected
        await etcd.start()

        second = await _put(store, "/t/a", b"2")
        seen += await until(batches, Put(second))
        assert seen == [Put(first), Put(second)], "nothing missed, nothing told twice"
        assert session.lease_id == lease_id
        assert store.connected


async def test_history_compacted_while_away_meansresync(shared_etcd: EtcdProcess) -> None:
    root_prefix = uuid.uuid4().hex
    endpoint = shared_etcd.endpoint
    async with (
        losing_proxy(endpoint.host, endpoint.port) as proxy,
        _through(proxy, root_prefix) as store,
        EtcdStore(EtcdTarget((endpoint,), root_prefix=root_prefix)) as other,
        store.watch("/t/") as batches,
    ):
        await resync(batches)
        await until(batches, Put(await _put(other, "/t/gone")))
        await proxy.cut()
        await other.write(Write("/t/gone", None, None))
        kept = await _put(other, "/t/kept")
        await _compact(shared_etcd, kept.mod_revision)
        await proxy.restore()

        table = await resync(batches)
        assert list(table.items) == [kept]
        assert table.revision >= kept.mod_revision
        after = await _put(other, "/t/after")
        assert await until(batches, Put(after)) == [Put(after)]


async def test_an_emptied_etcd_meansresync() -> None:
    async with (
        embedded_etcd() as etcd,
        EtcdStore(etcd.target) as store,
        store.watch("/t/") as batches,
    ):
        for i in range(20):
            await _put(store, f"/t/{i}")
        with anyio.fail_after(60):
            while not any(
                isinstance(e, Put) and e.item.key == "/t/19" for e in await anext(batches)
            ):
                pass
        await etcd.stop()
        await etcd.wipe()
        await etcd.start()

        table = await resync(batches)
        assert list(table.items) == []
        new = await _put(store, "/t/new")
        assert new.mod_revision < 20
        assert await until(batches, Put(new)) == [Put(new)]


@pytest.mark.parametrize("how", ["pause", "lose"])
async def test_silence_leads_to_a_new_connection(how: str) -> None:
    async with (
        embedded_etcd() as etcd,
        losing_proxy(etcd.endpoint.host, etcd.endpoint.port) as proxy,
        _through(proxy, "", silence_s=0.5) as store,
        store.watch("/t/") as batches,
    ):
        await resync(batches)
        assert proxy.accepted_count == 1
        if how == "pause":
            etcd.pause()
        else:
            proxy.lose()
        with anyio.fail_after(60):
            await proxy.wait_accepted(2)
        assert not store.connected
        if how == "pause":
            etcd.resume()
        else:
            await proxy.restore()
        item = await _put(store, "/t/a")
        assert await until(batches, Put(item)) == [Put(item)]


async def test_a_quiet_table_is_no_silence(
    shared_etcd: EtcdProcess, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = shared_etcd.endpoint
    root_prefix = uuid.uuid4().hex
    async with (
        losing_proxy(endpoint.host, endpoint.port) as proxy,
        _through(proxy, root_prefix, silence_s=1.5) as store,
        store.watch("/t/") as batches,
    ):
        await resync(batches)
        with caplog.at_level(logging.INFO):
            await assert_quiet(batches, 3.0)
        assert store.connected
        assert proxy.accepted_count == 1
        assert "interrupted" not in caplog.text


async def test_a_slow_consumer_holds_the_stream_back_and_loses_nothing(
    shared_etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_watch, "EVENTS_MAX", 100)
    waiting: list[int] = []
    digest = etcd_watch.EtcdWatch._digest

    def noted(self: etcd_watch.EtcdWatch, response: object) -> None:
        waiting.append(len(self._events))
        digest(self, response)

    monkeypatch.setattr(etcd_watch.EtcdWatch, "_digest", noted)
    root_prefix = uuid.uuid4().hex
    target = EtcdTarget((shared_etcd.endpoint,), root_prefix=root_prefix)
    async with EtcdStore(target, silence_s=1.0) as store, store.watch("/t/") as batches:
        await resync(batches)
        for start in range(0, 2000, 50):
            await store.transact([Write(f"/t/{start + i:04}", b"", 0) for i in range(50)])
        # Longer than the silence that is allowed: it is ours, not etcd's.
        async with store.watch("/quiet/") as quiet:
            await resync(quiet)
            await assert_quiet(quiet, 1.5)
        last = await _put(store, "/t/last")
        events = await until(batches, Put(last))
    assert max(waiting) < 100, "nothing more is read while so much waits"
    keys = [event.item.key for event in events if isinstance(event, Put)]
    assert keys == [*(f"/t/{i:04}" for i in range(2000)), "/t/last"]


async def test_resuming_within_a_transaction_tells_the_rest_of_it_only(
    shared_etcd: EtcdProcess,
) -> None:
    """Goal: the position is a revision and the keys told at it. Method: cut one in half."""
    target = EtcdTarget((shared_etcd.endpoint,), root_prefix=uuid.uuid4().hex)
    rpc = aetcd.rpc

    def told(key: bytes, revision: int) -> object:
        kv = rpc.KeyValue(key=target.root_prefix.encode() + key, mod_revision=revision)
        return rpc.Event(kv=kv)

    async with EtcdStore(target) as store, store.watch("/t/") as batches:
        assert isinstance(batches, etcd_watch.EtcdWatch)
        revision = (await resync(batches)).revision + 1000
        batches._digest(rpc.WatchResponse(events=[told(b"/t/a", revision)]))
        batches._digest(
            rpc.WatchResponse(
                events=[
                    told(b"/t/a", revision),
                    told(b"/t/b", revision),
                    told(b"/t/a", revision + 1),
                ]
            )
        )
        events = await anext(batches)
    assert [(e.item.key, e.item.mod_revision) for e in events if isinstance(e, Put)] == [
        ("/t/a", revision),
        ("/t/b", revision),
        ("/t/a", revision + 1),
    ]


async def test_an_event_storm_beyond_grpcs_default_limit(shared_etcd: EtcdProcess) -> None:
    root_prefix = uuid.uuid4().hex
    endpoint = shared_etcd.endpoint
    async with (
        losing_proxy(endpoint.host, endpoint.port) as proxy,
        _through(proxy, root_prefix) as store,
        EtcdStore(EtcdTarget((endpoint,), root_prefix=root_prefix)) as other,
        store.watch("/t/") as batches,
    ):
        await resync(batches)
        before = await _put(other, "/t/before")  # of an empty table nothing need be resumed
        assert await until(batches, Put(before)) == [Put(before)]
        await proxy.cut()
        items = [await _put(other, f"/t/{i}", b"x" * 500_000) for i in range(12)]
        await other.write(Write("/t/0", None, None))
        await proxy.restore()
        expected = [*map(Put, items), Delete("/t/0", items[-1].mod_revision + 1)]
        assert await until(batches, expected[-1]) == expected

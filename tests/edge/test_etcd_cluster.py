"""A real cluster of three etcd members: the leader goes, a majority goes, and they come back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import aetcd.rpc
import pytest

from mm.edge.etcd_process import EtcdProcess, find_binary
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import EtcdTarget
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Item, Put, Write
from tests.edge.store_world import resync, until, wait_answers

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

_COUNT = 3


class _Cluster:
    """Members that block run in threads that live as long as the cluster."""

    def __init__(self, members: list[EtcdProcess], threads: ThreadPoolExecutor) -> None:
        self.members = members
        self._threads = threads

    async def start(self, *members: EtcdProcess) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._threads, m.start) for m in members))

    async def stop(self, *members: EtcdProcess) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._threads, m.kill) for m in members))

    async def leader(self) -> EtcdProcess:
        for member in self.members:
            channel = aetcd.rpc.insecure_channel(str(member.endpoint))
            status = await aetcd.rpc.MaintenanceStub(channel).Status(aetcd.rpc.StatusRequest())
            await channel.close()
            if status.leader == status.header.member_id:
                return member
        raise AssertionError("there is no leader")

    def store(self, timeout_s: float) -> EtcdStore:
        target = EtcdTarget(tuple(member.endpoint for member in self.members))
        return EtcdStore(target, timeout_s=timeout_s)


def _free_ports() -> list[int]:
    """Ports for the members to know each other by, before they start.

    Not from the range out of which the kernel gives ports to others meanwhile.
    """
    ports = []
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as holder, contextlib.suppress(OSError):
            holder.bind(("127.0.0.1", port))
            ports.append(port)
    return ports[:_COUNT]


@pytest.fixture
def cluster() -> Iterator[_Cluster]:
    urls = [f"http://127.0.0.1:{port}" for port in _free_ports()]
    initial = ",".join(f"m{number}={url}" for number, url in enumerate(urls))
    with ExitStack() as stack:
        members = []
        for number, url in enumerate(urls):
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="mm-test-etcd-"))
            # Of a flag that is given twice the last one counts.
            flags = [
                f"--name=m{number}",
                f"--listen-peer-urls={url}",
                f"--initial-advertise-peer-urls={url}",
                f"--initial-cluster={initial}",
            ]
            members.append(EtcdProcess(find_binary(), Path(directory), flags))
            stack.callback(members[-1].kill)
        threads = stack.enter_context(ThreadPoolExecutor(_COUNT))
        list(threads.map(EtcdProcess.start, members))  # none is ready before most of them are
        yield _Cluster(members, threads)


async def _create(store: EtcdStore, key: str) -> Item:
    result = await store.write(Write(key, b"", 0))
    assert result.succeeded
    assert result.item is not None
    return result.item


async def test_a_cluster_loses_its_leader_then_its_majority(cluster: _Cluster) -> None:
    # An election takes a second, or more where the members have to wait for a processor.
    async with cluster.store(30) as store:
        async with store.watch("/t/") as batches, store.session(60) as session:
            lease_id = session.lease_id
            await resync(batches)
            first = await _create(store, "/t/first")
            # A watch that has heard of nothing yet would begin anew, with the whole table.
            assert await until(batches, Put(first)) == [Put(first)]

            leader = await cluster.leader()
            await cluster.stop(leader)
            second = await _create(store, "/t/second")  # no error: the election is waited for
            assert await until(batches, Put(second)) == [Put(second)]

            other = next(member for member in cluster.members if member.pid)
            await cluster.stop(other)
            async with cluster.store(2) as hasty:
                with pytest.raises(StoreUnavailableError, match=r"leader|no answer"):
                    await hasty.write(Write("/t/lost", b"", 0))
                with pytest.raises(StoreUnavailableError):
                    await hasty.check()

            await cluster.start(leader)
            await wait_answers(store)
            third = await _create(store, "/t/third")
            events = await until(batches, Put(third))
            # The write that failed may have been made after all; nothing is told twice.
            assert {e.item.key for e in events if isinstance(e, Put)} <= {"/t/lost", "/t/third"}
            assert session.lease_id == lease_id

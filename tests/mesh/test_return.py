"""Many instances that lost the store together come back without a storm."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import anyio
import pytest

from mm.core.jitter import jittered_s
from mm.edge.etcd_session import RETRY_S
from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault
from mm.mesh.ports import Item, Part
from mm.testing.cluster import PREFIX, Instance, running_cluster

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

#: What each tells, each hears: a hundred take four times as long.
INSTANCES_COUNT = 50
#: Leases are lost in that time.
OUTAGE_S = 22.0
BACK_S = 3.0
WINDOW_S = 0.1
#: A record and a candidature of each, in somewhat more than 1.5 pauses of the session.
TOGETHER_MAX = INSTANCES_COUNT


class TimingServer(MemoryServer):
    """Notes when it was asked to write what."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[float, str]] = []

    def transact(self, parts: Sequence[Part]) -> tuple[bool, list[Item | None]]:
        now_s = anyio.current_time()
        self.asked += [(now_s, part.key) for part in parts]
        return super().transact(parts)


async def come_back(instance: Instance, is_back: anyio.Event) -> None:
    """Reach the store as a session does, try by try (``edge.etcd_session``)."""
    rng = random.Random(f"session of {instance.name}")
    at_s = anyio.current_time()
    await is_back.wait()
    while at_s < anyio.current_time():
        at_s += jittered_s(RETRY_S, rng)
    await anyio.sleep_until(at_s)
    instance.store.set_fault(None)


async def test_many_instances_come_back_without_a_storm() -> None:
    async with running_cluster() as cluster, anyio.create_task_group() as group:
        server = cluster.server = TimingServer()
        async with anyio.create_task_group() as starting:
            for number in range(INSTANCES_COUNT):
                starting.start_soon(
                    lambda name: cluster.start(name, is_known_by_all=False), f"i{number:02}"
                )
        await anyio.sleep(2.5)
        for each in cluster.serving:
            each.store.set_fault(Fault.REFUSED)
        is_back = anyio.Event()
        for each in cluster.serving:
            group.start_soon(come_back, each, is_back)
        await anyio.sleep(OUTAGE_S)
        server.asked.clear()
        is_back.set()
        await anyio.sleep(BACK_S)
        assert len(server.table(f"{PREFIX}/instances/").items) == INSTANCES_COUNT
        asked = list(server.asked)
        group.cancel_scope.cancel()

    written = Counter(key for _, key in asked)
    assert max(written.values()) == 1, "each record once"
    assert written.total() == 2 * INSTANCES_COUNT
    times_s = [at_s for at_s, _ in asked]
    assert max(sum(t <= each < t + WINDOW_S for each in times_s) for t in times_s) <= TOGETHER_MAX

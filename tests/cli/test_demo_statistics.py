"""What instances say of themselves, folded over restarts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import anyio
import anyio.lowlevel
import pytest
from grpclib.client import Channel
from grpclib.protocol import H2Protocol
from grpclib.server import Server

from mm.core.ids import UNIT_BYTES
from mm.demo.cluster import Instance
from mm.demo.lost_connections import told_as_errors
from mm.demo.statistics import Counts, InstanceHistory, Reading, Statistics, hit_ratio
from mm.pb.mm.peer import InstanceStatistics


def history() -> InstanceHistory:
    return InstanceHistory("a", Reading("a"))


def test_gauges_and_rates() -> None:
    a = history()
    a.fold(InstanceStatistics(uptime_ms=1, calls=10, capacity_units=100, used_units=40), 5.0)
    assert a.reading.calls_per_s == 0.0
    a.fold(
        InstanceStatistics(
            uptime_ms=2, calls=30, capacity_units=100, used_units=60, models_loaded=3
        ),
        7.0,
    )
    reading = a.reading
    assert (reading.is_up, reading.models_loaded) == (True, 3)
    assert reading.calls_per_s == 10.0
    assert reading.used_bytes == 60 * UNIT_BYTES
    assert reading.free_bytes == 40 * UNIT_BYTES


@pytest.mark.anyio
async def test_a_connection_that_is_lost_before_the_call_is_no_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever is killed just then is down; that is all there is to it."""
    connect = Channel.__connect__

    async def lose(self: Channel) -> H2Protocol:
        protocol = await connect(self)
        protocol.processor.connection.close()
        return protocol

    monkeypatch.setattr(Channel, "__connect__", lose)
    server = Server([])
    await server.start("127.0.0.1", 0)
    try:
        assert server._server is not None
        port = server._server.sockets[0].getsockname()[1]
        statistics = Statistics([cast(Instance, SimpleNamespace(name="a", peer_port=port))])
        await statistics.poll()
    finally:
        server.close()
        await server.wait_closed()
    assert not statistics.readings[0].is_up


def test_other_mistakes_are_told_as_they_are() -> None:
    with pytest.raises(AttributeError, match="nonsense"), told_as_errors():
        SimpleNamespace().nonsense  # noqa: B018


@pytest.mark.anyio
async def test_an_answer_is_not_overtaken_by_that_of_another_poll(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The older of two answers would look as if the process had been started again."""
    asking, asking_max = 0, 0

    async def ask(self: Statistics, instance: Instance) -> None:
        nonlocal asking, asking_max
        asking += 1
        asking_max = max(asking, asking_max)
        await anyio.lowlevel.checkpoint()
        asking -= 1

    monkeypatch.setattr(Statistics, "_ask", ask)
    statistics = Statistics([cast(Instance, SimpleNamespace(name="a"))])
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(statistics.poll)
    assert asking_max == 1


def test_counters_go_on_when_a_process_is_started_again() -> None:
    a = history()
    a.fold(InstanceStatistics(uptime_ms=1000, evictions=5, hits=3, misses=1), 1.0)
    a.lose()
    assert not a.reading.is_up
    assert a.reading.counts.evictions == 5
    a.fold(InstanceStatistics(uptime_ms=10, evictions=2), 2.0)
    a.fold(InstanceStatistics(uptime_ms=20, evictions=4), 3.0)
    assert a.reading.counts == Counts(evictions=9, hits=3, misses=1)
    a.fold(InstanceStatistics(uptime_ms=5, evictions=1), 4.0)
    assert a.reading.counts.evictions == 10


def test_the_rate_after_a_restart_is_not_negative() -> None:
    a = history()
    a.fold(InstanceStatistics(uptime_ms=1000, calls=500), 1.0)
    a.fold(InstanceStatistics(uptime_ms=10, calls=20), 2.0)
    assert a.reading.calls_per_s == 20.0


def test_hit_ratio() -> None:
    assert hit_ratio(Counts()) == 0.0
    assert hit_ratio(Counts(hits=3, misses=1)) == pytest.approx(0.75)


def test_counts_add_up() -> None:
    assert Counts(1, 2, 3, 4, 5, 6, 7) + Counts(loads=1) == Counts(2, 2, 3, 4, 5, 6, 7)

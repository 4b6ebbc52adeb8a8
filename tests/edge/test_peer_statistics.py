"""Every statistic of the mesh reaches whoever asks an instance for them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import pytest

from mm.core.cluster_statistics import ClusterStatistics
from mm.core.ids import NEVER_MS, InstanceId
from mm.edge.own_series import untold
from mm.edge.peers import PeerService
from mm.mesh.statistics import Counters, InstanceStatistics
from mm.pb.mm import peer

pytestmark = pytest.mark.anyio

TEXTS = ("instance_id", "unready_because")
FLAGS = ("store_connected", "store_out_of_space", "runtime_away")
OTHERS = (*TEXTS, *FLAGS, "partitions", "counters")


def statistics(**partitions: ClusterStatistics) -> InstanceStatistics:
    """Every number another one."""
    counters = Counters(*range(1001, 1001 + len(fields(Counters))))
    gauges: dict[str, Any] = {
        field.name: 2001 + index
        for index, field in enumerate(fields(InstanceStatistics))
        if field.name not in OTHERS
    }
    return InstanceStatistics(
        instance_id="i",
        unready_because="so",
        store_connected=True,
        store_out_of_space=True,
        runtime_away=True,
        partitions={frozenset(name.split("_")): each for name, each in partitions.items()},
        counters=counters,
        **gauges,
    )


async def told(made: InstanceStatistics) -> peer.InstanceStatistics:
    class Node:
        def statistics(self) -> InstanceStatistics:
            return made

    service = PeerService(cast(Any, Node()), InstanceId("i"))
    return await service.statistics(peer.StatisticsRequest(), cast(Any, None))


async def test_every_number_is_told_under_its_name() -> None:
    made = statistics()
    answer = await told(made)
    for whole, left_out in ((made.counters, ()), (made, OTHERS)):
        for field in fields(whole):
            name = field.name
            if name in left_out:
                continue
            if name.endswith("_s"):  # the wire has whole numbers
                told_ms = getattr(answer, name.removesuffix("_s") + "_ms")
                assert told_ms == getattr(whole, name) * 1000, name
            else:
                assert getattr(answer, name) == getattr(whole, name), name
    assert (answer.instance_id, answer.unready_because) == ("i", "so")
    assert all(getattr(answer, name) is True for name in FLAGS)


async def test_partitions_are_told_by_what_they_must_not_host() -> None:
    answer = await told(
        statistics(
            u_t=ClusterStatistics(2, 200, 180, 7, 500), v=ClusterStatistics(1, 100, 0, 0, NEVER_MS)
        )
    )
    assert answer.partitions == [
        peer.Partition(["t", "u"], 2, 200, 180, 7, 500),
        peer.Partition(["v"], 1, 100, 0, 0, 0),
    ]


def test_every_number_has_a_series() -> None:
    hint = "name it in mm/edge/own_series.py and docs/metrics.md (tests/edge/test_own_series.py)"
    assert untold() == set(), hint

"""Transitions that wait for their turn to load, of which only so many have one at a time."""

from __future__ import annotations

import anyio
import pytest

from mm.testing.cluster import running_cluster, until
from tests.mesh.test_transitions import leader, pair, set_vmodel

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_a_target_that_serves_does_not_wait_for_loads_of_others() -> None:
    """However few transitions load at a time: it needs none."""
    async with running_cluster("a", "b", transitions_at_once_max=1) as cluster:
        for name in "vwx":
            await set_vmodel(cluster["a"], "m", name, sync=True)
        for each in cluster.serving:
            each.runtime.plan("slow", load_s=80.0)
        await set_vmodel(cluster["a"], "slow", "v")
        await anyio.sleep(1)
        for name in "wx":
            await set_vmodel(cluster["a"], "quick", name)
        await anyio.sleep(1)
        assert pair(cluster, "w") == ("m", "quick", False), "it waits for its turn to load"
        await cluster["b"].load("quick")
        switched = ("quick", "quick", False)
        await until(lambda: pair(cluster, "w") == pair(cluster, "x") == switched, 1.0)
        assert pair(cluster) == ("m", "slow", False)
        await until(lambda: pair(cluster) == ("slow", "slow", False), 100.0)
        assert not leader(cluster).node.transitions._workers

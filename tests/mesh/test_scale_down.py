"""Fewer instances than before are no outage of the store: what the next one had is back soon."""

from __future__ import annotations

import anyio
import pytest

from mm.testing.cluster import running_cluster, until
from tests.mesh.calls import FAST, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@pytest.mark.parametrize("names", ["abc", "abcdef"])
@pytest.mark.parametrize("minutes", [0, 5])
async def test_after_a_scale_down_the_copies_of_a_crashed_leader_are_back_in_seconds(
    names: str, minutes: int
) -> None:
    async with running_cluster(*names, plan=FAST) as cluster:
        leads = next(i for i in cluster.serving if i.node.services.leader.is_leader)
        await loaded_at(cluster, leads.name)
        await leads.set_policy("m", copies_min=1)
        await loaded_at(cluster, leads.name, model_id="called")
        others = [each for each in cluster.serving if each is not leads]
        async with anyio.create_task_group() as group:
            for each in others[1:]:
                group.start_soon(each.stop)
        await anyio.sleep(60 * minutes)
        await leads.crash()
        # The lease runs out after 20 s, and the filler gives ten more.
        await until(lambda: "m" in others[0].runtime.loaded, 25, "what a policy asks for")
        await until(lambda: "called" in others[0].runtime.loaded, 15, "what was called lately")

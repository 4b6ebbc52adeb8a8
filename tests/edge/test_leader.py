"""The election over every kind of store, a real etcd among them (spec core 1.8)."""

from __future__ import annotations

import anyio
import pytest

from mm.core.ids import InstanceId
from mm.mesh.leader import Leader
from mm.testing.cluster import until
from tests.edge.store_world import World

pytestmark = pytest.mark.anyio

PREFIX = "/mm/s/leaderLatch/"


async def test_one_of_two_leads_and_the_other_follows(world: World) -> None:
    async with anyio.create_task_group() as group, world.other.session(10) as other_session:
        second = Leader(store=world.other, prefix=PREFIX, me=InstanceId("b"), session=other_session)
        async with world.store.session(10) as session:
            first = Leader(store=world.store, prefix=PREFIX, me=InstanceId("a"), session=session)
            async with anyio.create_task_group() as life:
                life.start_soon(first.run)
                await until(lambda: first.is_leader)
                group.start_soon(second.run)
                await until(lambda: second.leader_id == "a")
                life.cancel_scope.cancel()
        await until(lambda: second.is_leader)
        group.cancel_scope.cancel()


async def test_a_lease_that_was_revoked_costs_the_lead_and_not_the_candidature(
    world: World,
) -> None:
    async with (
        anyio.create_task_group() as group,
        world.store.session(10) as session,
        world.other.session(10) as other_session,
    ):
        first = Leader(store=world.store, prefix=PREFIX, me=InstanceId("a"), session=session)
        second = Leader(store=world.other, prefix=PREFIX, me=InstanceId("b"), session=other_session)
        group.start_soon(first.run)
        await until(lambda: first.is_leader)
        group.start_soon(second.run)
        await until(lambda: second.leader_id == "a")
        changed = first.changed
        await world.revoke(session.lease_id)
        await until(lambda: second.is_leader and first.leader_id == "b")
        assert changed.is_set()
        await second.resign()
        await until(lambda: first.is_leader and second.leader_id == "a")
        group.cancel_scope.cancel()

"""Settings in the store, over every kind of store, a real etcd among them."""

from __future__ import annotations

import anyio
import pytest

from mm.core.dynamic_settings import RPM_THRESHOLD, Value
from mm.mesh.dynamic_config import DynamicConfig
from mm.mesh.ports import Write
from mm.testing.cluster import until
from tests.edge.store_world import World, put

pytestmark = pytest.mark.anyio

PREFIX = "/mm/s/config/"


async def test_what_is_there_holds_at_once_and_what_comes_when_it_comes(world: World) -> None:
    key = PREFIX + RPM_THRESHOLD
    await put(world.other, key, b"100")
    config = DynamicConfig(world.store, PREFIX)
    told: list[Value | None] = []
    async with anyio.create_task_group() as group:
        await group.start(config.run)
        config.follow(RPM_THRESHOLD, told.append)
        assert told == [100]
        for value in (b"many", b"200", b"5", b"200", b"300"):
            await put(world.other, key, value)
        await until(lambda: told[-1] == 300)
        await world.other.write(Write(key, None, if_revision=None))
        await until(lambda: told[-1] is None)
        group.cancel_scope.cancel()
    # Of values that come together some may be passed over, but never one that is not good.
    assert set(told) <= {100, 200, 300, None}

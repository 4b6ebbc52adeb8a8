"""Copies of a model that is called a lot, while instances of the Java mesh are there."""

from __future__ import annotations

import anyio
import pytest

from mm.core.scaling import BESIDE_JAVA_MAX
from tests.mesh.calls import loaded_at
from tests.mesh.test_java_instances import mixed
from tests.mesh.test_scaler import SLOW_PACE, call, ready

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_java_never_refuses_a_model_for_want_of_a_way_to_our_copies() -> None:
    """As many as are needed are added when Java has gone."""
    async with mixed(*"abcdef", java=("j",), **SLOW_PACE) as world:
        cluster, java = world.cluster, world.java["j"]
        await loaded_at(cluster, "a")
        refused: list[int] = []

        async def look() -> None:
            while "j" in world.java:
                if java.refuses("m"):
                    refused.append(len(ready(cluster)))
                await anyio.sleep(0.5)

        async with anyio.create_task_group() as group:
            group.start_soon(look)
            await call(cluster, 8.0, 40)
            assert len(ready(cluster)) == BESIDE_JAVA_MAX
            await world.stop("j")
        assert refused == []
        await call(cluster, 8.0, 20)
        assert len(ready(cluster)) > BESIDE_JAVA_MAX

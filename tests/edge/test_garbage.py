"""Full collections wait for a quiet moment, but not for ever."""

from __future__ import annotations

import gc
import math
import weakref

import anyio
import pytest

from mm.edge.garbage import AGAIN_S, DUE_S, LOOK_S, collect_quietly

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


class Knot:
    """Something that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


def old_knot() -> weakref.ref[Knot]:
    knot = Knot()
    gc.collect(1)  # from now on only a full collection looks at it
    return weakref.ref(knot)


@pytest.mark.parametrize(
    ("quiet_from_s", "freed_s"),
    [(0.0, LOOK_S), (LOOK_S + 1, LOOK_S + AGAIN_S), (math.inf, DUE_S)],
    ids=["quiet", "soon quiet", "never quiet"],
)
async def test_what_only_a_full_collection_frees_is_freed(
    quiet_from_s: float, freed_s: float
) -> None:
    before = gc.get_threshold()
    began_s = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(collect_quietly, lambda: anyio.current_time() - began_s >= quiet_from_s)
        await anyio.sleep(LOOK_S / 2)
        assert gc.get_threshold()[2] > 1_000_000
        knot = old_knot()
        await anyio.sleep(freed_s - LOOK_S / 2 - 1)
        assert knot() is not None
        await anyio.sleep(2)
        assert knot() is None
        group.cancel_scope.cancel()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0

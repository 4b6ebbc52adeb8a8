"""Full collections wait for a quiet moment, but not for ever."""

from __future__ import annotations

import gc
import weakref

import anyio
import pytest

from mm.edge.garbage import LOOK_S, LOOKS_MAX, collect_quietly

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


class Knot:
    """Something that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


def old_knot() -> weakref.ref[Knot]:
    knot = Knot()
    gc.collect(1)  # from now on only a full collection looks at it
    return weakref.ref(knot)


@pytest.mark.parametrize(("is_quiet", "looks"), [(True, 1), (False, LOOKS_MAX)])
async def test_what_only_a_full_collection_frees_is_freed(is_quiet: bool, looks: int) -> None:
    before = gc.get_threshold()
    async with anyio.create_task_group() as group:
        group.start_soon(collect_quietly, lambda: is_quiet)
        await anyio.sleep(LOOK_S / 2)
        assert gc.get_threshold()[2] > 1_000_000
        knot = old_knot()
        await anyio.sleep(LOOK_S * (looks - 1))
        assert knot() is not None
        await anyio.sleep(LOOK_S)
        assert knot() is None
        group.cancel_scope.cancel()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0

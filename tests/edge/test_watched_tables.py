"""What a watch tells when it reads its table anew, by a store that is played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mm.edge.etcd_watch import EtcdWatch
from mm.mesh.ports import Item, Resync

pytestmark = pytest.mark.anyio

ITEM = Item("/t/a", b"1", mod_revision=7, create_revision=7)


async def test_that_the_store_is_another_one_is_told_whatever_comes_before_it_is_heard() -> None:
    """Else the table of a backup would be taken for deletions."""
    history = SimpleNamespace(number=1)

    async def read_table(prefix: str) -> Resync:
        return Resync((ITEM,), 9)

    unused = cast(Any, None)
    watch = EtcdWatch("/t/", unused, unused, cast(Any, history), read_table)
    await watch._begin()
    await watch._begin()
    assert len(watch._events) == 1, "what was not taken is out of date"
    history.number = 2
    await watch._begin()
    await watch._begin()
    told = [event.is_of_other_store for event in watch._events if isinstance(event, Resync)]
    assert told == [False, True, False]

"""The simulator's store: news that are old when they come, and outages meanwhile."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from mm.edge.memory_server import MemoryServer
from mm.edge.memory_store import Fault
from mm.mesh.ports import Put, Resync, WatchEvent, Write
from mm.testing.cluster import until
from mm.testing.simulated_store import SimulatedStore

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

TABLE, KEY = "mm/registry/", "mm/registry/m"
NEVER_MIND_S = 10.0


class Heard:
    """A watch whose events take three seconds at most, and what it has heard."""

    def __init__(self) -> None:
        self.store = SimulatedStore(
            MemoryServer(), random.Random(3), lambda key, text: None, timeout_s=1.0
        )
        self.events: list[WatchEvent] = []

    async def run(self) -> None:
        async with self.store.watch(TABLE) as batches:
            async for batch in batches:
                assert batch, "a batch is never empty"
                self.events += batch

    @property
    def revisions(self) -> list[int]:
        return [each.item.mod_revision for each in self.events if isinstance(each, Put)]

    async def write(self) -> int:
        """Answer the revision of a new value."""
        result = await self.store.write(Write(KEY, b"{}", None))
        assert result.item is not None
        return result.item.mod_revision


@asynccontextmanager
async def hearing() -> AsyncIterator[Heard]:
    heard = Heard()
    async with anyio.create_task_group() as group:
        group.start_soon(heard.run)
        await anyio.sleep(NEVER_MIND_S)
        assert [type(event) for event in heard.events] == [Resync]
        heard.events.clear()
        heard.store.late_s_max = 3.0
        yield heard
        group.cancel_scope.cancel()


async def test_an_answer_overtakes_events_that_are_older() -> None:
    async with hearing() as heard:
        first = await heard.write()
        await anyio.sleep(0.001)
        second = await heard.write()
        assert heard.revisions == []
        await until(lambda: bool(heard.revisions))
        assert heard.revisions == [first], "it was under way when the second was written"
        await anyio.sleep(NEVER_MIND_S)
        assert heard.revisions == [first, second]


async def test_events_that_an_outage_meets_on_their_way_come_later_and_in_order() -> None:
    async with hearing() as heard:
        first = await heard.write()
        await anyio.sleep(0.001)
        second = await heard.write()
        heard.store.set_fault(Fault.REFUSED)
        await anyio.sleep(NEVER_MIND_S)
        assert heard.events == []
        heard.store.set_fault(None)
        await anyio.sleep(NEVER_MIND_S)
        assert heard.revisions == [first, second]


async def test_a_lost_history_replaces_what_was_on_its_way() -> None:
    async with hearing() as heard:
        await heard.write()
        await anyio.sleep(0.001)
        heard.store.deafen(["registry"])
        last = await heard.write()
        await anyio.sleep(NEVER_MIND_S)
        heard.store.hear(["registry"], history_is_lost=True)
        await anyio.sleep(NEVER_MIND_S)
        [only] = heard.events
        assert isinstance(only, Resync)
        assert [item.mod_revision for item in only.items] == [last]


async def test_a_table_that_an_outage_meets_on_its_way_comes_later() -> None:
    async with hearing() as heard:
        heard.store.deafen(["registry"])
        heard.store.hear(["registry"], history_is_lost=True)
        await anyio.sleep(0.001)
        heard.store.set_fault(Fault.SILENT)
        await anyio.sleep(NEVER_MIND_S)
        assert heard.events == []
        heard.store.set_fault(None)
        await anyio.sleep(NEVER_MIND_S)
        assert [type(event) for event in heard.events] == [Resync]

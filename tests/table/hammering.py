"""One writer with the GIL against readers without it, for the tests and for the sanitizers.

It owns the life that the writer leads the models through; what readers check is in ``hammer.pyx``.
"""

from __future__ import annotations

import random
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mm._lru import Table
from mm.table import CopyState

#: Some longer than a slot holds inline, so that readers also follow pointers.
IDS = [f"model-{each:02}__isvc-{'0123456789abcdef' * (each % 4)}" for each in range(48)]


class Writer:
    """Takes models through load, eviction, unloading and back, at random, and never waits."""

    def __init__(self, table: Table, world: Any, chance: random.Random) -> None:
        self.table = table
        self.world = world
        self.chance = chance
        self.now_ms = 1
        self.leaving: list[int] = []
        self.handles: list[int] = []
        self.steps = (
            [self.load] * 4
            + [self.remove, self.discard, self.set_peers, self.set_peers, self.turn_over_instance]
            + [self.set_alias, self.grow, self.touch, self.ask, self.keep]
        )

    def step(self) -> None:
        """One random step, and whatever unloading can end now."""
        self.now_ms += 1
        self.world.set_now(self.now_ms)
        self.chance.choice(self.steps)()
        self.end_unloading()

    def leave(self, model: int) -> None:
        self.table.begin_unload(IDS[model])
        self.leaving.append(model)

    def end_unloading(self) -> None:
        """Take models that no call holds any more out of the runtime's memory."""
        still = []
        for model in self.leaving:
            if self.table.begin_unload(IDS[model]):
                still.append(model)
            else:
                self.world.set_loaded(model, 0)
                self.table.set_state(IDS[model], CopyState.ABSENT)
        self.leaving = still

    def load(self) -> None:
        model = self.chance.randrange(len(IDS))
        if self.table.state(IDS[model]) is CopyState.ABSENT:
            evicted = self.table.put(IDS[model], self.chance.randrange(1, 4), self.now_ms)
            for each in evicted:
                if each.model_id != IDS[model]:
                    self.leave(IDS.index(each.model_id))
            self.world.set_loaded(model, 1)
            self.table.set_state(IDS[model], CopyState.READY)

    def remove(self) -> None:
        model = self.chance.randrange(len(IDS))
        if self.table.remove(IDS[model]) is not None:
            self.leave(model)

    def discard(self) -> None:
        self.table.discard(self.chance.choice(IDS))
        self.table.reclaim()

    def set_peers(self) -> None:
        count = self.chance.choice([0, 1, 2, 3, 8])
        self.table.set_peers(
            self.chance.choice(IDS), self.chance.sample(self.handles, min(count, len(self.handles)))
        )

    def turn_over_instance(self) -> None:
        place = self.chance.randrange(10)
        handle = self.table.add_instance(f"instance-{place}")
        if handle in self.handles:
            self.table.remove_instance(handle)
            self.handles.remove(handle)
        else:
            self.handles.append(handle)
            self.world.set_handle(self.chance.randrange(64), handle)

    def set_alias(self) -> None:
        if self.chance.random() < 0.3:
            self.table.remove_alias("v")
        else:
            self.table.set_alias("v", self.chance.choice(IDS))

    def grow(self) -> None:
        """Make the index grow, fill with tombstones, and be replaced, under the readers' feet."""
        if self.chance.random() < 0.05:
            others = [f"other-{self.now_ms}-{each}" for each in range(200)]
            for each in others:
                self.table.add(each)
            for each in others:
                self.table.discard(each)

    def touch(self) -> None:
        self.table.touch(self.chance.choice(IDS), self.now_ms)

    def keep(self) -> None:
        """Keep some, up to half of the room."""
        model_id = self.chance.choice(IDS)
        half_units = self.table.capacity_units // 2
        fits = self.table.kept_units + self.table.weight(model_id) <= half_units
        self.table.keep(model_id, fits and self.chance.random() < 0.7)

    def ask(self) -> None:
        model_id = self.chance.choice(IDS)
        self.table.take_busy()
        self.table.choose(model_id, self.chance.getrandbits(64))
        self.table.oldest()


def hammer(module: Any, *, seed: int, reader_count: int, steps: int) -> list[dict[str, int]]:
    """Run the writer for so many steps; answer what each reader saw."""
    table = Table(40)
    world = module.World(IDS)
    writer = Writer(table, world, random.Random(seed))
    reports: list[Future[dict[str, int]]] = []
    with ThreadPoolExecutor(reader_count) as threads:
        for each in range(reader_count):
            reports.append(threads.submit(module.read, table, world, seed + each, 50))
        try:
            for step in range(steps):
                writer.step()
                if step % 500 == 0:
                    table.check_invariants()
        finally:
            world.stop()
    for model_id in IDS:
        assert table.in_flight(model_id) == 0, "a call has not ended"
    writer.end_unloading()
    assert not writer.leaving, "no call is left, but a model is not unloaded"
    table.reclaim()
    table.check_invariants()
    return [each.result() for each in reports]

"""The policy of ``MM_EVICTION=cost``: the very code that instances use."""

from __future__ import annotations

import random
from collections import OrderedDict

from bench.policies.world import Policy, World
from mm.core.eviction import CostEviction
from mm.core.ids import ModelId

#: The time between two calls.
CALL_MS = 1000


class Ours(Policy):
    """Decayed use x load seconds / size, checked against LRU (``mm.core.eviction``)."""

    name = "cost"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.order: OrderedDict[str, int] = OrderedDict()  # what the table does: id -> last use
        self.ids = [ModelId(f"model-{each}") for each in range(len(world.sizes))]
        self.numbers = {model_id: number for number, model_id in enumerate(self.ids)}
        self.eviction = CostEviction(self.order.get, random.Random(1))

    def use(self, model: int, now: int) -> bool:
        """Serve a call; answers whether the model was loaded."""
        model_id, now_ms = self.ids[model], (now + 1) * CALL_MS
        hit = model_id in self.order
        if not hit:
            size, load_s = self.sizes[model], self.load_s[model]
            while self.used + size > self.capacity:
                victim = self.eviction.victim(ModelId(next(iter(self.order))), now_ms)
                self.eviction.evicted(victim)
                del self.order[victim]
                self.used -= self.sizes[self.numbers[victim]]
            self.eviction.admitted(
                model_id, size, load_s, used_ms=now_ms, capacity=self.capacity, now_ms=now_ms
            )
            self.eviction.loaded(model_id, load_s)
            self.used += size
        self.order[model_id] = now_ms
        self.order.move_to_end(model_id)
        return hit

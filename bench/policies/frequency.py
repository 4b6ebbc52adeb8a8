"""Policies that count uses: GDSF and W-TinyLFU."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from bench.policies.world import Policy, World


class Gdsf(Policy):
    """Uses x load seconds / size, on top of what the last victim had: so whoever stays ages.

    Cherkasova: "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy",
    HP Labs 1998; the cost is the load time here. The counts begin anew with each load.
    """

    name = "GDSF"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.floor = 0.0
        self.uses: dict[int, int] = {}
        self.worth: dict[int, float] = {}
        self.heap: list[tuple[float, int]] = []

    def use(self, model: int, now: int) -> bool:
        """Serve a call; answers whether the model was loaded."""
        hit = model in self.uses
        if not hit:
            while self.used + self.sizes[model] > self.capacity:
                worth, victim = heapq.heappop(self.heap)
                if self.worth.get(victim) == worth:
                    self.floor = worth
                    del self.uses[victim], self.worth[victim]
                    self.used -= self.sizes[victim]
            self.used += self.sizes[model]
        uses = self.uses[model] = self.uses.get(model, 0) + 1
        worth = self.floor + uses * self.load_s[model] / self.sizes[model]
        self.worth[model] = worth
        heapq.heappush(self.heap, (worth, model))
        return hit


class WTinyLfu(Policy):
    """A window of LRU; who leaves it stays only if used more often than those it would displace.

    Einziger, Friedman, Manes: "TinyLFU", TOS 2017; for unequal sizes the candidate must beat the
    sum of its victims (Einziger, Eytan, Friedman, Manes: "Lightweight robust size aware cache
    management", TOS 2022). A hundredth is the window's, four fifths of the rest are protected.
    Counts are exact where theirs are a sketch; they are halved every ten uses a cached model.
    """

    name = "W-TinyLFU"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.window: OrderedDict[int, None] = OrderedDict()
        self.probation: OrderedDict[int, None] = OrderedDict()
        self.protected: OrderedDict[int, None] = OrderedDict()
        self.window_used = self.protected_used = 0
        self.window_max = self.capacity // 100
        self.protected_max = (self.capacity - self.window_max) * 4 // 5
        self.counts: dict[int, int] = {}
        self.counted = 0

    def use(self, model: int, now: int) -> bool:
        """Serve a call; answers whether the model was loaded."""
        self._count(model)
        size = self.sizes[model]
        if model in self.window:
            self.window.move_to_end(model)
        elif model in self.protected:
            self.protected.move_to_end(model)
        elif model in self.probation:
            del self.probation[model]
            self.protected[model] = None
            self.protected_used += size
            while self.protected_used > self.protected_max:
                demoted, _ = self.protected.popitem(last=False)
                self.protected_used -= self.sizes[demoted]
                self.probation[demoted] = None
        else:
            self.window[model] = None
            self.window_used += size
            self.used += size
            while self.window_used > self.window_max:
                candidate, _ = self.window.popitem(last=False)
                self.window_used -= self.sizes[candidate]
                self._admit(candidate)
            return False
        return True

    def _count(self, model: int) -> None:
        self.counts[model] = self.counts.get(model, 0) + 1
        self.counted += 1
        cached = len(self.window) + len(self.probation) + len(self.protected)
        if self.counted >= 10 * max(cached, 10):
            self.counts = {key: uses // 2 for key, uses in self.counts.items() if uses > 1}
            self.counted //= 2

    def _admit(self, candidate: int) -> None:
        victims: list[int] = []
        need = self.used - self.capacity
        rivals = 0
        for queue in (self.probation, self.protected):
            for victim in queue:
                if need <= 0:
                    break
                victims.append(victim)
                need -= self.sizes[victim]
                rivals += self.counts.get(victim, 0)
        if victims and self.counts.get(candidate, 0) <= rivals:
            self.used -= self.sizes[candidate]
            # Those compared are spared now and looked at last the next time.
            for victim in victims:
                if victim in self.probation:
                    self.probation.move_to_end(victim)
            return
        for victim in victims:
            self.used -= self.sizes[victim]
            if victim in self.probation:
                del self.probation[victim]
            else:
                del self.protected[victim]
                self.protected_used -= self.sizes[victim]
        self.probation[candidate] = None

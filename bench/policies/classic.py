"""Policies that look at order only: LRU, FIFO, SIEVE and S3-FIFO."""

from __future__ import annotations

from collections import OrderedDict, deque

from bench.policies.world import Policy, World


class Lru(Policy):
    """The least recently used goes first. All others are measured by it."""

    name = "LRU"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.order: OrderedDict[int, None] = OrderedDict()

    def use(self, model: int, now: int) -> bool:
        """Serve a call; answers whether the model was loaded."""
        if model in self.order:
            self.order.move_to_end(model)
            return True
        self.order[model] = None
        self.used += self.sizes[model]
        while self.used > self.capacity:
            victim, _ = self.order.popitem(last=False)
            self.used -= self.sizes[victim]
        return False


class Fifo(Lru):
    """The one loaded the longest ago goes first."""

    name = "FIFO"

    def use(self, model: int, now: int) -> bool:
        """Serve a call; answers whether the model was loaded."""
        return model in self.order or super().use(model, now)


class Sieve(Policy):
    """A hand sweeps from old to new and takes the first not used since it last came by.

    Zhang, Yang, Yue, Vigfusson, Rashmi: "SIEVE is Simpler than LRU", NSDI 2024.
    """

    name = "SIEVE"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.visited: dict[int, bool] = {}
        # Neighbours in order of arrival; -1 is the head and the tail.
        self.newer: dict[int, int] = {-1: -1}
        self.older: dict[int, int] = {-1: -1}
        self.hand = -1

    def use(self, model: int, now: int) -> bool:
        """Serve a call; answers whether the model was loaded."""
        if model in self.visited:
            self.visited[model] = True
            return True
        while self.used + self.sizes[model] > self.capacity:
            self._evict()
        newest = self.older[-1]
        self.newer[newest], self.older[model] = model, newest
        self.newer[model], self.older[-1] = -1, model
        self.visited[model] = False
        self.used += self.sizes[model]
        return False

    def _evict(self) -> None:
        at = self.hand
        while at == -1 or self.visited[at]:
            if at != -1:
                self.visited[at] = False
            at = self.newer[at]
        self.hand = self.newer[at]
        older, newer = self.older.pop(at), self.newer.pop(at)
        self.newer[older], self.older[newer] = newer, older
        del self.visited[at]
        self.used -= self.sizes[at]


class S3Fifo(Policy):
    """A small queue for new ones, a main one for those used again, ghosts that go right into it.

    Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP 2023.
    The queues are bounded by size here, since models are not equal; a tenth is the small one's.
    """

    name = "S3-FIFO"
    uses_max = 3

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.uses: dict[int, int] = {}
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.small_used = 0
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.ghosts_used = 0

    def use(self, model: int, now: int) -> bool:
        """Serve a call; answers whether the model was loaded."""
        if model in self.uses:
            self.uses[model] = min(self.uses[model] + 1, self.uses_max)
            return True
        size = self.sizes[model]
        while self.used + size > self.capacity:
            if self.small_used * 10 >= self.capacity or not self.main:
                self._evict_small()
            else:
                self._evict_main()
        if model in self.ghosts:
            del self.ghosts[model]
            self.ghosts_used -= size
            self.main.append(model)
        else:
            self.small.append(model)
            self.small_used += size
        self.uses[model] = 0
        self.used += size
        return False

    def _evict_small(self) -> None:
        model = self.small.popleft()
        size = self.sizes[model]
        self.small_used -= size
        if self.uses[model] > 1:
            self.uses[model] = 0
            self.main.append(model)
            return
        del self.uses[model]
        self.used -= size
        self.ghosts[model] = None
        self.ghosts_used += size
        while self.ghosts_used > self.capacity:
            ghost, _ = self.ghosts.popitem(last=False)
            self.ghosts_used -= self.sizes[ghost]

    def _evict_main(self) -> None:
        model = self.main.popleft()
        if self.uses[model] > 0:
            self.uses[model] -= 1
            self.main.append(model)
            return
        del self.uses[model]
        self.used -= self.sizes[model]

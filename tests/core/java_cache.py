"""The cache of the Java mesh, taken literally from spec core 3.9: the naive twin of the accounting.

Its buffer of memory being unloaded is a weight clamped to [R, C] beside the entries, and it evicts
from the oldest end in a loop while everything together is too heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Entry:
    """One entry of the twin's cache; the reference LRU has its own weights."""

    key: int
    used_ms: int
    weight: int
    #: Its load started: leaving it takes an unload.
    claimed: bool = False

    @property
    def age_rank(self) -> tuple[int, int]:
        return self.used_ms, self.key


@dataclass
class JavaCache:
    """Spec core 3.9 word by word, but that failed loads leave no entry."""

    total: int
    reserve: int
    unloading: int = 0
    deficit: int = 0
    lost: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        return max(1, self.total - self.lost)

    @property
    def occupied(self) -> int:
        return sum(entry.weight for entry in self.entries.values())

    @property
    def buffer(self) -> int:
        return min(max(self.unloading, self.reserve), self.capacity)

    def evict(self) -> list[int]:
        evicted = []
        while self.entries and self.occupied + self.buffer > self.capacity:
            oldest = min(self.entries.values(), key=lambda entry: entry.age_rank)
            evicted.append(oldest.key)
            self.leave(oldest)
        return evicted

    def leave(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self.unloading += entry.weight

    def insert(self, entry: Entry) -> None:
        self.unloading -= entry.weight
        self.entries[entry.key] = entry

    def grow(self, entry: Entry, delta: int) -> None:
        self.unloading -= delta
        entry.weight += delta

    def ready(self, weight: int) -> bool:
        borrows = self.unloading + weight <= self.reserve
        return borrows or self.unloading + weight + self.occupied <= self.capacity

    def claim(self, entry: Entry) -> None:
        self.unloading += entry.weight
        entry.claimed = True

    def exceed(self, delta: int) -> None:
        excess = delta - (self.capacity - (self.occupied + self.buffer))
        if excess > 0:
            self.unloading -= excess
            self.deficit += excess

    def measure(self, entry: Entry, delta: int) -> None:
        if delta > 0:
            self.exceed(delta)
        else:
            repaid = min(-delta, self.deficit)
            self.deficit -= repaid
            self.unloading += repaid
        entry.weight += delta

    def complete(self, weight: int) -> None:
        repaid = min(weight, self.deficit)
        self.deficit -= repaid
        self.unloading -= weight - repaid

    def give_up(self, weight: int) -> None:
        self.unloading -= weight
        self.lost += weight

    def recover(self, weight: int) -> None:
        self.lost -= weight

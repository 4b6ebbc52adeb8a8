"""Which copy goes when room is needed: the one whose loss costs least, while that beats LRU.

Owns the choice and what it has to know for it; the table keeps the order and the copies. Chance and
time are arguments. The figures behind the constants: ``bench/policies``.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Final, Protocol

from mm.core.ids import ModelId
from mm.core.use_memory import UseMemory

#: Copies drawn for one choice. The least of 64 is among the lowest few per cent of all nearly
#: always, however many there are.
SAMPLE: Final = 64
#: A use counts half after four times as long as LRU keeps a copy that is not used. Shorter forgets
#: what tells models apart, longer keeps what was popular yesterday; between 2 and 10 it hardly
#: matters, because of the feedback.
HALF_LIFE: Final = 4.0
#: The part of a sample, oldest first, that a victim is taken from: at least so much (two of the
#: sample, to learn what cost is worth), and at the beginning.
PART_MIN: Final = 0.05
#: How fast that part moves: a cache full of average loads, gained, makes it so many times as large.
#: What is lost moves it faster.
SPEED: Final = 4.0
LOSS_BIAS: Final = 1.5
#: What choosing by cost may lose against LRU, on the whole: a hundredth of LRU's load time, and
#: in advance as much as 2 % of the copies take to load.
ALLOWANCE: Final = 0.01
ADVANCE: Final = 0.02
#: The mean load time is over about so many loads.
LOADS_MEAN: Final = 1000
#: A load that took no time is counted as this long, so that nothing is divided by zero.
LOAD_S_MIN: Final = 0.001


class Chance(Protocol):
    """What is needed of ``random.Random``."""

    def random(self) -> float:
        """Answer a number from 0 up to 1."""


class _Known:
    """A model with a copy here, or that LRU would still have."""

    __slots__ = ("in_lru", "is_loaded", "load_s", "model_id", "place", "seen_ms", "use", "weight")

    def __init__(self, model_id: ModelId, weight: int, load_s: float, seen_ms: int) -> None:
        self.model_id = model_id
        self.weight = weight
        self.load_s = load_s
        #: Last use as of the last look, and the decayed count of looks that found a new one.
        self.seen_ms = seen_ms
        self.use = 1.0
        self.in_lru = False
        #: Its index among the copies here; -1 if it has none.
        self.place = -1
        self.is_loaded = False


class CostEviction:
    """Victims by decayed use x load seconds / size, checked against what LRU would have kept.

    *The score.* Uses are not counted one by one: a call touches the table only, and whenever a copy
    is looked at, use since the last look counts as one. So a burst counts little more than a call,
    and hits cost nothing. Times are measured in the age at which LRU evicts, whatever that is.

    *The check.* A second cache is kept in the books, with LRU and the same capacity. Whenever a
    copy here is used that LRU would have lost, choosing by cost has saved a load; whenever a model
    is loaded that LRU would still have, it has cost one. That difference is all there is between
    the two policies, so it steers: victims are taken from the oldest part of a sample, and the part
    grows with what is saved and shrinks with what is lost. The balance of both may not fall below
    nothing; while it would, the victim is LRU's.

    Invariants: 1. ``_lru_units`` are the weights of all ``in_lru``; 2. a model is known while it
    has a copy here or is ``in_lru``; 3. the heap has each model ``in_lru`` once, under a time that
    is not later than its last use, or under the time of a moment in which it could not go.
    """

    def __init__(self, last_used_ms: Callable[[ModelId], int | None], chance: Chance) -> None:
        self._last_used_ms = last_used_ms
        self._chance = chance
        self._known: dict[ModelId, _Known] = {}
        self._copies: list[_Known] = []
        self._memory = UseMemory()
        # The books of LRU.
        self._lru_units = 0
        self._lru_heap: list[tuple[int, int, _Known]] = []
        self._lru_heap_stale = 0
        self._sequence = itertools.count()
        self._lru_age_ms = 1
        #: The last use of what LRU evicted last: what is older would be gone.
        self.boundary_ms = 0
        # The feedback.
        self._part = PART_MIN
        self._balance_s = 0.0
        self._load_mean_s = LOAD_S_MIN
        self._load_count = 0
        #: Load time that choosing by cost has saved, and what it has cost, since the start.
        self.saved_s = 0.0
        self.lost_s = 0.0

    def __repr__(self) -> str:
        return (
            f"<CostEviction part {self._part:.2f}, balance {self._balance_s:.1f} s"
            f" | {len(self._copies)} copies, {len(self._known)} known>"
        )

    @property
    def memory_bytes(self) -> int:
        """What the uses of models without a copy take."""
        return self._memory.memory_bytes

    # --- what happens to copies ---

    def admitted(
        self,
        model_id: ModelId,
        weight: int,
        load_s: float,
        *,
        used_ms: int,
        capacity: int,
        now_ms: int,
    ) -> None:
        """A copy takes its place in a cache of that capacity; its load will take about so long."""
        load_s = max(LOAD_S_MIN, load_s)
        self._settle(capacity, now_ms)
        known = self._known.get(model_id)
        if known is None:
            known = self._known[model_id] = _Known(model_id, weight, load_s, used_ms)
            if (remembered := self._memory.take(model_id)) is not None:
                use, at_ms = remembered
                known.use += use * self._decay(used_ms - at_ms)
        if known.in_lru:
            self._lost(known)
            self._count_use(known, used_ms)
            self._weigh(known, weight)
        else:
            self._earn(ALLOWANCE * load_s)
            self._enters_lru(known)
        known.place = len(self._copies)
        self._copies.append(known)
        self._settle(capacity, now_ms)

    def loaded(self, model_id: ModelId, load_s: float) -> None:
        """It serves, and its load took so long."""
        known = self._known[model_id]
        known.load_s = max(LOAD_S_MIN, load_s)
        known.is_loaded = True
        self._load_count += 1
        self._load_mean_s += (known.load_s - self._load_mean_s) / min(self._load_count, LOADS_MEAN)

    def resized(self, model_id: ModelId, weight: int) -> None:
        """It takes more, or less."""
        self._weigh(self._known[model_id], weight)

    def evicted(self, model_id: ModelId) -> None:
        """It went to make room. Twice is as good as once."""
        known = self._known.get(model_id)
        if known is not None and known.place >= 0:
            self._has_no_copy(known)
            self._forget_if_gone(known)

    def removed(self, model_id: ModelId) -> None:
        """It went for a reason for which LRU would have lost it too."""
        known = self._known[model_id]
        self._has_no_copy(known)
        if known.in_lru:
            self._leaves_lru(known)
            self._lru_heap_stale += 1
        self._forget_if_gone(known)

    # --- the choice ---

    def victim(self, oldest: ModelId, now_ms: int, *, spare: ModelId | None = None) -> ModelId:
        """Answer which copy should go, if the least recently used one is ``oldest``.

        Where there is a choice, none that is not loaded, none that the table has under a time to
        come (that is how copies are kept from eviction), and not ``spare``.
        """
        count, chance = len(self._copies), self._chance.random
        drawn = range(count) if count <= SAMPLE else {int(chance() * count) for _ in range(SAMPLE)}
        sample = [
            known
            for known in map(self._copies.__getitem__, drawn)
            if self._look(known, now_ms) and known.model_id != spare
        ]
        first = self._known[oldest]
        if self.boundary_ms == 0:  # nothing was evicted yet: LRU has what is here
            self._lru_age_ms = max(1, now_ms - first.seen_ms)
        if self._balance_s < 0 or not sample:
            return oldest
        sample.sort(key=lambda known: known.seen_ms)
        sample = sample[: max(2, round(self._part * len(sample)))]
        if self._look(first, now_ms) and oldest != spare:
            sample.append(first)
        return min(sample, key=lambda known: self._score(known, now_ms)).model_id

    def _score(self, known: _Known, now_ms: int) -> float:
        use = known.use * self._decay(now_ms - known.seen_ms)
        return use * known.load_s / max(1, known.weight)

    def _decay(self, age_ms: int) -> float:
        return math.exp2(-max(0, age_ms) / (HALF_LIFE * self._lru_age_ms))

    # --- looking ---

    def _look(self, known: _Known, now_ms: int) -> bool:
        """Find out whether a copy was used since the last look; answers whether it may go."""
        used_ms = self._last_used_ms(known.model_id)
        if used_ms is None or used_ms > now_ms or not known.is_loaded:
            return False
        if used_ms > known.seen_ms:
            self._count_use(known, used_ms)
            if not known.in_lru:
                self._saved(known)
                self._enters_lru(known)
        return True

    def _count_use(self, known: _Known, used_ms: int) -> None:
        known.use = 1.0 + known.use * self._decay(used_ms - known.seen_ms)
        known.seen_ms = max(known.seen_ms, used_ms)

    def _saved(self, known: _Known) -> None:
        self.saved_s += known.load_s
        self._part = min(1.0, self._part * (1 + self._step(known)))
        self._earn(known.load_s)

    def _lost(self, known: _Known) -> None:
        self.lost_s += known.load_s
        self._part = max(PART_MIN, self._part / (1 + LOSS_BIAS * self._step(known)))
        self._balance_s -= known.load_s

    def _step(self, known: _Known) -> float:
        return SPEED * known.load_s / (self._load_mean_s * max(1, len(self._copies)))

    def _earn(self, load_s: float) -> None:
        advance_s = ADVANCE * len(self._copies) * self._load_mean_s
        self._balance_s = min(advance_s, self._balance_s + load_s)

    # --- the books ---

    def _settle(self, capacity: int, now_ms: int) -> None:
        """Let LRU evict, in the books, what does not fit."""
        looks_left = len(self._known)
        while self._lru_units > capacity:
            at_ms, _, known = heapq.heappop(self._lru_heap)
            if not known.in_lru:
                self._lru_heap_stale -= 1
                continue
            may_go = known.place < 0 or self._look(known, now_ms)
            if looks_left > 0 and (known.seen_ms > at_ms or not may_go):
                looks_left -= 1
                self._queue(known, known.seen_ms if may_go else now_ms)
                continue
            self._leaves_lru(known)
            self.boundary_ms = max(self.boundary_ms, known.seen_ms)
            self._lru_age_ms = max(1, now_ms - known.seen_ms)
            self._forget_if_gone(known)

    def _enters_lru(self, known: _Known) -> None:
        known.in_lru = True
        self._lru_units += known.weight
        self._queue(known, known.seen_ms)

    def _leaves_lru(self, known: _Known) -> None:
        known.in_lru = False
        self._lru_units -= known.weight

    def _queue(self, known: _Known, at_ms: int) -> None:
        if self._lru_heap_stale > len(self._known):
            self._lru_heap = [entry for entry in self._lru_heap if entry[2].in_lru]
            heapq.heapify(self._lru_heap)
            self._lru_heap_stale = 0
        heapq.heappush(self._lru_heap, (at_ms, next(self._sequence), known))

    def _weigh(self, known: _Known, weight: int) -> None:
        if known.in_lru:
            self._lru_units += weight - known.weight
        known.weight = weight

    def _has_no_copy(self, known: _Known) -> None:
        last = self._copies.pop()
        if last is not known:
            self._copies[known.place] = last
            last.place = known.place
        known.place = -1
        known.is_loaded = False

    def _forget_if_gone(self, known: _Known) -> None:
        if known.place < 0 and not known.in_lru:
            del self._known[known.model_id]
            self._memory.store(known.model_id, known.use, known.seen_ms)

    def __len__(self) -> int:
        return len(self._copies)

    def check_invariants(self) -> None:
        """Assert that the books agree with each other."""
        in_lru = [known for known in self._known.values() if known.in_lru]
        assert self._lru_units == sum(known.weight for known in in_lru), self
        queued = [known for _, _, known in self._lru_heap if known.in_lru]
        assert len(queued) == len(in_lru), (len(queued), len(in_lru))
        assert {id(known) for known in queued} == {id(known) for known in in_lru}
        assert len(self._lru_heap) == len(queued) + self._lru_heap_stale
        for place, known in enumerate(self._copies):
            assert known.place == place, known.model_id
            assert self._known[known.model_id] is known
        with_copy = sum(known.place >= 0 for known in self._known.values())
        assert with_copy == len(self._copies), (with_copy, len(self._copies))
        assert all(known.in_lru or known.place >= 0 for known in self._known.values())
        assert PART_MIN <= self._part <= 1.0, self._part

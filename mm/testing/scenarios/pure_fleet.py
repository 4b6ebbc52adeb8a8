"""A fleet of instances without tasks or time: only what decides on hits and evictions.

Each instance is a real table with a real accounting, and sees the others through a real cluster
state, fed with records that are seconds old; the real placement chooses, the real check at the
receiver refuses. Loads and unloads take no time: what they cost is not the question here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import inf
from typing import Final

from mm.core.accounting import UnloadAccounting
from mm.core.calls import REFUSALS_MAX
from mm.core.cluster_state import ClusterState
from mm.core.hop_state import HopState
from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.placement import PlacementRequest, choose_instance, is_still_right
from mm.core.records import InstanceRecord
from mm.core.sizing import CacheSizing
from mm.limits import Limits
from mm.table import Table

#: Until an instance record that was written is known to all.
DELIVERY_S: Final = 1.0
PUBLISH_GAP_S: Final = Limits().publish_gap_s
LOADING_THREADS: Final = 8


class _Instance:
    def __init__(self, name: InstanceId, sizing: CacheSizing) -> None:
        self.name = name
        self.accounting = UnloadAccounting(sizing.capacity_units, sizing.reserve_units)
        self.table = Table(self.accounting.table_capacity_units)
        self.state = ClusterState(name, min_space_units=sizing.min_space_units)
        self.min_space_units = sizing.min_space_units

    def record(self) -> InstanceRecord:
        oldest = self.table.oldest()
        return InstanceRecord(
            start_time_ms=1,
            lru_time_ms=NEVER_MS if oldest is None else oldest[1],
            count=self.table.count,
            capacity_units=self.accounting.published_capacity_units,
            used_units=self.accounting.published_used_units,
            min_space_units=self.min_space_units,
            loading_threads=LOADING_THREADS,
            address=self.name,
        )

    def load(self, model_id: ModelId, size_units: int, now_ms: int) -> list[str]:
        """Answer which models left for this one."""
        self.accounting.inserted(size_units)
        gone = self.table.put(model_id, size_units, now_ms)
        for victim in gone:
            self.accounting.left(victim.weight_units, claimed=True)
            self.accounting.unload_completed(victim.weight_units)
        self.accounting.claimed(size_units)
        return [victim.model_id for victim in gone]


class PureFleet:
    """All instances, and where each model is; ``call`` is a client's call."""

    def __init__(self, count: int, sizing: CacheSizing, rng: random.Random) -> None:
        self._rng = rng
        self._default_units = sizing.default_units
        self._instances = [
            _Instance(InstanceId(f"i{number:02}"), sizing) for number in range(count)
        ]
        self._by_name = {each.name: each for each in self._instances}
        self._holders: dict[ModelId, _Instance] = {}
        #: When whose record is written next, and which of them are on their way: (when, whose,
        #: record).
        self._publish_s = [PUBLISH_GAP_S * number / count for number in range(count)]
        self._coming: list[tuple[float, InstanceId, InstanceRecord]] = []
        self._next_news_s = 0.0
        self.evictions_count = 0
        self.refusals_count = 0
        self.loads_counts = dict.fromkeys(self._by_name, 0)
        for each in self._instances:
            self._tell(each.name, each.record(), 0.0)

    @property
    def usable_units(self) -> int:
        """Answer what all tables hold together."""
        return sum(each.table.capacity_units for each in self._instances)

    def call(self, model_id: ModelId, size_units: int, now_s: float) -> bool:
        """Call a model at any instance; answers whether it was there."""
        if now_s >= self._next_news_s:
            self._publish(now_s)
        now_ms = round(1000 * now_s)
        holder = self._holders.get(model_id)
        if holder is not None:
            holder.table.touch(model_id, now_ms)
            return True
        entry = self._instances[int(self._rng.random() * len(self._instances))]
        chosen = self._place(entry, model_id, now_s)
        for victim in chosen.load(model_id, size_units, now_ms):
            self.evictions_count += 1
            del self._holders[ModelId(victim)]
        self._holders[model_id] = chosen
        self.loads_counts[chosen.name] += 1
        return False

    def check(self) -> None:
        """Assert that the books are right."""
        for each in self._instances:
            each.table.check_invariants()
            each.accounting.check_invariants()
            assert each.table.used_units == each.accounting.used_units

    def _place(self, entry: _Instance, model_id: ModelId, now_s: float) -> _Instance:
        """Answer who loads it; how large it will turn out nobody knows yet."""
        now_ms, size_units = round(1000 * now_s), self._default_units
        excludes: frozenset[InstanceId] = frozenset()
        for refusals_left in range(REFUSALS_MAX, -1, -1):
            request = PlacementRequest(model_id, excludes=excludes, size_units=size_units)
            view = entry.state.view(entry.record(), now_ms=now_ms, now_s=now_s)
            name = choose_instance(view, request, self._rng).instance_id
            assert name is not None, view
            chosen = self._by_name[name]
            if chosen is entry:
                break
            entry.state.load_sent(name, model_id, size_units, now_s=now_s)
            fresh = chosen.record()
            here = chosen.state.view(fresh, now_ms=now_ms, now_s=now_s)
            takes = refusals_left == 0 or is_still_right(here, request)
            entry.state.load_ended(name, model_id, took=takes, is_loading=False)
            if takes:
                break
            self.refusals_count += 1
            entry.state.learn(name, HopState.of(fresh), now_s=now_s)
            excludes |= {name}
        return chosen

    def _publish(self, now_s: float) -> None:
        while self._coming and self._coming[0][0] <= now_s:
            at_s, name, record = self._coming.pop(0)
            self._tell(name, record, at_s)
        for index, at_s in enumerate(self._publish_s):
            if at_s <= now_s:
                each = self._instances[index]
                self._coming.append((now_s + DELIVERY_S, each.name, each.record()))
                self._publish_s[index] = now_s + PUBLISH_GAP_S
        coming_s = self._coming[0][0] if self._coming else inf
        self._next_news_s = min(coming_s, *self._publish_s)

    def _tell(self, name: InstanceId, record: InstanceRecord, now_s: float) -> None:
        for each in self._instances:
            if each.name != name:
                each.state.put(name, record, now_ms=round(1000 * now_s), now_s=now_s)


class PooledLru:
    """One cache with all the memory of a fleet: what the fleet is compared with."""

    def __init__(self, capacity_units: int) -> None:
        self._table = Table(capacity_units)
        self.evictions_count = 0

    def call(self, model_id: ModelId, size_units: int, now_s: float) -> bool:
        """Call a model; answers whether it was there."""
        now_ms = round(1000 * now_s)
        if self._table.touch(model_id, now_ms):
            return True
        self.evictions_count += len(self._table.put(model_id, size_units, now_ms))
        return False


def misses(hits: Sequence[bool]) -> float:
    """Answer the part that was not there, in per cent."""
    return 100 * (len(hits) - sum(hits)) / len(hits)

"""Sums over the instances that may host the same types, kept by difference (spec core 1.11).

A tally costs the same for ten instances and for a thousand: each event adds one record and takes
one away.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from mm.core.ids import NEVER_MS, InstanceId
from mm.core.records import InstanceRecord


@dataclass(frozen=True, slots=True)
class ClusterStatistics:
    """What the instances of a partition have together."""

    instance_count: int = 0
    capacity_units: int = 0
    #: Room at instances that are not full: what full ones have left is too small to use.
    free_units: int = 0
    #: Copies, not models: one with three copies counts three times.
    copy_count: int = 0
    #: Last use of the oldest copy of them all; NEVER_MS without any.
    lru_time_ms: int = NEVER_MS


class Tally:
    """The sums of one partition.

    The oldest use is the top of a heap whose outdated entries are dropped when they surface;
    ``_lru_times`` says which are not. The heap is rebuilt before it is twice as long as needed.
    """

    def __init__(self, min_space_units: int) -> None:
        #: For instances that do not publish their own.
        self._min_space_units = min_space_units
        self._instance_count = 0
        self._capacity_units = 0
        self._free_units = 0
        self._copy_count = 0
        self._lru_times: dict[InstanceId, int] = {}
        self._heap: list[tuple[int, InstanceId]] = []

    def __len__(self) -> int:
        return self._instance_count

    def add(self, instance_id: InstanceId, record: InstanceRecord) -> None:
        """Count an instance."""
        self._count(record, 1)
        if record.lru_time_ms > 0:
            self._lru_times[instance_id] = record.lru_time_ms
            heapq.heappush(self._heap, (record.lru_time_ms, instance_id))
            if len(self._heap) > 2 * len(self._lru_times) + 8:
                self._heap = [(ms, each) for each, ms in self._lru_times.items()]
                heapq.heapify(self._heap)

    def remove(self, instance_id: InstanceId, record: InstanceRecord) -> None:
        """Take out an instance that was counted with this very record."""
        self._count(record, -1)
        self._lru_times.pop(instance_id, None)

    def statistics(self) -> ClusterStatistics:
        """Answer the sums as of now."""
        while self._heap and self._lru_times.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return ClusterStatistics(
            instance_count=self._instance_count,
            capacity_units=self._capacity_units,
            free_units=self._free_units,
            copy_count=self._copy_count,
            lru_time_ms=self._heap[0][0] if self._heap else NEVER_MS,
        )

    def _count(self, record: InstanceRecord, sign: int) -> None:
        self._instance_count += sign
        self._capacity_units += sign * record.capacity_units
        self._copy_count += sign * record.count
        self._free_units += sign * self.free_units(record)

    def free_units(self, record: InstanceRecord) -> int:
        """Answer what of an instance's room counts."""
        is_full = record.remaining_units < (record.min_space_units or self._min_space_units)
        return 0 if is_full else record.remaining_units

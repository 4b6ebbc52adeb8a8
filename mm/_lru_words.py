"""The words and limits that both tables share: ``mm/_lru.pyx`` and its twin ``mm/_lru_py.py``.

It owns what the two must not say differently: states, answers, limits, the texts of errors, and
the handles of instances (they change seldom, so one plain form serves both). It owns no order.
"""

from __future__ import annotations

import sys
from collections import deque
from enum import IntEnum
from typing import Final, NamedTuple

#: What ``choose`` answers for the local copy, and for none at all; other answers are handles.
LOCAL: Final = 0
NONE: Final = -1

#: An id is at most this long in UTF-8, so that its length fits 16 bits of a slot.
ID_BYTES_MAX: Final = 65_535
#: Models and vmodels together. The extension reserves address space, not memory, for so many.
SLOT_COUNT_MAX: Final = 16_777_215
#: Instances at one time, and lives of one index: 16 bits each of a handle.
INSTANCE_COUNT_MAX: Final = 65_535
GENERATION_MAX: Final = 65_535
#: Threads that read; the extension gives each a cache line of its own.
READER_COUNT_MAX: Final = 64

U32_MAX: Final = 2**32 - 1
I64_MAX: Final = 2**63 - 1
U64_MASK: Final = 2**64 - 1


class CopyState(IntEnum):
    """The life of a copy in this instance; only a READY one can be pinned."""

    ABSENT = 0
    LOADING = 1
    READY = 2
    UNLOADING = 3


class Evicted(NamedTuple):
    """A copy that left the order; its state is UNLOADING now if it was LOADING or READY."""

    model_id: str
    weight_units: int
    last_used_ms: int


def checked_id(model_id: str) -> str:
    """Answer the id itself if a table can hold it, ValueError naming the limit if not."""
    length = len(model_id.encode())
    if not 1 <= length <= ID_BYTES_MAX:
        raise ValueError(f"an id has 1 to {ID_BYTES_MAX} bytes, this one has {length}")
    return model_id


def checked(name: str, value: int, value_max: int) -> int:
    """Answer the value itself if it is within 0 to ``value_max``, else ValueError saying so."""
    if not 0 <= value <= value_max:
        raise ValueError(f"{name} is {value}, allowed is 0 to {value_max}")
    return value


class Instances:
    """Other instances by handle: an index and its generation, so that no handle comes back.

    Invariants: 1. each instance has one live handle; 2. no handle has index 0 (that is LOCAL) or
    generation 0 (that marks an index whose generations are used up).
    """

    def __init__(self) -> None:
        self._generations = [0]
        self._instance_ids: list[str | None] = [None]
        self._handles: dict[str, int] = {}
        self._free_indexes: deque[int] = deque()

    def add(self, instance_id: str) -> int:
        """Answer the handle of the instance, a new one if it has none."""
        handle = self._handles.get(checked_id(instance_id))
        if handle is not None:
            return handle
        if not self._free_indexes:
            if len(self._generations) > INSTANCE_COUNT_MAX:
                raise OverflowError(f"more than {INSTANCE_COUNT_MAX} instances")
            self._free_indexes.append(len(self._generations))
            self._generations.append(1)
            self._instance_ids.append(None)
        index = self._free_indexes.popleft()
        handle = self._generations[index] << 16 | index
        self._instance_ids[index] = instance_id
        self._handles[instance_id] = handle
        return handle

    def remove(self, handle: int) -> bool:
        """End the handle for good; False if it has ended before or never was."""
        instance_id = self.instance_of(handle)
        if instance_id is None:
            return False
        index = handle & 0xFFFF
        del self._handles[instance_id]
        self._instance_ids[index] = None
        if self._generations[index] == GENERATION_MAX:
            self._generations[index] = 0
        else:
            self._generations[index] += 1
            self._free_indexes.append(index)
        return True

    def instance_of(self, handle: int) -> str | None:
        """Answer whose handle it is, None for one that has ended or never was."""
        index = handle & 0xFFFF
        if handle <= 0 or index >= len(self._generations):
            return None
        return self._instance_ids[index] if self._generations[index] == handle >> 16 else None

    def live(self, handle: int) -> bool:
        """Answer whether the handle leads to an instance."""
        return self.instance_of(handle) is not None

    def generation(self, handle: int) -> int:
        """Answer the generation that handles of this one's index must have now."""
        return self._generations[handle & 0xFFFF]

    def memory_bytes(self) -> int:
        """Answer what the book-keeping takes."""
        lists = (self._generations, self._instance_ids, self._handles, self._free_indexes)
        return sum(map(sys.getsizeof, lists)) + sum(map(sys.getsizeof, self._handles))

    def check_invariants(self) -> None:
        """Raise AssertionError at the first thing that is not as it must be."""
        assert self._generations[0] == 0, "index 0 is nobody's"
        for instance_id, handle in self._handles.items():
            assert self.instance_of(handle) == instance_id, "a handle leads elsewhere"
        named = [each for each in self._instance_ids if each is not None]
        assert len(named) == len(self._handles), "an instance has two handles"

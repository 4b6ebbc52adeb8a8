"""How much models were used that have no copy here: a place of eight bytes, and approximate.

Owns only the numbers; what they are for is ``eviction``'s. A use is kept in sixteenths up to 16 and
its time in seconds, under the checksum of the model's id: two ids in about two billion pairs share
one, and of two that want the same place the later has it.
"""

from __future__ import annotations

import zlib
from array import array
from typing import Final

SLOTS_MIN: Final = 1 << 10
#: Eight MiB: as many places as models may be registered by default; past that the latest are
#: remembered. Until then places are at most half taken, which is 23 bytes a model at the worst.
SLOTS_MAX: Final = 1 << 20
_USE_STEPS: Final = 16
_USE_MAX: Final = 255


class UseMemory:
    """What was stored last for an id. Invariants: a power of two slots; 0 is an empty one.

    A slot has the upper 24 bits of the checksum, 8 of the use and 32 of the time; the lower bits
    of the checksum are its place.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * SLOTS_MIN))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def memory_bytes(self) -> int:
        """What it takes."""
        return len(self._slots) * self._slots.itemsize

    def store(self, model_id: str, use: float, used_ms: int) -> None:
        """Remember a use at a time; less than a thirty-second is as good as none."""
        steps = min(_USE_MAX, round(use * _USE_STEPS))
        if steps == 0:
            return
        checksum = zlib.crc32(model_id.encode())
        self._put(checksum, steps << 32 | (used_ms // 1000) & 0xFFFFFFFF)
        if self._count * 2 > len(self._slots) and len(self._slots) < SLOTS_MAX:
            self._grow()

    def take(self, model_id: str) -> tuple[float, int] | None:
        """Answer use and time of an id, and forget them; None if nothing is known."""
        checksum = zlib.crc32(model_id.encode())
        place = checksum & (len(self._slots) - 1)
        slot = self._slots[place]
        if slot == 0 or slot >> 40 != checksum >> 8:
            return None
        self._slots[place] = 0
        self._count -= 1
        return (slot >> 32 & _USE_MAX) / _USE_STEPS, (slot & 0xFFFFFFFF) * 1000

    def _put(self, checksum: int, value: int) -> None:
        place = checksum & (len(self._slots) - 1)
        self._count += self._slots[place] == 0
        self._slots[place] = (checksum >> 8) << 40 | value

    def _grow(self) -> None:
        before, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
        self._count = 0
        for place, slot in enumerate(before):
            if slot:
                # The place has the lowest bits (ten at least), the slot those from the eighth on.
                self._put((slot >> 40) << 8 | place & 0xFF, slot & (1 << 40) - 1)

"""How much memory each instance of the demo gets, from the sizes of the models.

Two wishes: all instances together hold about a quarter of the models, so that there is something
to evict; and each has room for the largest model, the unload reserve and four others of median
size, so that no single load empties an instance. ``zoo`` draws sizes for which both hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mm.core.ids import UNIT_BYTES

#: What all instances together hold of all models.
SHARE_WANTED: Final = 0.25

#: Models that fit beside the largest one.
OTHERS_MIN: Final = 4

#: The mesh keeps at most this share of a capacity free for models on their way out (spec core 3.1).
RESERVE_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one instance gets, and what all of them hold of all models."""

    bytes_each: int
    share: float


def capacity(sizes_bytes: Sequence[int], instance_count: int) -> Capacity:
    """Answer the memory of each of ``instance_count`` instances for models of these sizes."""
    assert sizes_bytes
    assert instance_count > 0
    total = sum(sizes_bytes)
    shared = total * SHARE_WANTED / instance_count
    needed = max(sizes_bytes) + OTHERS_MIN * statistics.median(sizes_bytes)
    units = -(-max(shared, needed / (1 - RESERVE_SHARE)) // UNIT_BYTES)
    bytes_each = int(units) * UNIT_BYTES
    return Capacity(bytes_each=bytes_each, share=bytes_each * instance_count / total)

"""Identifiers, units and the few numbers that every layer shares (spec core 0)."""

from __future__ import annotations

from typing import Final, NewType

ModelId = NewType("ModelId", str)
VModelId = NewType("VModelId", str)
InstanceId = NewType("InstanceId", str)

#: Sizes, weights and capacities are integers in units of this many bytes.
UNIT_BYTES: Final = 8192

#: "No model": the LRU time of an instance that holds none (spec core 1.5).
NEVER_MS: Final = 2**63 - 1


def units_of(size_bytes: int) -> int:
    """Answer the units that ``size_bytes`` take, rounded up."""
    return -(-size_bytes // UNIT_BYTES)

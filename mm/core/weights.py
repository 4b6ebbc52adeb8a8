"""What a model takes and an instance has: one number today, several one day (decision 10).

Owns every comparison of weights with room. Memory is the only resource so far, so a weight is an
integer of units, and all of this is what ``<=``, ``min`` and ``max`` are. With GPU memory or disk
beside it a weight becomes a tuple, and then two weights need not be comparable: neither fits into
the other. Code that asks "does it fit?" by ``fits`` and never by ``>`` is right for both.
"""

from __future__ import annotations

from typing import Final, TypeAlias

#: Units of each resource. Sums and differences are taken as they are.
Weight: TypeAlias = int

NOTHING: Final[Weight] = 0


def fits(weight: Weight, room: Weight) -> bool:
    """Answer whether there is room for the weight, in every resource."""
    return weight <= room


def common(one: Weight, other: Weight) -> Weight:
    """Answer the part that both have: of each resource the lesser amount."""
    return one if one < other else other


def covering(one: Weight, other: Weight) -> Weight:
    """Answer the least that both fit into: of each resource the larger amount."""
    return other if one < other else one


def share(weight: Weight, divisor: int) -> Weight:
    """Answer one part of a weight, rounded down."""
    return weight // divisor

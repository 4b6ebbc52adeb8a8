"""Pauses between tries that are no two instances' the same.

Instances that lose something together, as the store, would else ask for it together for ever after.
Owns how far apart they come; how long a pause is, is told where it is made.
"""

from __future__ import annotations

import random
from typing import Final

#: A pause is half as long at least, and half as long again at most: on the average it is what it
#: was meant to be, and after two tries nobody is in step with anybody any more.
SPREAD: Final = 0.5


def jittered_s(pause_s: float, rng: random.Random) -> float:
    """Answer how long to pause this time."""
    return pause_s * rng.uniform(1 - SPREAD, 1 + SPREAD)

"""Full garbage collections, at moments that nobody notices.

A full collection walks every object and stops everything meanwhile: 70 ms with 2,000 calls waiting,
a third of a second with 10,000, and Python begins one whenever a quarter more objects have grown
old, which is just when many calls arrive. Young objects are still collected as ever, in fractions
of a millisecond; calls leave no cycles behind, so the full ones can wait for a quiet moment.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Final

import anyio

#: How often a quiet moment is looked for.
LOOK_S: Final = 60.0
#: After so many looks without one the collection is due: cycles must not gather for ever.
LOOKS_MAX: Final = 10
#: More than any process allocates: Python begins no full collection by itself.
_NEVER: Final = 1_000_000_000


async def collect_quietly(is_quiet: Callable[[], bool]) -> None:
    """Collect everything when it is quiet, until cancelled; then as Python would again."""
    thresholds = gc.get_threshold()
    gc.collect()
    # What is there after the start stays for good: no need to walk it ever again.
    gc.freeze()
    gc.set_threshold(*thresholds[:2], _NEVER)
    try:
        looks_count = 0
        while True:
            await anyio.sleep(LOOK_S)
            looks_count += 1
            if is_quiet() or looks_count >= LOOKS_MAX:
                looks_count = 0
                gc.collect()
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()

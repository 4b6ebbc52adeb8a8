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

#: From one collection to the look for a quiet moment for the next.
LOOK_S: Final = 60.0
#: Where there is none, another look follows so soon: a busy instance has some every minute, but
#: seldom one at a time that was fixed before.
AGAIN_S: Final = 5.0
#: So long after the last the collection is due without one: cycles must not gather for ever.
DUE_S: Final = 600.0
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
        since_s, pause_s = 0.0, LOOK_S
        while True:
            await anyio.sleep(pause_s)
            since_s += pause_s
            pause_s = AGAIN_S
            if is_quiet() or since_s >= DUE_S:
                gc.collect()
                since_s, pause_s = 0.0, LOOK_S
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()

"""When a new model counts as used last (spec core 1.6)."""

from __future__ import annotations

from typing import Final

HOUR_MS: Final = 3600 * 1000
#: Long enough ago that new models do not push out those that are known to be used.
LOADING_AGE_MS: Final = 1 * HOUR_MS
IDLE_AGE_MS: Final = 6 * HOUR_MS


def first_use_ms(now_ms: int, *, load_now: bool) -> int:
    """Answer the last use of a model that nobody has used yet."""
    return now_ms - (LOADING_AGE_MS if load_now else IDLE_AGE_MS)

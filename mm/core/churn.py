"""The churn guard: refuse a load that would evict what was loaded a moment ago (spec core 3.12).

*Why it is off by default.* With more models in use than fit, each load evicts one that somebody
will want again: work, and no error. Refusing it (which the Java mesh does, for nine calls of ten)
helps nobody whose call is refused. A runtime whose loads cost its neighbours dearly may set
``MM_MIN_CHURN_AGE_MS``.
"""

from __future__ import annotations

from mm.core.ids import NEVER_MS


def churn_pause_ms(
    *, free_units: int, min_space_units: int, oldest_use_ms: int, now_ms: int, min_age_ms: int
) -> int:
    """Answer the time until a load may evict here, 0 if it may at once.

    It may if there is room without evicting, or if the oldest copy was last used ``min_age_ms``
    ago; 0 switches the guard off.
    """
    if min_age_ms <= 0 or free_units >= min_space_units or oldest_use_ms == NEVER_MS:
        return 0
    return max(0, min_age_ms - max(0, now_ms - oldest_use_ms))

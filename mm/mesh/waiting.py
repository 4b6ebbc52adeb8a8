"""Waiting for the first of several events.

Owns that, and nothing of what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import anyio


async def first_of(*waits: Callable[[], Awaitable[object]], timeout_s: float = math.inf) -> None:
    """Return when one of the waits is over, or the time is; the others are cancelled."""
    async with anyio.create_task_group() as group:

        async def until(wait: Callable[[], Awaitable[object]]) -> None:
            await wait()
            group.cancel_scope.cancel()

        for wait in waits:
            group.start_soon(until, wait)
        await anyio.sleep(timeout_s)
        group.cancel_scope.cancel()

"""Waiting for the first of several events, and in no line that would never end.

Owns that, and nothing of what is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import anyio

from mm.errors import StoreUnavailableError
from mm.mesh.ports import Store


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


def refuse_to_queue(store: Store, is_queue: bool) -> None:
    """Raise ``StoreUnavailableError`` where a line for the store would never end: while it is away
    each request waits for its time limit.
    """
    if is_queue and not store.connected:
        raise StoreUnavailableError("the store cannot be reached")

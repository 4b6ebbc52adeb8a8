"""The wait for the store at the start: it must answer before anything else makes sense (spec core
7.1).
"""

from __future__ import annotations

import logging

import anyio

from mm.errors import StartupError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.ports import Store

logger = logging.getLogger(__name__)

#: Between two questions; a start should not notice it.
ASK_AGAIN_S = 0.2


async def wait_for_store(store: Store, limits: Limits) -> None:
    """Return once the store answers; raises ``StartupError`` when it does not in time."""
    message, is_refused = "no answer", True
    limit_s = limits.store_start_timeout_s
    with anyio.move_on_after(limit_s) as scope:
        started_s = anyio.current_time()
        while True:
            try:
                await store.check()
            except StoreUnavailableError as exc:
                if message != exc.message:
                    message = exc.message
                    logger.warning("the store does not answer yet: %s", message)
                is_refused = is_refused and exc.is_refused
                limit_s = limits.store_start_timeout_s
                if is_refused:
                    limit_s = limits.store_refused_timeout_s
                scope.deadline = started_s + limit_s
                await anyio.sleep(ASK_AGAIN_S)
            else:
                break
    if scope.cancelled_caught:
        raise StartupError(
            f"Problem connecting to etcd: {message} (tried for {limit_s:g} s; see KV_STORE)"
        )

"""A lease kept alive in etcd, and replaced when it is lost (spec core 1.1: one session a process).

Each refresh is a short exchange of its own over whatever connection is in use: nothing lives longer
than one, so a lost connection costs nothing but the next try.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import Any, Final

from aetcd import rpc

from mm.core.jitter import jittered_s
from mm.edge.etcd_calls import CallError, CallFault, Stream
from mm.edge.etcd_connection import Connection
from mm.edge.etcd_connector import Connector
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Session

logger = logging.getLogger(__name__)

#: Two refreshes may fail before the lease is in danger.
_REFRESHES_PER_TTL: Final = 3
#: Between tries to reach etcd, on the average: a lease that still lives is soon taken up again.
RETRY_S: Final = 0.3


class EtcdSession(Session):
    """A lease. Made by ``EtcdStore.session``."""

    def __init__(self, ttl_s: int, connector: Connector) -> None:
        self._ttl_s = ttl_s
        self._connector = connector
        self._lease_id = 0
        self._changed = asyncio.Event()
        self._look = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._rng = random.Random()
        self._interval_s = min(ttl_s, connector.silence_s) / _REFRESHES_PER_TTL

    @property
    def lease_id(self) -> int:
        """The current lease, 0 while there is none."""
        return self._lease_id

    async def wait_change(self, lease_id: int) -> int:
        """Return the current lease as soon as there is one that differs from ``lease_id``."""
        while self._lease_id in (0, lease_id):
            if self._keeping is not None and self._keeping.done():
                if not self._keeping.cancelled():
                    self._keeping.result()  # ended by a bug: it goes up here
                raise self._connector.error("the session is closed")
            await self._changed.wait()
        return self._lease_id

    def look_now(self) -> None:
        """Refresh at once: somebody was told that the lease is lost."""
        self._look.set()

    async def start(self) -> None:
        """Get the first lease; raises ``StoreUnavailableError``."""
        await self._grant()
        self._keeping = self._connector.spawn(self._keep())
        self._keeping.add_done_callback(lambda _: self._changed.set())

    async def stop(self) -> None:
        """Give the lease back, if etcd can be told; else it runs out by itself."""
        if self._keeping is not None:
            self._keeping.cancel()
        lease_id, self._lease_id = self._lease_id, 0
        if not lease_id:
            return
        request = rpc.LeaseRevokeRequest(ID=lease_id)
        gone = frozenset({CallFault.LEASE_LOST})
        try:
            await self._connector.call(_revoke, request, pass_on=gone)
        except CallError:
            return  # gone already
        except StoreUnavailableError as exc:
            logger.info("the lease is left to run out: %s", exc)

    async def _grant(self) -> None:
        response, _ = await self._connector.call(_grant, rpc.LeaseGrantRequest(TTL=self._ttl_s))
        self._lease_id = response.ID
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _keep(self) -> None:
        pause_s = self._interval_s
        while True:
            await self._pause(pause_s)
            try:
                if not await self._refresh():
                    logger.warning("the lease %x is lost; asking for another", self._lease_id)
                    self._lease_id = 0
                    await self._grant()
            except StoreUnavailableError as exc:
                logger.debug("the lease was not refreshed: %s", exc)
                # Instances that lost etcd together should not come back together.
                pause_s = jittered_s(min(RETRY_S, self._interval_s), self._rng)
            else:
                pause_s = self._interval_s

    async def _pause(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._look.wait()
        self._look.clear()

    async def _refresh(self) -> bool:
        """Answer whether the lease lives; raises ``StoreUnavailableError``."""
        if not self._lease_id:
            return False
        connection = await self._connector.connection(time.monotonic() + self._connector.timeout_s)
        limit_s = min(self._connector.timeout_s, self._interval_s)
        started_s = time.monotonic()
        metadata = connection.metadata
        try:
            ttl_s = await self._exchange(connection, limit_s)
        except CallError as exc:
            if exc.fault is CallFault.LEASE_LOST:
                return False
            if exc.fault is CallFault.TOKEN:
                deadline_s = time.monotonic() + self._connector.timeout_s
                await self._connector.renew_token(connection, metadata, deadline_s)
            elif connection.heard_s <= started_s:
                self._connector.retire(connection, exc.reason)
            raise self._connector.error(exc.reason) from None
        connection.heard()
        return ttl_s > 0

    async def _exchange(self, connection: Connection, limit_s: float) -> int:
        """One request, one answer. A lease that is no more has a TTL of 0, not an error."""
        stream = Stream(connection.lease.LeaseKeepAlive, connection.metadata)
        try:
            await stream.write(rpc.LeaseKeepAliveRequest(ID=self._lease_id), limit_s)
            response = await stream.read(limit_s)
        finally:
            stream.close()
        if response is None:
            raise CallError(CallFault.MOVE, f"no answer within {limit_s:.2g} s", maybe_done=False)
        return int(response.TTL)


def _grant(connection: Connection) -> Any:
    return connection.lease.LeaseGrant


def _revoke(connection: Connection) -> Any:
    return connection.lease.LeaseRevoke

"""The connection to etcd that is in use: how long it may be silent, and what follows it.

Runs calls within a time limit, moving to another member as needed, and goes over to other
credentials. How a connection is made is ``mm.edge.etcd_connection``'s; what is asked of etcd is no
concern of this file.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from mm.edge.etcd_calls import CallError, CallFault, drain
from mm.edge.etcd_connection import Connection, Dialer, Metadata, NotConnected
from mm.edge.kv_config import EtcdTarget
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Write

logger = logging.getLogger(__name__)

#: While the store is known to be away, a call waits only this long for it to come back.
DOWN_WAIT_S: Final = 0.5
#: Between attempts while the members are busy with themselves.
_PAUSE_S: Final = 0.05
#: Between attempts with changed credentials that etcd does not know yet. A login costs etcd 60 ms
#: of a core, and a hundred instances may wait for the same change.
EXCHANGE_RETRY_S: Final = 2.0

Rpc = Callable[[Connection], Any]


class Connector:
    """Keeps one good connection to the cluster and makes calls over it.

    All failures come out as ``StoreUnavailableError`` naming the endpoints, but for those faults
    that the caller asked to see.
    """

    def __init__(self, target: EtcdTarget, timeout_s: float, silence_s: float) -> None:
        self.timeout_s = timeout_s
        self.silence_s = silence_s
        self._dialer = Dialer(target, timeout_s, self._discard)
        self._current: Connection | None = None
        #: Made so far that were used.
        self.connections_count = 0
        self._round: asyncio.Task[tuple[str, bool]] | None = None
        self._trial: asyncio.Task[None] | None = None
        self._down_reason = ""
        self._down_since_s = 0.0
        self._is_refused = False
        #: Whether etcd refused a write for want of space, and has taken none since.
        self.out_of_space = False
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    # --- state ---

    @property
    def _target(self) -> EtcdTarget:
        return self._dialer.target

    @property
    def connected(self) -> bool:
        """Whether the last contact succeeded and is recent."""
        if self._current is None or self._down_reason:
            return False
        return time.monotonic() - self._current.heard_s <= self.silence_s

    def error(self, reason: str) -> StoreUnavailableError:
        """Answer the error to raise: says which store, and why."""
        return StoreUnavailableError(f"{self._target}: {reason}", is_refused=self._is_refused)

    def wrote(self, writes: Sequence[Write]) -> None:
        """Note that etcd took these: there is room, unless all they do is make some."""
        if self.out_of_space and any(write.value is not None for write in writes):
            self.out_of_space = False
            logger.info("etcd has room again")

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task that ends at the latest when the connector closes."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def retire(self, connection: Connection, reason: str) -> None:
        """Give a connection up for good; whoever uses it notices, the next call makes a new one."""
        if connection.retired:
            return
        logger.info("leaving etcd at %s: %s", connection.endpoint, reason)
        self._discard(connection)
        if self._current is connection:
            self._current = None
            self._dialer.turn()

    async def close(self) -> None:
        """Close everything; bounded."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._current is not None:
            self._discard(self._current)
            self._current = None
        if self._tasks or self._closing:
            await asyncio.wait(self._tasks | self._closing, timeout=self.timeout_s)
        await drain()

    def _discard(self, connection: Connection, grace_s: float | None = None) -> None:
        connection.retired = True
        task = asyncio.get_running_loop().create_task(connection.close(grace_s))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- other credentials ---

    def exchange(self, target: EtcdTarget) -> None:
        """Go over to these members and credentials as soon as they work.

        Until then those in use hold on: secret and etcd are changed one after the other, in
        whichever order. ``root_prefix`` must be the same.
        """
        assert target.root_prefix == self._target.root_prefix
        if self._trial is not None:
            self._trial.cancel()
            self._trial = None
        if target == self._target:
            logger.info("%s: the settings in use are those that are wanted again", target)
            return
        self._trial = self.spawn(self._try(Dialer(target, self.timeout_s, self._discard)))

    async def _try(self, dialer: Dialer) -> None:
        said = ""
        while isinstance(found := await dialer.dial(), NotConnected):
            if found.reason != said:
                said = found.reason
                logger.warning(
                    "%s: the changed settings do not work, so the ones before hold on: %s",
                    dialer.target,
                    said,
                )
            await asyncio.sleep(EXCHANGE_RETRY_S)
        before, self._current = self._current, found
        self._dialer = dialer
        self._connected()
        logger.info("%s: the changed settings are in use", dialer.target)
        if before is not None:
            # What is under way is answered; watches go over when the time is up.
            self._discard(before, grace_s=self.timeout_s)

    # --- calls ---

    async def call(
        self, method: Rpc, request: object, *, pass_on: frozenset[CallFault] = frozenset()
    ) -> tuple[Any, bool]:
        """Make one call, on another member if need be; answers also whether it was sent before.

        Raises ``CallError`` for the faults in ``pass_on``.
        """
        deadline_s = time.monotonic() + self.timeout_s
        moves_left = len(self._target.endpoints)
        sent_before = False
        token_renewed = False
        while True:
            connection = await self.connection(deadline_s)
            started_s = time.monotonic()
            metadata = connection.metadata
            limit_s = self._attempt_limit_s(deadline_s - started_s)
            try:
                response = await connection.unary(method(connection), request, limit_s)
            except CallError as exc:
                if exc.fault in pass_on:
                    raise
                error = self.error(exc.reason)
                if exc.fault is CallFault.NO_SPACE and not self.out_of_space:
                    self.out_of_space = True
                    logger.error("%s: no write is taken until somebody makes room", exc.reason)
                sent_before = sent_before or exc.maybe_done
                if exc.fault is CallFault.TOKEN and not token_renewed:
                    token_renewed = True
                    await self.renew_token(connection, metadata, deadline_s)
                elif exc.fault is CallFault.WAIT:
                    if len(self._target.endpoints) > 1:
                        self.retire(connection, exc.reason)
                    await asyncio.sleep(_PAUSE_S)
                elif exc.fault is CallFault.MOVE and moves_left:
                    moves_left -= 1
                    if connection.heard_s <= started_s:
                        self.retire(connection, exc.reason)
                else:
                    raise error from None
                if time.monotonic() >= deadline_s - _PAUSE_S:
                    raise error from None
            else:
                self._down_reason = ""
                return response, sent_before

    def _attempt_limit_s(self, left_s: float) -> float:
        """Leave time for another member if there is one."""
        members = len(self._target.endpoints)
        return max(left_s if members == 1 else left_s / min(members, 3), 0.01)

    async def renew_token(
        self, connection: Connection, refused: Metadata, deadline_s: float
    ) -> None:
        """Log in again unless somebody did since ``refused``; raises ``StoreUnavailableError``.

        A login is made slow by design, so all who were refused share one.
        """
        if connection.metadata is not refused:
            return
        if connection.renewal is None or connection.renewal.done():
            connection.renewal = self.spawn(self._login(connection))
        renewal = connection.renewal
        await asyncio.wait({renewal}, timeout=max(deadline_s - time.monotonic(), 0.01))
        if not renewal.done() or renewal.cancelled():
            raise self.error("no answer to the login in time")
        if renewal.result():
            raise self.error(renewal.result())

    async def _login(self, connection: Connection) -> str:
        """Answer why it failed, or nothing."""
        target = connection.target
        try:
            await connection.authenticate(target.user, target.password, self.timeout_s)
        except CallError as exc:
            return exc.reason
        return ""

    # --- connecting ---

    async def connection(self, deadline_s: float) -> Connection:
        """Answer the connection in use, or make one; raises ``StoreUnavailableError``."""
        while True:
            if self._closed:
                raise self.error("the store is closed")
            if self._current is not None:
                return self._current
            reason, may_pass = await self._wait_round(deadline_s)
            if not reason:
                continue
            # Members without a leader are electing one, which takes a second or two. If it takes
            # longer they are too few, and calls fail at once.
            patience_s = min(deadline_s, self._down_since_s + self.timeout_s)
            if not may_pass or time.monotonic() >= patience_s - _PAUSE_S:
                raise self.error(reason)
            await asyncio.sleep(_PAUSE_S)

    async def _wait_round(self, deadline_s: float) -> tuple[str, bool]:
        """Wait for the attempt to connect; answer why it failed, and if that may soon pass."""
        if self._round is None or self._round.done():
            self._round = self.spawn(self._connect())
        attempt = self._round
        left_s = deadline_s - time.monotonic()
        limit_s = min(left_s, DOWN_WAIT_S) if self._down_reason else left_s
        await asyncio.wait({attempt}, timeout=max(limit_s, 0.01))
        if not attempt.done() or attempt.cancelled():
            return self._down_reason or f"no answer within {self.timeout_s:g} s", False
        return attempt.result()

    async def _connect(self) -> tuple[str, bool]:
        """Answer why no member will have us, nothing if one does; and whether that may soon pass.

        What holds when it is over may be of other credentials than it began with.
        """
        dialer = self._dialer
        found = await dialer.dial()
        if isinstance(found, Connection):
            if self._dialer is not dialer:
                self._discard(found)
            else:
                self._current = found
                self._connected()
            return "", False
        if self._current is not None:
            return "", False
        if not self._down_reason:
            self._down_since_s = time.monotonic()
        self._down_reason = found.reason
        self._is_refused = found.is_refused
        return found.reason, found.may_pass

    def _connected(self) -> None:
        self.connections_count += 1
        self._down_reason = ""
        self._is_refused = False

"""Following a table in etcd (design section 6): a ``Resync``, then every change, across outages.

Owns the position in etcd's history and the discipline of one stream: never used again after a
cancel, resumed at the last revision seen, given up when it is silent though progress was asked
for, and replaced by reading the table again where history is compacted or another.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from aetcd import rpc

from mm.edge.etcd_calls import CallError, CallFault, Stream, fault_of_text
from mm.edge.etcd_connection import Connection
from mm.edge.etcd_connector import Connector
from mm.edge.etcd_history import EtcdHistory, Follower
from mm.edge.etcd_txn import KeyCodec
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Delete, Put, Resync, WatchEvent

logger = logging.getLogger(__name__)

#: With so many events untaken no more are read: etcd then keeps them for us.
EVENTS_MAX: Final = 10_000
#: Progress is asked for so many times in the silence that is allowed. Counted instead of timed, so
#: that a process that was itself stopped for long does not blame the store.
_PROBES: Final = 3
_BACKOFF_FIRST_S: Final = 0.05
_BACKOFF_MAX_S: Final = 1.0

_DELETE: Final = rpc.Event.EventType.Value("DELETE")


class EtcdWatch(Follower, AsyncIterator[Sequence[WatchEvent]]):
    """One followed table. Made by ``EtcdStore.watch``.

    Invariant: everything before ``_resume_at`` was delivered, and at it the events of ``_seen``.
    A transaction may be told in several messages, so its revision may be half delivered. Before it
    is resumed the store must show that it still knows the last item told (``_witness``): another
    store may well have come as far by then.
    """

    def __init__(
        self,
        prefix: str,
        connector: Connector,
        codec: KeyCodec,
        history: EtcdHistory,
        read_table: Callable[[str], Awaitable[Resync]],
    ) -> None:
        self._prefix = prefix
        self._connector = connector
        self._codec = codec
        self._history = history
        self._read_table = read_table
        self._resume_at = 0  # 0: nothing known, read the table
        self._seen: set[bytes] = set()
        self._open: Stream | None = None
        self._events: list[WatchEvent] = []
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._lost_reason = ""
        self._backoff_s = _BACKOFF_FIRST_S
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._following = self._connector.spawn(self._follow())
        self._following.add_done_callback(lambda _: self._arrived.set())
        self._history.follow(self)

    def turn_back(self) -> None:
        """Leave the stream: the store is another one."""
        if self._open is not None:
            self._open.interrupt()

    def stop(self) -> None:
        """End; whoever still waits for events is told that there are no more."""
        assert self._following is not None
        self._following.cancel()
        self._history.unfollow(self)

    async def __anext__(self) -> Sequence[WatchEvent]:
        """Answer the events since the last time, at least one."""
        assert self._following is not None
        while not self._events:
            if self._following.done():
                if not self._following.cancelled():
                    self._following.result()  # ended by a bug: it goes up here
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        events, self._events = self._events, []
        self._taken.set()
        return events

    # --- across streams ---

    async def _follow(self) -> None:
        while True:
            try:
                if not await self._can_resume():
                    await self._begin()
                await self._stream()
            except StoreUnavailableError as exc:
                self._lost(exc.message)
            # Instances that lost the store together should not come back together.
            await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1.0))
            self._backoff_s = min(self._backoff_s * 2, _BACKOFF_MAX_S)

    async def _can_resume(self) -> bool:
        if self.history_number != self._history.number:
            return False
        if self.witness is None:  # the table was empty: reading it again costs nothing
            return False
        # Asked even if the table must be read: only this tells which store's table that will be.
        return await self._history.remembers(self.witness) and self._resume_at > 0

    async def _begin(self) -> None:
        table = await self._read_table(self._prefix)
        told, self.history_number = self.history_number, self._history.number
        if told and told != self.history_number:
            table = replace(table, is_of_other_store=True)
        is_empty_still = bool(told) and self.witness is None and not table.items
        self._resume_at = table.revision + 1
        self._seen.clear()
        self.witness = max(table.items, key=lambda item: item.mod_revision, default=None)
        is_news_waiting = any(isinstance(e, Resync) and e.is_of_other_store for e in self._events)
        if table.is_of_other_store or is_news_waiting:
            # Nobody will tell again what the old one said before, or that this is another one.
            self._events.append(table)
        elif not is_empty_still:
            self._events = [table]  # what was not taken yet is out of date
        self._arrived.set()

    def _lost(self, reason: str) -> None:
        self._history.interrupted()
        log = logger.debug if self._lost_reason else logger.warning
        log("the watch of %s is interrupted: %s", self._prefix, reason)
        self._lost_reason = reason

    def _found(self) -> None:
        self._backoff_s = _BACKOFF_FIRST_S
        if self._lost_reason:
            logger.info("the watch of %s goes on", self._prefix)
            self._lost_reason = ""

    async def _stream(self) -> None:
        """Follow over one stream until it ends."""
        deadline_s = time.monotonic() + self._connector.timeout_s
        connection = await self._connector.connection(deadline_s)
        started_s = time.monotonic()
        metadata = connection.metadata
        try:
            stream = self._open = Stream(connection.watch.Watch, metadata)
            await stream.write(self._create_request(), self._connector.timeout_s)
            await self._read(stream, connection)
        except CallError as exc:
            self._lost(exc.reason)
            if exc.fault is CallFault.COMPACTED:
                self._resume_at = 0
            elif exc.fault is CallFault.TOKEN:
                limit_s = time.monotonic() + self._connector.timeout_s
                await self._connector.renew_token(connection, metadata, limit_s)
            elif exc.fault is CallFault.MOVE and _is_suspect(connection, started_s, exc):
                self._connector.retire(connection, exc.reason)
        finally:
            if self._open is not None:
                self._open.close()
                self._open = None

    def _create_request(self) -> Any:
        start, end = self._codec.range_of(self._prefix)
        create = rpc.WatchCreateRequest(
            key=start,
            range_end=end,
            start_revision=self._resume_at,
            progress_notify=True,
            fragment=True,
        )
        return rpc.WatchRequest(create_request=create)

    # --- within one stream ---

    async def _read(self, stream: Stream, connection: Connection) -> None:
        interval_s = self._connector.silence_s / _PROBES
        unanswered = 0
        while True:
            response = await stream.read(interval_s)
            if response is None:
                unanswered += 1
                if unanswered >= _PROBES:
                    raise _SilentError(f"silent for {self._connector.silence_s:g} s")
                progress = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())
                await stream.write(progress, interval_s)
                continue
            unanswered = 0
            connection.heard()
            self._digest(response)
            while len(self._events) >= EVENTS_MAX:
                self._taken.clear()
                await self._taken.wait()

    def _digest(self, response: Any) -> None:
        if response.canceled or response.compact_revision:
            if response.compact_revision:
                reason = f"history before {response.compact_revision} is compacted"
                raise CallError(CallFault.COMPACTED, reason, maybe_done=False)
            reason = response.cancel_reason or "etcd cancelled it"
            raise CallError(fault_of_text(reason), reason, maybe_done=False)
        if response.created:
            self._check_history(response.header)
            self._found()
        elif response.events:
            self._take(response.events)
        elif response.watch_id >= 0:
            # Everything up to here was delivered. Answers to requests have the id -1, and before
            # etcd 3.5.8 they could overtake events: those only tell that somebody is there.
            self._resume_at = max(self._resume_at, response.header.revision + 1)
            self._seen.clear()

    def _check_history(self, header: Any) -> None:
        """See that the member knows what was told; one that lags behind may not yet.

        Reading the table tells which it is, and if it is another store's.
        """
        if header.revision < self._resume_at - 1:
            reason = f"etcd is at revision {header.revision} only"
            raise CallError(CallFault.COMPACTED, reason, maybe_done=False)

    def _take(self, events: Sequence[Any]) -> None:
        for event in events:
            kv = event.kv
            if kv.mod_revision > self._resume_at:
                self._resume_at = kv.mod_revision
                self._seen.clear()
            elif kv.key in self._seen:
                continue  # told again after resuming
            self._seen.add(kv.key)
            if event.type == _DELETE:
                self._events.append(Delete(self._codec.decode(kv.key), kv.mod_revision))
            else:
                self.witness = self._codec.item(kv)
                self._events.append(Put(self.witness))
        if self._events:
            self._arrived.set()


class _SilentError(CallError):
    def __init__(self, reason: str) -> None:
        super().__init__(CallFault.MOVE, reason, maybe_done=False)


def _is_suspect(connection: Connection, started_s: float, error: CallError) -> bool:
    """Answer whether the whole connection is to be blamed for a stream's end."""
    return isinstance(error, _SilentError) or connection.heard_s <= started_s

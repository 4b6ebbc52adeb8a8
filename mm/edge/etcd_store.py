"""The store over etcd: ``mm.mesh.ports.Store`` for ``KV_STORE=etcd:...`` (spec core 1, design 6).

Owns what is asked: reads, tables in pages, conditional writes. The parts: ``etcd_connection`` and
``etcd_connector`` (members, TLS, time limits, fail-over), ``etcd_history`` (whether it is still the
same store), ``etcd_txn`` and ``etcd_grouping`` (writes), ``etcd_watch`` and ``etcd_session`` (what
lives longer than a call). aetcd supplies messages, stubs and the channel.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final

import anyio
import anyio.lowlevel
from aetcd import rpc

from mm.edge.etcd_calls import CallError, CallFault
from mm.edge.etcd_connection import PROBE_KEY, Connection
from mm.edge.etcd_connector import Connector
from mm.edge.etcd_grouping import WriteGrouper
from mm.edge.etcd_history import EtcdHistory
from mm.edge.etcd_session import EtcdSession
from mm.edge.etcd_txn import (
    OPS_MAX,
    KeyCodec,
    WriteUnknownError,
    answers_of,
    is_as_wanted,
    ops_count,
    request_of,
    result_of,
    revisions_of,
    revisions_request_of,
)
from mm.edge.etcd_watch import EtcdWatch
from mm.edge.kv_config import EtcdTarget
from mm.mesh.ports import (
    REVISIONS_MAX,
    Item,
    Part,
    Resync,
    Session,
    Store,
    WatchEvent,
    Write,
    WriteResult,
)

#: Records of the first page of a table; later pages aim at a size in bytes.
PAGE_ITEMS_FIRST: Final = 500
PAGE_ITEMS_MAX: Final = 10_000
PAGE_BYTES: Final = 2 * 1024 * 1024
#: Others get the event loop after so many (about 5 ms). Smaller pages would do that too, but etcd
#: counts the whole table for each.
_ITEMS_AT_ONCE: Final = 1_000
_LIST_ATTEMPTS_MAX: Final = 3

_LEASE_LOST: Final = frozenset({CallFault.LEASE_LOST})
_COMPACTED: Final = frozenset({CallFault.COMPACTED})


class EtcdStore(Store):
    """One client of an etcd cluster. An async context manager; nothing is sent before it is asked.

    ``timeout_s`` bounds every call; reading a table, each page. ``silence_s``: a connection on
    which nothing is heard for so long, though an answer is due, is replaced. ``group_writes`` False
    sends each write on its own.
    """

    def __init__(
        self,
        target: EtcdTarget,
        *,
        timeout_s: float = 3.5,
        silence_s: float = 10.0,
        group_writes: bool = True,
    ) -> None:
        self._codec = KeyCodec(target.root_prefix)
        self._connector = Connector(target, timeout_s, silence_s)
        self._history = EtcdHistory(self._connector, self._codec, self._look_after_leases)
        self._grouper = WriteGrouper(self._connector, self._codec, self._history)
        self._group_writes = group_writes
        self._sessions: set[EtcdSession] = set()

    async def __aenter__(self) -> EtcdStore:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The connector bounds its own clean-up; the margin is for the bound itself to work.
        with anyio.move_on_after(self._connector.timeout_s + 1.0, shield=True):
            await self._connector.close()

    @property
    def connected(self) -> bool:
        """Whether the last contact succeeded and is recent; never blocks."""
        return self._connector.connected

    @property
    def out_of_space(self) -> bool:
        """Whether etcd refused a write for want of space, and has taken none since."""
        return self._connector.out_of_space

    def exchange(self, target: EtcdTarget) -> None:
        """Go over to other members or credentials, once they work; the root prefix stays."""
        self._connector.exchange(target)

    async def check(self) -> None:
        """Return if the store answers, and could write: the read is linearizable."""
        key = self._codec.encode(PROBE_KEY.decode())
        await self._connector.call(_range, rpc.RangeRequest(key=key, count_only=True))

    async def get(self, key: str) -> Item | None:
        """Read linearizably."""
        request = rpc.RangeRequest(key=self._codec.encode(key))
        response, _ = await self._history.call(_range, request)
        return self._codec.item(response.kvs[0]) if response.kvs else None

    async def revisions(self, keys: Sequence[str]) -> Sequence[int]:
        """Read the revisions of keys linearizably; 0 for one that is not there."""
        if len(keys) > REVISIONS_MAX:
            raise ValueError(f"{len(keys)} keys at once; at most {REVISIONS_MAX}")
        response, _ = await self._history.call(_txn, revisions_request_of(keys, self._codec))
        return revisions_of(response)

    async def list(self, prefix: str) -> Resync:
        """Read a table in pages at one revision; each page has the time limit of a call."""
        reason = "it was replaced while it was read"
        for _ in range(_LIST_ATTEMPTS_MAX):
            number = self._history.number
            try:
                table = await self._list(prefix)
            except CallError as exc:  # compacted while reading: begin again at a later revision
                reason = exc.reason
            else:
                # The first page of another store was asked for as that of the known one.
                if number == self._history.number:
                    return table
        raise self._connector.error(reason)

    async def _list(self, prefix: str) -> Resync:
        start, end = self._codec.range_of(prefix)
        items: list[Item] = []
        revision = 0
        limit = PAGE_ITEMS_FIRST
        while True:
            request = rpc.RangeRequest(key=start, range_end=end, limit=limit, revision=revision)
            response, _ = await self._history.look(_range, request, pass_on=_COMPACTED)
            for begin in range(0, len(response.kvs), _ITEMS_AT_ONCE):
                items += map(self._codec.item, response.kvs[begin : begin + _ITEMS_AT_ONCE])
                await anyio.lowlevel.checkpoint()
            # Answers to a past revision still tell the present one.
            revision = revision or response.header.revision
            if not response.more:
                return Resync(items, revision)
            start = response.kvs[-1].key + b"\0"
            item_bytes = max(response.ByteSize() // len(response.kvs), 1)
            limit = max(1, min(PAGE_BYTES // item_bytes, PAGE_ITEMS_MAX))

    async def write(self, write: Write) -> WriteResult:
        """One compare-and-set; concurrent ones travel in one transaction."""
        if self._group_writes and not write.lease_id:
            return await self._grouper.write(write)
        succeeded, [item], sent_before = await self._transact([write])
        try:
            return result_of(write, succeeded, item, sent_before=sent_before)
        except WriteUnknownError as exc:
            raise self._connector.error(str(exc)) from None

    async def transact(self, parts: Sequence[Part]) -> tuple[bool, Sequence[Item | None]]:
        """All writes or none; then what is stored under each key, in the order given."""
        keys = [part.key for part in parts]
        if len(set(keys)) != len(keys):
            raise ValueError(f"a key occurs twice in one transaction: {keys}")
        if (count := ops_count(parts)) > OPS_MAX:
            raise ValueError(
                f"{count} operations in one transaction, two for each write; at most {OPS_MAX}"
            )
        succeeded, items, sent_before = await self._transact(parts)
        if succeeded or not sent_before:
            return succeeded, items
        if all(map(is_as_wanted, parts, items)):
            return True, items
        raise self._connector.error(str(WriteUnknownError()))

    async def _transact(self, parts: Sequence[Part]) -> tuple[bool, Sequence[Item | None], bool]:
        writes = [part for part in parts if isinstance(part, Write)]
        request = request_of(parts, self._codec)
        try:
            response, sent_before = await self._history.call(_txn, request, pass_on=_LEASE_LOST)
        except CallError as exc:
            lost = {write.lease_id for write in writes}
            for session in self._sessions:
                if session.lease_id in lost:
                    session.look_now()
            raise self._connector.error(exc.reason) from None
        self._connector.wrote(writes)
        revision = response.header.revision
        succeeded, items = answers_of(parts, response, self._codec, revision)
        return succeeded, items, sent_before

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncIterator[AsyncIterator[Sequence[WatchEvent]]]:
        """Follow a table: batches of events, a ``Resync`` first. Survives outages."""
        watch = EtcdWatch(prefix, self._connector, self._codec, self._history, self.list)
        watch.start()
        try:
            yield watch
        finally:
            watch.stop()

    @asynccontextmanager
    async def session(self, ttl_s: int) -> AsyncIterator[Session]:
        """Hold a lease; revoked on the way out."""
        session = EtcdSession(ttl_s, self._connector)
        await session.start()
        self._sessions.add(session)
        try:
            yield session
        finally:
            self._sessions.discard(session)
            with anyio.move_on_after(self._connector.timeout_s, shield=True):
                await session.stop()

    def _look_after_leases(self) -> None:
        """Another store knows none of them."""
        for session in self._sessions:
            session.look_now()


def _range(connection: Connection) -> Any:
    return connection.kv.Range


def _txn(connection: Connection) -> Any:
    return connection.kv.Txn

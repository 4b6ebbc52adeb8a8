"""Concurrent writes travel together: one etcd transaction of nested ones, a result for each.

Each nested transaction is the compare-and-set that would have been sent alone, so results per key
are unchanged; what is shared is the round trip, the consensus and the failure. Owns the queue and
who goes with whom; the messages are those of ``mm.edge.etcd_txn``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aetcd import rpc

from mm.edge.etcd_connection import Connection
from mm.edge.etcd_connector import Connector
from mm.edge.etcd_history import EtcdHistory
from mm.edge.etcd_txn import OPS_MAX, KeyCodec, WriteUnknownError, answers_of, request_of, result_of
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Write, WriteResult

#: A nested transaction has up to two operations, and etcd counts those on top of the outer ones.
GROUP_WRITES_MAX: Final = OPS_MAX - 8
#: etcd refuses requests above 1.5 MiB by default; one write alone may come near to that.
GROUP_BYTES_MAX: Final = 1024 * 1024
#: With two, one is being written while the answers to the other are read.
GROUPS_IN_FLIGHT_MAX: Final = 2


@dataclass(eq=False, slots=True)
class _Pending:
    write: Write
    result: asyncio.Future[WriteResult] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def size_bytes(self) -> int:
        return len(self.write.key) + len(self.write.value or b"")


class WriteGrouper:
    """Sends writes, together where they meet.

    Invariants:
    1. Writes to one key are sent in the order in which they came, each after the answer to the one
       before: etcd refuses a transaction that puts a key twice.
    2. A write that is bound to a lease does not come here: a lost lease fails a whole transaction.
    3. A write whose caller gave up before it was sent is not sent.
    """

    def __init__(self, connector: Connector, codec: KeyCodec, history: EtcdHistory) -> None:
        self._connector = connector
        self._codec = codec
        self._history = history
        self._pending: dict[_Pending, None] = {}  # in order of arrival
        self._keys_in_flight: set[str] = set()
        self._groups_in_flight = 0

    async def write(self, write: Write) -> WriteResult:
        """Make one compare-and-set; raises ``StoreUnavailableError``."""
        assert not write.lease_id, "writes bound to a lease go alone"
        pending = _Pending(write)
        self._pending[pending] = None
        self._send_what_can_be()
        # A group gives up after the time limit; this is for those who never got into one.
        limit = asyncio.get_running_loop().call_later(
            self._connector.timeout_s + 0.2, self._expire, pending.result
        )
        try:
            return await pending.result
        finally:
            limit.cancel()
            self._pending.pop(pending, None)
            if not pending.result.cancelled() and pending.result.done():
                pending.result.exception()  # looked at; asyncio complains of those that nobody saw

    def _expire(self, result: asyncio.Future[WriteResult]) -> None:
        if not result.done():
            reason = f"no answer within {self._connector.timeout_s:g} s"
            result.set_exception(self._connector.error(reason))

    def _send_what_can_be(self) -> None:
        while self._pending and self._groups_in_flight < GROUPS_IN_FLIGHT_MAX:
            group = self._take_group()
            if not group:
                return
            self._groups_in_flight += 1
            self._keys_in_flight.update(one.write.key for one in group)
            self._connector.spawn(self._send(group))

    def _take_group(self) -> list[_Pending]:
        """Take the writes that may go now, oldest first."""
        group: dict[str, _Pending] = {}
        size_bytes = 0
        for pending in self._pending:
            key = pending.write.key
            if key in self._keys_in_flight or key in group:
                continue
            size_bytes += pending.size_bytes
            if group and size_bytes > GROUP_BYTES_MAX:
                break
            group[key] = pending
            if len(group) == GROUP_WRITES_MAX:
                break
        for pending in group.values():
            del self._pending[pending]
        return list(group.values())

    async def _send(self, group: Sequence[_Pending]) -> None:
        outcome: list[WriteResult | Exception]
        try:
            outcome = await self._transact([one.write for one in group])
        except Exception as exc:  # of the world or a bug: it is the callers' either way
            outcome = [exc] * len(group)
        except BaseException:
            outcome = [self._connector.error("the store is closed")] * len(group)
            raise
        finally:
            self._groups_in_flight -= 1
            self._keys_in_flight.difference_update(one.write.key for one in group)
            for one, result in zip(group, outcome, strict=True):
                _give(one.result, result)
            self._send_what_can_be()

    async def _transact(self, writes: Sequence[Write]) -> list[WriteResult | Exception]:
        parts = [request_of([write], self._codec) for write in writes]
        request = parts[0]
        if len(parts) > 1:
            request = rpc.TxnRequest(success=[rpc.RequestOp(request_txn=part) for part in parts])
        response, sent_before = await self._history.call(_txn, request)
        self._connector.wrote(writes)
        revision = response.header.revision
        answers = [one.response_txn for one in response.responses] if len(parts) > 1 else [response]
        results: list[WriteResult | Exception] = []
        for write, answer in zip(writes, answers, strict=True):
            succeeded, [item] = answers_of([write], answer, self._codec, revision)
            try:
                results.append(result_of(write, succeeded, item, sent_before=sent_before))
            except WriteUnknownError as exc:
                results.append(self._connector.error(str(exc)))
        return results


def _txn(connection: Connection) -> Any:
    return connection.kv.Txn


def _give(future: asyncio.Future[WriteResult], result: WriteResult | Exception) -> None:
    if future.done():
        return  # its caller gave up
    if isinstance(result, StoreUnavailableError):
        # One for each: tracebacks of many callers must not pile up on one object.
        future.set_exception(StoreUnavailableError(result.message))
    elif isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)

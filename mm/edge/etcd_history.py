"""Whether etcd is still the store that it was: the one history whose revisions only rise.

An etcd whose data directory is gone, or that was restored from a backup, or another cluster at the
same address, answers as if nothing had happened; revisions known from before mean nothing there.
Owns how that is noticed, and that nobody works with the answers of the new store before all tables
were read anew: "there is no such record" would be taken for a deletion, and a record that
another instance has just written for one that was deleted long ago.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from aetcd import rpc

from mm.edge.etcd_calls import CallError, CallFault
from mm.edge.etcd_connection import Connection
from mm.edge.etcd_connector import Connector, Rpc
from mm.edge.etcd_txn import KeyCodec
from mm.mesh.ports import Item

logger = logging.getLogger(__name__)

_COMPACTED: Final = frozenset({CallFault.COMPACTED})


class Follower:
    """Somebody who told others of a table: ``history_number`` of the store it told of, 0: none;
    ``witness`` is the newest item that it saw there, None: the table was empty.
    """

    history_number = 0
    witness: Item | None = None

    def turn_back(self) -> None:
        """Read the table anew: the store is another one."""
        raise NotImplementedError


class EtcdHistory:
    """Counts the stores that this client has seen behind its addresses, the first is number 1.

    Another one is known by another cluster id, by a revision below one that was answered before the
    question was asked (all reads are linearizable), or by not remembering what the old one told;
    never by what is not there. The last of these is asked after each interruption, once for all
    who call: others may have written to the new store, until its revisions are as high.
    """

    def __init__(
        self, connector: Connector, codec: KeyCodec, on_replaced: Callable[[], None]
    ) -> None:
        self._connector = connector
        self._codec = codec
        self._on_replaced = on_replaced
        self._cluster_id = 0
        self._revision = 0
        self._followers: set[Follower] = set()
        self._interruptions = 0
        #: Connections and interruptions up to which this is known to be the store that it was.
        self._sure_of = (0, 0)
        self._asking = asyncio.Lock()
        self.number = 1

    def follow(self, follower: Follower) -> None:
        """Hold back answers of a new store until this one has told of it."""
        self._followers.add(follower)

    def unfollow(self, follower: Follower) -> None:
        """Do so no longer."""
        self._followers.discard(follower)

    def interrupted(self) -> None:
        """Note that contact was lost: who answers next may be another one."""
        self._interruptions += 1

    async def call(
        self, method: Rpc, request: object, *, pass_on: frozenset[CallFault] = frozenset()
    ) -> tuple[Any, bool]:
        """Make a call for somebody who relies on the tables (``Connector.call``).

        Raises ``StoreUnavailableError`` also while the tables are still those of another store.
        """
        self._refuse_if_replaced(self.number)
        await self._make_sure()
        number = self.number
        answer = await self.look(method, request, pass_on=pass_on)
        await (
            self._make_sure()
        )  # the connection may have been lost, and another one made, in between
        self._refuse_if_replaced(number)
        return answer

    async def look(
        self, method: Rpc, request: object, *, pass_on: frozenset[CallFault] = frozenset()
    ) -> tuple[Any, bool]:
        """Make a call, and see which store answers."""
        number, revision = self.number, self._revision
        response, sent_before = await self._connector.call(method, request, pass_on=pass_on)
        header = response.header
        is_other = self._cluster_id not in (0, header.cluster_id) or header.revision < revision
        if number == self.number:
            if is_other:
                self._replaced(f"it is cluster {header.cluster_id:x} at {header.revision}")
                self._revision = 0
            self._cluster_id = header.cluster_id
            self._revision = max(self._revision, header.revision)
        return response, sent_before

    async def _make_sure(self) -> None:
        """After an interruption, see that the store remembers the newest that it told."""
        if self._sure_of == (self._connector.connections_count, self._interruptions):
            return
        async with self._asking:
            contact = (self._connector.connections_count, self._interruptions)
            if self._sure_of == contact:
                return
            told = (f.witness for f in self._followers if f.history_number == self.number)
            witnesses = [witness for witness in told if witness is not None]
            if witnesses:
                await self.remembers(max(witnesses, key=lambda item: item.mod_revision))
            self._sure_of = contact

    async def remembers(self, item: Item) -> bool:
        """Answer whether the store has, or had, this very item.

        False if it cannot say because that is compacted away, too: then its tables must be read.
        """
        number = self.number
        for revision in (0, item.mod_revision):
            request = rpc.RangeRequest(key=self._codec.encode(item.key), revision=revision)
            try:
                response, _ = await self.look(_range, request, pass_on=_COMPACTED)
            except CallError:
                return False
            if number != self.number:
                return False
            if response.kvs and self._codec.item(response.kvs[0]) == item:
                return True
        self._replaced(f"it never had {item.key} of revision {item.mod_revision}")
        return False

    def _replaced(self, how: str) -> None:
        logger.warning("the store is another one, emptied, restored or replaced: %s", how)
        self.number += 1
        self._on_replaced()
        for follower in self._followers:
            follower.turn_back()

    def _refuse_if_replaced(self, number: int) -> None:
        told = {each.history_number for each in self._followers} - {0}
        if number != self.number or told - {self.number}:
            raise self._connector.error("it was replaced; its tables are being read anew")


def _range(connection: Connection) -> Any:
    return connection.kv.Range

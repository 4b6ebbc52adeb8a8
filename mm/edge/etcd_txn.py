"""Conditional writes as etcd transactions (spec core 1.4): how they are asked, how answers read.

Pure translation between ``Write``/``Item`` and etcd's messages, keys with their root prefix
included. Sending is done by ``mm.edge.etcd_store`` and ``mm.edge.etcd_grouping``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from aetcd import rpc

from mm.mesh.ports import Check, Item, Part, Write, WriteResult

#: etcd's own bound (--max-txn-ops) on the operations of one transaction; nested ones count on top.
OPS_MAX: Final = 128


class KeyCodec:
    """Keys as the mesh knows them <-> keys as etcd does.

    The root prefix is put in front as it is, nothing in between. Bytes that are no UTF-8 survive
    the way there and back.
    """

    def __init__(self, root_prefix: str) -> None:
        self._root = root_prefix.encode("utf-8", "surrogateescape")

    def encode(self, key: str) -> bytes:
        """Answer etcd's key."""
        assert key.startswith("/"), f"logical keys start with a slash, this does not: {key!r}"
        return self._root + key.encode("utf-8", "surrogateescape")

    def decode(self, key: bytes) -> str:
        """Answer the logical key."""
        assert key.startswith(self._root), "etcd answered a key outside of the range asked for"
        return key[len(self._root) :].decode("utf-8", "surrogateescape")

    def range_of(self, prefix: str) -> tuple[bytes, bytes]:
        """Answer the first key of a table, and the first one after it."""
        start = self.encode(prefix)
        # The last byte is that of a UTF-8 text, so never 0xff.
        return start, start[:-1] + bytes([start[-1] + 1])

    def item(self, kv: Any) -> Item:
        """Read etcd's key-value."""
        return Item(self.decode(kv.key), kv.value, kv.mod_revision, kv.create_revision, kv.lease)


def ops_count(parts: Sequence[Part]) -> int:
    """Answer how many operations a transaction may come to."""
    return sum(1 if isinstance(part, Check) else 2 for part in parts)


def request_of(parts: Sequence[Part], codec: KeyCodec) -> Any:
    """Answer the transaction: all writes if every condition holds, else what is stored."""
    request = rpc.TxnRequest()
    for part in parts:
        key = codec.encode(part.key)
        if part.if_revision is not None:
            request.compare.append(
                rpc.Compare(
                    key=key,
                    target=rpc.Compare.MOD,
                    result=rpc.Compare.EQUAL,
                    mod_revision=part.if_revision,
                )
            )
        request.success.extend(_operations(part, key))
        request.failure.append(rpc.RequestOp(request_range=rpc.RangeRequest(key=key)))
    return request


def revisions_request_of(keys: Sequence[str], codec: KeyCodec) -> Any:
    """Answer the transaction that tells the revisions of keys, and nothing else of them."""
    ranges = (rpc.RangeRequest(key=codec.encode(key), keys_only=True) for key in keys)
    return rpc.TxnRequest(success=[rpc.RequestOp(request_range=each) for each in ranges])


def revisions_of(response: Any) -> list[int]:
    """Read the answer to ``revisions_request_of``; 0 for a key that is not there."""
    found = (one.response_range.kvs for one in response.responses)
    return [kvs[0].mod_revision if kvs else 0 for kvs in found]


def _operations(part: Part, key: bytes) -> Sequence[Any]:
    if isinstance(part, Check):
        return [rpc.RequestOp(request_range=rpc.RangeRequest(key=key))]
    if part.value is None:
        delete = rpc.DeleteRangeRequest(key=key)
        return [rpc.RequestOp(request_delete_range=delete)]
    put = rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=part.value, lease=part.lease_id))
    if part.if_revision == 0:
        return [put]  # just created: nothing about it that we do not know
    # The value is known, but not the create revision.
    look = rpc.RequestOp(request_range=rpc.RangeRequest(key=key, keys_only=True))
    return [put, look]


def answers_of(
    parts: Sequence[Part], response: Any, codec: KeyCodec, revision: int
) -> tuple[bool, list[Item | None]]:
    """Read the answer to ``request_of(parts)`` that was given at ``revision``."""
    if not response.succeeded:
        return False, [_first(one.response_range, codec) for one in response.responses]
    items: list[Item | None] = []
    responses = iter(response.responses)
    for part in parts:
        first = next(responses)
        if isinstance(part, Check):
            items.append(_first(first.response_range, codec))
            continue
        if part.value is None:
            items.append(None)
            continue
        created = revision
        if part.if_revision != 0:
            created = next(responses).response_range.kvs[0].create_revision
        items.append(Item(part.key, part.value, revision, created, part.lease_id))
    return True, items


def _first(response: Any, codec: KeyCodec) -> Item | None:
    return codec.item(response.kvs[0]) if response.kvs else None


def is_as_wanted(part: Part, item: Item | None) -> bool:
    """Answer whether what is stored is what the write would have left, or what was to hold.

    It tells what became of a write that was sent twice: the second can fail because the first
    worked.
    """
    if isinstance(part, Check):
        return (0 if item is None else item.mod_revision) == part.if_revision
    if item is None or part.value is None:
        return item is None and part.value is None
    return (item.value, item.lease_id) == (part.value, part.lease_id)


def result_of(
    write: Write, succeeded: bool, item: Item | None, *, sent_before: bool
) -> WriteResult:
    """Answer the result of one write, ``WriteUnknownError`` if nobody can tell."""
    if succeeded or not sent_before:
        return WriteResult(succeeded, item)
    if is_as_wanted(write, item):
        return WriteResult(True, item)
    raise WriteUnknownError


class WriteUnknownError(Exception):
    """The connection was lost after sending, and what is stored now does not tell what happened."""

    def __init__(self) -> None:
        super().__init__("the connection was lost; whether it was written is not known")

"""HPACK with a limit of our own, and a memory for the header lists that come again and again.

On a busy connection nearly all header lists are ones that were seen before, made of nothing but
references into the compression table. Such a block means the same as last time while the table
is the same; looking it up costs a fraction of taking it apart in Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hpack.hpack import Decoder, Encoder
from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple
from hpack.table import HeaderTable

from mm.core.headers import HeaderList

#: Blocks remembered a connection; a few dozen methods and answers.
_REMEMBERED_MAX = 64
#: Longer blocks are unlikely to come again.
_REMEMBERED_BYTES_MAX = 256


def _newest(table: HeaderTable) -> object:
    """Answer what changes whenever a table does, but for its size: the entry put in last."""
    entries = table.dynamic_entries
    return entries[0] if entries else None


class LimitedDecoder(Decoder):
    """Bounds what a block may expand to; h2 would replace the bound by the advertised one."""

    def __init__(self, block_bytes_max: int) -> None:
        super().__init__()
        self._block_bytes_max = block_bytes_max
        self._remembered: dict[bytes, list[HeaderTuple]] = {}

    @property
    def max_header_list_size(self) -> int:
        """Bytes that one block may expand to."""
        return self._block_bytes_max

    @max_header_list_size.setter
    def max_header_list_size(self, value: int) -> None:
        """Ignore what h2 sets."""

    def decode(self, data: bytes, raw: bool = False) -> Iterable[HeaderTuple]:
        """Answer the header list of a block, a new list each time."""
        known = self._remembered.get(data)
        if known is not None:
            return known.copy()
        size, before = self.header_table.maxsize, _newest(self.header_table)
        headers = list(super().decode(data, raw))
        if size != self.header_table.maxsize or before is not _newest(self.header_table):
            self._remembered.clear()
        elif len(data) <= _REMEMBERED_BYTES_MAX:
            if len(self._remembered) >= _REMEMBERED_MAX:
                self._remembered.clear()
            self._remembered[data] = headers.copy()
        return headers


class RememberingEncoder(Encoder):
    """Encodes without Huffman, which costs more in Python than the bytes it saves."""

    def __init__(self) -> None:
        super().__init__()
        self._remembered: dict[tuple[Any, ...], bytes] = {}

    @property
    def header_table_size(self) -> int:
        """What the other side's decoder keeps."""
        return self.header_table.maxsize

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        # hpack forgets to announce a change that is followed by the same value again.
        if value != self.header_table.maxsize:
            self.header_table.maxsize = value
            self.table_size_changes.append(value)

    def encode_list(self, headers: HeaderList) -> bytes:
        """Answer the block for a header list.

        Headers that are never to be indexed differ in every call. Those at the end are encoded
        afresh each time, without keeping the rest from being known.
        """
        end = len(headers)
        while end and headers[end - 1].__class__ is NeverIndexedHeaderTuple:
            end -= 1
        block = self._encode_stable(headers if end == len(headers) else headers[:end])
        if end < len(headers):
            block += self.encode(headers[end:], huffman=False)
        return block

    def _encode_stable(self, headers: HeaderList) -> bytes:
        # As a key, a header never to be indexed would equal an ordinary one.
        ordinary = all(header.__class__ is not NeverIndexedHeaderTuple for header in headers)
        resized = self.header_table.resized
        key = tuple(headers)
        known = self._remembered.get(key)
        if known is not None and ordinary and not resized:
            return known
        before = _newest(self.header_table)
        block = self.encode(headers, huffman=False)
        if resized or before is not _newest(self.header_table):
            self._remembered.clear()
        elif ordinary and len(block) <= _REMEMBERED_BYTES_MAX:
            if len(self._remembered) >= _REMEMBERED_MAX:
                self._remembered.clear()
            self._remembered[key] = block
        return block

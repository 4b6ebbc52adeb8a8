"""Records as values, by the JSON that they came from (spec core 10.6: not parsed at every call).

A mirror keeps records as they came, for there may be a million; those in use are needed as values
all the time. One that cannot be read is named in the log, once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from mm.core.records import RecordError
from mm.mesh.ports import Item

logger = logging.getLogger(__name__)

#: Parsed records kept; the others stay packed as their JSON (design section 4).
PARSED_MAX: Final = 4096

T = TypeVar("T")


class ParsedRecords(Generic[T]):
    """The records of one table that were used or changed last.

    Invariants: 1. What is kept was made from the very bytes that it is asked for by. 2. No more
    than ``PARSED_MAX`` are.
    """

    def __init__(self, decode: Callable[[bytes], T]) -> None:
        self._decode = decode
        self._parsed: OrderedDict[str, tuple[bytes, T]] = OrderedDict()
        #: Those that cannot be read, by a hash of what they were when that was said.
        self._corrupt: dict[str, int] = {}

    @property
    def corrupt_count(self) -> int:
        """How many records cannot be read."""
        return len(self._corrupt)

    def get(self, key_id: str, item: Item) -> T | None:
        """Answer the record, and keep it; None if it cannot be read."""
        cached = self._parsed.get(key_id)
        if cached is not None and cached[0] == item.value:
            self._parsed.move_to_end(key_id)
            return cached[1]
        record = self._parse(key_id, item)
        if record is not None:
            self.remember(key_id, item.value, record)
        return record

    def peek(self, key_id: str, item: Item) -> T | None:
        """Answer the record without keeping it, for looks at all of them."""
        cached = self._parsed.get(key_id)
        if cached is not None and cached[0] == item.value:
            return cached[1]
        return self._parse(key_id, item)

    def remember(self, key_id: str, value: bytes, record: T) -> None:
        """Keep a record that is known to be made from these bytes."""
        self._corrupt.pop(key_id, None)
        self._parsed[key_id] = (value, record)
        self._parsed.move_to_end(key_id)
        if len(self._parsed) > PARSED_MAX:
            self._parsed.popitem(last=False)

    def forget(self, key_id: str) -> None:
        """Hear that the record is gone."""
        self._parsed.pop(key_id, None)
        self._corrupt.pop(key_id, None)

    def _parse(self, key_id: str, item: Item) -> T | None:
        if self._corrupt.get(key_id) == hash(item.value):
            return None
        try:
            record = self._decode(item.value)
        except RecordError as exc:
            self._corrupt[key_id] = hash(item.value)
            logger.error("record %s skipped: %s", item.key, exc)
            return None
        self._corrupt.pop(key_id, None)
        return record

"""The book-keeping of readers in the plain-Python twin of the table: it has none, and counts them.

Owns the epochs by which the extension knows when memory may be used again.
"""

from __future__ import annotations

from collections import deque

from mm._lru_words import READER_COUNT_MAX


class Readers:
    """Who reads, and which slots that left they may still look at."""

    def __init__(self) -> None:
        self._epoch = 1
        self._readers: dict[int, int] = {}  # reader -> epoch it has seen, 0 while offline
        self._retired: deque[int] = deque()  # epochs at which discarded slots left

    def register(self) -> int:
        """Answer the number of a new reader, which is offline."""
        for reader in range(READER_COUNT_MAX):
            if reader not in self._readers:
                self._readers[reader] = 0
                return reader
        raise OverflowError(f"more than {READER_COUNT_MAX} readers")

    def unregister(self, reader: int) -> None:
        """Give the number back."""
        self._check(reader)
        del self._readers[reader]

    def online(self, reader: int) -> None:
        """It has forgotten all it saw before, and reads on."""
        self._check(reader)
        self._readers[reader] = self._epoch

    def offline(self, reader: int) -> None:
        """It reads nothing."""
        self._check(reader)
        self._readers[reader] = 0

    def retire(self) -> None:
        """Note a slot that left at this epoch: readers online since before may look at it."""
        self._epoch += 1
        self._retired.append(self._epoch)

    def claim(self) -> int:
        """Answer how many slots that left are free to be used again, and forget them."""
        seen = min((epoch for epoch in self._readers.values() if epoch), default=self._epoch)
        claimed = 0
        while self._retired and self._retired[0] <= seen:
            self._retired.popleft()
            claimed += 1
        return claimed

    def _check(self, reader: int) -> None:
        if reader not in self._readers:
            raise ValueError(f"no reader {reader}")

"""Ids in order, however many: what a listing turns its pages by.

A million ids in one list would make every new one move megabytes. So they lie in runs of bounded
length, and a change costs the search among the runs and one short move.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final

#: A run is split in two when it has grown to twice this: a move within it is then 8 KiB at most,
#: and a million ids are a thousand runs to search among.
RUN_LENGTH: Final = 1024


class SortedIds:
    """A set of non-empty ids, read in order from any place.

    The order is that of code points, which is that of the bytes of UTF-8 and so of etcd's keys.

    Invariants: 1. no run is empty or longer than twice ``RUN_LENGTH``; 2. the ids of a run are
    ascending, and all below those of the next; 3. ``_firsts`` has the first id of each run.
    """

    def __init__(self) -> None:
        self._runs: list[list[str]] = []
        self._firsts: list[str] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        for run in self._runs:
            yield from run

    def add(self, key_id: str) -> None:
        """Put in an id that is not there."""
        self._length += 1
        if not self._runs:
            self._insert_run(0, [key_id])
            return
        place = max(0, bisect_right(self._firsts, key_id) - 1)
        run = self._runs[place]
        if key_id > run[-1]:
            # A table is read in order: its runs are filled and left, and not split.
            if len(run) >= RUN_LENGTH and place == len(self._runs) - 1:
                self._insert_run(place + 1, [key_id])
                return
            run.append(key_id)
        else:
            index = bisect_left(run, key_id)
            assert run[index] != key_id, f"{key_id} is there"
            run.insert(index, key_id)
            self._firsts[place] = run[0]
        if len(run) > 2 * RUN_LENGTH:
            self._insert_run(place + 1, run[RUN_LENGTH:])
            del run[RUN_LENGTH:]

    def remove(self, key_id: str) -> None:
        """Take out an id that is there."""
        place = bisect_right(self._firsts, key_id) - 1
        run = self._runs[place] if place >= 0 else []
        index = bisect_left(run, key_id)
        assert run[index : index + 1] == [key_id], f"{key_id} is not there"
        del run[index]
        self._length -= 1
        if run:
            self._firsts[place] = run[0]
        else:
            del self._runs[place]
            del self._firsts[place]

    def following(self, after: str, count: int, *, prefix: str = "") -> list[str]:
        """Answer the first ``count`` ids with a prefix that are above ``after``, in order."""
        found: list[str] = []
        find, start = (bisect_right, after) if after >= prefix else (bisect_left, prefix)
        place = max(0, bisect_right(self._firsts, start) - 1)
        while place < len(self._runs) and len(found) < count:
            run = self._runs[place]
            index = find(run, start)
            found += run[index : index + count - len(found)]
            if found and not found[-1].startswith(prefix):
                break
            place += 1
        while found and not found[-1].startswith(prefix):
            found.pop()
        return found

    def _insert_run(self, place: int, run: list[str]) -> None:
        self._runs.insert(place, run)
        self._firsts.insert(place, run[0])

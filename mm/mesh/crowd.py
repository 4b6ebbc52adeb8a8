"""Many who wait for one thing, and go on a few at a time when it is there.

Let go all at once, thousands would keep the event loop from everyone else for as long as what they
do next takes, a part of a millisecond each: calls for models would stand behind all of it.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

import anyio

#: So many go on at once; whoever has gone on lets one more go.
LET_GO_AT_ONCE: Final = 2


class Crowd:
    """Those who wait, in order; over once and for all."""

    __slots__ = ("_waiting", "is_over")

    def __init__(self) -> None:
        self._waiting: dict[anyio.Event, None] = {}
        self.is_over = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self) -> None:
        """Wait until it is over, and for one's turn."""
        if self.is_over:
            return
        turn = anyio.Event()
        self._waiting[turn] = None
        try:
            await turn.wait()
        finally:
            self._waiting.pop(turn, None)
            self._let_next_go()

    def end(self) -> None:
        """What they wait for is there, or will never be."""
        if not self.is_over:
            self.is_over = True
            self._let_go(LET_GO_AT_ONCE)

    def _let_next_go(self) -> None:
        if self.is_over:
            self._let_go(1)

    def _let_go(self, count: int) -> None:
        for turn in list(islice(self._waiting, count)):
            del self._waiting[turn]
            turn.set()

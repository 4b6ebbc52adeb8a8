"""Whether what is mirrored is what the store has now: one short question for many callers.

A mirror may be behind, without a limit. Whoever gives an answer that depends on what is mirrored,
and writes nothing that would tell, asks here first. All that ask at the moment share one read of
revisions, and while it is under way the next ones gather: so a storm of such questions costs the
store a request now and then, and no write.

Those of a group go on one after the other, not all in the moment of the answer: what each does next
takes part of a millisecond, and calls for models would stand behind all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, TypeAlias

import anyio

from mm.errors import LimitError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.mirror import Mirror
from mm.mesh.ports import REVISIONS_MAX, Store
from mm.mesh.statistics import Counters
from mm.mesh.waiting import refuse_to_queue

#: Reads under way at a time: with one, the next group is the larger the slower the store is.
_AT_ONCE: Final = 1
#: After a group of so many the next one is not sent sooner than this: a read costs as much as
#: several answers, and a store that is quick would get one for every few calls of a storm. Who asks
#: again and again alone is not held up.
_STORM_COUNT: Final = 4
_GATHER_S: Final = 0.01
#: Of a group so many go on at once; whoever has gone on lets one more go.
_LET_GO_AT_ONCE: Final = 2
#: An id, and the mirror that should have what the store has under it.
Entry: TypeAlias = tuple[Mirror, str]


@dataclass(eq=False, slots=True)
class _Group:
    """Keys asked for together; a later group begins when this one is sent, or full."""

    keys: dict[str, None] = field(default_factory=dict)
    #: Those who wait for the one that asks, in order.
    waiters: dict[anyio.Event, None] = field(default_factory=dict)
    is_over: bool = False
    #: None at the end without a failure: whoever asked for all gave up.
    revisions: dict[str, int] | None = None
    failure: StoreUnavailableError | None = None

    def has_room(self, keys: Sequence[str]) -> bool:
        """Answer whether these can be asked for, too."""
        return len(self.keys) + sum(key not in self.keys for key in keys) <= REVISIONS_MAX

    async def wait(self) -> None:
        """Wait until it is over, and for one's turn."""
        turn = anyio.Event()
        self.waiters[turn] = None
        try:
            await turn.wait()
        finally:
            self.waiters.pop(turn, None)
            if self.is_over:
                self._let_go(1)

    def end(self) -> None:
        """There is an answer, or will be none."""
        self.is_over = True
        self._let_go(_LET_GO_AT_ONCE)

    def _let_go(self, count: int) -> None:
        for turn in list(islice(self.waiters, count)):
            del self.waiters[turn]
            turn.set()


class Confirmations:
    """The first of a group asks for all of it; if it gives up, another one does.

    Invariant: what is answered was so at a moment between question and answer, because nobody
    joins a group that is sent.
    """

    def __init__(self, store: Store, limits: Limits, counters: Counters) -> None:
        self._store = store
        self._waiting_max = limits.vmodel_changes_waiting_max
        self._counters = counters
        self._turns = anyio.Semaphore(_AT_ONCE)
        self._gathering: _Group | None = None
        self._waiting_count = 0
        self._next_s = 0.0

    async def outdated(self, entries: Sequence[Entry]) -> list[Entry]:
        """Answer which entries the store has otherwise than they are mirrored when this is called,
        or has not, all as of one moment. They are a few at most: they share a read.

        Raises ``StoreUnavailableError``, or ``LimitError`` when too many ask.
        """
        keys = [mirror.key(key_id) for mirror, key_id in entries]
        known = [_known_revision(mirror, key_id) for mirror, key_id in entries]
        if self._waiting_count >= self._waiting_max:
            raise LimitError(
                f"{self._waiting_count} calls wait for the store already, the limit; retry later",
                retry_after_ms=1000,
            )
        refuse_to_queue(self._store, self._turns.value == 0)
        self._waiting_count += 1
        try:
            revisions = await self._revisions(keys)
        finally:
            self._waiting_count -= 1
        return [
            entry
            for entry, key, revision in zip(entries, keys, known, strict=True)
            if revisions[key] != revision
        ]

    async def _revisions(self, keys: Sequence[str]) -> dict[str, int]:
        while True:
            group = self._gathering
            if group is not None and group.has_room(keys):
                group.keys.update(dict.fromkeys(keys))
                await group.wait()
            else:
                group = self._gathering = _Group(dict.fromkeys(keys))
                await self._ask(group)
            if group.failure is not None:
                raise group.failure.another()
            if group.revisions is not None:
                return group.revisions

    async def _ask(self, group: _Group) -> None:
        has_to_wait = self._turns.value == 0
        try:
            async with self._turns:
                if self._next_s > (now_s := anyio.current_time()):
                    await anyio.sleep(self._next_s - now_s)
                self._close(group)
                if len(group.waiters) + 1 >= _STORM_COUNT:
                    self._next_s = anyio.current_time() + _GATHER_S
                refuse_to_queue(self._store, has_to_wait)
                self._counters.vmodel_confirmations += 1
                keys = list(group.keys)
                revisions = await self._store.revisions(keys)
                group.revisions = dict(zip(keys, revisions, strict=True))
        except StoreUnavailableError as exc:
            group.failure = exc
        finally:
            self._close(group)
            group.end()

    def _close(self, group: _Group) -> None:
        if self._gathering is group:
            self._gathering = None


def _known_revision(mirror: Mirror, key_id: str) -> int | None:
    if mirror.is_unconfirmed(key_id):
        return None  # that of another store
    item = mirror.get(key_id)
    return 0 if item is None else item.mod_revision

"""Whether what is mirrored is what the store has now: one short question for many callers.

A mirror may be behind, without a limit. Whoever gives an answer that depends on what is mirrored,
and writes nothing that would tell, asks here first. All that ask at the moment share one read of
revisions, and while it is under way the next ones gather: so a storm of such questions costs the
store a request now and then, and no write.

The read is nobody's own: a caller that leaves only stops waiting. Else callers whose time is short
could keep all others from ever being told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import anyio

from mm.errors import LimitError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.crowd import Crowd
from mm.mesh.mirror import Mirror
from mm.mesh.ports import REVISIONS_MAX, Store
from mm.mesh.statistics import Counters
from mm.mesh.waiting import refuse_to_queue

#: After a group of so many the next one is not sent sooner than this: a read costs as much as
#: several answers, and a store that is quick would get one for every few calls of a storm. Who asks
#: again and again alone is not held up.
_STORM_COUNT: Final = 4
_GATHER_S: Final = 0.01
_STOPS: Final = "this instance stops"
#: An id, and the mirror that should have what the store has under it.
Entry: TypeAlias = tuple[Mirror, str]


@dataclass(eq=False, slots=True)
class _Group:
    """Keys asked for together; a later group begins when this one is sent, or full."""

    #: Another one was under way when it began.
    has_waited: bool
    keys: dict[str, None] = field(default_factory=dict)
    callers: Crowd = field(default_factory=Crowd)
    revisions: dict[str, int] = field(default_factory=dict)
    failure: StoreUnavailableError | None = None

    def has_room(self, keys: Sequence[str]) -> bool:
        """Answer whether these can be asked for, too."""
        return len(self.keys) + sum(key not in self.keys for key in keys) <= REVISIONS_MAX

    def fail(self, failure: StoreUnavailableError) -> None:
        """There will be no answer."""
        self.failure = failure
        self.callers.end()


class Confirmations:
    """One read at a time: so the next group is the larger the slower the store is.

    Invariant: what is answered was so at a moment between question and answer, because nobody
    joins a group that is sent.
    """

    def __init__(self, store: Store, limits: Limits, counters: Counters) -> None:
        self._store = store
        self._waiting_max = limits.vmodel_changes_waiting_max
        self._counters = counters
        #: Not sent yet; the last one may be joined.
        self._groups: deque[_Group] = deque()
        self._news = anyio.Event()
        self._is_asking = self._is_over = False
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
        refuse_to_queue(self._store, self._is_asking)
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
        if self._is_over:
            raise StoreUnavailableError(_STOPS)
        group = self._groups[-1] if self._groups else None
        if group is None or not group.has_room(keys):
            group = _Group(has_waited=self._is_asking or bool(self._groups))
            self._groups.append(group)
            self._news.set()
        group.keys.update(dict.fromkeys(keys))
        await group.callers.wait()
        if group.failure is not None:
            raise group.failure.another()
        return group.revisions

    async def run(self) -> None:
        """Ask for all of them until cancelled."""
        try:
            while True:
                while self._groups:
                    if self._next_s > (now_s := anyio.current_time()):
                        await anyio.sleep(self._next_s - now_s)
                    await self._ask(self._groups.popleft())
                self._news = anyio.Event()
                await self._news.wait()
        finally:
            self._is_over = True
            for group in self._groups:
                group.fail(StoreUnavailableError(_STOPS))

    async def _ask(self, group: _Group) -> None:
        if not group.callers:
            return  # all of them gave up
        if len(group.callers) >= _STORM_COUNT:
            self._next_s = anyio.current_time() + _GATHER_S
        self._is_asking = True
        try:
            refuse_to_queue(self._store, group.has_waited)
            self._counters.vmodel_confirmations += 1
            keys = list(group.keys)
            revisions = await self._store.revisions(keys)
            group.revisions = dict(zip(keys, revisions, strict=True))
        except StoreUnavailableError as exc:
            group.failure = exc
        except BaseException:
            group.failure = StoreUnavailableError(_STOPS)
            raise
        finally:
            self._is_asking = False
            group.callers.end()


def _known_revision(mirror: Mirror, key_id: str) -> int | None:
    if mirror.is_unconfirmed(key_id):
        return None  # that of another store
    item = mirror.get(key_id)
    return 0 if item is None else item.mod_revision

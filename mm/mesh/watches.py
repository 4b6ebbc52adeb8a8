"""Who wants to be told of each change of models or vmodels, until he leaves.

A watch keeps the ids that changed, not what they became: that is looked up when it is sent. So a
client that reads slowly hears less often, never too little, and what is kept for him is bounded by
the ids there are, and by ``PENDING_MAX``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import anyio

from mm.core.ids import InstanceId
from mm.errors import LimitError
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Item
from mm.mesh.statistics import Counters

#: Watches at an instance; each looks at each change.
WATCHES_MAX: Final = 100
#: Of them, those of one connection: a program that watches more had better watch by a prefix, and
#: nobody takes them all.
WATCHES_OF_CLIENT_MAX: Final = 20
#: Those of one identity, whatever number of connections it has: others have the rest.
WATCHES_OF_CALLER_MAX: Final = 50
#: So long a client may take nothing of what is sent; then its place is another's. Whoever is there
#: at all reads within a second.
SEND_MAX_S: Final = 60.0
#: Ids that changed and were not told yet, of one watch: a few MB. A client that is further behind
#: had better list anew.
PENDING_MAX: Final = 20_000

#: Answers the ids that are concerned when an instance came or went.
Held = Callable[[InstanceId], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who watches."""

    #: The same for all watches of a connection; None: nobody knows.
    client: object = None
    #: The name of an identity; empty: nobody asked.
    caller: str = ""


_NOBODY: Final = Watcher()


class Watch:
    """The ids that changed since they were taken, in the order of their first change."""

    def __init__(self, key_id: str = "", prefix: str = "", who: Watcher = _NOBODY) -> None:
        self._key_id = key_id
        self.who = who
        self._prefix = prefix
        self._pending: dict[str, None] = {}
        self._news = anyio.Event()
        #: Too many changes were missed, or nothing was taken for too long.
        self.is_behind = False

    def heard(self, key_id: str) -> None:
        """Note a change of an id."""
        if (self._key_id and key_id != self._key_id) or not key_id.startswith(self._prefix):
            return
        if len(self._pending) >= PENDING_MAX and key_id not in self._pending:
            self.is_behind = True
            self._pending.clear()
        if not self.is_behind:
            self._pending[key_id] = None
        self._news.set()

    def stuck(self, after_s: float) -> LimitError:
        """Answer what the client is told that takes nothing."""
        self.is_behind = True
        return LimitError(f"the client took nothing for {after_s:g} s: watch anew")

    async def next(self) -> str:
        """Wait for a change and answer its id. Raises ``LimitError`` once too many were missed."""
        while not self._pending:
            if self.is_behind:
                raise LimitError(
                    f"the client reads too slowly: more than {PENDING_MAX} changes wait; list anew,"
                    " and watch fewer ids"
                )
            self._news = anyio.Event()
            await self._news.wait()
        key_id = next(iter(self._pending))
        del self._pending[key_id]
        return key_id


class Watches:
    """The watches of one table.

    With ``instances`` and ``held``, what an instance holds changes with its coming and going.
    """

    def __init__(
        self,
        counters: Counters,
        table: Mirror,
        instances: Mirror | None = None,
        held: Held | None = None,
    ) -> None:
        self._counters = counters
        self._watches: list[Watch] = []
        self._held = held
        self._present: set[str] = set()
        table.listen(self._changed)
        if instances is not None:
            self._present.update(instances)
            instances.listen(self._instance_changed)

    def __len__(self) -> int:
        return len(self._watches)

    @contextmanager
    def open(self, key_id: str = "", prefix: str = "", who: Watcher = _NOBODY) -> Iterator[Watch]:
        """Watch an id, or all with a prefix. ``who`` does. Raises ``LimitError``."""
        try:
            self._admit(who)
        except LimitError:
            self._counters.watches_refused += 1
            raise
        watch = Watch(key_id, prefix, who)
        self._watches.append(watch)
        self._counters.watches_begun += 1
        try:
            yield watch
        finally:
            self._watches.remove(watch)
            self._counters.watches_ended += 1
            self._counters.watches_behind += watch.is_behind

    def _admit(self, who: Watcher) -> None:
        """Raise ``LimitError`` where there is no place for one more."""
        of_client = sum(each.who.client == who.client for each in self._watches)
        if who.client is not None and of_client >= WATCHES_OF_CLIENT_MAX:
            raise LimitError(f"this connection has {of_client} watches open, the limit")
        of_caller = sum(each.who.caller == who.caller for each in self._watches)
        if who.caller and of_caller >= WATCHES_OF_CALLER_MAX:
            raise LimitError(f'"{who.caller}" has {of_caller} watches open, the limit')
        if len(self._watches) >= WATCHES_MAX:
            raise LimitError(f"{WATCHES_MAX} watches are open at this instance, the limit")

    def _changed(self, key_id: str, _item: Item | None) -> None:
        for watch in self._watches:
            watch.heard(key_id)

    def _instance_changed(self, key_id: str, item: Item | None) -> None:
        if (item is not None) == (key_id in self._present):
            return
        (self._present.add if item is not None else self._present.discard)(key_id)
        if self._held is not None and self._watches:
            for held_id in self._held(InstanceId(key_id)):
                self._changed(held_id, None)

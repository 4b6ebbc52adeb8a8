"""The store of a simulated instance: a ``MemoryStore`` that is slow, deaf, late and contended.

Owns the ways to be wrong that a plain outage (``Fault``) is not, each from a seed. Held to the
store contract like every other store (``tests/edge``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import anyio
import msgspec

from mm.edge.memory_server import MemoryServer, Watcher
from mm.edge.memory_store import MemoryStore
from mm.mesh.ports import Item, Part, WatchEvent, Write

#: The attribute of the other program whose writes forestall ours.
_FOREIGN: Final = "simulatedForeignWrites"


class SimulatedStore(MemoryStore):
    """A client whose every message takes a time of its own; ``tell`` hears of each write."""

    def __init__(
        self,
        server: MemoryServer,
        rng: random.Random,
        tell: Callable[[str, str], None],
        *,
        timeout_s: float,
    ) -> None:
        super().__init__(server, timeout_s=timeout_s)
        self._rng = rng
        self._tell = tell
        #: The longest that a call is on its way, there or back; below half the time limit.
        self.way_s_max = 0.0
        #: The longest that events are on their way.
        self.late_s_max = 0.0
        #: The share of writes that somebody else forestalls.
        self.conflict_share = 0.0
        self._deaf: set[str] = set()

    # --- what a simulator arranges --------------------------------------------------------------

    def deafen(self, tables: Collection[str]) -> None:
        """Lose the watches of these tables ("registry"): nothing is heard, though calls work."""
        self._deaf.update(tables)

    def hear(self, tables: Collection[str], *, history_is_lost: bool) -> None:
        """Have these watches catch up, event by event or by the whole table."""
        self._deaf.difference_update(tables)
        for watcher in self._watchers:
            if history_is_lost and _table_of(watcher.prefix) in tables:
                watcher.pending = []
                watcher.resync_due = True
            watcher.wake()

    def lose_leases(self) -> None:
        """Have the leases revoked, as by an operator or a store that lost its mind."""
        for session in list(self._sessions):
            self.revoke_lease(session.lease_id)

    def calm(self) -> None:
        """End everything that is wrong."""
        self.way_s_max = self.late_s_max = self.conflict_share = 0.0
        self.set_fault(None)
        self.hear(list(self._deaf), history_is_lost=False)

    # --- the store ------------------------------------------------------------------------------

    def _apply(self, parts: Sequence[Part]) -> tuple[bool, Sequence[Item | None]]:
        writes = [part for part in parts if isinstance(part, Write)]
        for write in writes:
            if self._rng.random() < self.conflict_share:
                self._forestall(write.key)
        succeeded, items = super()._apply(parts)
        for write in writes:
            self._tell(write.key, _described(write, succeeded))
        return succeeded, items

    def _forestall(self, key: str) -> None:
        """Change a record as a program would that keeps to itself: it adds to its own attribute."""
        item = self.server.get(key)
        if item is None or item.lease_id:
            return
        record = _attributes(item.value)
        record[_FOREIGN] = record.get(_FOREIGN, 0) + 1
        self.server.transact([Write(key, msgspec.json.encode(record), item.mod_revision)])
        self._tell(key, "written by somebody else")

    async def _delay(self) -> None:
        if self.way_s_max:
            await anyio.sleep(self._rng.uniform(0, self.way_s_max))

    async def _take(self, watcher: Watcher) -> Sequence[WatchEvent]:
        # The delay comes after the events have left the server, so that they may be older than an
        # answer that overtakes them.
        events = self.server.take(watcher)
        if self.late_s_max:
            await anyio.sleep(self._rng.uniform(0, self.late_s_max))
        if self._hears(watcher):
            return events
        self.server.give_back(watcher, events)
        return []

    def _hears(self, watcher: Watcher) -> bool:
        return super()._hears(watcher) and _table_of(watcher.prefix) not in self._deaf


def _table_of(prefix: str) -> str:
    return prefix.rstrip("/").rpartition("/")[2]


def _attributes(value: bytes) -> dict[str, Any]:
    """Answer what stands in a record; nothing if it is none."""
    try:
        return dict(msgspec.json.decode(value, type=dict[str, Any]))
    except msgspec.DecodeError:
        return {}


def _described(write: Write, succeeded: bool) -> str:
    if write.value is None:
        text = "delete"
    else:
        record = _attributes(write.value)
        parts = {name: record[name] for name in _TOLD if record.get(name)}
        text = "write " + " ".join(f"{name}={value}" for name, value in parts.items())
    return f"{text} at {write.if_revision}: {'done' if succeeded else 'conflict'}"


#: What a story needs of a record: the copies and failures of a model, the state of an instance.
_TOLD: Final = ("instanceIds", "copies", "fails", "count", "used", "lInProg", "shutdown")

"""Ids that a mirror does not know: the store has the last word, but not at any price (spec core
7.6).

An id may be unknown because its record was written a moment ago, so the store is asked. Ids come
from clients, though, and most unknown ones stay unknown: each is asked for once a second at most,
whoever wants it, and all together are bounded. A record that comes meanwhile is found at once: the
mirror is looked at first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import anyio

from mm.errors import LimitError, StoreUnavailableError
from mm.limits import Limits
from mm.mesh.id_checks import check_id_length
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Item, Store
from mm.mesh.waiting import refuse_to_queue

#: How long "there is none" stands, and "the store cannot be reached".
ANSWER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Answer:
    until_s: float
    #: None: there is no such record.
    error: StoreUnavailableError | None
    was_connected: bool


class LookUps:
    """Strong reads of one table. The answers kept are bounded by the look-ups of a second."""

    def __init__(self, store: Store, mirror: Mirror, limits: Limits) -> None:
        self._store = store
        self._mirror = mirror
        self._limits = limits
        self._reads = anyio.Semaphore(limits.look_ups_in_flight_max)
        self._under_way: dict[str, anyio.Event] = {}
        #: All kept equally long, so the oldest is the first to go.
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        # Look-ups that may begin now; they come back as time goes by.
        self._allowed: float = limits.look_ups_per_s_max
        self._allowed_at_s = 0.0
        #: Since the start: reads of unknown ids, and those that were too many.
        self.count = 0
        self.refused_count = 0

    async def find(self, key_id: str, *, is_known_to_peer: bool = False) -> Item | None:
        """Answer the mirrored record, else the store's word of the last second.

        That word is older than a peer that has seen the record since: then the store is asked.
        Raises ``StoreUnavailableError``, ``LimitError`` when too much is asked for, or
        ``InvalidRequestError`` for an id that nothing can have.
        """
        while True:
            item = self._mirror.get(key_id)
            if item is not None:
                return item
            answer = self._answers.get(key_id)
            if answer is not None and self._stands(answer):
                if answer.error is not None:
                    raise answer.error.another()
                if not is_known_to_peer:
                    return None
            under_way = self._under_way.get(key_id)
            if under_way is None:
                return await self._look_up(key_id)
            await under_way.wait()

    async def read(self, key_id: str) -> Item | None:
        """Answer what the store says now.

        Raises ``StoreUnavailableError``, or ``LimitError`` when too many wait already.
        """
        self._check_line()
        return await self._read(key_id)

    async def _read(self, key_id: str) -> Item | None:
        async with self._reads:
            refuse_to_queue(self._store, self._reads.statistics().tasks_waiting > 0)
            item = await self._store.get(self._mirror.key(key_id))
        if item is None or self._mirror.is_outlived(item):
            return None
        self._mirror.written(item)
        return item

    async def _look_up(self, key_id: str) -> Item | None:
        """Ask the store, for everybody who wants this id; another goes on if this one gives up."""
        check_id_length(key_id, self._limits)
        self._take_turn()
        done = self._under_way[key_id] = anyio.Event()
        try:
            item = await self._read(key_id)
            if item is None:
                self._remember(key_id, None)
            return item
        except StoreUnavailableError as exc:
            self._remember(key_id, exc)
            raise
        finally:
            del self._under_way[key_id]
            done.set()

    def _take_turn(self) -> None:
        self._check_line()
        per_s, now_s = self._limits.look_ups_per_s_max, anyio.current_time()
        passed_s = now_s - self._allowed_at_s
        self._allowed = min(per_s, self._allowed + passed_s * per_s)
        self._allowed_at_s = now_s
        if self._allowed < 1:
            self._refuse(f"{per_s} were looked up in the last second")
        self._allowed -= 1
        self.count += 1

    def _check_line(self) -> None:
        """Raise if whoever asks the store now should not stand in line for it."""
        refuse_to_queue(self._store, self._reads.value == 0)
        if self._reads.statistics().tasks_waiting >= self._limits.look_ups_waiting_max:
            self._refuse(f"{self._limits.look_ups_waiting_max} look-ups wait already")

    def _refuse(self, reason: str) -> None:
        self.refused_count += 1
        raise LimitError(
            f"too many ids that are not known here are asked for: {reason}, the limit;"
            " retry later, or ask for ids that are registered",
            retry_after_ms=round(1000 * ANSWER_S),
        )

    def _stands(self, answer: _Answer) -> bool:
        if answer.until_s <= anyio.current_time():
            return False
        # A store that came back, or went away for good, has something else to say.
        return answer.error is None or answer.was_connected == self._store.connected

    def _remember(self, key_id: str, error: StoreUnavailableError | None) -> None:
        now_s = anyio.current_time()
        while self._answers and next(iter(self._answers.values())).until_s <= now_s:
            self._answers.popitem(last=False)
        self._answers[key_id] = _Answer(now_s + ANSWER_S, error, self._store.connected)
        self._answers.move_to_end(key_id)

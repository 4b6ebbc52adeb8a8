"""Which instance does what only one should do (spec core 1.8).

Owns our candidature and the watch of all of them: whoever stands longest is the leader. What the
leader does must be safe to do twice: after a partition two may believe in themselves for a while.
"""

from __future__ import annotations

import logging
import random
from functools import partial

import anyio

from mm.core.ids import InstanceId
from mm.core.jitter import jittered_s
from mm.errors import StoreUnavailableError
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Item, Session, Store, Write
from mm.mesh.waiting import first_of

logger = logging.getLogger(__name__)

#: Between tries to stand, on the average: the store is away, or the lease turns out to be lost.
RETRY_S = 1.0


class Leader:
    """Stands for election as long as it runs; each candidate computes the leader for itself.

    A candidate is a key bound to the session's lease; the one created first leads. Rewriting a key
    keeps its place, so a lease that is replaced in time costs nobody the lead.
    """

    def __init__(self, *, store: Store, prefix: str, me: InstanceId, session: Session) -> None:
        self._store = store
        self._session = session
        self._me = me
        self._candidate = f"_{me}"
        self._rng = random.Random(self._candidate)
        self._mirror = Mirror(store, prefix, self._changed)
        self._has_stood = False
        self._has_resigned = False
        #: Set, and replaced, whenever our candidate key changed.
        self._own_changed = anyio.Event()
        #: The leader as far as is known here; None while there is none.
        self.leader_id: InstanceId | None = None
        #: Set, and replaced, whenever ``is_leader`` changed.
        self.changed = anyio.Event()

    @property
    def is_leader(self) -> bool:
        """Whether this instance leads, as far as it knows. Without the store nothing changes."""
        return self.leader_id == self._me

    async def run(self) -> None:
        """Stand, and follow the election, until cancelled."""
        async with anyio.create_task_group() as group:
            await group.start(self._mirror.run)
            while True:
                changed, lease_id = self._own_changed, self._session.lease_id
                try:
                    is_standing = self._has_resigned or await self._stand()
                except StoreUnavailableError as exc:
                    logger.debug("not standing for election yet: %s", exc)
                    is_standing = False
                if is_standing:
                    await self._wait_for_reason(changed, lease_id)
                else:
                    await anyio.sleep(jittered_s(RETRY_S, self._rng))

    async def resign(self) -> None:
        """Stand no more: this instance is about to leave. Raises ``StoreUnavailableError``."""
        self._has_resigned = True
        if not self._has_stood:
            return
        key = self._mirror.key(self._candidate)
        await self._store.write(Write(key, None, if_revision=None))

    async def _stand(self) -> bool:
        """See that our key is there, with the present lease; answers whether it is."""
        lease_id = self._session.lease_id or await self._session.wait_change(0)
        known = self._mirror.get(self._candidate)
        if known is not None and known.lease_id == lease_id and known.mod_revision:
            return True
        self._has_stood = True
        result = await self._store.write(
            Write(
                self._mirror.key(self._candidate),
                self._candidate.encode(),
                if_revision=known.mod_revision if known is not None else 0,
                lease_id=lease_id,
            )
        )
        item = result.item
        if item is not None:
            # Who stood before a new key of ours is told by the watch, in order; until it has come
            # that far we would take ourselves for the first. So it is the watch that tells of us.
            if item.create_revision <= self._mirror.revision:
                self._mirror.written(item)
        elif known is not None:
            self._mirror.deleted_by_us(self._candidate, known.mod_revision)
        return result.succeeded

    async def _wait_for_reason(self, changed: anyio.Event, lease_id: int) -> None:
        """Return when our key or our lease is not what it was."""
        await first_of(changed.wait, partial(self._session.wait_change, lease_id))

    def _changed(self, key_id: str, _item: Item | None) -> None:
        if key_id == self._candidate:
            self._own_changed.set()
            self._own_changed = anyio.Event()
        was_leader = self.is_leader
        # Revision 0: left of a store that was emptied. Who still lives stands anew.
        standing = [
            (item.create_revision, item.value)
            for _, item in self._mirror.items()
            if item.mod_revision
        ]
        self.leader_id = _instance_of(min(standing)[1]) if standing else None
        if self.is_leader != was_leader:
            logger.info("instance %s %s the leader", self._me, "is" if self.is_leader else "is not")
            self.changed.set()
            self.changed = anyio.Event()


def _instance_of(value: bytes) -> InstanceId:
    """Answer the id in a candidate's value: its first line, without the underscore before it."""
    line = value.split(b"\n", 1)[0].decode(errors="replace")
    return InstanceId(line.removeprefix("_"))

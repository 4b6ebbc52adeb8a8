"""The instances of the cluster, as this one sees them: records, addresses, who cannot be reached
(spec core 1.5, 1.11).

Owns the mirror of the instance table and the table's peer handles, and tells the cluster state of
both. Publishing our own record is ``publisher``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from mm.core.cluster_state import ClusterState
from mm.core.copy_record import CopyStage
from mm.core.ids import InstanceId, ModelId
from mm.core.records import InstanceRecord, ModelRecord, RecordError
from mm.core.routing import ComingCopy, ReadyCopy, is_ready
from mm.mesh.departures import Departures
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Clock, Item, Store
from mm.mesh.reach import Reach
from mm.mesh.registry import Registry
from mm.table import Table

logger = logging.getLogger(__name__)

#: Copies of an instance whose record vanished, though it was not shutting down, are still called
#: this long: a store that was away lets leases run out before anybody can renew them, and then all
#: instances are gone for a moment. One that is really gone is found out by the first call.
GONE_CALLED_S = 10.0


@dataclass(frozen=True, slots=True)
class _Gone:
    """Where an instance was that has no record any more."""

    address: str
    handle: int
    until_s: float


@dataclass(frozen=True, slots=True)
class Holders:
    """The instances with a copy of one model, this one among them; those that are gone are not."""

    ready: tuple[InstanceId, ...]
    coming: tuple[InstanceId, ...]
    #: Ready at instances of the Java mesh: their clients are served, ours cannot be sent there.
    foreign: tuple[InstanceId, ...]
    #: Of the ready ones, those that are there for sure: others can ask them something.
    deciding: tuple[InstanceId, ...]
    #: And those that can be called at this moment, and are not about to stop.
    serving: tuple[InstanceId, ...]


class Members:
    """Who is there. Invariant: an instance has a table handle exactly while its record is known and
    it is not us.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        *,
        me: InstanceId,
        table: Table,
        registry: Registry,
        cluster: ClusterState,
        clock: Clock,
        assumed_load_ms: Callable[[str], int],
    ) -> None:
        self._me = me
        self._table = table
        self._registry = registry
        self._cluster = cluster
        self._clock = clock
        self._assumed_load_ms = assumed_load_ms
        self._records: dict[InstanceId, InstanceRecord] = {}
        self._handles: dict[InstanceId, int] = {}
        self._reach = Reach(cluster)
        self._gone: dict[InstanceId, _Gone] = {}
        self._departures = Departures()
        self._mirror = Mirror(store, prefix, self._changed)
        #: Told when what ``callable_now`` answers may have changed.
        self.on_reach: Callable[[], None] | None = None
        #: Others that should get no new work; True: because they are shutting down.
        self._unable: dict[InstanceId, bool] = {}
        #: Set, and replaced, whenever an instance vanished,
        self.somebody_vanished = anyio.Event()
        #: The same, whenever one came or vanished,
        self.somebody_moved = anyio.Event()
        #: whenever anybody's record changed, and ours,
        self.news = anyio.Event()
        self.own_changed = anyio.Event()
        #: and whenever one of the two counts below changed.
        self.standing_changed = anyio.Event()
        self.run = self._mirror.run
        registry.listen(self._record_changed)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._records

    @property
    def stopping_count(self) -> int:
        """Others that are shutting down."""
        return sum(self._unable.values())

    @property
    def foreign_count(self) -> int:
        """Instances of the Java mesh."""
        return sum(map(self.is_foreign, self._records))

    @property
    def able_count(self) -> int:
        """Others that are there to stay, and whose first loads did not fail."""
        return len(self._records) - (self._me in self._records) - len(self._unable)

    def key(self) -> str:
        """Answer the store's key of our own record."""
        return self._mirror.key(self._me)

    @property
    def mirror(self) -> Mirror:
        """The records as they came."""
        return self._mirror

    def own_item(self) -> Item | None:
        """Answer our own record as the store has it."""
        return None if self._mirror.is_unconfirmed(self._me) else self._mirror.get(self._me)

    def written(self, item: Item) -> None:
        """Take over what the publisher just wrote."""
        self._mirror.written(item)

    def handle(self, instance_id: InstanceId) -> int | None:
        """Answer the table's handle of an instance that can be called now, else None."""
        return None if self._reach.is_away(instance_id) else self._handle(instance_id)

    def _handle(self, instance_id: InstanceId) -> int | None:
        """Answer the handle of an instance that has an address, whether or not it was reached."""
        handle = self._handles.get(instance_id)
        if handle is None or not self._records[instance_id].address:
            gone = self._gone.get(instance_id)
            if gone is None:
                return None
            if gone.until_s <= (now_s := anyio.current_time()):
                self._bury(now_s)  # else hits would go on drawing its copies
                return None
            handle = gone.handle
        return handle

    def handle_if_known(self, instance_id: InstanceId) -> int | None:
        """Answer the table's handle of an instance, reachable or not."""
        return self._handles.get(instance_id)

    def callable_now(self) -> list[tuple[int, InstanceId, str, float]]:
        """Answer (handle, id, host:port, until when to leave it alone) of everybody who has an
        address, also of those who vanished a moment ago; the time on the clock of anyio.
        """
        found = [
            (handle, name, self._records[name].address, self._reach.away_until_s(name))
            for name, handle in self._handles.items()
            if self._records[name].address
        ]
        for name, gone in self._gone.items():
            found.append((gone.handle, name, gone.address, self._reach.away_until_s(name)))
        return found

    def name_of(self, handle: int) -> InstanceId | None:
        """Answer whose handle it is, None for one that has ended."""
        name = self._table.instance_of(handle)
        return None if name is None else InstanceId(name)

    def _reach_changed(self) -> None:
        if self.on_reach is not None:
            self.on_reach()

    def instance_of(self, handle: int) -> InstanceId | None:
        """Answer the instance of a handle, None if it cannot be called now."""
        name = self._table.instance_of(handle)
        if name is None or self.handle(InstanceId(name)) != handle:
            return None
        return InstanceId(name)

    def copies_of(
        self, model_id: ModelId, record: ModelRecord, now_ms: int
    ) -> tuple[list[ReadyCopy], list[ComingCopy], list[InstanceId]]:
        """Answer the copies of a model at other instances that can be called now: those that serve,
        with the calls in flight that they told of, and those on their way; then, of those that
        could not be reached a moment ago, the ones that serve.
        """
        ready: list[ReadyCopy] = []
        coming: list[ComingCopy] = []
        suspects: list[InstanceId] = []
        loads = dict(self._table.peer_loads(model_id))
        is_table_late = False
        for instance_id, enqueued_ms in record.copies.items():
            handle = None if instance_id == self._me else self._handle(instance_id)
            if handle is None:
                continue
            if self._reach.is_away(instance_id):
                if self._is_ready(record, instance_id, now_ms):
                    suspects.append(instance_id)
                continue
            if self._is_ready(record, instance_id, now_ms):
                is_table_late = is_table_late or handle not in loads
                ready.append(ReadyCopy(instance_id, loads.get(handle, 0)))
                continue
            state = record.copy_state(instance_id)
            if state is None:
                coming.append(ComingCopy(instance_id, enqueued_ms))
            else:
                is_queued = state.stage is CopyStage.QUEUED
                coming.append(ComingCopy(instance_id, state.since_ms, is_queued))
        if is_table_late:
            # One that says nothing of its state, and has had the time to load since.
            self._record_changed(model_id, record)
        return ready, coming, suspects

    def holders(self, record: ModelRecord, now_ms: int) -> Holders:
        """Answer who has, and who is about to have, a copy of a model."""
        ready: list[InstanceId] = []
        coming: list[InstanceId] = []
        foreign: list[InstanceId] = []
        now_s = anyio.current_time()
        for instance_id in record.copies:
            is_ready = self._is_ready(record, instance_id, now_ms)
            if self.is_foreign(instance_id):
                foreign += [instance_id] if is_ready else []
            elif instance_id == self._me or self._is_there(instance_id, now_s):
                (ready if is_ready else coming).append(instance_id)
        there = [(each, self._records.get(each)) for each in ready]
        return Holders(
            ready=tuple(ready),
            coming=tuple(coming),
            foreign=tuple(foreign),
            deciding=tuple(i for i, known in there if known is not None),
            serving=tuple(
                i
                for i, known in there
                if known is not None and not known.shutting_down and not self._reach.is_away(i)
            ),
        )

    def address(self, instance_id: InstanceId) -> str:
        """Answer host:port of an instance that has a handle."""
        record = self._records.get(instance_id)
        return record.address if record is not None else self._gone[instance_id].address

    def address_or_none(self, instance_id: InstanceId) -> str | None:
        """Answer host:port of an instance that can be called now, else None."""
        return None if self.handle(instance_id) is None else self.address(instance_id)

    def mark_unreachable(self, instance_id: InstanceId, now_s: float) -> None:
        """A connection failed: leave the instance alone for a while."""
        if self._known_handle(instance_id) is None:
            return  # gone for good meanwhile
        if self._reach.failed(instance_id, now_s):
            self._reach_changed()

    def mark_silent(self, instance_id: InstanceId) -> bool:
        """It takes calls and does not answer: leave it alone until it does. False if that is no
        news.
        """
        if self._known_handle(instance_id) is None or not self._reach.fell_silent(instance_id):
            return False
        self._reach_changed()
        return True

    @property
    def silent_count(self) -> int:
        """How many take calls and do not answer."""
        return self._reach.silent_count

    def mark_reachable(self, instance_id: InstanceId) -> bool:
        """It answered; answers whether it was silent."""
        was_silent = self._reach.is_silent(instance_id)
        if self._reach.answered(instance_id):
            self._reach_changed()
        return was_silent

    def next_reachable_ms(self) -> int | None:
        """Answer in how long one that cannot be reached now is tried again; None if all can be."""
        return self._reach.next_ms()

    def place(self) -> int:
        """Answer how many have a lower id than this one."""
        return sum(each < self._me for each in self._records)

    def is_foreign(self, instance_id: InstanceId) -> bool:
        """Answer whether an instance is there and cannot be asked: one of the Java mesh."""
        found = self._records.get(instance_id)
        return found is not None and not found.address and instance_id != self._me

    def stays(self, instance_id: InstanceId) -> bool:
        """Answer whether an instance is there, not about to stop, and can be asked."""
        found = self._records.get(instance_id)
        return found is not None and bool(found.address) and not found.shutting_down

    def present(self) -> frozenset[InstanceId]:
        """Answer everybody who is there, this instance among them."""
        return frozenset(self._records)

    def left(self) -> frozenset[InstanceId]:
        """Answer who left in order of late, and is not back."""
        return frozenset(self._departures)

    def staying(self) -> list[InstanceId]:
        """Answer the others that are there to stay."""
        return [each for each in self._records if each != self._me and self.stays(each)]

    def serves(self, instance_id: InstanceId, record: ModelRecord) -> bool:
        """Answer whether an instance that is there to stay has a ready copy, as its record says."""
        if instance_id not in record.copies or not self.stays(instance_id):
            return False
        return self._is_ready(record, instance_id, self._clock.now_ms())

    def address_if_known(self, instance_id: InstanceId) -> str | None:
        """Answer host:port of an instance that is there, or was a moment ago, reachable or not."""
        return None if self._known_handle(instance_id) is None else self.address(instance_id)

    def _changed(self, key_id: str, item: Item | None) -> None:
        instance_id = InstanceId(key_id)
        self.news.set()
        self.news = anyio.Event()
        if instance_id == self._me:
            self.own_changed.set()
            self.own_changed = anyio.Event()
        record = None
        if item is not None:
            try:
                record = InstanceRecord.decode(item.value)
            except RecordError as exc:
                logger.error("record %s skipped: %s", item.key, exc)
        if record is None:
            self._forget(instance_id)
            return
        known = self._records.get(instance_id)
        self._records[instance_id] = record
        self._departures.forget(instance_id)
        if known is None:
            self._moved()
        if record.address:
            self._cluster.put(
                instance_id, record, now_ms=self._clock.now_ms(), now_s=anyio.current_time()
            )
        else:  # one of the Java mesh: nothing can be loaded there, so its room is none
            self._cluster.remove(instance_id, now_ms=self._clock.now_ms())
        if instance_id == self._me:
            return
        self._note_standing(instance_id, known, record)
        if known is None or known.start_time_ms != record.start_time_ms:
            where = f"at {record.address}" if record.address else "of the Java mesh: not called"
            logger.info("instance %s is there, %s", instance_id, where)
            self.mark_reachable(instance_id)
        self._gone.pop(instance_id, None)
        if instance_id not in self._handles:
            self._handles[instance_id] = self._table.add_instance(instance_id)
            for model_id in self._registry.held_by(instance_id):
                self._record_changed(model_id, self._registry.get(model_id))
        self._reach_changed()

    def _forget(self, instance_id: InstanceId) -> None:
        record = self._records.pop(instance_id, None)
        if record is None:
            return
        if record.shutting_down:
            self._departures.note(instance_id, anyio.current_time())
        self._cluster.remove(instance_id, now_ms=self._clock.now_ms())
        self._note_standing(instance_id, record, None)
        handle = self._handles.pop(instance_id, None)
        if handle is not None:
            logger.info("instance %s is gone", instance_id)
            if record.shutting_down or not record.address:
                self._table.remove_instance(handle)
                self._reach.forget(instance_id)
            else:
                until_s = anyio.current_time() + GONE_CALLED_S
                self._gone[instance_id] = _Gone(record.address, handle, until_s)
        self._bury(anyio.current_time())
        self._reach_changed()
        self.somebody_vanished.set()
        self.somebody_vanished = anyio.Event()
        self._moved()

    def _moved(self) -> None:
        self.somebody_moved.set()
        self.somebody_moved = anyio.Event()

    def _note_standing(
        self, instance_id: InstanceId, before: InstanceRecord | None, now: InstanceRecord | None
    ) -> None:
        if _standing(before) == _standing(now):
            return
        self._unable.pop(instance_id, None)
        if now is not None and (now.shutting_down or now.loads_fail):
            self._unable[instance_id] = now.shutting_down
        self.standing_changed.set()
        self.standing_changed = anyio.Event()

    def _bury(self, now_s: float) -> None:
        """Forget for good who has been gone long enough."""
        for instance_id, gone in list(self._gone.items()):
            if gone.until_s <= now_s:
                del self._gone[instance_id]
                self._reach.forget(instance_id)
                self._table.remove_instance(gone.handle)
                self._reach_changed()

    def _is_ready(self, record: ModelRecord, instance_id: InstanceId, now_ms: int) -> bool:
        return is_ready(record, instance_id, now_ms, self._assumed_load_ms(record.info.model_type))

    def _is_there(self, instance_id: InstanceId, now_s: float) -> bool:
        """Answer whether an instance is there, or may be back in a moment."""
        gone = self._gone.get(instance_id)
        return instance_id in self._records or (gone is not None and gone.until_s > now_s)

    def _known_handle(self, instance_id: InstanceId) -> int | None:
        """Answer the handle of an instance that is there, or was a moment ago."""
        handle = self._handles.get(instance_id)
        if handle is None and instance_id in self._gone:
            handle = self._gone[instance_id].handle
        return handle

    def _record_changed(self, model_id: ModelId, record: ModelRecord | None) -> None:
        """Tell the table where ready copies are: those on their way are no hits."""
        handles = []
        if record is not None:
            now_ms = self._clock.now_ms()
            handles = [
                handle
                for instance_id in record.copies
                if (handle := self._known_handle(instance_id)) is not None
                and self._is_ready(record, instance_id, now_ms)
            ]
        self._table.set_peers(model_id, handles)
        if not handles and self._table.state(model_id) == 0 and not self._table.weight(model_id):
            self._table.discard(model_id)


def _standing(record: InstanceRecord | None) -> tuple[bool, bool] | None:
    return None if record is None else (record.shutting_down, record.loads_fail)

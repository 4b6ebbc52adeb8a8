"""The plain-Python twin of the table: it says what ``mm/_lru.pyx`` means (design section 4).

It owns one readable form of every rule (spec core 3.2), and no speed: finding the oldest copy
looks at all of them. Both pass ``tests/table/test_table.py``, and ``tests/table/test_in_step.py``
drives them side by side; a change here must land there too.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator

from mm._lru_py_readers import Readers
from mm._lru_py_slot import Slot
from mm._lru_words import (
    I64_MAX,
    LOCAL,
    NONE,
    U32_MAX,
    U64_MASK,
    CopyState,
    Evicted,
    Instances,
    checked,
    checked_id,
)


class Table:
    """What models there are, which have a copy here, in which order they go, and who else has one.

    Invariants (``check_invariants``): 1. copies that count go by (last used, order of ``put``),
    those kept after all others; 2. ``used_units`` is the sum of their weights and never above
    ``capacity_units``: even one copy larger than the table does not stay; 3. a discarded model is
    known only while something holds it: a copy that counts, a state other than ABSENT, a call, an
    alias; 4. an alias names a model that is here; 5. each instance has one live handle.

    What is asked of an unknown model is answered as for one without copies; what is demanded of
    it (``set_*`` but ``set_peers``, ``begin_unload``, ``unpin``) is a KeyError.
    """

    def __init__(self, capacity_units: int) -> None:
        self._capacity_units = checked("capacity_units", capacity_units, I64_MAX)
        self._used_units = 0
        self._kept_units = 0
        self._sequence = 0
        self._slots: dict[str, Slot] = {}
        self._cached: dict[str, Slot] = {}
        self._aliases: dict[str, Slot] = {}
        self._instances = Instances()
        self._readers = Readers()

    # Slots

    def add(self, model_id: str) -> None:
        """Make the model known (again); a model already known stays as it is."""
        self._slot_for(model_id)

    def discard(self, model_id: str) -> None:
        """Forget the model and its peers as soon as nothing holds it; until then it stays known."""
        slot = self._slots.get(checked_id(model_id))
        if slot is not None:
            slot.discarded = True
            slot.peers.clear()
            self._let_go(slot)

    def __contains__(self, model_id: object) -> bool:
        return isinstance(model_id, str) and model_id in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    # The order of local copies

    @property
    def capacity_units(self) -> int:
        return self._capacity_units

    @property
    def used_units(self) -> int:
        return self._used_units

    @property
    def count(self) -> int:
        return len(self._cached)

    @property
    def kept_units(self) -> int:
        return self._kept_units

    def put(self, model_id: str, weight_units: int, last_used_ms: int) -> list[Evicted]:
        """Count a copy here; of one that counts already set the weight and raise the time."""
        checked_id(model_id)
        checked("weight_units", weight_units, U32_MAX)
        checked("last_used_ms", last_used_ms, I64_MAX)
        slot = self._slot_for(model_id)
        if slot.cached:
            slot.last_used_ms = max(slot.last_used_ms, last_used_ms)
        else:
            self._sequence += 1
            slot.cached = True
            slot.sequence = self._sequence
            slot.last_used_ms = last_used_ms
            slot.weight_units = 0
            self._cached[model_id] = slot
        self._weigh(slot, weight_units)
        return self._evict()

    def set_weight(self, model_id: str, weight_units: int) -> list[Evicted]:
        """Change the weight of a copy that counts; growing may evict it itself."""
        slot = self._cached.get(checked_id(model_id))
        checked("weight_units", weight_units, U32_MAX)
        if slot is None:
            raise KeyError(model_id)
        self._weigh(slot, weight_units)
        return self._evict()

    def keep(self, model_id: str, kept: bool) -> bool:
        """Let a copy go only when no other is left, or in its turn again; False if none counts."""
        slot = self._cached.get(checked_id(model_id))
        if slot is None:
            return False
        if slot.kept != kept:
            if kept:
                self._sequence += 1
                slot.sequence = self._sequence
            slot.kept = kept
            self._kept_units += slot.weight_units if kept else -slot.weight_units
        return True

    def is_kept(self, model_id: str) -> bool:
        """Answer whether the copy is kept."""
        slot = self._cached.get(checked_id(model_id))
        return slot is not None and slot.kept

    def set_capacity(self, capacity_units: int) -> list[Evicted]:
        """Change the capacity, evicting what no longer fits."""
        self._capacity_units = checked("capacity_units", capacity_units, I64_MAX)
        return self._evict()

    def remove(self, model_id: str) -> Evicted | None:
        """Take one copy out of the order, as eviction does; None if it does not count."""
        slot = self._cached.get(checked_id(model_id))
        return None if slot is None else self._uncache(slot)

    def weight(self, model_id: str) -> int:
        """Answer the weight of the copy, 0 if none counts."""
        slot = self._cached.get(checked_id(model_id))
        return 0 if slot is None else slot.weight_units

    def touch(self, model_id: str, now_ms: int) -> bool:
        """Raise the time of last use, never lower it; False if no copy counts."""
        slot = self._cached.get(checked_id(model_id))
        checked("now_ms", now_ms, I64_MAX)
        if slot is None:
            return False
        slot.last_used_ms = max(slot.last_used_ms, now_ms)
        return True

    def last_used(self, model_id: str) -> int | None:
        """Answer the time of last use, None if no copy counts."""
        slot = self._cached.get(checked_id(model_id))
        return None if slot is None else slot.last_used_ms

    def oldest(self) -> tuple[str, int] | None:
        """Answer the copy that would go next and its time, None if there is none but those kept."""
        slot = min(self._cached.values(), key=lambda each: each.order, default=None)
        return None if slot is None or slot.kept else (slot.model_id, slot.last_used_ms)

    def cached(self) -> Iterator[tuple[str, int, int]]:
        """Iterate (model id, weight, last used) over a snapshot, oldest first, those kept last."""
        ordered = sorted(self._cached.values(), key=lambda each: each.order)
        return iter([(each.model_id, each.weight_units, each.last_used_ms) for each in ordered])

    # The life of the local copy

    def state(self, model_id: str) -> CopyState:
        """Answer the state of the copy here, ABSENT for an unknown model."""
        slot = self._slots.get(checked_id(model_id))
        return CopyState.ABSENT if slot is None else slot.state

    def set_state(self, model_id: str, state: CopyState) -> None:
        """Store the state; which step may follow which is the caller's to know."""
        slot = self._known(model_id)
        slot.state = CopyState(state)
        self._let_go(slot)

    def begin_unload(self, model_id: str) -> int:
        """Store UNLOADING, so that no call pins any more; answer the calls still in flight."""
        slot = self._known(model_id)
        slot.state = CopyState.UNLOADING
        return slot.in_flight

    def pin(self, model_id: str) -> bool:
        """Count a call in flight on a copy that is READY; False, and nothing counted, otherwise."""
        slot = self._slots.get(checked_id(model_id))
        if slot is None or slot.state is not CopyState.READY:
            return False
        slot.in_flight += 1
        slot.calls = (slot.calls + 1) & U32_MAX
        return True

    def unpin(self, model_id: str) -> None:
        """End a call that ``pin`` counted."""
        slot = self._known(model_id)
        if slot.in_flight == 0:
            raise ValueError(f"no call is in flight on {model_id!r}")
        slot.in_flight -= 1
        self._let_go(slot)

    def in_flight(self, model_id: str) -> int:
        """Answer the calls that hold the copy here."""
        slot = self._slots.get(checked_id(model_id))
        return 0 if slot is None else slot.in_flight

    def set_concurrency_max(self, model_id: str, calls_max: int) -> None:
        """Store how many calls the copy takes at a time, 0 for no limit; ``pin`` ignores it."""
        self._known(model_id).concurrency_max = checked("calls_max", calls_max, U32_MAX)

    def concurrency_max(self, model_id: str) -> int:
        """Answer what ``set_concurrency_max`` stored, else 0."""
        slot = self._slots.get(checked_id(model_id))
        return 0 if slot is None else slot.concurrency_max

    def set_flags(self, model_id: str, flags: int) -> None:
        """Store 32 bits whose meaning is the caller's."""
        self._known(model_id).flags = checked("flags", flags, U32_MAX)

    def flags(self, model_id: str) -> int:
        """Answer what ``set_flags`` stored, else 0."""
        slot = self._slots.get(checked_id(model_id))
        return 0 if slot is None else slot.flags

    def take_busy(self) -> list[tuple[str, int, int]]:
        """Answer (model id, calls pinned since last asked, calls in flight) of those with either.

        Of copies that count, in any order.
        """
        busy = []
        for slot in self._cached.values():
            if slot.calls or slot.in_flight:
                busy.append((slot.model_id, slot.calls, slot.in_flight))
                slot.calls = 0
        return busy

    # Other instances, and which of them hold a ready copy

    def add_instance(self, instance_id: str) -> int:
        """Answer the handle of the instance, a new one if it has none."""
        return self._instances.add(instance_id)

    def remove_instance(self, handle: int) -> None:
        """End the handle everywhere at once; it never comes back. An ended one is left alone."""
        self._instances.remove(handle)

    def instance_of(self, handle: int) -> str | None:
        """Answer whose handle it is, None for one that has ended or never was."""
        return self._instances.instance_of(handle)

    def set_peers(self, model_id: str, handles: Iterable[int]) -> None:
        """Say which instances hold a ready copy; a model with one becomes known.

        Loads told before are kept; handles that have ended, and doubles, are dropped.
        """
        slot = self._slots.get(checked_id(model_id))
        wanted = [handle for handle in handles if self._instances.live(handle)]
        if wanted:
            slot = self._slot_for(model_id)
        if slot is not None:
            slot.peers = {handle: slot.peers.get(handle, 0) for handle in wanted}

    def peers(self, model_id: str) -> list[int]:
        """Answer the live handles in the order given."""
        slot = self._slots.get(checked_id(model_id))
        return (
            []
            if slot is None
            else [handle for handle in slot.peers if self._instances.live(handle)]
        )

    def peer_loads(self, model_id: str) -> list[tuple[int, int]]:
        """Answer (handle, calls in flight as that copy told last) of the live peers, in order."""
        slot = self._slots.get(checked_id(model_id))
        peers = {} if slot is None else slot.peers
        return [item for item in peers.items() if self._instances.live(item[0])]

    def report_load(self, handle: int, model_id: str, in_flight: int) -> None:
        """Note the calls in flight that a copy told of; one that is no peer is left alone."""
        slot = self._slots.get(checked_id(model_id))
        checked("in_flight", in_flight, U32_MAX)
        if slot is not None and handle in slot.peers:
            slot.peers[handle] = in_flight

    def choose(self, model_id: str, random: int, exclude: Collection[int] = ()) -> int:
        """Pick a ready copy: of two drawn with ``random`` (64 bits) the one with fewer calls.

        The copy here wins a tie, else the first drawn. The low half draws the first, the high
        half the second among the rest.
        """
        slot = self._slots.get(checked_id(model_id))
        if slot is None:
            return NONE
        drawn = [(LOCAL, slot.in_flight)] if slot.state is CopyState.READY else []
        drawn += [item for item in slot.peers.items() if self._instances.live(item[0])]
        drawn = [item for item in drawn if item[0] not in exclude]
        if len(drawn) < 2:
            return drawn[0][0] if drawn else NONE
        random &= U64_MASK
        first = (random & U32_MAX) * len(drawn) >> 32
        second = (random >> 32) * (len(drawn) - 1) >> 32
        second += second >= first
        one, other = drawn[first], drawn[second]
        if other[1] < one[1] or (other[1] == one[1] and other[0] == LOCAL):
            one = other
        return one[0]

    # VModel ids

    def set_alias(self, vmodel_id: str, model_id: str) -> None:
        """Let the vmodel id name this model, which it makes known and holds."""
        checked_id(vmodel_id)
        slot = self._slot_for(model_id)
        slot.alias_count += 1
        before = self._aliases.get(vmodel_id)
        if before is None:
            self._readers.claim()
        self._aliases[vmodel_id] = slot
        if before is not None:
            self._release_alias(before)

    def remove_alias(self, vmodel_id: str) -> None:
        """Forget the vmodel id; one that is unknown is left alone."""
        slot = self._aliases.pop(checked_id(vmodel_id), None)
        if slot is not None:
            self._readers.retire()
            self._release_alias(slot)

    def resolve(self, vmodel_id: str) -> str | None:
        """Answer the id of the vmodel's active model, None if it is unknown."""
        slot = self._aliases.get(checked_id(vmodel_id))
        return None if slot is None else slot.model_id

    # Readers in other threads (here: only their book-keeping)

    def register_reader(self) -> int:
        """Answer the number of a new reader, which is offline."""
        return self._readers.register()

    def unregister_reader(self, reader: int) -> None:
        """Give the number back; the reader must not read any more."""
        self._readers.unregister(reader)

    def reader_online(self, reader: int) -> None:
        """Pass a quiescent point: the reader has forgotten all it saw before, and reads on."""
        self._readers.online(reader)

    def reader_offline(self, reader: int) -> None:
        """Pass a quiescent point, and read nothing until ``reader_online``."""
        self._readers.offline(reader)

    def reclaim(self) -> int:
        """Forget discarded models that calls have left; answer how many slots readers let go."""
        for slot in [each for each in self._slots.values() if each.discarded]:
            self._let_go(slot)
        return self._readers.claim()

    def memory_bytes(self) -> int:
        """Answer about how much memory the table takes."""
        total = (
            sys.getsizeof(self._slots) + sys.getsizeof(self._cached) + sys.getsizeof(self._aliases)
        )
        total += sum(sys.getsizeof(key) for key in self._aliases)
        for model_id, slot in self._slots.items():
            total += sys.getsizeof(model_id) + sys.getsizeof(slot) + sys.getsizeof(slot.peers)
        return total

    def check_invariants(self) -> None:
        """Walk everything and raise AssertionError at the first thing that is not as it must be."""
        assert self._used_units <= self._capacity_units, "more in use than there is room"
        assert self._used_units == sum(each.weight_units for each in self._cached.values())
        for model_id, slot in self._slots.items():
            assert slot.model_id == model_id, "a slot is under another id"
            assert slot.cached == (model_id in self._cached), "the order and the slot disagree"
            assert slot.in_flight >= 0, "more calls ended than began"
            assert slot.cached or not slot.kept, "a copy that does not count is kept"
            assert not (slot.discarded and slot.free), "discarded and free, but still here"
        for slot in self._cached.values():
            assert self._slots.get(slot.model_id) is slot, "a copy counts without a slot"
        kept = [each.weight_units for each in self._cached.values() if each.kept]
        assert self._kept_units == sum(kept), "what is kept does not add up"
        sequences = {each.sequence for each in self._cached.values()}
        assert len(sequences) == len(self._cached), "two copies share a place in the order"
        for slot in self._aliases.values():
            assert self._slots.get(slot.model_id) is slot, "an alias names a model that is not here"
        assert sum(each.alias_count for each in self._slots.values()) == len(self._aliases)
        self._instances.check_invariants()

    # Parts

    def _known(self, model_id: str) -> Slot:
        slot = self._slots.get(checked_id(model_id))
        if slot is None:
            raise KeyError(model_id)
        return slot

    def _slot_for(self, model_id: str) -> Slot:
        slot = self._slots.get(checked_id(model_id))
        if slot is None:
            self._readers.claim()
            slot = self._slots[model_id] = Slot(model_id)
        slot.discarded = False
        return slot

    def _weigh(self, slot: Slot, weight_units: int) -> None:
        delta_units = weight_units - slot.weight_units
        self._used_units += delta_units
        self._kept_units += delta_units if slot.kept else 0
        slot.weight_units = weight_units

    def _evict(self) -> list[Evicted]:
        evicted = []
        while self._used_units > self._capacity_units:
            evicted.append(self._uncache(min(self._cached.values(), key=lambda each: each.order)))
        return evicted

    def _uncache(self, slot: Slot) -> Evicted:
        evicted = Evicted(slot.model_id, slot.weight_units, slot.last_used_ms)
        del self._cached[slot.model_id]
        self._weigh(slot, 0)
        slot.cached = slot.kept = False
        if slot.state in (CopyState.LOADING, CopyState.READY):
            slot.state = CopyState.UNLOADING
        self._let_go(slot)
        return evicted

    def _let_go(self, slot: Slot) -> None:
        if slot.discarded and slot.free:
            del self._slots[slot.model_id]
            self._readers.retire()

    def _release_alias(self, slot: Slot) -> None:
        slot.alias_count -= 1
        self._let_go(slot)

"""The table of models: time-ordered weighted LRU of local copies, and where ready copies are.

It owns what calls look up (design section 4). ``_lru.pxd`` is the map of its memory and the API of
readers in other threads; ``_lru_py.py`` is the plain-Python twin that tells what each method means;
the parts included below are leaves that see structs and integers only. The methods of ``Table`` are
the one writer: the GIL is held from their beginning to their end, and whatever could run other
Python code on the way (making an object may) happens while the table is whole.

No clock in here (times are arguments), no logging, and no calling back: what leaves is returned.
"""

from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

import os
import sys

from mm._lru_words import (
    I64_MAX,
    ID_BYTES_MAX,
    INSTANCE_COUNT_MAX,
    READER_COUNT_MAX,
    SLOT_COUNT_MAX,
    U32_MAX,
    U64_MASK,
    CopyState,
    Evicted,
    Instances,
    checked,
    checked_id,
)

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t size)

include "_lru_memory.pxi"
include "_lru_index.pxi"
include "_lru_order.pxi"
include "_lru_peers.pxi"
include "_lru_writer.pxi"
include "_lru_check.pxi"

assert sizeof(slot_t) == 128, "a slot is two cache lines"
assert READERS == READER_COUNT_MAX
assert SLOTS_MAX == SLOT_COUNT_MAX + 1
assert GENERATIONS == INSTANCE_COUNT_MAX + 1


cdef class Table:
    """One writer (these methods, under the GIL), many readers (``_lru.pxd``, without).

    The meaning of every method, and the invariants, are told in the twin, ``mm._lru_py.Table``.
    """

    def __cinit__(self, object capacity_units):
        cdef int64_t capacity = number("capacity_units", capacity_units, I64_MAX)
        cdef bytes seed = os.urandom(8)
        self.instances = Instances()
        self.marked = set()
        self.core = table_open(capacity, bytes8(seed))
        if self.core == NULL:
            raise MemoryError

    def __dealloc__(self):
        table_close(self.core)

    # Slots

    def add(self, str model_id not None):
        """Make the model known (again); a model already known stays as it is."""
        slot_for(self, id_from(model_id))

    def discard(self, str model_id not None):
        """Forget the model and its peers as soon as nothing holds it; until then it stays known."""
        cdef uint32_t i = found(self, id_from(model_id))
        if i != 0:
            peers_set(self.core, &self.core.slots[i], NULL, 0)
            self.marked.add(i)
            self.core.slots[i].discarded = 1
            let_go(self, i)

    def __contains__(self, model_id):
        cdef Py_ssize_t length
        cdef const char *id
        if not isinstance(model_id, str):
            return False
        id = PyUnicode_AsUTF8AndSize(model_id, &length)
        return find(self.core, id, <size_t>length) != self.core.slots

    def __len__(self):
        return (<index_t *>load_ptr(&self.core.models, relaxed)).live_count

    # The order of local copies

    @property
    def capacity_units(self):
        """What the weights may sum up to."""
        return self.core.capacity_units

    @property
    def used_units(self):
        """What the weights sum up to."""
        return self.core.used_units

    @property
    def count(self):
        """How many copies count."""
        return self.core.cached_count

    @property
    def kept_units(self):
        """What the weights of those kept sum up to."""
        return self.core.kept_units

    def put(self, str model_id not None, object weight_units, object last_used_ms):
        """Count a copy here; of one that counts already set the weight and raise the time."""
        cdef table_t *t = self.core
        cdef id_t id = id_from(model_id)
        cdef uint32_t weight = <uint32_t>number("weight_units", weight_units, U32_MAX)
        cdef int64_t last_used = number("last_used_ms", last_used_ms, I64_MAX)
        cdef uint32_t i = slot_for(self, id)
        cdef slot_t *s = &t.slots[i]
        if s.cached:
            touch(s, last_used)
        else:
            t.sequence += 1
            t.cached_count += 1
            s.cached = 1
            s.sequence = t.sequence
            store_i64(&s.last_used_ms, last_used, relaxed)
            link_by_time(t, i, last_used)
        weigh(self, s, weight)
        return evict(self)

    def set_weight(self, str model_id not None, object weight_units):
        """Change the weight of a copy that counts; growing may evict it itself."""
        cdef uint32_t i = found(self, id_from(model_id))
        cdef uint32_t weight = <uint32_t>number("weight_units", weight_units, U32_MAX)
        if not self.core.slots[i].cached:
            raise KeyError(model_id)
        weigh(self, &self.core.slots[i], weight)
        return evict(self)

    def keep(self, str model_id not None, bint kept):
        """Let a copy go only when no other is left, or in its turn again; False if none counts."""
        cdef uint32_t i = found(self, id_from(model_id))
        cdef slot_t *s = &self.core.slots[i]
        if s.cached and s.kept != kept:
            set_kept(self.core, i, kept)
        return s.cached != 0

    def is_kept(self, str model_id not None):
        """Answer whether the copy is kept."""
        return self.core.slots[found(self, id_from(model_id))].kept != 0

    def set_capacity(self, object capacity_units):
        """Change the capacity, evicting what no longer fits."""
        self.core.capacity_units = number("capacity_units", capacity_units, I64_MAX)
        return evict(self)

    def remove(self, str model_id not None):
        """Take one copy out of the order, as eviction does; None if it does not count."""
        cdef uint32_t i = found(self, id_from(model_id))
        cdef slot_t *s = &self.core.slots[i]
        if not s.cached:
            return None
        evicted = Evicted(model_id, s.weight_units, load_i64(&s.last_used_ms, relaxed))
        uncache(self.core, s, i)
        let_go(self, i)
        return evicted

    def weight(self, str model_id not None):
        """Answer the weight of the copy, 0 if none counts."""
        return self.core.slots[found(self, id_from(model_id))].weight_units

    def touch(self, str model_id not None, object now_ms):
        """Raise the time of last use, never lower it; False if no copy counts."""
        cdef slot_t *s = &self.core.slots[found(self, id_from(model_id))]
        cdef int64_t now = number("now_ms", now_ms, I64_MAX)
        if not s.cached:
            return False
        touch(s, now)
        return True

    def last_used(self, str model_id not None):
        """Answer the time of last use, None if no copy counts."""
        cdef slot_t *s = &self.core.slots[found(self, id_from(model_id))]
        return load_i64(&s.last_used_ms, relaxed) if s.cached else None

    def oldest(self):
        """Answer the copy that would go next and its time, None if there is none but those kept."""
        cdef slot_t *s = &self.core.slots[oldest_of(self.core)]
        if not s.cached or s.kept:
            return None
        return text_of(s), load_i64(&s.last_used_ms, relaxed)

    def cached(self):
        """Iterate (model id, weight, last used) over a snapshot, oldest first, those kept last."""
        return iter(snapshot_of(self.core))

    # The life of the local copy

    def state(self, str model_id not None):
        """Answer the state of the copy here, ABSENT for an unknown model."""
        return STATES[load_u8(&self.core.slots[found(self, id_from(model_id))].state, relaxed)]

    def set_state(self, str model_id not None, object state):
        """Store the state; which step may follow which is the caller's to know."""
        cdef uint32_t i = known(self, model_id)
        cdef uint8_t value = CopyState(state)
        store_u8(&self.core.slots[i].state, value, seq_cst)
        let_go(self, i)

    def begin_unload(self, str model_id not None):
        """Store UNLOADING, so that no call pins any more; answer the calls still in flight."""
        cdef slot_t *s = &self.core.slots[known(self, model_id)]
        store_u8(&s.state, UNLOADING, seq_cst)  # see `pin`
        return <uint32_t>load_u64(&s.calls, seq_cst)

    def pin(self, str model_id not None):
        """Count a call in flight on a copy that is READY; False, and nothing counted, otherwise."""
        cdef uint32_t i = found(self, id_from(model_id))
        return i != 0 and pin(&self.core.slots[i])

    def unpin(self, str model_id not None):
        """End a call that ``pin`` counted."""
        cdef uint32_t i = known(self, model_id)
        if in_flight_of(&self.core.slots[i]) == 0:
            raise ValueError(f"no call is in flight on {model_id!r}")
        unpin(&self.core.slots[i])
        let_go(self, i)

    def in_flight(self, str model_id not None):
        """Answer the calls that hold the copy here."""
        return in_flight_of(&self.core.slots[found(self, id_from(model_id))])

    def set_concurrency_max(self, str model_id not None, object calls_max):
        """Store how many calls the copy takes at a time, 0 for no limit; ``pin`` ignores it."""
        cdef uint32_t i = known(self, model_id)
        cdef uint32_t value = <uint32_t>number("calls_max", calls_max, U32_MAX)
        store_u32(&self.core.slots[i].concurrency_max, value, relaxed)

    def concurrency_max(self, str model_id not None):
        """Answer what ``set_concurrency_max`` stored, else 0."""
        return load_u32(&self.core.slots[found(self, id_from(model_id))].concurrency_max, relaxed)

    def set_flags(self, str model_id not None, object flags):
        """Store 32 bits whose meaning is the caller's."""
        cdef uint32_t i = known(self, model_id)
        cdef uint32_t value = <uint32_t>number("flags", flags, U32_MAX)
        store_u32(&self.core.slots[i].flags, value, relaxed)

    def flags(self, str model_id not None):
        """Answer what ``set_flags`` stored, else 0."""
        return load_u32(&self.core.slots[found(self, id_from(model_id))].flags, relaxed)

    def take_busy(self):
        """Answer (model id, calls pinned since last asked, calls in flight) of those with either.

        Of copies that count, in any order; up to 2**31 - 1 calls.
        """
        return busy_of(self.core)

    # Other instances, and which of them hold a ready copy

    def add_instance(self, str instance_id not None):
        """Answer the handle of the instance, a new one if it has none."""
        cdef int64_t handle = self.instances.add(instance_id)
        store_u16(&self.core.generations[handle & 0xFFFF], <uint16_t>(handle >> 16), relaxed)
        return handle

    def remove_instance(self, object handle):
        """End the handle everywhere at once; it never comes back. An ended one is left alone."""
        cdef uint16_t generation
        if self.instances.remove(handle):
            generation = self.instances.generation(handle)
            store_u16(&self.core.generations[<uint32_t>handle & 0xFFFF], generation, relaxed)

    def instance_of(self, object handle):
        """Answer whose handle it is, None for one that has ended or never was."""
        return self.instances.instance_of(handle)

    def set_peers(self, str model_id not None, object handles):
        """Say which instances hold a ready copy; a model with one becomes known.

        Loads told before are kept; handles that have ended, and doubles, are dropped.
        """
        cdef id_t id = id_from(model_id)
        cdef list wanted = [each for each in dict.fromkeys(handles) if self.instances.live(each)]
        cdef uint32_t count = <uint32_t>len(wanted), at
        cdef uint32_t i = slot_for(self, id) if count else found(self, id)
        cdef uint64_t some[16]
        cdef uint64_t *entries = some
        if i == 0:
            return
        if count > 16:
            entries = <uint64_t *>malloc(count * sizeof(uint64_t))
            if entries == NULL:
                raise MemoryError
        for at in range(count):
            entries[at] = wanted[at]
        done = peers_set(self.core, &self.core.slots[i], entries, count)
        if entries != some:
            free(entries)
        if not done:
            raise MemoryError

    def peers(self, str model_id not None):
        """Answer the live handles in the order given."""
        return [handle for handle, _ in self.peer_loads(model_id)]

    def peer_loads(self, str model_id not None):
        """Answer (handle, calls in flight as that copy told last) of the live peers, in order."""
        cdef slot_t *s = &self.core.slots[found(self, id_from(model_id))]
        cdef peers_t *more = <peers_t *>load_ptr(&s.more_peers, relaxed)
        cdef uint32_t i
        cdef uint64_t entry
        cdef list loads = []
        for i in range(peer_count(more)):
            entry = load_u64(peer_at(s, more, i), relaxed)
            if entry != 0 and live(self.core, <uint32_t>(entry >> 32)):
                loads.append((entry >> 32, <uint32_t>entry))
        return loads

    def report_load(self, object handle, str model_id not None, object in_flight):
        """Note the calls in flight that a copy told of; one that is no peer is left alone."""
        cdef slot_t *s = &self.core.slots[found(self, id_from(model_id))]
        cdef uint32_t load = <uint32_t>number("in_flight", in_flight, U32_MAX)
        if 0 < handle <= U32_MAX:
            report_load(s, <uint32_t>handle, load)

    def choose(self, str model_id not None, object random, object exclude=()):
        """Pick a ready copy: of two drawn with ``random`` (64 bits) the one with fewer calls.

        The copy here wins a tie, else the first drawn. The low half draws the first, the high
        half the second among the rest.
        """
        cdef id_t id = id_from(model_id)
        cdef uint64_t draw = random & U64_MASK
        cdef int64_t some[16]
        cdef int64_t *handles = some
        cdef size_t count = 0
        cdef int64_t chosen
        if len(exclude) > 16:
            handles = <int64_t *>malloc(len(exclude) * sizeof(int64_t))
            if handles == NULL:
                raise MemoryError
        try:
            for each in exclude:
                handles[count] = each
                count += 1
            chosen = choose_copy(self.core, find(self.core, id.bytes, id.length), draw, handles,
                                 count)
        finally:
            if handles != some:
                free(handles)
        return chosen

    # VModel ids

    def set_alias(self, str vmodel_id not None, str model_id not None):
        """Let the vmodel id name this model, which it makes known and holds."""
        cdef table_t *t = self.core
        cdef id_t id = id_from(vmodel_id)
        cdef id_t model = id_from(model_id)
        cdef uint32_t tag = tag_of(t, id.bytes, id.length)
        cdef uint32_t i = find_in(t, <index_t *>load_ptr(&t.aliases, relaxed), id.bytes,
                                  id.length, tag)
        cdef uint32_t target = slot_for(self, model), before
        count_alias(self, target, 1)
        if i != 0:
            before = load_u32(&t.slots[i].alias, relaxed)
            store_u32(&t.slots[i].alias, target, release)  # see `find_alias`
            count_alias(self, before, -1)
            return
        if index_make_room(t, &t.aliases):
            i = slot_new(t, KIND_ALIAS, id.bytes, id.length)
        if i == 0:
            count_alias(self, target, -1)
            raise MemoryError
        store_u32(&t.slots[i].alias, target, relaxed)
        index_insert(t, &t.aliases, tag, i)

    def remove_alias(self, str vmodel_id not None):
        """Forget the vmodel id; one that is unknown is left alone."""
        cdef table_t *t = self.core
        cdef id_t id = id_from(vmodel_id)
        cdef uint32_t tag = tag_of(t, id.bytes, id.length)
        cdef uint32_t i = find_in(t, <index_t *>load_ptr(&t.aliases, relaxed), id.bytes,
                                  id.length, tag)
        if i != 0:
            index_remove(t, &t.aliases, tag, i)
            slot_retire(t, i)
            count_alias(self, load_u32(&t.slots[i].alias, relaxed), -1)

    def resolve(self, str vmodel_id not None):
        """Answer the id of the vmodel's active model, None if it is unknown."""
        cdef id_t id = id_from(vmodel_id)
        cdef slot_t *s = find_alias(self.core, id.bytes, id.length)
        return None if s == self.core.slots else text_of(s)

    # Readers in other threads; those without the GIL use the functions of _lru.pxd

    def register_reader(self):
        """Answer the number of a new reader, which is offline."""
        cdef int reader = reader_register(self.core)
        if reader < 0:
            raise OverflowError(f"more than {READER_COUNT_MAX} readers")
        return reader

    def unregister_reader(self, object reader):
        """Give the number back; the reader must not read any more."""
        reader_unregister(self.core, reader_number(self, reader))

    def reader_online(self, object reader):
        """Pass a quiescent point: the reader has forgotten all it saw before, and reads on."""
        reader_online(self.core, reader_number(self, reader))

    def reader_offline(self, object reader):
        """Pass a quiescent point, and read nothing until ``reader_online``."""
        reader_offline(self.core, reader_number(self, reader))

    def reclaim(self):
        """Forget discarded models that calls have left; answer how many slots readers let go."""
        for i in list(self.marked):
            let_go(self, i)
        return slots_claim(self.core)

    def memory_bytes(self):
        """Answer what the table takes: the arena as far as it is usable, and all beside it."""
        return (sizeof(table_t) + self.core.slot_count_committed * sizeof(slot_t)
                + GENERATIONS * sizeof(atomic_u16) + self.core.heap_bytes
                + sys.getsizeof(self) + sys.getsizeof(self.marked)
                + self.instances.memory_bytes())

    def check_invariants(self):
        """Walk everything and raise AssertionError at the first thing that is not as it must be."""
        check_order(self.core)
        check_indexes(self.core)
        check_slots(self.core, self.marked)
        self.instances.check_invariants()

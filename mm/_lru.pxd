# The map of the table's memory, and the API of its readers (design section 4).
#
# Any module that cimports this file reads the table without the GIL. The meaning of every word is
# told in _lru_py.py, the plain-Python twin; writing is the business of _lru.pyx alone.
#
# Concurrency. One writer: whoever holds the GIL and calls a method of `Table`. Many readers:
# threads that have registered and gone online. Readers see slots through an index of atomics and
# touch nothing else in a slot than its atomics and what never changes while the slot can be found
# (its id). Each order of memory is argued where it stands; there are no stand-alone fences, which
# ThreadSanitizer does not understand, and nothing is volatile.
#
# Life of a slot: taken from the arena, filled, put in the index (release) -> found by readers
# (acquire) -> taken out of the index, retired with the epoch of that moment -> used again when
# every reader online has seen that epoch. A pointer to a slot is good until the reader's next
# `reader_online` or `reader_offline`; a pinned slot stays longer, until it is unpinned.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from mm._lru_atomics cimport (
    acquire, atomic_i64, atomic_ptr, atomic_u8, atomic_u16, atomic_u32, atomic_u64, bytes4,
    bytes8, c_assert, fold, prefetch, relaxed, release, seq_cst, add_u64, cas_i64, cas_u32,
    cas_u64, load_i64, load_ptr, load_u8, load_u16, load_u32, load_u64, store_i64, store_ptr,
    store_u8, store_u16, store_u32, store_u64, sub_u64,
)


cdef enum:
    # The states of `CopyState`.
    ABSENT = 0
    LOADING = 1
    READY = 2
    UNLOADING = 3

    # What `choose_copy` answers besides handles.
    CHOSE_LOCAL = 0
    CHOSE_NONE = -1

    # What a slot is at the moment.
    KIND_FREE = 0
    KIND_MODEL = 1
    KIND_ALIAS = 2
    KIND_SENTINEL = 3

    ID_INLINE = 40       # ids of KServe, "name__isvc-0123456789", mostly fit the slot's first line
    PEERS_INLINE = 2     # most models have one or two copies
    READERS = 64         # READER_COUNT_MAX
    BATCH = 16           # lookups under way at once in `lookup_batch`: enough to hide memory


# One model (or vmodel): two cache lines. A hit on a copy here needs the first only.
cdef struct slot_t:
    # Line 1: what a hit reads and writes.
    atomic_u64 calls           # low half: calls in flight here; high half: calls since last taken
    atomic_i64 last_used_ms    # only ever raised while the copy counts
    atomic_u8 state            # ABSENT .. UNLOADING
    uint8_t kind               # KIND_*
    uint16_t id_length
    atomic_u32 flags
    char id[ID_INLINE]         # the id; one that is longer: a pointer to it
    # Line 2: who else has a copy; then what is the writer's own.
    atomic_ptr more_peers      # peers_t: those that found no room below, or NULL
    atomic_u64 peers[PEERS_INLINE]  # handle << 32 | calls in flight as it told; 0 is none
    uint32_t older             # neighbours in the order, 0 at both ends: slot 0 is the sentinel
    uint32_t newer             # (of a retired or free slot: the next in its chain)
    int64_t position_ms        # the time under which it is linked, at most last_used_ms
    uint64_t sequence          # order of `put`: decides between equal times
    uint32_t weight_units
    atomic_u32 alias           # a model: how many vmodels name it; a vmodel: the slot it names
    atomic_u32 concurrency_max
    uint8_t cached             # counts in the order
    uint8_t discarded          # to go when nothing holds it
    uint8_t kept               # stands at the end of the order, whatever its times
    uint8_t spare


# Memory that readers may still look at when the writer has replaced it.
cdef struct block_t:
    block_t *next
    uint64_t epoch
    size_t size_bytes


# Peers beyond those inline.
cdef struct peers_t:
    block_t block
    uint32_t count
    atomic_u64 entries[1]      # `count` of them


# Ids to slots: open addressing, linear probing. An entry is tag << 32 | slot; 0 is empty. The tag
# is the upper half of the id's hash and gives the home by multiplication, so growth needs no slot.
cdef struct index_t:
    block_t block
    uint32_t size              # a power of two
    uint32_t used_count        # entries that are not empty, tombstones included
    uint32_t live_count
    atomic_u64 *entries


# One thread that reads: the epoch it saw when it last came online, 0 while offline.
cdef struct reader_t:
    atomic_u64 epoch
    atomic_u32 taken
    char line_rest[52]


cdef struct table_t:
    # What readers read; changes seldom.
    atomic_ptr models          # index_t
    atomic_ptr aliases         # index_t
    slot_t *slots              # the arena; slot 0 is the sentinel, and what `find` misses find
    atomic_u16 *generations    # by instance index; a handle is good while its generation is here
    uint64_t seed              # of the hash, so that nobody can choose ids that collide
    char line_rest[24]
    atomic_u64 epoch           # raised when something is retired; from 1
    char epoch_line_rest[56]
    reader_t readers[READERS]
    # The writer's own.
    int64_t capacity_units
    int64_t used_units
    int64_t kept_units         # of used_units, what is kept
    uint32_t kept_first        # in the order those kept come last, from here on; 0 is none
    uint32_t cached_count
    uint32_t slot_count        # slots ever taken, the sentinel included
    uint32_t slot_count_committed
    uint32_t free_slot         # chain of slots to use again
    uint32_t retired_first     # chain of slots that readers may still see, by epoch
    uint32_t retired_last
    uint64_t sequence          # of the last `put`
    uint64_t scan_debt         # steps taken to re-link since the last sort
    block_t *retired_blocks_first
    block_t *retired_blocks_last
    size_t heap_bytes          # long ids, peers beyond those inline, indexes; retired ones too


cdef class Table:
    cdef table_t *core
    cdef object instances      # mm._lru_words.Instances
    cdef set marked            # slots discarded but held


# ---------------------------------------------------------------------------------------------
# Readers. Register once per thread; go online to read, offline before blocking. Coming online
# again while online is a quiescent point too.

cdef inline int reader_register(table_t *t) noexcept nogil:
    """Answer the number of a new reader, offline; -1 if there are READERS already."""
    cdef int i
    cdef uint32_t nobody
    for i in range(READERS):
        nobody = 0
        # acquire: the number's last holder has stored its 0 before it gave the number back.
        if cas_u32(&t.readers[i].taken, &nobody, 1, acquire, relaxed):
            return i
    return -1


cdef inline void reader_offline(table_t *t, int reader) noexcept nogil:
    # release: all reads of this turn come before the writer's reading of 0.
    store_u64(&t.readers[reader].epoch, 0, release)


cdef inline void reader_unregister(table_t *t, int reader) noexcept nogil:
    reader_offline(t, reader)
    store_u32(&t.readers[reader].taken, 0, release)


cdef inline void reader_online(table_t *t, int reader) noexcept nogil:
    # The writer unlinks, raises the epoch, then reads the readers' epochs; a reader stores its
    # epoch, then reads. If the writer's read misses the store, it precedes the store in the single
    # order of seq_cst operations; so the second load below follows the raise, and by acquiring it
    # sees what was unlinked. The store releases what this reader did in the turn before.
    store_u64(&t.readers[reader].epoch, load_u64(&t.epoch, seq_cst), seq_cst)
    load_u64(&t.epoch, seq_cst)


# ---------------------------------------------------------------------------------------------
# Finding

cdef inline uint32_t tag_of(const table_t *t, const char *id, size_t length) noexcept nogil:
    """Answer the upper half of the id's hash: products of its words with each other's secrets."""
    cdef uint64_t h = t.seed ^ (<uint64_t>length * 0x9E3779B97F4A7C15U)
    cdef uint64_t a, b
    cdef size_t i = 0
    if length >= 16:
        while i + 16 < length:
            h = fold(bytes8(id + i) ^ 0xD6E8FEB86659FD93U, bytes8(id + i + 8) ^ h)
            i += 16
        a = bytes8(id + length - 16)
        b = bytes8(id + length - 8)
    elif length >= 8:
        a = bytes8(id)
        b = bytes8(id + length - 8)
    elif length >= 4:
        a = bytes4(id)
        b = bytes4(id + length - 4)
    else:
        a = (<uint64_t>(<uint8_t>id[0]) << 16 | <uint64_t>(<uint8_t>id[length >> 1]) << 8
             | <uint8_t>id[length - 1])
        b = 0
    h = fold(a ^ 0xA0761D6478BD642FU ^ t.seed, b ^ h)
    return <uint32_t>(fold(h ^ 0x8EBC6AF09C88C6E3U, t.seed ^ 0x589965CC75374CC3U) >> 32)


cdef inline bint same_bytes(const char *a, const char *b, size_t length) noexcept nogil:
    """Answer whether two runs are equal: in words, the last one overlapping."""
    cdef size_t i
    if length >= 8:
        i = 0
        while i + 8 < length:
            if bytes8(a + i) != bytes8(b + i):
                return False
            i += 8
        return bytes8(a + length - 8) == bytes8(b + length - 8)
    for i in range(length):
        if a[i] != b[i]:
            return False
    return True


cdef inline const char *id_of(const slot_t *s) noexcept nogil:
    if s.id_length <= ID_INLINE:
        return s.id
    return (<const char **>s.id)[0]


cdef inline uint32_t find_in(
    const table_t *t, const index_t *x, const char *id, size_t length, uint32_t tag
) noexcept nogil:
    """Answer the slot of the id, 0 if it has none."""
    cdef uint32_t i = <uint32_t>((<uint64_t>tag * x.size) >> 32)
    cdef uint64_t entry
    cdef const slot_t *s
    while True:
        # acquire: with the entry come the id and all else that was written before it.
        entry = load_u64(&x.entries[i], acquire)
        if entry == 0:
            return 0
        if <uint32_t>(entry >> 32) == tag:
            s = &t.slots[<uint32_t>entry]  # a tombstone names the sentinel, whose id is empty
            if s.id_length == length and same_bytes(id_of(s), id, length):
                return <uint32_t>entry
        i = (i + 1) & (x.size - 1)


cdef inline slot_t *find(table_t *t, const char *id, size_t length) noexcept nogil:
    """Answer the slot of a model; the sentinel, which is ABSENT, if it is unknown."""
    cdef index_t *x
    if length == 0:
        return t.slots
    x = <index_t *>load_ptr(&t.models, acquire)
    return &t.slots[find_in(t, x, id, length, tag_of(t, id, length))]


cdef inline slot_t *find_alias(table_t *t, const char *id, size_t length) noexcept nogil:
    """Answer the slot of a vmodel's active model; the sentinel if the vmodel is unknown."""
    cdef index_t *x
    cdef uint32_t i
    if length == 0:
        return t.slots
    x = <index_t *>load_ptr(&t.aliases, acquire)
    i = find_in(t, x, id, length, tag_of(t, id, length))
    # acquire: the slot named may be newer than the alias. The sentinel names itself.
    return &t.slots[load_u32(&t.slots[i].alias, acquire)]


cdef inline void lookup_batch(
    table_t *t, const char *const *ids, const size_t *lengths, size_t count, slot_t **found
) noexcept nogil:
    """Find many at once: their misses in the CPU's cache overlap, so each costs a fraction."""
    cdef index_t *x = <index_t *>load_ptr(&t.models, acquire)
    cdef uint32_t tags[BATCH]
    cdef uint32_t candidates[BATCH]
    cdef size_t begin = 0, i, n
    cdef uint32_t at
    cdef uint64_t entry
    cdef slot_t *s
    while begin < count:
        n = min(<size_t>BATCH, count - begin)
        for i in range(n):
            tags[i] = tag_of(t, ids[begin + i], lengths[begin + i])
            prefetch(&x.entries[(<uint64_t>tags[i] * x.size) >> 32])
        for i in range(n):
            at = <uint32_t>((<uint64_t>tags[i] * x.size) >> 32)
            entry = load_u64(&x.entries[at], acquire)
            while entry != 0 and <uint32_t>(entry >> 32) != tags[i]:
                at = (at + 1) & (x.size - 1)
                entry = load_u64(&x.entries[at], acquire)
            candidates[i] = <uint32_t>entry
            prefetch(&t.slots[candidates[i]])
        for i in range(n):
            s = &t.slots[candidates[i]]
            if not (s.id_length == lengths[begin + i]
                    and same_bytes(id_of(s), ids[begin + i], s.id_length)):
                s = find(t, ids[begin + i], lengths[begin + i])  # two ids with one tag, or none
            found[begin + i] = s
        begin += n


# ---------------------------------------------------------------------------------------------
# Calls on a copy here

cdef inline uint32_t in_flight_of(slot_t *s) noexcept nogil:
    return <uint32_t>load_u64(&s.calls, relaxed)


cdef inline bint pin(slot_t *s) noexcept nogil:
    """Count a call in flight if the copy is READY; nothing is counted otherwise."""
    # `begin_unload` stores UNLOADING, then reads the calls. In the single order of these four
    # seq_cst operations either this add comes before that read, or that store before this load.
    add_u64(&s.calls, (<uint64_t>1 << 32) | 1, seq_cst)
    if load_u8(&s.state, seq_cst) == READY:
        return True
    sub_u64(&s.calls, (<uint64_t>1 << 32) | 1, seq_cst)
    return False


cdef inline bint pin_below(slot_t *s, uint32_t calls_max) noexcept nogil:
    """Like ``pin``, but only while fewer calls than that are in flight."""
    cdef uint64_t seen = load_u64(&s.calls, relaxed)
    while <uint32_t>seen < calls_max:
        # As in `pin`, the add and the read of the state are in the single order.
        if cas_u64(&s.calls, &seen, seen + ((<uint64_t>1 << 32) | 1), seq_cst, relaxed):
            if load_u8(&s.state, seq_cst) == READY:
                return True
            sub_u64(&s.calls, (<uint64_t>1 << 32) | 1, seq_cst)
            return False
    return False


cdef inline uint32_t unpin(slot_t *s) noexcept nogil:
    """Let go of a pin; answers the calls still in flight."""
    # release (within seq_cst): the call's work is done when the writer counts it gone.
    c_assert(<uint32_t>load_u64(&s.calls, relaxed) != 0)
    return <uint32_t>sub_u64(&s.calls, 1, seq_cst) - 1


cdef inline void touch(slot_t *s, int64_t now_ms) noexcept nogil:
    """Raise the time of last use; the writer moves the slot when it next looks at it."""
    # relaxed: the time is a value by itself; nothing is read on the strength of it.
    cdef int64_t seen = load_i64(&s.last_used_ms, relaxed)
    while seen < now_ms:
        if cas_i64(&s.last_used_ms, &seen, now_ms, relaxed, relaxed):
            return


# ---------------------------------------------------------------------------------------------
# Copies elsewhere

cdef inline bint live(const table_t *t, uint32_t handle) noexcept nogil:
    # relaxed: a handle ended a moment ago is as good as one that ends a moment later.
    return load_u16(&t.generations[handle & 0xFFFF], relaxed) == handle >> 16


cdef inline atomic_u64 *peer_at(slot_t *s, peers_t *more, uint32_t i) noexcept nogil:
    return &s.peers[i] if i < PEERS_INLINE else &more.entries[i - PEERS_INLINE]


cdef inline uint32_t peer_count(const peers_t *more) noexcept nogil:
    return PEERS_INLINE if more == NULL else PEERS_INLINE + more.count


cdef inline bint report_load(slot_t *s, uint32_t handle, uint32_t in_flight) noexcept nogil:
    """Note a peer's calls in flight; False if it is no peer of this model."""
    cdef peers_t *more = <peers_t *>load_ptr(&s.more_peers, acquire)
    cdef uint32_t i
    cdef uint64_t seen
    cdef atomic_u64 *entry
    for i in range(peer_count(more)):
        entry = peer_at(s, more, i)
        seen = load_u64(entry, relaxed)
        # The swap fails if the writer gave the entry to another peer meanwhile.
        while seen != 0 and seen >> 32 == handle:
            if cas_u64(entry, &seen, <uint64_t>handle << 32 | in_flight, relaxed, relaxed):
                return True
    return False


cdef inline bint excluded(
    int64_t handle, const int64_t *exclude, size_t exclude_count
) noexcept nogil:
    cdef size_t i
    for i in range(exclude_count):
        if exclude[i] == handle:
            return True
    return False


cdef inline int64_t choose_copy(
    const table_t *t, slot_t *s, uint64_t random, const int64_t *exclude, size_t exclude_count
) noexcept nogil:
    """Answer a handle, CHOSE_LOCAL or CHOSE_NONE: the twin's `choose` tells the rule.

    Two walks and no memory of its own: if peers change between the walks, what the second finds
    counts.
    """
    cdef peers_t *more = <peers_t *>load_ptr(&s.more_peers, acquire)
    cdef bint here = (load_u8(&s.state, relaxed) == READY
                      and not excluded(CHOSE_LOCAL, exclude, exclude_count))
    cdef uint32_t walk, i, place, load, count, one = 0, other = 0
    cdef int64_t handle, chosen = CHOSE_NONE
    cdef uint32_t chosen_load = 0
    cdef uint64_t entry
    count = 0
    for walk in range(2):
        place = 0
        for i in range(peer_count(more) + 1):
            if i == 0:
                if not here:
                    continue
                handle = CHOSE_LOCAL
                load = in_flight_of(s)
            else:
                entry = load_u64(peer_at(s, more, i - 1), relaxed)
                handle = <int64_t>(entry >> 32)
                load = <uint32_t>entry
                if entry == 0 or not live(t, <uint32_t>handle):
                    continue
                if exclude_count != 0 and excluded(handle, exclude, exclude_count):
                    continue
            if walk == 1 and (place == one or place == other):
                if (chosen == CHOSE_NONE or load < chosen_load
                        or (load == chosen_load and chosen != CHOSE_LOCAL and place == one)):
                    chosen = handle
                    chosen_load = load
            place += 1
        if walk == 0:
            count = place
            if count == 0:
                return CHOSE_NONE
            one = <uint32_t>(((random & 0xFFFFFFFFU) * count) >> 32)
            other = one
            if count > 1:
                other = <uint32_t>(((random >> 32) * (count - 1)) >> 32)
                if other >= one:
                    other += 1
    return chosen

# Ids to slots: how the one writer changes an index that readers walk meanwhile.
#
# Each change is one store of one entry, and no entry ever moves, so a reader finds every id that
# is there all the time. A removed entry becomes a tombstone, which a later one may take.

cdef enum:
    INDEX_SIZE_MIN = 64
    # Room is made at 7/10: a miss then looks at 6 entries on average, a hit at 2.2.
    INDEX_LOAD_MAX_TENTHS = 7
    INDEX_LOAD_NEW_TENTHS = 4

cdef uint64_t TOMBSTONE = <uint64_t>1 << 32  # some tag, and the sentinel's slot


cdef index_t *index_new(table_t *t, uint32_t size) noexcept nogil:
    cdef size_t length = 64 + size * sizeof(atomic_u64)
    cdef index_t *x = <index_t *>block_new(t, length, PAGE_BYTES if length > PAGE_BYTES else 64)
    if x != NULL:
        x.size = size
        x.entries = <atomic_u64 *>(<char *>x + 64)
    return x


cdef inline uint32_t index_home(const index_t *x, uint32_t tag) noexcept nogil:
    return <uint32_t>((<uint64_t>tag * x.size) >> 32)


cdef bint index_make_room(table_t *t, atomic_ptr *which) noexcept nogil:
    """See to it that one more id fits: build a larger (or cleaner) index beside, publish it."""
    cdef index_t *x = <index_t *>load_ptr(which, relaxed)
    cdef index_t *y
    cdef uint32_t size = INDEX_SIZE_MIN, i, at
    cdef uint64_t entry
    if (<uint64_t>x.used_count + 1) * 10 <= <uint64_t>x.size * INDEX_LOAD_MAX_TENTHS:
        return True
    while (<uint64_t>x.live_count + 1) * 10 > <uint64_t>size * INDEX_LOAD_NEW_TENTHS:
        size *= 2
    y = index_new(t, size)
    if y == NULL:
        return False
    # Tags in order of the old home are in order of the new one: both are walked from end to end.
    for i in range(x.size):
        entry = load_u64(&x.entries[i], relaxed)
        if <uint32_t>entry == 0:
            continue
        at = index_home(y, <uint32_t>(entry >> 32))
        while load_u64(&y.entries[at], relaxed) != 0:
            at = (at + 1) & (size - 1)
        store_u64(&y.entries[at], entry, relaxed)
    y.live_count = y.used_count = x.live_count
    store_ptr(which, y, release)  # with the pointer come the entries just written
    block_retire(t, &x.block)
    return True


cdef void index_insert(table_t *t, atomic_ptr *which, uint32_t tag, uint32_t slot) noexcept nogil:
    """Let an id that is not there be found; room has been made."""
    cdef index_t *x = <index_t *>load_ptr(which, relaxed)
    cdef uint32_t at = index_home(x, tag)
    while <uint32_t>load_u64(&x.entries[at], relaxed) != 0:
        at = (at + 1) & (x.size - 1)
    x.live_count += 1
    if load_u64(&x.entries[at], relaxed) == 0:
        x.used_count += 1
    # release: whoever finds the entry sees the slot filled.
    store_u64(&x.entries[at], <uint64_t>tag << 32 | slot, release)


cdef void index_remove(table_t *t, atomic_ptr *which, uint32_t tag, uint32_t slot) noexcept nogil:
    """Let the id be found no more; the caller retires the slot."""
    cdef index_t *x = <index_t *>load_ptr(which, relaxed)
    cdef uint32_t at = index_home(x, tag)
    while <uint32_t>load_u64(&x.entries[at], relaxed) != slot:
        at = (at + 1) & (x.size - 1)
    x.live_count -= 1
    store_u64(&x.entries[at], TOMBSTONE, release)
    # Nothing was ever pushed beyond an empty entry: tombstones before one can be empty as well.
    if load_u64(&x.entries[(at + 1) & (x.size - 1)], relaxed) == 0:
        while load_u64(&x.entries[at], relaxed) == TOMBSTONE:
            store_u64(&x.entries[at], 0, release)
            x.used_count -= 1
            at = (at - 1) & (x.size - 1)

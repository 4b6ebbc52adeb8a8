# What calls came to: by listener and method, how many with which status, how long they took, how
# many bytes. One writer, the thread; Python reads at any time and adds the threads up.
#
# Clients choose paths, so the table is bounded: beyond METHODS_MAX all others are counted together,
# and paths that are too long, under no path.


cdef uint32_t bucket_of(uint64_t us) noexcept nogil:
    """Four buckets to a doubling, from 2 us up; the twin is ``mm.wire.BUCKET_BOUNDS_S``."""
    cdef uint32_t exponent
    if us < 8:
        return <uint32_t>(us >> 1)
    exponent = 63 - leading_zeros(us)
    exponent = (exponent - 3) * 4 + <uint32_t>(us >> (exponent - 2) & 3) + 4
    return exponent if exponent < BUCKETS else BUCKETS - 1


cdef inline void add_to(atomic_u64 *number, uint64_t more) noexcept nogil:
    # The worker is the only writer. relaxed: numbers.
    store_u64(number, load_u64(number, relaxed) + more, relaxed)


cdef bint is_of(const method_counts_t *counts, uint8_t role, const text_t *path) noexcept nogil:
    return (counts.role == role and counts.path_length == path.length
            and memcmp(counts.path, path.bytes, path.length) == 0)


cdef method_counts_t *counts_of(worker_t *w, uint8_t role, const text_t *path) noexcept nogil:
    """Find the counts of a method, or begin them."""
    cdef uint32_t hash = hash_text(path, 0x811C9DC5U ^ role)
    cdef uint32_t place = (hash ^ hash >> 16) & (2 * METHODS_MAX - 1)
    cdef uint32_t count_ = load_u32(&w.methods_count, relaxed)
    cdef method_counts_t *counts
    if path.length > METHOD_PATH_BYTES:
        return &w.methods[role]
    while w.methods_index[place] != 0:
        counts = &w.methods[w.methods_index[place]]
        if is_of(counts, role, path):
            return counts
        place = (place + 1) & (2 * METHODS_MAX - 1)
    if count_ == METHODS_MAX:
        return &w.methods[role]
    counts = &w.methods[count_]
    counts.role = role
    memcpy(counts.path, path.bytes, path.length)
    counts.path_length = path.length
    w.methods_index[place] = <uint16_t>count_
    # release: who sees the number sees the path.
    store_u32(&w.methods_count, count_ + 1, release)
    return counts


cdef bint statistics_new(worker_t *w) noexcept nogil:
    """Make the table; its first places are for the calls of methods that it has no place for."""
    cdef uint32_t role
    w.methods = <method_counts_t *>calloc(METHODS_MAX, sizeof(method_counts_t))
    w.methods_index = <uint16_t *>calloc(2 * METHODS_MAX, sizeof(uint16_t))
    if w.methods == NULL or w.methods_index == NULL:
        return False
    for role in range(<uint32_t>ROLES):
        w.methods[role].role = <uint8_t>role
    store_u32(&w.methods_count, ROLES, release)
    return True


cdef void call_counted(call_t *call, conn_t *conn) noexcept nogil:
    """Count a call whose client has its answer, or has gone."""
    cdef worker_t *w = call.worker
    cdef method_counts_t *counts = conn.counts
    cdef uint64_t us = (w.now_ns - call.arrived_ns) // 1000
    cdef int32_t code = call.status
    if call.head.path.length == 0:
        return
    if counts == NULL or not is_of(counts, call.role, &call.head.path):
        # The next call of a connection is likely of the same method.
        counts = conn.counts = counts_of(w, call.role, &call.head.path)
    if not call.answer_whole:
        code = 1
    elif code < 0 or code >= CODES:
        code = 2
    add_to(&counts.codes[code], 1)
    add_to(&counts.buckets[bucket_of(us)], 1)
    add_to(&counts.duration_us, us)
    add_to(&counts.request_bytes, call.body_base + call.body.length)
    add_to(&counts.response_bytes, call.answer_base + call.answer.length)

# What calls came to, in the four series of mm.core.call_meter, of which CallMeter is the twin: by
# method and status, and by model if that is wanted. Of the calls that the wire has served: those
# that it left to tier 2 are counted there, but for the attempts that the wire had made.
#
# Clients choose paths, so the table is bounded: beyond METHODS_MAX all others are counted together,
# under place 0. With models, the row goes that was not used the longest.
#
# Numbers have one writer, the thread, and are read at any time. Which rows there are changes under
# the lock alone, which whoever reads takes to copy some rows at a time, and never while it needs
# anything else, the GIL least of all; the thread reads them without.

cdef enum:
    ROWS_AT_ONCE = 16
    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    PERMISSION_DENIED = 7
    UNIMPLEMENTED = 12
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


cdef bint statistics_new(worker_t *w, uint32_t rows_max, bint by_model) noexcept nogil:
    """Make the tables; the bounds are Python's to fill in. False without memory."""
    cdef uint32_t size = 64
    pthread_mutex_init(&w.rows_lock, NULL)
    while size < rows_max:
        size *= 2
    w.by.size = size
    w.by.rows_max = rows_max
    w.by.by_model = by_model
    w.by.chains = <row_t **>calloc(size, sizeof(row_t *))
    w.rows = <row_t **>calloc(rows_max + 1, sizeof(row_t *))
    w.methods = <text_t *>calloc(METHODS_MAX, sizeof(text_t))
    w.methods_index = <uint16_t *>calloc(2 * METHODS_MAX, sizeof(uint16_t))
    w.methods_count = 1
    return (w.by.chains != NULL and w.rows != NULL and w.methods != NULL
            and w.methods_index != NULL)


cdef void statistics_free(worker_t *w) noexcept nogil:
    cdef uint32_t i
    if w.rows != NULL:
        for i in range(w.rows_count):
            free(w.rows[i].ids)
            free(w.rows[i])
    if w.methods != NULL:
        for i in range(w.methods_count):
            free(w.methods[i].bytes)
    free(w.by.chains)
    free(w.rows)
    free(w.methods)
    free(w.methods_index)
    pthread_mutex_destroy(&w.rows_lock)


# --- counting -------------------------------------------------------------------------------------

cdef inline void add_to(atomic_u64 *number, uint64_t more) noexcept nogil:
    # The worker is the only writer. relaxed: numbers.
    store_u64(number, load_u64(number, relaxed) + more, relaxed)


cdef void time_add(worker_t *w, times_t *times, uint64_t since_ns) noexcept nogil:
    cdef uint64_t us = (w.now_ns - since_ns) // 1000
    cdef uint32_t place = 0
    while place < TIME_BUCKETS - 1 and us > w.by.times[place]:
        place += 1
    add_to(&times.counts[place], 1)
    add_to(&times.sums[place], us)


cdef void size_add(worker_t *w, sizes_t *sizes, uint64_t size) noexcept nogil:
    cdef uint32_t place = 0
    while place < SIZE_BUCKETS - 1 and size > w.by.sizes[place]:
        place += 1
    add_to(&sizes.counts[place], 1)
    add_to(&sizes.sums[place], size)


cdef void invoked_count(call_t *call, int32_t status) noexcept nogil:
    """Count an attempt at the runtime here: it was answered, or failed."""
    cdef worker_t *w = call.worker
    cdef row_t *row
    if call.lane != LANE_HERE or w.by.rows_max == 0:
        return
    row = row_of(call, call.up, status)
    if row != NULL:
        time_add(w, &row.invoked, call.attempted_ns)


cdef void answered_count(call_t *call, conn_t *conn) noexcept nogil:
    """Count a client's call that the wire served: its client has the answer, or has gone."""
    cdef worker_t *w = call.worker
    cdef int32_t status = call.status if call.answer_whole else <int32_t>CANCELLED
    cdef row_t *row
    if (call.role != ROLE_EXTERNAL or (call.lane != LANE_HERE and call.lane != LANE_THERE)
            or w.by.rows_max == 0):
        return
    row = row_of(call, conn, status)
    if row == NULL:
        return
    time_add(w, &row.answered, call.arrived_ns)
    size_add(w, &row.requests, call.request_meter.total)
    if status == OK:
        size_add(w, &row.responses, call.answer_meter.total)


# --- reading --------------------------------------------------------------------------------------

cdef inline void numbers_copy(atomic_u64 *to, atomic_u64 *numbers, int count_) noexcept nogil:
    cdef int i
    for i in range(count_):
        store_u64(&to[i], load_u64(&numbers[i], relaxed), relaxed)


cdef inline void times_copy(times_t *to, times_t *times) noexcept nogil:
    numbers_copy(to.counts, times.counts, TIME_BUCKETS)
    numbers_copy(to.sums, times.sums, TIME_BUCKETS)


cdef inline void sizes_copy(sizes_t *to, sizes_t *sizes) noexcept nogil:
    numbers_copy(to.counts, sizes.counts, SIZE_BUCKETS)
    numbers_copy(to.sums, sizes.sums, SIZE_BUCKETS)


cdef int rows_copy(worker_t *w, uint32_t at, row_t *to) noexcept nogil:
    """Copy up to ROWS_AT_ONCE rows, with their ids, which the caller frees; answers how many that
    were, -1 without memory. Any thread.
    """
    cdef int n = 0
    cdef row_t *row
    cdef size_t length
    pthread_mutex_lock(&w.rows_lock)
    while n < ROWS_AT_ONCE and at < w.rows_count:
        row = w.rows[at]
        length = <size_t>row.model_length + row.vmodel_length
        to[n].ids = <uint8_t *>malloc(length + 1)
        if to[n].ids == NULL:
            break
        memcpy(to[n].ids, row.ids, length)
        to[n].model_length = row.model_length
        to[n].vmodel_length = row.vmodel_length
        to[n].method = row.method
        to[n].code = row.code
        times_copy(&to[n].invoked, &row.invoked)
        times_copy(&to[n].answered, &row.answered)
        sizes_copy(&to[n].requests, &row.requests)
        sizes_copy(&to[n].responses, &row.responses)
        n += 1
        at += 1
    if n < ROWS_AT_ONCE and at < w.rows_count:
        rows_free(to, n)
        n = -1
    pthread_mutex_unlock(&w.rows_lock)
    return n


cdef void rows_free(row_t *rows, int count_) noexcept nogil:
    cdef int i
    for i in range(count_):
        free(rows[i].ids)


# --- rows -----------------------------------------------------------------------------------------

cdef inline bint same_text(const text_t *a, const text_t *b) noexcept nogil:
    return a.length == b.length and memcmp(a.bytes, b.bytes, a.length) == 0


cdef bint is_of(
    const row_t *row, uint8_t code, const text_t *model_id, const text_t *vmodel_id
) noexcept nogil:
    return (row.code == code and row.model_length == model_id.length
            and row.vmodel_length == vmodel_id.length
            and memcmp(row.ids, model_id.bytes, model_id.length) == 0
            and memcmp(row.ids + row.model_length, vmodel_id.bytes, vmodel_id.length) == 0)


cdef row_t *row_of(call_t *call, conn_t *conn, int32_t status) noexcept nogil:
    """Find the numbers of a call of this status, or begin them; NULL without memory.

    ``conn``: either end of it, or NULL; its next call is likely to be of the same row.
    """
    cdef worker_t *w = call.worker
    cdef text_t *path = &call.head.path
    cdef text_t model_id, vmodel_id
    cdef uint8_t code = <uint8_t>status if 0 <= status < CODES else <uint8_t>UNKNOWN
    cdef row_t *row = conn.row if conn != NULL else NULL
    cdef uint32_t hash
    cdef uint16_t method
    model_id.bytes = vmodel_id.bytes = <uint8_t *>b""
    model_id.length = vmodel_id.length = 0
    if w.by.by_model:
        model_id = call.model_id
        if call.head.is_vmodel:
            vmodel_id = call.head.model_id
    if (row == NULL or not same_text(&w.methods[row.method], path)
            or not is_of(row, code, &model_id, &vmodel_id)):
        method = method_place(w, path)
        hash = hash_text(&vmodel_id, hash_text(&model_id, 0x811C9DC5U + method * 31U + code))
        hash ^= hash >> 16
        row = w.by.chains[hash & (w.by.size - 1)]
        while row != NULL and not (row.method == method
                                   and is_of(row, code, &model_id, &vmodel_id)):
            row = row.next
        if row == NULL:
            row = row_new(w, hash, method, code, &model_id, &vmodel_id)
        if conn != NULL:
            conn.row = row
    if w.by.by_model and row != NULL and row != w.by.newest:
        row_unlink(w, row)
        row_link(w, row)
    return row


cdef uint16_t method_place(worker_t *w, const text_t *path) noexcept nogil:
    """Find a method's place, or give it one; 0 if there is none left."""
    cdef uint32_t hash = hash_text(path, 0x811C9DC5U)
    cdef uint32_t place = (hash ^ hash >> 16) % (2 * METHODS_MAX)
    cdef uint32_t count_ = w.methods_count
    cdef text_t *method
    if path.length > METHOD_PATH_BYTES:
        return 0
    while w.methods_index[place] != 0:
        if same_text(&w.methods[w.methods_index[place]], path):
            return w.methods_index[place]
        place = (place + 1) % (2 * METHODS_MAX)
    if count_ == METHODS_MAX:
        return 0
    method = &w.methods[count_]
    method.bytes = <uint8_t *>malloc(path.length)
    if method.bytes == NULL:
        return 0
    memcpy(method.bytes, path.bytes, path.length)
    method.length = path.length
    w.methods_index[place] = <uint16_t>count_
    # Whoever reads it has a row that names it, which comes later, and under the lock.
    w.methods_count = count_ + 1
    return <uint16_t>count_


cdef row_t *row_new(
    worker_t *w, uint32_t hash, uint16_t method, uint8_t code, const text_t *model_id,
    const text_t *vmodel_id
) noexcept nogil:
    """Begin a row, in the place of that used the longest ago if there is none left."""
    cdef uint8_t *ids = <uint8_t *>malloc(model_id.length + vmodel_id.length + 1)
    cdef row_t *row = NULL
    cdef row_t *oldest = NULL
    if ids == NULL:
        return NULL
    memcpy(ids, model_id.bytes, model_id.length)
    memcpy(ids + model_id.length, vmodel_id.bytes, vmodel_id.length)
    if w.rows_count < w.by.rows_max:
        row = <row_t *>calloc(1, sizeof(row_t))
    else:
        row = oldest = w.by.oldest
    if row == NULL:
        free(ids)
        return NULL
    pthread_mutex_lock(&w.rows_lock)
    if oldest != NULL:
        row_unlink(w, row)
        row_unchain(w, row)
        free(row.ids)
        memset(row, 0, sizeof(row_t))
    else:
        w.rows[w.rows_count] = row
        w.rows_count += 1
    row.hash = hash
    row.method = method
    row.code = code
    row.ids = ids
    row.model_length = model_id.length
    row.vmodel_length = vmodel_id.length
    pthread_mutex_unlock(&w.rows_lock)
    row.next = w.by.chains[hash & (w.by.size - 1)]
    w.by.chains[hash & (w.by.size - 1)] = row
    row_link(w, row)
    return row


cdef void row_unchain(worker_t *w, row_t *row) noexcept nogil:
    cdef row_t **at = &w.by.chains[row.hash & (w.by.size - 1)]
    while at[0] != row:
        at = &at[0].next
    at[0] = row.next


cdef void row_link(worker_t *w, row_t *row) noexcept nogil:
    """Put a row at the end of the order, as that used last."""
    row.newer = NULL
    row.older = w.by.newest
    if row.older != NULL:
        row.older.newer = row
    else:
        w.by.oldest = row
    w.by.newest = row


cdef void row_unlink(worker_t *w, row_t *row) noexcept nogil:
    if row.older != NULL:
        row.older.newer = row.newer
    else:
        w.by.oldest = row.newer
    if row.newer != NULL:
        row.newer.older = row.older
    else:
        w.by.newest = row.older

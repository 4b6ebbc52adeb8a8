# Memory of a worker: buffers that grow, the arena of a call, the pool of calls, header lists.
#
# Nothing here is shared between threads. What malloc refuses is answered by False or NULL, and the
# call that needed it ends; a call that ends normally gives its memory to the pool, so a worker that
# has seen its busiest moment allocates nothing for a call beyond what nghttp2 does.

cdef enum:
    POOL_MAX = 4096             # calls kept for reuse
    POOLED_BUFFER_BYTES = 8192  # a buffer that has grown beyond this is large
    # Large buffers kept with the calls in the pool. Memory that is freed and taken anew comes from
    # the kernel page by page, which costs more than copying a message does.
    SPARE_BYTES_MAX = 8388608
    # Lists of headers kept with the calls in the pool have room for no more than so many.
    POOLED_HEADERS = 64
    BUFFER_BYTES_MIN = 1024
    CHUNK_BYTES_MIN = 4096


cdef bint buffer_reserve(buffer_t *b, size_t more) noexcept nogil:
    """Make room for so many bytes at the end; False without memory, and then nothing changed."""
    cdef size_t capacity = b.capacity
    cdef uint8_t *bytes
    if b.capacity - b.length >= more:
        return True
    if capacity < BUFFER_BYTES_MIN:
        capacity = BUFFER_BYTES_MIN
    while capacity - b.length < more:
        capacity *= 2
    bytes = <uint8_t *>realloc(b.bytes, capacity)
    if bytes == NULL:
        return False
    b.bytes = bytes
    b.capacity = capacity
    return True


cdef bint buffer_add(buffer_t *b, const void *bytes, size_t length) noexcept nogil:
    if not buffer_reserve(b, length):
        return False
    memcpy(b.bytes + b.length, bytes, length)
    b.length += length
    return True


cdef inline size_t buffer_left(const buffer_t *b) noexcept nogil:
    return b.length - b.at


cdef inline void buffer_rewind(buffer_t *b) noexcept nogil:
    """Begin anew if everything has gone on. The bytes stay: what is packed may point at them."""
    if b.at == b.length:
        b.at = b.length = 0


cdef void buffer_drop(buffer_t *b) noexcept nogil:
    """Forget what has gone on already."""
    buffer_rewind(b)
    if b.at >= 65536 and b.at * 2 >= b.length:
        # Moving costs at most what has been written since the last move.
        memmove(b.bytes, b.bytes + b.at, b.length - b.at)
        b.length -= b.at
        b.at = 0


cdef void buffer_free(buffer_t *b) noexcept nogil:
    free(b.bytes)
    memset(b, 0, sizeof(buffer_t))


cdef inline void buffer_reset(worker_t *w, buffer_t *b) noexcept nogil:
    """Empty a buffer whose call goes to the pool; frees a large one if there are enough."""
    if b.capacity > POOLED_BUFFER_BYTES:
        if w.spare_bytes + b.capacity > SPARE_BYTES_MAX:
            buffer_free(b)
        else:
            w.spare_bytes += b.capacity
    b.length = b.at = 0


cdef inline void buffer_unspare(worker_t *w, const buffer_t *b) noexcept nogil:
    if b.capacity > POOLED_BUFFER_BYTES:
        w.spare_bytes -= b.capacity


# --- the arena: bytes that live as long as their call ---------------------------------------------

cdef uint8_t *arena_take(call_t *call, size_t length) noexcept nogil:
    """Answer so many bytes, NULL without memory."""
    cdef uint8_t *found
    cdef chunk_t *chunk
    if CALL_ARENA_BYTES - call.arena_used >= length:
        found = &call.arena[call.arena_used]
        call.arena_used += length
        return found
    # A block of its own for each: only calls with many or long headers come here.
    chunk = <chunk_t *>malloc(sizeof(chunk_t) + length)
    if chunk == NULL:
        return NULL
    chunk.next = call.chunks
    call.chunks = chunk
    # As malloc has them: with a head of 8 bytes, in steps of 16, 32 at least.
    call.chunks_bytes += 32 if length <= 16 else (sizeof(chunk_t) + length + 23) & ~<size_t>15
    return <uint8_t *>(chunk + 1)


cdef bint arena_text(
    call_t *call, text_t *text, const void *bytes, size_t length
) noexcept nogil:
    """Keep a copy of some bytes."""
    cdef uint8_t *found = arena_take(call, length)
    if found == NULL:
        return False
    memcpy(found, bytes, length)
    text.bytes = found
    text.length = <uint32_t>length
    return True


cdef inline uint32_t text_place(const uint8_t *bytes, size_t length, uint32_t size) noexcept nogil:
    """Answer a text's place in an index of a power of two places (FNV-1a, 64 bits, folded).

    Not keyed: only for texts that no client can choose so that many share a place.
    """
    cdef uint64_t hash = 0xCBF29CE484222325U
    cdef size_t i
    for i in range(length):
        hash = (hash ^ bytes[i]) * 0x100000001B3U
    return <uint32_t>(hash ^ hash >> 32) & (size - 1)


# --- header lists ---------------------------------------------------------------------------------

cdef header_t *headers_next(headers_t *headers) noexcept nogil:
    """Answer the place for one more header, NULL without memory."""
    cdef uint32_t capacity
    cdef header_t *items
    if headers.count == headers.capacity:
        capacity = 2 * headers.capacity if headers.capacity else 16
        items = <header_t *>realloc(headers.items, capacity * sizeof(header_t))
        if items == NULL:
            return NULL
        headers.items = items
        headers.capacity = capacity
    headers.count += 1
    return &headers.items[headers.count - 1]


cdef header_t *headers_add(
    call_t *call, headers_t *headers, const uint8_t *name, size_t name_length,
    const uint8_t *value, size_t value_length, uint8_t kind, uint8_t flags
) noexcept nogil:
    """Keep a copy of a header; NULL without memory."""
    cdef uint8_t *bytes = arena_take(call, name_length + value_length)
    cdef header_t *header
    if bytes == NULL:
        return NULL
    header = headers_next(headers)
    if header == NULL:
        return NULL
    memcpy(bytes, name, name_length)
    memcpy(bytes + name_length, value, value_length)
    header.name = bytes
    header.value = bytes + name_length
    header.name_length = <uint32_t>name_length
    header.value_length = <uint32_t>value_length
    header.kind = kind
    header.flags = flags
    headers.bytes += name_length + value_length + 32
    return header


cdef inline void headers_clear(headers_t *headers) noexcept nogil:
    headers.count = 0
    headers.bytes = 0


# --- calls ----------------------------------------------------------------------------------------

cdef call_t *call_new(worker_t *w) noexcept nogil:
    """Answer an empty call, NULL without memory."""
    cdef call_t *call = w.pool
    if call != NULL:
        w.pool = call.pool_next
        w.pool_count -= 1
        call.pool_next = NULL
        if w.spare_bytes != 0:
            buffer_unspare(w, &call.body)
            buffer_unspare(w, &call.answer)
            buffer_unspare(w, &call.injector.out)
        return call
    call = <call_t *>calloc(1, sizeof(call_t))
    if call != NULL:
        call.worker = w
        call.timer.owner = call
        call.timer.kind = TIMER_CALL
    return call


cdef void headers_free(headers_t *headers) noexcept nogil:
    free(headers.items)
    memset(headers, 0, sizeof(headers_t))


cdef inline size_t lists_bytes(const call_t *call) noexcept nogil:
    """Answer what the lists of a call take beside the bytes of their headers."""
    return sizeof(header_t) * (
        <size_t>call.request.capacity + call.response.capacity + call.trailers.capacity
        + call.held_response.capacity + call.held_trailers.capacity)


cdef void chunks_free(call_t *call) noexcept nogil:
    cdef chunk_t *chunk
    while call.chunks != NULL:
        chunk = call.chunks
        call.chunks = chunk.next
        free(chunk)
    call.arena_used = 0
    call.chunks_bytes = 0


cdef void call_destroy(call_t *call) noexcept nogil:
    chunks_free(call)
    headers_free(&call.request)
    headers_free(&call.response)
    headers_free(&call.trailers)
    headers_free(&call.held_response)
    headers_free(&call.held_trailers)
    buffer_free(&call.body)
    buffer_free(&call.answer)
    buffer_free(&call.injector.out)
    free(call)


cdef void call_free(call_t *call) noexcept nogil:
    """Give a call back that nothing names any more; what is being written may point at it."""
    cdef worker_t *w = call.worker
    cdef call_t *pool
    cdef headers_t lists[5]
    cdef buffer_t buffers[3]
    cdef int i
    c_assert(call.down == NULL and call.up == NULL and call.waits_for == NULL)
    c_assert(call.slot == NULL and not call.in_turn and not call.timer.is_set)
    if w.is_packing:
        call.pool_next = w.leaving
        w.leaving = call
        return
    answer_forget(call)
    w.held_bytes -= call.held_bytes
    weigh_as(call, 0)
    if w.pool_count >= POOL_MAX:
        call_destroy(call)
        return
    chunks_free(call)
    # All is zero in a new call but the memory that it brings along.
    lists[0] = call.request
    lists[1] = call.response
    lists[2] = call.trailers
    lists[3] = call.held_response
    lists[4] = call.held_trailers
    buffers[0] = call.body
    buffers[1] = call.answer
    buffers[2] = call.injector.out
    for i in range(5):
        if lists[i].capacity > POOLED_HEADERS:
            headers_free(&lists[i])
        headers_clear(&lists[i])
    for i in range(3):
        buffer_reset(w, &buffers[i])
    # Not the arena: what lies in there is written before it is read.
    memset(call, 0, <size_t>(<uint8_t *>&call.arena[0] - <uint8_t *>call))
    call.request = lists[0]
    call.response = lists[1]
    call.trailers = lists[2]
    call.held_response = lists[3]
    call.held_trailers = lists[4]
    call.body = buffers[0]
    call.answer = buffers[1]
    call.injector.out = buffers[2]
    call.worker = w
    call.timer.owner = call
    call.timer.kind = TIMER_CALL
    pool = w.pool
    call.pool_next = pool
    w.pool = call
    w.pool_count += 1


cdef inline void count(worker_t *w, int which, uint64_t more) noexcept nogil:
    # The worker is the only writer, so that no read-modify-write is needed. relaxed: a number.
    store_u64(&w.counts[which], load_u64(&w.counts[which], relaxed) + more, relaxed)

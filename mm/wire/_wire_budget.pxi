# Memory for requests: what all of a worker's take, what each connection has of it, and who has to
# go. Answers that wait have a bound of their own (_wire_slow.pxi).
#
# Windows bound what a stream has waiting; with thousands of streams that is no bound. A connection
# may have as much as is left of the budget: one alone half of it, of ten greedy ones each an
# eleventh, and whoever comes then finds as much. So nobody pays for what others have waiting.

cdef enum:
    # What nghttp2 has of a stream.
    STREAM_BYTES = 512


cdef inline void call_weigh(call_t *call) noexcept nogil:
    """Count what a call takes now."""
    weigh_as(call, sizeof(call_t) + STREAM_BYTES + call.chunks_bytes + lists_bytes(call)
             + call.body.length + call.injector.out.length)


cdef inline void weigh_as(call_t *call, size_t weight) noexcept nogil:
    cdef size_t more = weight - call.weight   # less: it wraps around, in all sums
    if more == 0:
        return
    call.weight = weight
    count(call.worker, COUNT_BUFFER_BYTES, more)
    if call.down != NULL:
        call.down.buffer_bytes += more


cdef inline bint is_greedy(const call_t *call, size_t more) noexcept nogil:
    """Answer whether its connection would have more than is left."""
    cdef const config_t *config = call.worker.config
    return (call.down != NULL and config != NULL
            and call.down.buffer_bytes + load_u64(&call.worker.counts[COUNT_BUFFER_BYTES], relaxed)
            + more > config.buffer_bytes_max)


cdef void call_refuse(call_t *call) noexcept nogil:
    """There is no memory for a call; nothing if it is answered."""
    cdef char text[160]
    cdef int n
    if call.answer_ended or call.down == NULL:
        return
    count(call.worker, COUNT_BUFFERS_FULL, 1)
    n = snprintf(
        text, sizeof(text),
        b"calls of this connection that wait take %llu bytes; no more is left of %llu "
        b"(MM_WIRE_BUFFER_BYTES_MAX)", <unsigned long long>call.down.buffer_bytes,
        <unsigned long long>call.worker.config.buffer_bytes_max)
    call_fail(call, 8, <const uint8_t *>text, n)

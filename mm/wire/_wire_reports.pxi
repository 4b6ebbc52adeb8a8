# What peers that call copies here were told of them, for whoever pushes news between replies
# (mesh/load_pusher.py). Only calls of peers come here, twice each: when they begin, and when their
# reply says how busy the copy is.
#
# Python takes all of it every few milliseconds while there is something, under a lock that the
# thread finds free otherwise.
#
# And what attempts came to whose calls cannot be sent again, so that tier 2 weighs those, too: else
# a model that the runtime has lost stayed where the table has it.


cdef bint reports_new(worker_t *w) noexcept nogil:
    pthread_mutex_init(&w.reports_lock, NULL)
    w.reports = <report_t *>calloc(REPORTS_MAX, sizeof(report_t))
    w.reports_index = <uint16_t *>calloc(2 * REPORTS_MAX, sizeof(uint16_t))
    return w.reports != NULL and w.reports_index != NULL


cdef void reports_free(worker_t *w) noexcept nogil:
    failures_free(w.failures)
    free(w.reports)
    free(w.reports_index)
    pthread_mutex_destroy(&w.reports_lock)


cdef uint32_t hash_text(const text_t *text, uint32_t hash) noexcept nogil:
    cdef uint32_t i
    for i in range(text.length):
        hash = (hash ^ text.bytes[i]) * 0x01000193U
    return hash


cdef void report(call_t *call, int64_t told) noexcept nogil:
    """Note that a peer's call for a copy here began (-1), or what its reply tells."""
    cdef worker_t *w = call.worker
    cdef text_t *sender = &call.head.hop_from
    cdef text_t *id = &call.model_id
    cdef report_t *found
    cdef bint is_first = False
    if sender.length == 0 or sender.length + id.length > REPORT_BYTES:
        return   # what is longer hears by replies alone
    pthread_mutex_lock(&w.reports_lock)
    found = report_of(w, sender, id)
    if found == NULL:
        count(w, COUNT_REPORTS_DROPPED, 1)
    elif told < 0:
        found.calls += 1
    else:
        found.told = told
        found.answers += 1
        found.service_ns += w.now_ns - call.arrived_ns
    if found != NULL and not w.reports_noticed:
        w.reports_noticed = is_first = True
    pthread_mutex_unlock(&w.reports_lock)
    if is_first:
        notice(w)


cdef report_t *report_of(worker_t *w, const text_t *sender, const text_t *id) noexcept nogil:
    """Find the entry of a peer and a model, or make it; NULL: there are too many."""
    cdef uint32_t hash = hash_text(id, hash_text(sender, 0x811C9DC5U))
    cdef uint32_t place = (hash ^ hash >> 16) & (2 * REPORTS_MAX - 1)
    cdef report_t *each
    while w.reports_index[place] != 0:
        each = &w.reports[w.reports_index[place] - 1]
        if (each.hash == hash and each.sender_length == sender.length
                and each.id_length == id.length
                and memcmp(each.bytes, sender.bytes, sender.length) == 0
                and memcmp(each.bytes + sender.length, id.bytes, id.length) == 0):
            return each
        place = (place + 1) & (2 * REPORTS_MAX - 1)
    if w.reports_count == REPORTS_MAX:
        return NULL
    each = &w.reports[w.reports_count]
    w.reports_count += 1
    w.reports_index[place] = <uint16_t>w.reports_count
    each.hash = hash
    each.calls = each.answers = 0
    each.told = -1
    each.service_ns = 0
    each.sender_length = <uint16_t>sender.length
    each.id_length = <uint16_t>id.length
    memcpy(each.bytes, sender.bytes, sender.length)
    memcpy(each.bytes + sender.length, id.bytes, id.length)
    return each


# --- failures -------------------------------------------------------------------------------------

cdef void failures_free(failure_t *failure) noexcept nogil:
    cdef failure_t *next_
    while failure != NULL:
        next_ = failure.next
        free(failure)
        failure = next_


cdef void failure_note(call_t *call, const headers_t *trailers) noexcept nogil:
    """Have tier 2 told what an attempt came to: an answer's trailers; NULL: the fault."""
    cdef worker_t *w = call.worker
    cdef failure_t *failure = NULL
    cdef size_t count_
    if nv_reserve(w, TRIED_MAX):
        count_ = build_tried(call, call.lane, trailers, w.nv)
        failure = failure_new(w.nv, count_)
    pthread_mutex_lock(&w.reports_lock)
    if failure != NULL and w.failures_count < FAILURES_MAX:
        failure.next = w.failures
        w.failures = failure
        w.failures_count += 1
        failure = NULL
        count(w, COUNT_FAILURES_TOLD, 1)
    else:
        count(w, COUNT_FAILURES_UNTOLD, 1)
    pthread_mutex_unlock(&w.reports_lock)
    free(failure)
    notice(w)


cdef failure_t *failure_new(const nghttp2_nv *nv, size_t count_) noexcept nogil:
    """Copy what build_tried has laid out; NULL without memory."""
    cdef failure_t *failure
    cdef uint8_t *at
    cdef uint32_t lengths[2]
    cdef size_t i, length = 0
    for i in range(count_):
        length += sizeof(lengths) + nv[i].namelen + failure_text(&nv[i])
    failure = <failure_t *>malloc(sizeof(failure_t) + length)
    if failure == NULL:
        return NULL
    failure.length = length
    at = <uint8_t *>(failure + 1)
    for i in range(count_):
        lengths[0] = <uint32_t>nv[i].namelen
        lengths[1] = <uint32_t>failure_text(&nv[i])
        memcpy(at, lengths, sizeof(lengths))
        at += sizeof(lengths)
        memcpy(at, nv[i].name, lengths[0])
        at += lengths[0]
        memcpy(at, nv[i].value, lengths[1])
        at += lengths[1]
    return failure


cdef inline size_t failure_text(const nghttp2_nv *nv) noexcept nogil:
    """Answer how much of a value is told: all of an id."""
    return nv.valuelen if nv.valuelen < FAILURE_TEXT_BYTES else <size_t>FAILURE_TEXT_BYTES

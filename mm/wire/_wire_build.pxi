# The header lists that the wire sends: of requests by lane, and of answers (spec core 2.12).
#
# They are laid out in the worker's scratch and point into the call's arena, which outlives the
# frames (see _wire.pxd), so nghttp2 copies nothing but the list itself. What differs in every call
# is never put into HPACK's table: it would push useful entries out of it.

cdef enum:
    # Headers of what an attempt came to: where, of which model, and of the answer's trailers each
    # name that counts, once.
    ANSWERED_MAX = 5
    TRIED_MAX = 2 + ANSWERED_MAX
    # Headers that the wire adds to a list at most. To a request for tier 2: what an attempt came
    # to, the certificate, the client. To a hit: six that every request has, two forms of the id,
    # two of encodings, six of the hop, the time that is left.
    ADDED_SPLICE_MAX = TRIED_MAX + 2
    ADDED_HIT_MAX = 6 + 2 + 2 + 6 + 1
    ADDED_MAX = ADDED_HIT_MAX   # the larger of both
    # Of a vmodel's id, so that it has 4,096 bytes at most when it is encoded.
    VMODEL_ID_MAX = 1364


cdef bint nv_reserve(worker_t *w, uint32_t needed) noexcept nogil:
    cdef nghttp2_nv *nv
    if w.nv_capacity >= needed:
        return True
    nv = <nghttp2_nv *>realloc(w.nv, needed * sizeof(nghttp2_nv))
    if nv == NULL:
        return False
    w.nv = nv
    w.nv_capacity = needed
    return True


cdef inline void put(
    nghttp2_nv *nv, const void *name, size_t name_length, const void *value, size_t value_length,
    uint8_t flags
) noexcept nogil:
    nv.name = <uint8_t *>name
    nv.namelen = name_length
    nv.value = <uint8_t *>value
    nv.valuelen = value_length
    nv.flags = flags | NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE


cdef inline void put_header(nghttp2_nv *nv, const header_t *h) noexcept nogil:
    put(nv, h.name, h.name_length, h.value, h.value_length, h.flags)


cdef bint put_timeout(call_t *call, nghttp2_nv *nv) noexcept nogil:
    """Write what is left of the client's time; False if nothing is, or without memory."""
    cdef uint64_t now_ns = call.worker.now_ns
    cdef uint64_t left_us
    cdef char text[24]
    cdef text_t kept
    cdef int n
    if call.deadline_ns <= now_ns:
        return False
    left_us = (call.deadline_ns - now_ns) // 1000
    if left_us < 100000000:
        n = snprintf(text, sizeof(text), b"%lluu", <unsigned long long>(left_us if left_us else 1))
    elif left_us < 100000000000U:
        n = snprintf(text, sizeof(text), b"%llum", <unsigned long long>(left_us // 1000))
    else:
        left_us //= 1000000
        n = snprintf(text, sizeof(text), b"%lluS",
                     <unsigned long long>(left_us if left_us < 99999999 else 99999999))
    if not arena_text(call, &kept, text, n):
        return False
    put(nv, b"grpc-timeout", 12, kept.bytes, kept.length, NGHTTP2_NV_FLAG_NO_INDEX)
    return True


cdef size_t build_request(call_t *call, conn_t *conn) noexcept nogil:
    """Lay out the headers of a request; 0 without memory, or if the client's time is up."""
    cdef worker_t *w = call.worker
    cdef size_t n
    if not nv_reserve(w, call.request.count + ADDED_MAX):
        return 0
    if call.lane >= LANE_MODEL:
        n = build_splice(call, w.nv)
    else:
        n = build_hit(call, conn, w.nv)
    c_assert(n <= w.nv_capacity)
    return n


cdef size_t build_splice(call_t *call, nghttp2_nv *nv) noexcept nogil:
    """Everything as it came, with the time that is left; after an attempt here, what that came to.
    """
    cdef headers_t *request = &call.request
    cdef header_t *h
    cdef size_t n = 0
    cdef uint32_t i
    for i in range(request.count):
        h = &request.items[i]
        if h.kind == STRIPPED:
            continue
        if (call.deadline_ns != 0 and call.worker.now_ns != call.arrived_ns
                and h.name_length == 12 and same(h.name, b"grpc-timeout", 12)):
            # It was tried here, or has waited: for its first message, for a connection.
            if not put_timeout(call, &nv[n]):
                put(&nv[n], b"grpc-timeout", 12, b"1n", 2, NGHTTP2_NV_FLAG_NO_INDEX)
        else:
            put_header(&nv[n], h)
        n += 1
    n += put_certificate(call, &nv[n])
    if call.is_replayed:
        n += build_tried(call, call.tried_lane, &call.held_trailers if call.has_held else NULL,
                         &nv[n])
    if call.lane == LANE_OWN:
        n += put_client(call, &nv[n])
    return n


cdef uint32_t put_client(call_t *call, nghttp2_nv *nv) noexcept nogil:
    """Whose call it is: all clients share the wire's connections to tier 2, and what one connection
    may have of the mesh's own services is counted there. 0: the client is gone, or without memory.
    """
    cdef char text[48]
    cdef text_t kept
    cdef int length
    if call.down == NULL:
        return 0
    # Its descriptor tells a thread from the others, from before there is a table.
    length = snprintf(text, sizeof(text), b"%d-%llu", call.worker.wake_fd,
                      <unsigned long long>call.down.number)
    if not arena_text(call, &kept, text, length):
        return 0
    put(&nv[0], b"mm-wire-client", 14, kept.bytes, kept.length, NGHTTP2_NV_FLAG_NO_INDEX)
    return 1


cdef size_t build_tried(
    call_t *call, uint8_t lane, const headers_t *trailers, nghttp2_nv *nv
) noexcept nogil:
    """Tell tier 2 where the call has been, and what was answered there; NULL: nothing.

    Answers the number of headers, of which there are at most TRIED_MAX, whatever the trailers: who
    answered chose them. Of a name that comes more than once the last one counts.
    """
    cdef nghttp2_nv *place[ANSWERED_MAX]
    cdef char text[48]
    cdef text_t kept
    cdef header_t *h
    cdef uint32_t i
    cdef int which
    cdef size_t n = 0
    cdef int length
    if lane == LANE_HERE:
        length = snprintf(text, sizeof(text), b"here %u", call.copy_word >> 8)
    else:
        length = snprintf(text, sizeof(text), b"%u %d", call.handle, <int>call.may_redirect)
    if arena_text(call, &kept, text, length):
        put(&nv[n], b"mm-wire-tried", 13, kept.bytes, kept.length, 0)
        n += 1
    put(&nv[n], b"mm-wire-model", 13, call.model_id.bytes, call.model_id.length, 0)
    n += 1
    if trailers == NULL:
        put(&nv[n], b"mm-wire-fault", 13, call.fault.bytes, call.fault.length, 0)
        return n + 1
    memset(place, 0, sizeof(place))
    for i in range(trailers.count):
        h = &trailers.items[i]
        which = answered_as(h)
        if which < 0:
            continue
        if place[which] == NULL:
            place[which] = &nv[n]
            n += 1
        put(place[which], ANSWERED[which], strlen(ANSWERED[which]), h.value, h.value_length, 0)
    return n


cdef const char *ANSWERED[ANSWERED_MAX]
ANSWERED[:] = [
    b"mm-wire-status", b"mm-wire-message", b"mm-wire-result", b"mm-wire-state", b"mm-wire-pushback",
]


cdef int answered_as(const header_t *h) noexcept nogil:
    """Answer which of ANSWERED a trailer is told as; -1: none."""
    if h.name_length == 11 and same(h.name, b"grpc-status", 11):
        return 0
    if h.name_length == 12 and same(h.name, b"grpc-message", 12):
        return 1
    if h.name_length == 13 and same(h.name, b"mm-hop-result", 13):
        return 2
    if h.name_length == 12 and same(h.name, b"mm-hop-state", 12):
        return 3
    if h.name_length == 22 and same(h.name, b"grpc-retry-pushback-ms", 22):
        return 4
    return -1


cdef size_t build_hit(call_t *call, conn_t *conn, nghttp2_nv *nv) noexcept nogil:
    """What a runtime or peer is told: the client's metadata, the concrete id, and the hop."""
    cdef head_t *head = &call.head
    cdef headers_t *request = &call.request
    cdef target_t *target = conn.target
    cdef header_t *h
    cdef uint32_t i
    cdef size_t n = 6
    put(&nv[0], b":method", 7, b"POST", 4, 0)
    put(&nv[1], b":scheme", 7, b"http", 4, 0)
    put(&nv[2], b":path", 5, head.path.bytes, head.path.length, 0)
    put(&nv[3], b":authority", 10, target.name, target.name_length, 0)
    put(&nv[4], b"te", 2, b"trailers", 8, 0)
    put(&nv[5], b"content-type", 12, head.content_type.bytes, head.content_type.length, 0)
    for i in range(request.count):
        h = &request.items[i]
        if h.kind == PASS:
            put_header(&nv[n], h)
            n += 1
    i = put_ids(call, conn, &nv[n])
    if i == 0:
        return 0
    n += i
    if head.accept_encoding.length != 0:
        put(&nv[n], b"grpc-accept-encoding", 20, head.accept_encoding.bytes,
            head.accept_encoding.length, 0)
        n += 1
    if head.encoding.length != 0 and not (
            head.encoding.length == 8 and same(head.encoding.bytes, b"identity", 8)):
        put(&nv[n], b"grpc-encoding", 13, head.encoding.bytes, head.encoding.length, 0)
        n += 1
    if call.lane == LANE_THERE:
        n += put_hop(call, &nv[n])
    if call.deadline_ns != 0:
        if not put_timeout(call, &nv[n]):
            return 0
        n += 1
    return n


cdef uint32_t put_hop(call_t *call, nghttp2_nv *nv) noexcept nogil:
    """A hit at another instance (docs/peer-protocol.md)."""
    cdef config_t *config = call.worker.config
    cdef uint32_t n = 4
    put(&nv[0], b"mm-hop-version", 14, b"1", 1, 0)
    put(&nv[1], b"mm-hop-kind", 11, b"hit-only", 8, 0)
    put(&nv[2], b"mm-hop-left", 11, b"1", 1, 0)
    # The configuration may be replaced while the frame waits, so this one is copied.
    put(&nv[3], b"mm-hop-from", 11, config.instance.bytes, config.instance.length, 0)
    nv[3].flags = NGHTTP2_NV_FLAG_NO_COPY_NAME
    if call.request_ended and call.keeps:
        if call.may_redirect:
            put(&nv[n], b"mm-hop-redirect", 15, b"1", 1, 0)
            n += 1
        if config.has_slots and call.head.is_vmodel:
            n += put_vmodel(call, &nv[n])
    return n


cdef uint32_t put_vmodel(call_t *call, nghttp2_nv *nv) noexcept nogil:
    """Which vmodel it is for, as it may wait for a slot there: percent-encoded, of no revision that
    is known here. 0: it is too long, or without memory.
    """
    cdef const text_t *id = &call.head.model_id
    cdef uint8_t *out = NULL
    cdef uint32_t n = 0, i
    cdef uint8_t c
    if id.length <= VMODEL_ID_MAX:
        out = arena_take(call, <size_t>id.length * 3 + 2)
    if out == NULL:
        return 0
    for i in range(id.length):
        c = id.bytes[i]
        if 48 <= c <= 57 or 65 <= c <= 90 or 97 <= c <= 122 or c in (45, 46, 95, 126):
            out[n] = c
            n += 1
        else:
            out[n] = 37   # "%"
            out[n + 1] = HEX[c >> 4]
            out[n + 2] = HEX[c & 15]
            n += 3
    out[n] = 47           # "/"
    out[n + 1] = 48       # "0"
    put(nv, b"mm-hop-vmodel", 13, out, n + 2, NGHTTP2_NV_FLAG_NO_INDEX)
    return 1


cdef const uint8_t *HEX = b"0123456789ABCDEF"


cdef const char *BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


cdef bint is_recent(conn_t *conn, const uint8_t *id, uint32_t length) noexcept nogil:
    """Answer whether an id was sent on a connection of late; from now on it was.

    HPACK's table holds some 25 ids in their two forms. Entered each time, the ids of many models
    would push each other out of it, and all headers that every call has: that costs both ends more
    than writing an id out. So one is entered when it comes a second time before another one of the
    same place.
    """
    cdef uint64_t hash = length
    cdef uint64_t word
    cdef uint32_t at = 0
    cdef uint64_t *place
    while at < length:
        word = 0
        memcpy(&word, id + at, 8 if length - at >= 8 else length - at)
        hash = (hash ^ word) * 0x9E3779B97F4A7C15U
        hash ^= hash >> 29
        at += 8
    place = &conn.recent_ids[hash & (RECENT_IDS - 1)]
    if place[0] == hash:
        return True
    place[0] = hash
    return False


cdef uint32_t put_ids(call_t *call, conn_t *conn, nghttp2_nv *nv) noexcept nogil:
    """The concrete id, in base64 and, if it is visible ASCII, in the clear; 0 without memory."""
    cdef const uint8_t *id = call.model_id.bytes
    cdef uint32_t length = call.model_id.length
    cdef uint8_t *out = arena_take(call, (<size_t>length * 4 + 2) // 3)
    cdef uint32_t at = 0, n = 0, i
    cdef uint32_t word
    cdef uint8_t flags
    if out == NULL:
        return 0
    flags = NGHTTP2_NV_FLAG_NONE if is_recent(conn, id, length) else NGHTTP2_NV_FLAG_NO_INDEX
    while at + 3 <= length:
        word = <uint32_t>id[at] << 16 | <uint32_t>id[at + 1] << 8 | id[at + 2]
        out[n] = BASE64[word >> 18]
        out[n + 1] = BASE64[word >> 12 & 63]
        out[n + 2] = BASE64[word >> 6 & 63]
        out[n + 3] = BASE64[word & 63]
        at += 3
        n += 4
    if length - at == 1:
        out[n] = BASE64[id[at] >> 2]
        out[n + 1] = BASE64[(id[at] & 3) << 4]
        n += 2
    elif length - at == 2:
        word = <uint32_t>id[at] << 8 | id[at + 1]
        out[n] = BASE64[word >> 10]
        out[n + 1] = BASE64[word >> 4 & 63]
        out[n + 2] = BASE64[(word & 15) << 2]
        n += 3
    put(&nv[0], b"mm-model-id-bin", 15, out, n, flags)
    for i in range(length):
        if id[i] < 32 or id[i] > 126:
            return 1
    put(&nv[1], b"mm-model-id", 11, id, length, flags)
    return 2


cdef size_t build_answer(call_t *call, const headers_t *headers, bint with_load) noexcept nogil:
    """Lay out an answer's headers or trailers; room for them has been made with the request's."""
    cdef worker_t *w = call.worker
    cdef header_t *h
    cdef uint32_t i
    cdef size_t n = 0
    cdef char text[16]
    cdef text_t kept
    cdef int length
    if not nv_reserve(w, headers.count + 1):
        return 0
    for i in range(headers.count):
        h = &headers.items[i]
        if h.kind != STRIPPED:
            put_header(&w.nv[n], h)
            n += 1
    if with_load and call.slot != NULL:
        # Besides this one, which is still pinned.
        length = snprintf(text, sizeof(text), b"%u", in_flight_of(call.slot) - 1)
        if arena_text(call, &kept, text, length):
            if call.head.hop_kind.bytes != NULL:
                report(call, in_flight_of(call.slot) - 1)
            put(&w.nv[n], b"mm-hop-load", 11, kept.bytes, kept.length, NGHTTP2_NV_FLAG_NO_INDEX)
            n += 1
    return n

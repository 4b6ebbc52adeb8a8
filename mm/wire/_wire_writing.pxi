# What leaves: connections that something was submitted to are written once at the end of a turn.
#
# `mark_dirty` puts a connection in the line, `flush` takes it out. Frames are laid out as parts:
# what is small is copied into `gather`, large pieces of bodies are pointed at, and the kernel
# gathers them from where they lie. A socket that takes no more stops its session from packing
# frames, and so, by flow control, whoever sends to it; what was packed by then is copied.

cdef enum:
    GATHER_BYTES = 262144       # written at once
    # What a socket that broke has left to read is here already: a few turns, unless somebody only
    # closed one half of it.
    LAST_READS_MS = 1000
    FLUSH_ROUNDS = 4            # in a turn; a large answer must not keep the others waiting
    # Two parts more cost the kernel as much as copying so many bytes.
    POINTED_BYTES_MIN = 2048


cdef void mark_dirty(conn_t *conn) noexcept nogil:
    cdef worker_t *w = conn.worker
    if conn.is_dirty or conn.is_closed:
        return
    conn.is_dirty = 1
    conn.dirty_next = NULL
    if w.dirty_last != NULL:
        w.dirty_last.dirty_next = conn
    else:
        w.dirty = conn
    w.dirty_last = conn


cdef bint write_some(conn_t *conn, buffer_t *from_) noexcept nogil:
    """Write what the socket takes; False if the connection is lost."""
    cdef ssize_t n
    while buffer_left(from_) != 0:
        n = send(conn.fd, from_.bytes + from_.at, buffer_left(from_), MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            return errno == EAGAIN
        from_.at += n
        conn.blocked_ms = conn.worker.now_ms
        count(conn.worker, COUNT_BYTES_OUT + conn.side, n)
    return True


cdef void flush(conn_t *conn) noexcept nogil:
    """Pack and write what was submitted, as far as the socket and a turn allow."""
    cdef worker_t *w = conn.worker
    cdef int _round
    cdef bint is_well
    cdef size_t at = conn.out.at
    if conn.is_closed or conn.is_connecting or conn.is_mute:
        return
    if buffer_left(&conn.out) != 0:
        if not write_some(conn, &conn.out):
            conn_broke(conn)
            return
        if buffer_left(&conn.out) != 0:
            if conn.out.at != at:
                blocked_enter(conn)
            return
        buffer_free(&conn.out)
        blocked_leave(conn)
        conn.is_blocked = 0
        conn_watch(conn)
    if conn.is_shaking:
        return
    w.copies_parts = conn.ssl != NULL
    for _round in range(FLUSH_ROUNDS):
        w.is_packing = 1
        is_well = pack(conn) and (conn.ssl == NULL or tls_seal(conn)) and parts_write(conn)
        w.is_packing = 0
        calls_leave(w)
        if not is_well:
            conn_broke(conn)
            return
        if buffer_left(&conn.out) != 0:
            conn.is_blocked = 1
            conn.blocked_ms = w.now_ms
            blocked_enter(conn)
            conn_watch(conn)
            return
        if not is_full(w):
            conn_finish(conn)
            return
    mark_dirty(conn)


cdef void conn_broke(conn_t *conn) noexcept nogil:
    """Nothing can be written any more. Who was asked may have answered before: that is read first,
    until the socket has nothing more, which it says soon.
    """
    if conn.is_server or conn.is_shaking:
        conn_close(conn)
        return
    conn.is_mute = conn.is_draining = 1
    buffer_free(&conn.out)
    if conn.is_blocked:
        conn.is_blocked = 0
        conn_watch(conn)
    timer_set(conn.worker, &conn.timer, conn.worker.now_ms + LAST_READS_MS)


cdef void calls_leave(worker_t *w) noexcept nogil:
    """Free the calls that ended while parts may have pointed at their bytes."""
    cdef call_t *call
    while w.leaving != NULL:
        call = w.leaving
        w.leaving = call.pool_next
        call_free(call)


# --- packing --------------------------------------------------------------------------------------

cdef inline bint is_full(const worker_t *w) noexcept nogil:
    """Answer whether enough is packed; the last part is left for what may have to be copied."""
    return w.packed_bytes >= GATHER_BYTES or w.parts_count >= PARTS_MAX - 1


cdef bint pack(conn_t *conn) noexcept nogil:
    """Lay out frames; False if the session is beyond help."""
    cdef worker_t *w = conn.worker
    cdef const uint8_t *bytes
    cdef ssize_t n
    w.gather.at = w.gather.length = 0
    w.parts_count = 0
    w.packed_bytes = 0
    while not is_full(w):
        n = nghttp2_session_mem_send(conn.session, &bytes)
        if n == 0:
            return True
        if n < 0 or not buffer_reserve(&w.gather, n):
            return False
        part_copy(w, bytes, n)
    return True


cdef void part_copy(worker_t *w, const uint8_t *bytes, size_t length) noexcept nogil:
    """Add a copy of some bytes to what is written; `gather` has room."""
    cdef part_t *part = NULL
    if w.parts_count != 0:
        part = &w.parts[w.parts_count - 1]
    if part == NULL or part.bytes != NULL:
        part = &w.parts[w.parts_count]
        w.parts_count += 1
        part.bytes = NULL
        part.at = w.gather.length
        part.length = 0
    memcpy(w.gather.bytes + w.gather.length, bytes, length)
    w.gather.length += length
    part.length += length
    w.packed_bytes += length


cdef void part_add(worker_t *w, const uint8_t *bytes, size_t length) noexcept nogil:
    """Add bytes that stay where they are until they are written; `gather` has room for them."""
    cdef part_t *part
    # One part is needed for this, and one for whatever has to be copied after it.
    if length < POINTED_BYTES_MIN or w.copies_parts or w.parts_count + 2 > PARTS_MAX:
        part_copy(w, bytes, length)
        return
    part = &w.parts[w.parts_count]
    w.parts_count += 1
    part.bytes = bytes
    part.length = length
    w.packed_bytes += length


cdef int send_data(
    nghttp2_session *session, nghttp2_frame *frame, const uint8_t *head, size_t length,
    nghttp2_data_source *_source, void *user
) noexcept nogil:
    """Lay out a piece of a body, behind the head of the frame that nghttp2 has begun."""
    cdef conn_t *conn = <conn_t *>user
    cdef worker_t *w = conn.worker
    cdef call_t *call
    cdef buffer_t *out
    if is_full(w):
        return NGHTTP2_ERR_WOULDBLOCK
    call = <call_t *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if call == NULL or not buffer_reserve(&w.gather, 9 + length):
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    if conn.is_server:
        if answer_left(call) < length:
            return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
        part_copy(w, head, 9)
        frames_earn(conn)
        answer_send(call, length)
        return 0
    out = request_out(call)
    if buffer_left(out) < length:
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    part_copy(w, head, 9)
    if is_injected(call):
        # More may be put in before this is written, in the same place.
        part_copy(w, out.bytes + out.at, length)
    else:
        part_add(w, out.bytes + out.at, length)
    out.at += length
    body_sent(call)
    call_weigh(call)
    return 0


# --- writing --------------------------------------------------------------------------------------

cdef bint parts_write(conn_t *conn) noexcept nogil:
    """Write what is packed; keep a copy of what the socket does not take. False if the connection
    is lost.
    """
    cdef worker_t *w = conn.worker
    cdef iovec vectors[PARTS_MAX]
    cdef part_t *part
    cdef msghdr message
    cdef uint32_t i, at = 0
    cdef ssize_t n
    for i in range(w.parts_count):
        part = &w.parts[i]
        vectors[i].iov_base = <void *>(
            part.bytes if part.bytes != NULL else w.gather.bytes + part.at)
        vectors[i].iov_len = part.length
    memset(&message, 0, sizeof(message))
    while at < w.parts_count:
        if w.parts_count == 1:
            n = send(conn.fd, vectors[0].iov_base, vectors[0].iov_len, MSG_NOSIGNAL)
        else:
            message.msg_iov = &vectors[at]
            message.msg_iovlen = w.parts_count - at
            n = sendmsg(conn.fd, &message, MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                return False
            break
        count(w, COUNT_BYTES_OUT + conn.side, n)
        while at < w.parts_count and <size_t>n >= vectors[at].iov_len:
            n -= vectors[at].iov_len
            at += 1
        if at < w.parts_count:
            # A socket that takes a part of it is full.
            vectors[at].iov_base = <uint8_t *>vectors[at].iov_base + n
            vectors[at].iov_len -= n
            break
    for i in range(at, w.parts_count):
        if not buffer_add(&conn.out, vectors[i].iov_base, vectors[i].iov_len):
            return False
    return True


cdef void conn_finish(conn_t *conn) noexcept nogil:
    """All is written: close what has no more to say."""
    if (nghttp2_session_want_read(conn.session) == 0
            and nghttp2_session_want_write(conn.session) == 0):
        conn_close(conn)
    elif conn.is_draining and conn.calls == NULL and (not conn.is_server or conn.goaway_sent):
        conn_close(conn)

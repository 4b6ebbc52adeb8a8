# What a client or peer may do on a connection besides calling: frames that cost us something and
# bring nobody anything are counted, and who sends too many is cut off.
#
# The heads of frames are read here, before nghttp2 sees them: its own limits are of this or that
# version, and it tells of some frames only when they are whole, of others never. A connection has
# an allowance (`frames_left`) that fills with time and with what it really calls for; what it sends
# costs a part of it.
#
# A peer passes on what all its clients do, and whoever is cut off loses calls of others, so it may
# do far more (PEER_FRAMES, PEER_RESETS), and what its clients can have it send costs little.

cdef enum:
    # Of one list of headers. At 16 KiB a frame lists are far longer than any that is accepted.
    CONTINUATIONS_MAX = 8
    # Each piece of a body allows for the window updates of both ends, and a ping with it.
    FRAMES_EARNED = 4
    # What is dear, in frames: a change of TLS keys, headers that are not kept, streams for which
    # new settings count.
    KEY_UPDATE_FRAMES = 300
    BOMB_FRAMES = 500
    STREAMS_A_FRAME = 8
    # So many times what a client may. It has 20 times the streams, and of frames that are no part
    # of calls it sends no more for many clients than for one. Resets are its clients' own: calls by
    # the ten thousand whose time is up in less than a second. 100,000 in each second are about as
    # many calls as a thread, whose connection it is, can pass on at all (9 us at both ends), and
    # every one of them given up.
    PEER_FRAMES = 20
    PEER_RESETS = 500
    # Control frames that may wait for a client that does not read, beside four of each stream.
    QUEUE_MAX = 2000
    # Of a client, that are looked at in one turn: as calls they take half a millisecond, for which
    # others may have to wait. What is left waits, as long as that of all takes no more memory.
    FRAMES_A_TURN = 128
    RESTS_BYTES_MAX = 16777216
    # A call that has run so long was not made to be reset.
    RESET_LIFE_NS = 1000000000

    FRAME_DATA = 0
    FRAME_HEADERS = 1
    FRAME_RST_STREAM = 3
    FRAME_SETTINGS = 4
    FRAME_CONTINUATION = 9
    FLAG_END_STREAM = 1
    FLAG_END_HEADERS = 4
    FLAG_PADDED = 8
    PREFACE_BYTES = 24
    # At most 256 bytes of a frame are padding, so at least half of one that is as long is a body's.
    PADDED_BYTES_MIN = 512


cdef inline bint is_guarded(const conn_t *conn) noexcept nogil:
    return conn.is_server


cdef inline bint is_timed(const conn_t *conn) noexcept nogil:
    """Answer whether it is held to limits of time (_wire_clients.pxi): clients are."""
    return conn.is_server and conn.role == ROLE_EXTERNAL


cdef void frames_earn(conn_t *conn) noexcept nogil:
    """A piece of a body, or the end of an answer, has passed."""
    cdef const config_t *config = conn.worker.config
    if config == NULL:
        return
    conn.frames_left += FRAMES_EARNED
    if conn.frames_left > config.frames[conn.role].burst:
        conn.frames_left = config.frames[conn.role].burst


cdef void frames_charge(conn_t *conn, double frames, const char *what) noexcept nogil:
    """Take so much from the allowance; with nothing left ``what`` is why it is cut off."""
    cdef worker_t *w = conn.worker
    if not is_guarded(conn) or w.config == NULL:
        return
    conn.frames_left -= frames
    if conn.frames_left >= 0:
        return
    conn.frames_left += (w.now_ms - conn.frames_ms) * w.config.frames[conn.role].per_s / 1000
    conn.frames_ms = w.now_ms
    if conn.frames_left > w.config.frames[conn.role].burst:
        conn.frames_left = w.config.frames[conn.role].burst
    if conn.frames_left < 0 and conn.flood == NULL:
        conn.flood = what


cdef void bomb_charge(conn_t *conn) noexcept nogil:
    """Headers came that are not kept. Those of a peer may be a client's, which are as long as that
    may send and a few more.
    """
    frames_charge(conn, BOMB_FRAMES if is_timed(conn) else 1, b"headers that are too long")


cdef void frame_begun(conn_t *conn) noexcept nogil:
    """The head of a frame is there."""
    cdef const uint8_t *head = conn.frame_head
    cdef uint32_t length = <uint32_t>head[0] << 16 | <uint32_t>head[1] << 8 | head[2]
    cdef uint8_t type = head[3], flags = head[4]
    conn.frame_left = length
    if type == FRAME_DATA:
        conn.strays += 1   # unless `data_begun` finds its call
    elif type == FRAME_HEADERS or type == FRAME_CONTINUATION:
        if type == FRAME_HEADERS:
            conn.strays += 1   # unless `server_begin_headers` does
            conn.continuations = 0
        else:
            conn.continuations += 1
            if conn.continuations > CONTINUATIONS_MAX and conn.flood == NULL:
                conn.flood = b"CONTINUATION frames"
        conn.is_in_headers = not flags & FLAG_END_HEADERS
    elif type == FRAME_SETTINGS:
        frames_charge(conn, 1 + conn.streams // STREAMS_A_FRAME, b"settings")
    elif type != FRAME_RST_STREAM:   # `reset_received` has its own measure
        frames_charge(conn, 1, b"control frames")


cdef void data_begun(conn_t *conn, const call_t *call, const nghttp2_frame_hd *head) noexcept nogil:
    """DATA begins, of a stream that is open. Earns if a call takes what it brings."""
    if call == NULL or (call.answer_ended and not call.wants_replay):
        return
    conn.strays -= 1
    if head.length >= (PADDED_BYTES_MIN if head.flags & FLAG_PADDED else 1):
        frames_earn(conn)
    elif not head.flags & FLAG_END_STREAM:
        frames_charge(conn, 1, b"empty frames")


cdef void strays_charge(conn_t *conn) noexcept nogil:
    """Charge for HEADERS and DATA of streams that have no call: closed, refused or passed over.

    nghttp2 steps over them and tells nothing. Below 0 it has told of one from an earlier read.
    """
    if conn.strays > 0:
        frames_charge(conn, conn.strays, b"frames of streams without a call")
        conn.strays = 0


cdef inline void frame_ended(conn_t *conn) noexcept nogil:
    """A frame is whole, or is of a body: those may take their time. Headers end with a flag."""
    conn.is_begun = conn.is_in_headers


cdef size_t frames_watch(conn_t *conn, const uint8_t *bytes, size_t length) noexcept nogil:
    """Look at the frames in what was read, at as many as one turn has time for, and answer how many
    bytes these are; `flood` says what there are too many of.
    """
    cdef worker_t *w = conn.worker
    cdef size_t step, left = length
    cdef uint32_t frames = 0
    cdef uint32_t frames_max = FRAMES_A_TURN
    if not is_timed(conn) or load_u64(&w.counts[COUNT_RESTS_BYTES], relaxed) >= RESTS_BYTES_MAX:
        frames_max = <uint32_t>-1
    while left != 0 and conn.flood == NULL and frames < frames_max:
        if conn.frame_left != 0:
            step = conn.frame_left if conn.frame_left < left else left
            conn.frame_left -= <uint32_t>step
            if conn.frame_left == 0:
                frame_ended(conn)
        else:
            if not conn.is_begun:
                conn.is_begun = 1
                conn.begun_ms = conn.worker.now_ms
            step = 9 - conn.frame_head_length
            if step > left:
                step = left
            memcpy(conn.frame_head + conn.frame_head_length, bytes, step)
            conn.frame_head_length += <uint8_t>step
            if conn.frame_head_length == 9:
                conn.frame_head_length = 0
                frame_begun(conn)
                frames += 1
                if conn.frame_left == 0 or conn.frame_head[3] == FRAME_DATA:
                    frame_ended(conn)
        bytes += step
        left -= step
    if (conn.is_blocked and conn.flood == NULL
            and nghttp2_session_get_outbound_queue_size(conn.session)
            > QUEUE_MAX + 4 * <size_t>conn.worker.config.streams_max[conn.role]):
        conn.flood = b"answers that it does not read"
    return length - left


cdef bint rest_keep(
    conn_t *conn, const uint8_t *bytes, size_t length, size_t seen
) noexcept nogil:
    """Have what a turn has no time for be gone on with in the next one. False: no memory.

    The bytes are what was read just now, or, if there was some left, that.
    """
    cdef worker_t *w = conn.worker
    if buffer_left(&conn.rest) != 0:
        conn.rest.at += seen
    elif seen < length and not buffer_add(&conn.rest, bytes + seen, length - seen):
        return False
    if buffer_left(&conn.rest) == 0:
        return True
    conn.is_resting = 1
    conn.rest_previous = w.resting_last
    conn.rest_next = NULL
    if w.resting_last != NULL:
        w.resting_last.rest_next = conn
    else:
        w.resting = conn
    w.resting_last = conn
    w.resting_count += 1
    count(w, COUNT_RESTS_BYTES, buffer_left(&conn.rest))
    return True


cdef void rest_leave(conn_t *conn) noexcept nogil:
    cdef worker_t *w = conn.worker
    if not conn.is_resting:
        return
    conn.is_resting = 0
    if conn.rest_previous != NULL:
        conn.rest_previous.rest_next = conn.rest_next
    else:
        w.resting = conn.rest_next
    if conn.rest_next != NULL:
        conn.rest_next.rest_previous = conn.rest_previous
    else:
        w.resting_last = conn.rest_previous
    w.resting_count -= 1
    count(w, COUNT_RESTS_BYTES, <uint64_t>-<int64_t>buffer_left(&conn.rest))


cdef void rests_go_on(worker_t *w) noexcept nogil:
    """Look at some more of what earlier turns had no time for, of each client once."""
    cdef conn_t *conn
    cdef size_t left = w.resting_count
    while left != 0 and w.resting != NULL:
        left -= 1
        conn = w.resting
        rest_leave(conn)
        # The bytes stay where they are meanwhile: of who is closed `bury` frees them.
        conn_take(conn, conn.rest.bytes + conn.rest.at, buffer_left(&conn.rest))
        if buffer_left(&conn.rest) == 0:
            buffer_free(&conn.rest)
cdef void conn_cut(conn_t *conn) noexcept nogil:
    """Say that it is enough, as far as that goes, and close."""
    cdef worker_t *w = conn.worker
    count(w, COUNT_FLOODS, 1)
    pthread_mutex_lock(&w.reports_lock)
    snprintf(w.flood, sizeof(w.flood), b"%s", conn.flood)
    memcpy(w.flood_address, conn.address, 16)
    pthread_mutex_unlock(&w.reports_lock)
    nghttp2_session_terminate_session(conn.session, NGHTTP2_ENHANCE_YOUR_CALM)
    flush(conn)
    conn_close(conn)


cdef void reset_counted(conn_t *conn, const call_t *call) noexcept nogil:
    """Count a reset; a client that does little else is dropped (CVE-2023-44487)."""
    cdef worker_t *w = conn.worker
    if not is_guarded(conn) or w.config == NULL:
        return
    if call != NULL and w.now_ns - call.arrived_ns >= RESET_LIFE_NS:
        return   # a client, or a whole crowd of them, whose time was up
    conn.resets_left += (w.now_ms - conn.resets_ms) * w.config.resets[conn.role].per_s / 1000
    if conn.resets_left > w.config.resets[conn.role].burst:
        conn.resets_left = w.config.resets[conn.role].burst
    conn.resets_ms = w.now_ms
    conn.resets_left -= 1
    if conn.resets_left < 0 and not conn.goaway_sent:
        conn.goaway_sent = conn.is_draining = 1
        conn.until_ms = 0
        count(w, COUNT_RESETS_REFUSED, 1)
        nghttp2_session_terminate_session(conn.session, NGHTTP2_ENHANCE_YOUR_CALM)
        mark_dirty(conn)
        if not is_timed(conn):
            # Nobody looks whether it reads that.
            timer_set(w, &conn.timer, w.now_ms + w.config.headers_ms)


cdef void reset_sent(conn_t *conn, uint32_t code) noexcept nogil:
    """We ended a stream: if the client made us, that is as good as its own reset (CVE-2025-8671).

    Codes of our own choice (the clock, the client's upstream) are others.
    """
    if (code == NGHTTP2_PROTOCOL_ERROR or code == NGHTTP2_INTERNAL_ERROR
            or code == NGHTTP2_FLOW_CONTROL_ERROR or code == NGHTTP2_STREAM_CLOSED
            or code == NGHTTP2_FRAME_SIZE_ERROR or code == NGHTTP2_COMPRESSION_ERROR):
        reset_counted(conn, NULL)


cdef void key_updates_watch(
    int _is_sent, int _version, int kind, const void *bytes, size_t length, SSL *ssl, void *_user
) noexcept nogil:
    """OpenSSL tells of each message of a handshake; after it, only changes of keys matter."""
    cdef conn_t *conn
    if (kind == SSL3_RT_HANDSHAKE and length != 0
            and (<const uint8_t *>bytes)[0] == SSL3_MT_KEY_UPDATE):
        conn = <conn_t *>BIO_get_data(SSL_get_rbio(ssl))
        frames_charge(conn, KEY_UPDATE_FRAMES, b"changes of TLS keys")

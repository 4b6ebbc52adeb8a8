# The time of clients' connections: how old they get, how long nobody calls on them, and how long
# what has begun may take to be whole.
#
# One timer a connection, that of its handshake before, looks at all of it. Whoever is gone without
# a word is the kernel's to notice (mm/edge/h2/listening.py), and answers that nobody takes are in a
# line of their own (_wire_slow.pxi).

cdef enum:
    # Looks are put off to the next multiple, so that those of many connections come together.
    LOOKS_TOGETHER_MS = 64


cdef void client_settled(conn_t *conn) noexcept nogil:
    """The preface and SETTINGS of a client or peer are here."""
    cdef worker_t *w = conn.worker
    cdef uint32_t age_ms
    conn.is_ready = 1
    conn.idle_since_ms = w.now_ms
    timer_stop(w, &conn.timer)
    if conn.is_draining:
        timer_set(w, &conn.timer, w.now_ms + DRAIN_NOTICE_MS)   # then `client_drained`
        return
    if not is_timed(conn) or w.config == NULL:
        return
    age_ms = w.config.age_ms
    # A tenth more or less: of clients that came together not all have to come back together.
    conn.until_ms = w.now_ms + age_ms - age_ms // 10 + drawn(w) % (age_ms // 5 + 1)
    client_look_later(conn)


cdef void client_look_later(conn_t *conn) noexcept nogil:
    """Look again when the next of all limits may be reached."""
    cdef worker_t *w = conn.worker
    cdef const config_t *config = w.config
    cdef uint64_t due_ms = w.now_ms + config.headers_ms
    if config.message_ms < config.headers_ms:
        due_ms = w.now_ms + config.message_ms
    if (config.age_ms != 0 or conn.goaway_sent) and conn.until_ms < due_ms:
        due_ms = conn.until_ms
    if config.unread_ms < config.headers_ms and w.now_ms + config.unread_ms < due_ms:
        due_ms = w.now_ms + config.unread_ms
    if config.idle_ms != 0 and conn.calls == NULL and conn.idle_since_ms + config.idle_ms < due_ms:
        due_ms = conn.idle_since_ms + config.idle_ms
    if due_ms > w.now_ms + 16 * LOOKS_TOGETHER_MS:
        due_ms = (due_ms // LOOKS_TOGETHER_MS + 1) * LOOKS_TOGETHER_MS
    timer_set(w, &conn.timer, due_ms)


cdef void client_look(conn_t *conn) noexcept nogil:
    """Hold a connection to its limits of time."""
    cdef worker_t *w = conn.worker
    cdef const config_t *config = w.config
    if conn.is_begun and w.now_ms - conn.begun_ms >= config.headers_ms:
        conn.flood = b"time for a frame or headers"
        conn_cut(conn)
        return
    if conn.is_blocked and w.now_ms - conn.blocked_ms >= config.unread_ms:
        # What was packed is no call's any more, and so in no line of those who wait.
        count(w, COUNT_SLOW_GIVEN_UP, 1)
        conn_close(conn)
        return
    if conn.goaway_sent:
        if w.now_ms >= conn.until_ms:
            conn_close(conn)   # its grace is over, or it does not read why it is dropped
            return
    elif config.age_ms != 0 and w.now_ms >= conn.until_ms:
        conn.is_aged = 1
        count(w, COUNT_AGED, 1)
        conn_drain(conn)
        return
    elif (config.idle_ms != 0 and conn.calls == NULL
            and w.now_ms - conn.idle_since_ms >= config.idle_ms):
        count(w, COUNT_IDLE, 1)
        conn_drain(conn)
        return
    messages_look(conn)
    client_look_later(conn)


cdef void client_drained(conn_t *conn) noexcept nogil:
    """A connection that takes no more calls has been told so: tell it for good.

    The calls on it, and those that came at the last moment, have the same limits as before.
    """
    cdef worker_t *w = conn.worker
    conn_goaway(conn)
    if not is_timed(conn) or w.config == NULL:
        return
    conn.until_ms = <uint64_t>-1
    if conn.is_aged and w.config.age_grace_ms != 0:
        conn.until_ms = w.now_ms + w.config.age_grace_ms
    client_look_later(conn)


# --- first messages -------------------------------------------------------------------------------

cdef void first_follow(call_t *call, const uint8_t *bytes, size_t length) noexcept nogil:
    """See whether the first message of a request is whole."""
    while length != 0 and call.first_head < 5:
        if call.first_head != 0:   # the first byte tells of compression
            call.first_left = call.first_left << 8 | bytes[0]
        call.first_head += 1
        bytes += 1
        length -= 1
    if call.first_head == 5:
        call.first_left -= length if length < call.first_left else call.first_left
        call.has_first = call.first_left == 0


cdef void messages_look(conn_t *conn) noexcept nogil:
    """End calls whose clients do not get their first message together.

    Not if it is us, or the runtime, who did not take what came. Later ones may take their time:
    streams of many are open for hours.
    """
    cdef worker_t *w = conn.worker
    cdef const char *text = b"the request's first message takes too long"
    cdef uint64_t limit_ns = <uint64_t>w.config.message_ms * 1000000
    cdef call_t *call = conn.calls
    while call != NULL:
        if (not call.has_first and not call.request_ended and not call.answer_ended
                and w.now_ns - call.arrived_ns >= limit_ns
                and (call.awaits_message or buffer_left(request_out(call)) == 0)):
            count(w, COUNT_MESSAGES_LATE, 1)
            call_fail(call, 4, <const uint8_t *>text, strlen(text))
        call = call.down_next

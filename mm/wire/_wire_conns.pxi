# Connections: their sockets, what is read from them, and how they end.
#
# A turn of the worker reads what has come, then writes each connection that something was submitted
# to once (_wire_writing.pxi).

cdef enum:
    # What bodies point at stays in the input until the turn ends (_wire_pieces.pxi), so that a turn
    # that reads more than one large piece needs more than it reads at once. Both together with
    # what is written at once fit into the second cache of a core.
    INPUT_BYTES = 262144
    READ_BYTES = 131072         # at once
    STREAM_WINDOW_BYTES = 262144
    CONNECTION_WINDOW_BYTES = 67108864   # of those who call here
    # Of a connection of ours whose window is as large as can be: nghttp2 gives back what has left
    # when that is half of it, so so many streams' windows have room at any time.
    CONN_STREAMS_MAX = 0x7FFFFFFF // 2 // 262144
    CONNECT_MS = 6000
    PING_MS = 2500              # to peers, and then this long for the answer:
    PING_ANSWER_MS = 5000
    PING_RUNTIME_MS = 310000    # between two that nothing was answered between
    DRAIN_NOTICE_MS = 100       # between the first GOAWAY and the second


cdef conn_t *conn_new(worker_t *w, int fd, uint8_t role, target_t *target) noexcept nogil:
    """Take a socket over; closes it and answers NULL without memory."""
    cdef conn_t *conn = <conn_t *>calloc(1, sizeof(conn_t))
    cdef epoll_event event
    cdef SSL_CTX *context = NULL
    cdef int one = 1
    if conn == NULL:
        close(fd)
        return NULL
    conn.source.kind = SOURCE_CONN
    conn.worker = w
    w.conns_made += 1
    conn.number = w.conns_made
    conn.fd = fd
    conn.role = role
    conn.target = target
    conn.is_server = target == NULL
    conn.side = side_of(conn)
    conn.timer.owner = conn
    conn.timer.kind = TIMER_CONN
    conn.heard_ms = conn.resets_ms = conn.frames_ms = w.now_ms
    if w.config != NULL:
        conn.resets_left = w.config.resets[role].burst
        conn.frames_left = w.config.frames[role].burst
    conn.frame_left = PREFACE_BYTES
    # Without it an answer may wait 40 ms for an acknowledgement. Refused by Unix sockets.
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
    event.events = EPOLLIN
    event.data.ptr = conn
    if w.config != NULL:
        if target == NULL:
            context = w.config.tls[role]
        elif target.lane == LANE_THERE:
            context = w.config.tls_to_peers
    if (not session_open(conn) or (context != NULL and not tls_open(conn, context))
            or epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0):
        nghttp2_session_del(conn.session)
        SSL_free(conn.ssl)
        free(conn)
        close(fd)
        return NULL
    conn.next = w.conns
    if w.conns != NULL:
        w.conns.previous = conn
    w.conns = conn
    return conn


cdef uint8_t side_of(const conn_t *conn) noexcept nogil:
    """Answer who is at the other end, for the counters."""
    if conn.is_server:
        return SIDE_CLIENT if conn.role == ROLE_EXTERNAL else SIDE_PEER
    if conn.target.lane == LANE_HERE:
        return SIDE_RUNTIME
    return SIDE_PEER if conn.target.lane == LANE_THERE else SIDE_TIER2


cdef void conn_close(conn_t *conn) noexcept nogil:
    """End a connection at once; its calls hear of it. Freed at the end of the turn."""
    cdef worker_t *w = conn.worker
    cdef target_t *target = conn.target
    cdef uint32_t i
    if conn.is_closed:
        return
    conn.is_closed = 1
    timer_stop(w, &conn.timer)
    blocked_leave(conn)
    shake_leave(conn)
    rest_leave(conn)
    if conn.previous != NULL:
        conn.previous.next = conn.next
    else:
        w.conns = conn.next
    if conn.next != NULL:
        conn.next.previous = conn.previous
    if target != NULL:
        for i in range(target.conns_count):
            if target.conns[i] == conn:
                target.conns_count -= 1
                target.conns[i] = target.conns[target.conns_count]
                break
        if conn.is_ready:
            count(w, COUNT_UPSTREAMS_OPEN + conn.side - SIDE_PEER, <uint64_t>-1)
    else:
        count(w, COUNT_CONNECTIONS_OPEN, <uint64_t>-1)
        crowd_leave(w.crowd, conn.role, conn.address)
    if conn.is_shaking and not conn.is_connecting:
        # Probes of ports connect and say nothing.
        if conn.is_late or not SSL_in_before(conn.ssl):
            count(w, COUNT_HANDSHAKES_FAILED, 1)
    elif conn.ssl != NULL and not conn.is_connecting:
        tls_goodbye(conn)
    close(conn.fd)
    # Its session tells nothing any more; so that what the calls do cannot reach it, it is marked
    # closed first, and deleted in `bury`.
    while conn.calls != NULL:
        if conn.is_server:
            down_closed(conn.calls)
        else:
            up_closed(conn.calls, 0, True)
    conn.next = w.dead
    w.dead = conn
    if target != NULL:
        target_conn_lost(w, target, conn)


cdef void bury(worker_t *w) noexcept nogil:
    """Free what was closed in this turn: no event names it any more."""
    cdef conn_t *conn
    cdef conn_t *left = NULL
    cdef listener_t *listener
    while w.dead_listeners != NULL:
        listener = w.dead_listeners
        w.dead_listeners = listener.next
        free(listener)
    while w.dead != NULL:
        conn = w.dead
        w.dead = conn.next
        if conn.is_dirty:
            conn.next = left   # it stands in the line of the next turn
            left = conn
            continue
        nghttp2_session_del(conn.session)
        SSL_free(conn.ssl)
        shown_forget(&conn.shown)
        buffer_free(&conn.out)
        buffer_free(&conn.rest)
        free(conn)
    w.dead = left


cdef void conn_watch(conn_t *conn) noexcept nogil:
    """Ask epoll for what the connection waits for now."""
    cdef epoll_event event
    event.events = 0 if conn.awaits_shake else EPOLLIN
    if conn.is_blocked or conn.is_connecting:
        event.events |= EPOLLOUT
    event.data.ptr = conn
    epoll_ctl(conn.worker.epoll_fd, EPOLL_CTL_MOD, conn.fd, &event)


# --- reading --------------------------------------------------------------------------------------

cdef ssize_t plain_read(conn_t *conn, uint8_t *to) noexcept nogil:
    """Read at most READ_BYTES. 0: nothing yet, -1: closed."""
    cdef ssize_t n = recv(conn.fd, to, READ_BYTES, 0)
    if n == 0 or (n < 0 and errno != EAGAIN and errno != EINTR):
        conn_close(conn)
        return -1
    if n < 0:
        return 0
    conn.heard_ms = conn.worker.now_ms
    count(conn.worker, COUNT_BYTES_IN + conn.side, n)
    return n


cdef void conn_readable(conn_t *conn) noexcept nogil:
    cdef worker_t *w = conn.worker
    cdef ssize_t n
    cdef uint8_t *input = input_place(w)
    if conn.is_closed or conn.is_resting:   # room was made by writing; what came first comes first
        return
    n = plain_read(conn, input) if conn.ssl == NULL else tls_read(conn, input)
    if n < 0 or (n == 0 and not conn.is_ended):
        return
    conn_take(conn, input, n)


cdef void conn_take(conn_t *conn, const uint8_t *bytes, size_t length) noexcept nogil:
    """Look at what was read, or, of one who may be hostile, at as much as a turn has time for."""
    cdef worker_t *w = conn.worker
    cdef size_t seen = length
    cdef ssize_t used
    cdef uint32_t pieces = w.pieces_count
    if is_guarded(conn):
        seen = frames_watch(conn, bytes, length)
        if conn.flood == NULL and not rest_keep(conn, bytes, length, seen):
            conn.flood = b"more frames than there is memory for"
        if conn.flood != NULL:
            conn_cut(conn)
            return
    used = nghttp2_session_mem_recv(conn.session, bytes, seen)
    if w.pieces_count != pieces:   # of one whose bytes are all looked at
        w.input_at += length
    if used == NGHTTP2_ERR_FLOODED or used == NGHTTP2_ERR_TOO_MANY_CONTINUATIONS:
        conn.flood = b"control frames"
    strays_charge(conn)
    if conn.flood != NULL:
        conn_cut(conn)
    elif used < 0 or (conn.is_ended and not conn.is_resting):
        # What the session still has to say is why (GOAWAY).
        flush(conn)
        conn_close(conn)
    else:
        mark_dirty(conn)
    begin_fresh(w)
    release_held(w)


cdef void fresh_add(call_t *call) noexcept nogil:
    """Let a call begin when this read has been looked at."""
    cdef worker_t *w = call.worker
    call.in_turn = 1
    call.turn_next = NULL
    if w.fresh == NULL:
        w.fresh = call
    else:
        w.fresh_last.turn_next = call
    w.fresh_last = call


cdef void begin_fresh(worker_t *w) noexcept nogil:
    """Send the calls on their way whose headers came in the read just done."""
    cdef call_t *call
    if w.fresh != NULL and load_u32(&w.has_commands, acquire):
        # What was configured before these bytes were sent holds for them.
        commands_run(w)
    while w.fresh != NULL:
        call = w.fresh
        w.fresh = call.turn_next
        call.turn_next = NULL
        call.in_turn = 0
        if call.down != NULL and not call.answer_ended:
            call_begin(w, call)
        else:
            call_settle(call)


cdef void conn_event(conn_t *conn, uint32_t events) noexcept nogil:
    if conn.is_closed:
        return
    if conn.is_connecting:
        conn_connected(conn)
        return
    if events & EPOLLOUT:
        mark_dirty(conn)
    if conn.is_shaking and conn.is_server:
        if events & (EPOLLHUP | EPOLLERR) and SSL_in_before(conn.ssl):
            # Its hello could still be read: nothing is computed for who is gone.
            conn_close(conn)
        elif events & (EPOLLIN | EPOLLHUP | EPOLLERR):
            shake_wait(conn)
    elif events & (EPOLLIN | EPOLLHUP | EPOLLERR):
        conn_readable(conn)


# --- time -----------------------------------------------------------------------------------------

cdef void conn_timer(conn_t *conn) noexcept nogil:
    """Whatever the connection waited for took its time."""
    cdef worker_t *w = conn.worker
    if conn.is_closed:
        return
    if conn.is_in_line and w.now_ms < conn.until_ms:
        target_connect_again(conn)
    elif conn.is_mute:
        conn_close(conn)
    elif not conn.is_ready:
        conn.is_late = 1
        if conn.is_shaking and not conn.is_connecting:
            count(w, COUNT_HANDSHAKES_LATE, 1)
            tls_note(conn, b"it takes too long")
        elif conn.is_server:
            count(w, COUNT_PREFACES_LATE, 1)
        conn_close(conn)
    elif conn.is_server:
        if conn.is_draining and not conn.goaway_sent:
            client_drained(conn)
        else:
            client_look(conn)
    elif conn.target.lane < LANE_MODEL and not conn_close_idle(conn):
        if conn.target.uses_ping:
            conn_keep_alive(conn)
        else:
            conn_ask_runtime(conn)
        if not conn.is_closed:
            timer_set(w, &conn.timer, w.now_ms + look_ms(conn))


cdef uint32_t look_ms(const conn_t *conn) noexcept nogil:
    """Answer when to look again whether a connection of ours is of use."""
    cdef uint32_t wait_ms = 500 if conn.awaits_ping else PING_MS
    cdef uint32_t idle_ms = conn.worker.config.upstream_idle_ms // 4 + 1
    if not conn.target.uses_ping:
        wait_ms = conn.worker.config.quiet_ms // 4 + 1
    return idle_ms if idle_ms < wait_ms else wait_ms


cdef bint conn_close_idle(conn_t *conn) noexcept nogil:
    """Let go of a connection of ours that nobody has needed for long; False if it stays.

    One to the runtime always does: the next call is likely to be for a model here.
    """
    cdef worker_t *w = conn.worker
    if (conn.calls != NULL or conn.is_draining
            or w.now_ms - conn.idle_since_ms < w.config.upstream_idle_ms
            or (conn.target.lane == LANE_HERE and conn.target.conns_count == 1)):
        return False
    conn.is_draining = 1
    count(w, COUNT_UPSTREAMS_IDLE, 1)
    nghttp2_session_terminate_session(conn.session, NGHTTP2_NO_ERROR)
    mark_dirty(conn)
    return True


cdef void conn_keep_alive(conn_t *conn) noexcept nogil:
    """A peer that says nothing for long is gone without a word."""
    cdef worker_t *w = conn.worker
    cdef uint64_t quiet_ms = w.now_ms - conn.heard_ms
    if conn.awaits_ping and quiet_ms >= PING_MS + PING_ANSWER_MS:
        conn_close(conn)
        return
    if quiet_ms >= PING_MS and not conn.awaits_ping:
        conn.awaits_ping = 1
        nghttp2_submit_ping(conn.session, NGHTTP2_FLAG_NONE, NULL)
        mark_dirty(conn)
    elif quiet_ms < PING_MS:
        conn.awaits_ping = 0


cdef void conn_ask_runtime(conn_t *conn) noexcept nogil:
    """A runtime that says nothing for very long, though it has calls, is no more, or stopped: calls
    without a deadline would wait there for ever.

    gRPC servers end connections with more pings than one in five minutes, unless something was
    answered in between, or without calls.
    """
    cdef worker_t *w = conn.worker
    cdef config_t *config = w.config
    if conn.awaits_ping:
        if conn.heard_ms > conn.pinged_ms:
            conn.awaits_ping = 0
        elif w.now_ms - conn.pinged_ms >= config.quiet_answer_ms:
            conn_close(conn)
            return
    elif (conn.calls != NULL and w.now_ms - conn.heard_ms >= config.quiet_ms
            and (conn.may_ping or w.now_ms - conn.pinged_ms >= PING_RUNTIME_MS)):
        conn.awaits_ping = 1
        conn.may_ping = 0
        conn.pinged_ms = w.now_ms
        nghttp2_submit_ping(conn.session, NGHTTP2_FLAG_NONE, NULL)
        mark_dirty(conn)


cdef void conn_drain(conn_t *conn) noexcept nogil:
    """Take no more calls: GOAWAY twice, so that none that is on its way is lost."""
    if conn.is_draining or conn.is_closed:
        return
    conn.is_draining = 1
    nghttp2_submit_shutdown_notice(conn.session)
    mark_dirty(conn)
    if conn.is_ready:
        timer_set(conn.worker, &conn.timer, conn.worker.now_ms + DRAIN_NOTICE_MS)
    # If not, calls may have come with its first bytes, which nobody has read yet: `client_settled`
    # sets the timer. Until then it is that of the handshake, which ends who says nothing.


cdef void conn_goaway(conn_t *conn) noexcept nogil:
    conn.goaway_sent = 1
    nghttp2_submit_goaway(
        conn.session, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(conn.session),
        NGHTTP2_NO_ERROR, NULL, 0)
    mark_dirty(conn)

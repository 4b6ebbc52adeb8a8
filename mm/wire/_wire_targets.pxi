# Where calls are sent: addresses, the connections to each, and calls that wait for one.
#
# A worker has one target for the runtime, one for each peer, and four for tier 2, whose sockets
# Python makes. Connections are made when calls need them, another one when those that are there are
# full. While one is being made calls wait in a line; when that fails they go to tier 2, which knows
# what else there is.

cdef enum:
    # After a connect that failed, and after one more each time twice as long, up to the second.
    # Nobody waits for that: calls are tier 2's meanwhile, whose own pause stays the first.
    CONNECT_PAUSE_MS = 50
    CONNECT_PAUSE_MAX_MS = 1000
    # A Unix socket whose backlog is full refuses at once, where TCP would try again by itself. Its
    # owner takes what waits there in one go, as soon as it comes to it.
    CONNECT_AGAIN_MS = 20
    CONNS_RUNTIME = 16
    CONNS_PEER = 4


cdef target_t *target_new(uint8_t lane) noexcept nogil:
    cdef target_t *target = <target_t *>calloc(1, sizeof(target_t))
    if target != NULL:
        target.lane = lane
        target.conns_max = CONNS_PEER if lane == LANE_THERE else CONNS_RUNTIME
        target.uses_ping = lane == LANE_THERE
    return target


cdef void target_set(target_t *target, const target_t *told) noexcept nogil:
    """Take over the address that Python found out."""
    target.handle = told.handle
    target.address = told.address
    target.address_length = told.address_length
    memcpy(target.name, told.name, sizeof(target.name))
    target.name_length = told.name_length
    memcpy(target.label, told.label, sizeof(target.label))
    memcpy(target.instance, told.instance, sizeof(target.instance))


cdef bint target_is_coming(const target_t *target) noexcept nogil:
    """Answer whether a connection is being made."""
    cdef uint32_t i
    for i in range(target.conns_count):
        if not target.conns[i].is_ready and not target.conns[i].is_draining:
            return True
    return False


cdef conn_t *target_conn(worker_t *w, target_t *target) noexcept nogil:
    """Answer a connection with room for a stream; else NULL, and one may be coming."""
    cdef conn_t *conn
    cdef uint32_t i
    for i in range(target.conns_count):
        conn = target.conns[i]
        if conn.is_ready and not conn.is_draining and conn.streams < conn.streams_max:
            return conn
    if (target.address_length != 0 and not target.is_retired
            and target.conns_count < target.conns_max and not target_is_coming(target)
            and (target.failed_ms == 0
                 or w.now_ms - target.failed_ms >= connect_pause_ms(target))):
        target_connect(w, target)
    return NULL


cdef inline uint32_t connect_pause_ms(const target_t *target) noexcept nogil:
    """Answer how long after its last failure a target is left alone."""
    cdef uint32_t pause_ms = CONNECT_PAUSE_MS
    cdef uint32_t i
    for i in range(1, target.failures):
        pause_ms *= 2
        if pause_ms >= CONNECT_PAUSE_MAX_MS:
            return CONNECT_PAUSE_MAX_MS
    return pause_ms


cdef void target_connect(worker_t *w, target_t *target) noexcept nogil:
    """Begin to make a connection."""
    cdef int fd = socket(target.address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    cdef conn_t *conn
    cdef bint is_in_line = False
    if fd < 0:
        target_failed(w, target, errno)
        return
    if connect(fd, <const sockaddr *>&target.address, target.address_length) != 0:
        is_in_line = errno == EAGAIN
        if errno != EINPROGRESS and not is_in_line:
            target_failed(w, target, errno)
            close(fd)
            return
    conn = conn_new(w, fd, 0, target)
    if conn == NULL:
        target_failed(w, target, ENOMEM)
        return
    target.failed_ms = 0
    target.failure[0] = 0
    conn.is_connecting = 1
    target.conns[target.conns_count] = conn
    target.conns_count += 1
    conn.until_ms = w.now_ms + CONNECT_MS
    if is_in_line:
        conn.is_in_line = 1
        # A socket that is not connected is told of as hung up, all the time.
        epoll_ctl(w.epoll_fd, EPOLL_CTL_DEL, conn.fd, NULL)
        timer_set(w, &conn.timer, w.now_ms + CONNECT_AGAIN_MS)
    else:
        timer_set(w, &conn.timer, conn.until_ms)
        conn_watch(conn)


cdef void target_connect_again(conn_t *conn) noexcept nogil:
    """Stand in line once more before a listener whose backlog was full."""
    cdef worker_t *w = conn.worker
    cdef target_t *target = conn.target
    cdef epoll_event event
    if connect(conn.fd, <const sockaddr *>&target.address, target.address_length) != 0:
        if errno == EAGAIN:
            timer_set(w, &conn.timer, w.now_ms + CONNECT_AGAIN_MS)
            return
        target_failed(w, target, errno)
        conn_close(conn)
        return
    conn.is_in_line = 0
    event.events = EPOLLIN | EPOLLOUT
    event.data.ptr = conn
    epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, conn.fd, &event)
    timer_set(w, &conn.timer, conn.until_ms)


cdef const char *why_failed(const target_t *target) noexcept nogil:
    if target.failure[0] != 0:
        return target.failure
    return b"no connection"


cdef void target_missed(worker_t *w, target_t *target) noexcept nogil:
    """There is one more connection that did not come; `failure` says why."""
    target.failed_ms = w.now_ms if w.now_ms else 1
    target.failures += 1
    count(w, COUNT_CONNECT_FAILURES, 1)


cdef void target_failed(worker_t *w, target_t *target, int why) noexcept nogil:
    snprintf(target.failure, sizeof(target.failure), NOT_CONNECTED, target.label, strerror(why))
    target_missed(w, target)


cdef void target_silent(worker_t *w, target_t *target, bint is_late) noexcept nogil:
    """There was a connection, or none came, and nobody spoke HTTP/2 on it."""
    if is_late:
        snprintf(target.failure, sizeof(target.failure), NO_ANSWER, target.label, CONNECT_MS / 1e3)
    else:
        snprintf(target.failure, sizeof(target.failure), NO_HTTP2, target.label)
    target_missed(w, target)


cdef void conn_connected(conn_t *conn) noexcept nogil:
    """The socket of a connection of ours is there, or is not."""
    cdef int why = 0
    cdef socklen_t length = sizeof(why)
    getsockopt(conn.fd, SOL_SOCKET, SO_ERROR, &why, &length)
    if why != 0:
        target_failed(conn.worker, conn.target, why)
        conn_close(conn)
        return
    conn.is_connecting = 0
    conn_watch(conn)
    if conn.ssl != NULL:
        tls_shake(conn)
    else:
        mark_dirty(conn)


cdef void conn_settled(conn_t *conn) noexcept nogil:
    """The other side's settings are here, or new."""
    cdef worker_t *w = conn.worker
    conn.streams_max = nghttp2_session_get_remote_settings(
        conn.session, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS)
    if conn.target.lane < LANE_MODEL and conn.streams_max > CONN_STREAMS_MAX:
        conn.streams_max = CONN_STREAMS_MAX
    conn.target.failures = 0
    if not conn.is_ready:
        conn.is_ready = 1
        count(w, COUNT_UPSTREAMS_OPEN + conn.side - SIDE_PEER, 1)
        conn.idle_since_ms = w.now_ms
        timer_stop(w, &conn.timer)
        if conn.target.lane < LANE_MODEL:
            timer_set(w, &conn.timer, w.now_ms + look_ms(conn))
    target_serve(w, conn.target)


cdef void target_serve(worker_t *w, target_t *target) noexcept nogil:
    """Let the calls go on that waited for a connection."""
    cdef call_t *call
    cdef uint32_t left = target.waiting_count
    while left != 0 and target.waiting != NULL:
        left -= 1
        call = target.waiting
        target_unwait(call)
        attempt(call, target)


cdef void tier2_missing(worker_t *w, const target_t *target) noexcept nogil:
    """Have Python make a connection to tier 2."""
    cdef uint8_t place = target.role * 2 + (1 if target.lane == LANE_OWN else 0)
    or_u32(&w.missing, <uint32_t>1 << place, release)
    notice(w)


cdef void target_conn_lost(worker_t *w, target_t *target, conn_t *conn) noexcept nogil:
    """A connection is gone: whoever waited for it hears of it."""
    cdef call_t *call
    if not conn.is_ready and target.failed_ms == 0:
        target_silent(w, target, conn.is_late)
    if target.lane >= LANE_MODEL and target.conns_count == 0:
        tier2_missing(w, target)
    if not target_is_coming(target):
        while target.waiting != NULL:
            call = target.waiting
            target_unwait(call)
            if is_full_up(call, target):
                # One more could not be had, which is no fault of those that are there.
                leave(call)
                splice(call, LANE_MODEL, COUNT_LEFT_BUSY)
            else:
                set_fault(call, why_failed(target))
                attempt_failed(call)
    if target.is_retired and target.conns_count == 0:
        target_free(w, target)


cdef bint target_wait(call_t *call, target_t *target) noexcept nogil:
    """Have a call wait for the connection that is being made; False if too many do."""
    if target.waiting_count >= call.worker.config.waiting_max:
        count(call.worker, COUNT_WAITING_FULL, 1)
        return False
    call.waits_for = target
    call.wait_next = NULL
    call.wait_previous = target.waiting_last
    if target.waiting_last != NULL:
        target.waiting_last.wait_next = call
    else:
        target.waiting = call
    target.waiting_last = call
    target.waiting_count += 1
    count(call.worker, COUNT_WAITING, 1)
    return True


cdef void target_unwait(call_t *call) noexcept nogil:
    cdef target_t *target = call.waits_for
    if call.wait_previous != NULL:
        call.wait_previous.wait_next = call.wait_next
    else:
        target.waiting = call.wait_next
    if call.wait_next != NULL:
        call.wait_next.wait_previous = call.wait_previous
    else:
        target.waiting_last = call.wait_previous
    call.wait_previous = call.wait_next = NULL
    call.waits_for = NULL
    target.waiting_count -= 1
    count(call.worker, COUNT_WAITING, <uint64_t>-1)


cdef void target_retire(worker_t *w, target_t *target) noexcept nogil:
    """The address is no more: what is under way there ends by itself."""
    cdef uint32_t i
    cdef call_t *call
    target.is_retired = 1
    while target.waiting != NULL:
        call = target.waiting
        target_unwait(call)
        leave(call)
        splice(call, LANE_MODEL, COUNT_LEFT_AWAY)
    target.next_retired = w.retired
    w.retired = target
    if target.conns_count == 0:
        target_free(w, target)
        return
    for i in range(target.conns_count):
        target.conns[i].is_draining = 1
        mark_dirty(target.conns[i])


cdef void target_free(worker_t *w, target_t *target) noexcept nogil:
    cdef target_t **at = &w.retired
    while at[0] != NULL:
        if at[0] == target:
            at[0] = target.next_retired
            break
        at = &at[0].next_retired
    free(target)

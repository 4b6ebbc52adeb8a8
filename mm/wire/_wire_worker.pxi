# One thread of the wire: its loop, its mailbox, its beginning and end.

cdef enum:
    EVENTS = 256
    ACCEPTS = 16                # of one listener in a turn: a third of a millisecond
    # Without a file descriptor for it a connection waits in the listener, which stays readable.
    # Others end all the time; ten looks a second find out, and cost nothing.
    ACCEPT_PAUSE_MS = 100
    TIER2_PAUSE_MS = 100        # before a connection to tier 2 is asked for anew that was of no use
    PEERS_MAX = 65536           # instance indexes of the table
    FLUSH_PASSES = 4
    # Of processor time at once. A turn takes less, and most who share the processor, tier 2 among
    # them, want milliseconds, for which calls would wait each time that a thread wakes.
    SLICE_NS = 100000


cdef worker_t *worker_new(
    uint64_t seed, int notice_fd, uint32_t rows_max, bint by_model, crowd_t *crowd
) except NULL:
    """Make a worker that does not run yet; Python owns it and frees it."""
    cdef worker_t *w = <worker_t *>calloc(1, sizeof(worker_t))
    cdef epoll_event event
    if w == NULL:
        raise MemoryError
    w.reader = -1
    w.wake_fd = w.epoll_fd = -1
    w.notice_fd = notice_fd
    w.random = seed | 1
    pthread_mutex_init(&w.lock, NULL)
    w.crowd = crowd_new(w.random) if crowd == NULL else crowd_share(crowd)
    w.input = <uint8_t *>malloc(INPUT_BYTES)
    w.peers = <target_t **>calloc(PEERS_MAX, sizeof(target_t *))
    w.peers_open = <atomic_u32 *>calloc(PEERS_MAX, sizeof(atomic_u32))
    w.peers_answers = <atomic_u32 *>calloc(PEERS_MAX, sizeof(atomic_u32))
    w.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    w.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    w.mailbox.kind = SOURCE_MAILBOX
    w.accept_timer.owner = w
    w.accept_timer.kind = TIMER_ACCEPT
    w.tier2_timer.owner = w
    w.tier2_timer.kind = TIMER_TIER2
    event.events = EPOLLIN
    event.data.ptr = &w.mailbox
    if (not reports_new(w) or not statistics_new(w, rows_max, by_model)
            or w.crowd == NULL or w.input == NULL or w.peers == NULL or w.peers_open == NULL
            or w.peers_answers == NULL or w.wake_fd < 0 or w.epoll_fd < 0
            or not nv_reserve(w, 64) or not buffer_reserve(&w.gather, GATHER_BYTES + 65536)
            or not buffer_reserve(&w.records, RECORDS_BYTES)
            or epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, w.wake_fd, &event) != 0):
        worker_free(w)
        raise MemoryError
    return w


cdef void worker_free(worker_t *w) noexcept:
    """Free a worker whose thread has ended, or never began."""
    cdef call_t *call
    cdef command_t *command
    cdef target_t *target
    cdef int i
    w.is_stopping = 1
    while w.listeners != NULL:
        listener_close(w, w.listeners)
    while w.conns != NULL:
        conn_close(w.conns)
    while w.dirty != NULL:
        flush_all(w)
    bury(w)
    while w.commands != NULL:
        command = w.commands
        w.commands = command.next
        command_free(command)
    while w.pool != NULL:
        call = w.pool
        w.pool = call.pool_next
        call_destroy(call)
    if w.peers != NULL:
        for i in range(PEERS_MAX):
            free(w.peers[i])
    for i in range(ROLES * 2):
        free(w.tier2[i])
    free(w.runtime)
    while w.retired != NULL:
        target = w.retired
        w.retired = target.next_retired
        free(target)
    if w.reader >= 0:
        reader_unregister(w.config.table, w.reader)
    config_free(w.config)
    if w.wake_fd >= 0:
        close(w.wake_fd)
    if w.epoll_fd >= 0:
        close(w.epoll_fd)
    free(w.peers)
    free(w.peers_open)
    free(w.peers_answers)
    crowd_release(w.crowd)
    reports_free(w)
    statistics_free(w)
    free(w.input)
    free(w.nv)
    buffer_free(&w.gather)
    buffer_free(&w.records)
    buffer_free(&w.sealed)
    pthread_mutex_destroy(&w.lock)
    free(w)


# --- listeners ------------------------------------------------------------------------------------

cdef void listener_add(worker_t *w, int fd, uint8_t role) noexcept nogil:
    """Accept connections on a socket, which is the worker's from now on."""
    cdef listener_t *listener = <listener_t *>calloc(1, sizeof(listener_t))
    if listener == NULL:
        close(fd)
        return
    listener.source.kind = SOURCE_LISTENER
    listener.fd = fd
    listener.role = role
    listener.next = w.listeners
    w.listeners = listener
    if not w.accept_timer.is_set:
        listener_watch(w, listener)


cdef void listener_watch(worker_t *w, listener_t *listener) noexcept nogil:
    cdef epoll_event event
    # Of several workers one is woken for a connection.
    event.events = EPOLLIN | EPOLLEXCLUSIVE
    event.data.ptr = listener
    epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, listener.fd, &event)


cdef void listener_close(worker_t *w, listener_t *listener) noexcept nogil:
    """Accept no more. The descriptor is the worker's own: were it somebody else's to close, its
    number could have become another file's by now, a connection's of this worker among them.
    """
    cdef listener_t **at = &w.listeners
    while at[0] != listener:
        at = &at[0].next
    at[0] = listener.next
    # Other descriptors of the socket may stay open, so that closing is not enough.
    epoll_ctl(w.epoll_fd, EPOLL_CTL_DEL, listener.fd, NULL)
    close(listener.fd)
    # Events of this turn may still name it.
    listener.is_closed = 1
    listener.next = w.dead_listeners
    w.dead_listeners = listener


cdef void listener_event(worker_t *w, listener_t *listener) noexcept nogil:
    cdef int i, fd, why
    cdef conn_t *conn
    cdef sockaddr_storage address
    cdef socklen_t length
    cdef uint8_t key[16]
    for i in range(ACCEPTS):
        if listener.is_closed:
            return
        length = sizeof(address)
        fd = accept4(
            listener.fd, <sockaddr *>&address, &length, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            if errno == EMFILE or errno == ENFILE or errno == ENOBUFS or errno == ENOMEM:
                accepts_pause(w)
            return
        address_key(&address, key)
        why = crowd_enter(w.crowd, w.config, listener.role, key)
        if why != 0:
            crowd_refuse(w, fd, listener.role, why)
            continue
        conn = conn_new(w, fd, listener.role, NULL)
        if conn == NULL:
            crowd_leave(w.crowd, listener.role, key)
            continue
        memcpy(conn.address, key, 16)
        count(w, COUNT_CONNECTIONS, 1)
        count(w, COUNT_CONNECTIONS_OPEN, 1)
        timer_set(w, &conn.timer, w.now_ms + w.config.handshake_ms)
        mark_dirty(conn)


cdef void accepts_pause(worker_t *w) noexcept nogil:
    """Leave connections where they are for a moment: asking at once would be a busy loop."""
    cdef listener_t *listener = w.listeners
    count(w, COUNT_ACCEPT_PAUSES, 1)
    timer_set(w, &w.accept_timer, w.now_ms + ACCEPT_PAUSE_MS)
    while listener != NULL:
        # Not modified: epoll refuses that for what is watched exclusively.
        epoll_ctl(w.epoll_fd, EPOLL_CTL_DEL, listener.fd, NULL)
        listener = listener.next


cdef void accepts_resume(worker_t *w) noexcept nogil:
    cdef listener_t *listener = w.listeners
    while listener != NULL:
        listener_watch(w, listener)
        listener = listener.next


# --- the loop -------------------------------------------------------------------------------------

cdef void clocks_read(worker_t *w) noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    w.now_ns = <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec
    w.now_ms = w.now_ns // 1000000
    clock_gettime(CLOCK_REALTIME, &now)
    w.wall_ms = now.tv_sec * 1000 + now.tv_nsec // 1000000


cdef void flush_all(worker_t *w) noexcept nogil:
    """Write what the turn has submitted. What a flush submits elsewhere comes in the next pass."""
    cdef conn_t *conn
    cdef conn_t *last
    cdef int _pass
    for _pass in range(FLUSH_PASSES):
        last = w.dirty_last
        while w.dirty != NULL:
            conn = w.dirty
            w.dirty = conn.dirty_next
            if w.dirty == NULL:
                w.dirty_last = NULL
            conn.is_dirty = 0
            flush(conn)
            if conn == last:
                break
        if w.dirty == NULL:
            return


cdef void worker_run(worker_t *w) noexcept nogil:
    """Serve until told to stop."""
    cdef epoll_event events[EVENTS]
    cdef int i, n, wait_ms
    cdef source_t *source
    cdef uint64_t ignored
    want_slice(SLICE_NS)
    clocks_read(w)
    w.wheel_ms = w.now_ms
    while not w.is_stopping:
        wait_ms = timers_wait_ms(w)
        # A command that came after the last look at them, and whose waking was read in that turn.
        if (w.dirty != NULL or w.shaking != NULL or w.resting != NULL
                or load_u32(&w.has_commands, acquire)):
            wait_ms = 0
        # Offline while asleep: the table's writer need not wait for us.
        if w.reader >= 0:
            reader_offline(w.config.table, w.reader)
        n = epoll_wait(w.epoll_fd, events, EVENTS, wait_ms)
        if w.reader >= 0:
            reader_online(w.config.table, w.reader)
        clocks_read(w)
        if load_u32(&w.has_commands, acquire):
            commands_run(w)
        rests_go_on(w)
        for i in range(n):
            source = <source_t *>events[i].data.ptr
            if source.kind == SOURCE_CONN:
                conn_event(<conn_t *>source, events[i].events)
            elif source.kind == SOURCE_MAILBOX:
                read(w.wake_fd, &ignored, sizeof(ignored))
            else:
                listener_event(w, <listener_t *>source)
        timers_run(w)
        flush_all(w)
        if w.shaking != NULL:
            shakes_go_on(w)
            flush_all(w)
        pieces_settle(w)
        bury(w)
    if w.reader >= 0:
        reader_offline(w.config.table, w.reader)

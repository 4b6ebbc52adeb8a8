# What Python tells a worker: commands, which it takes over in its own turn, and the configuration.

cdef enum:
    # command_t.kind
    COMMAND_CONFIG = 0
    COMMAND_LISTEN = 1
    COMMAND_TIER2 = 2
    COMMAND_RUNTIME = 3
    COMMAND_PEERS = 4
    COMMAND_DRAIN = 5
    COMMAND_STOP = 6
    COMMAND_END_CALLS = 7


cdef void post(worker_t *w, command_t *command) noexcept nogil:
    """Give the worker a command, which it owns from now on. Any thread."""
    cdef uint64_t one = 1
    command.next = NULL
    pthread_mutex_lock(&w.lock)
    if w.commands_last != NULL:
        w.commands_last.next = command
    else:
        w.commands = command
    w.commands_last = command
    # release: whoever sees it takes the lock anyway; that it is seen soon is what matters.
    store_u32(&w.has_commands, 1, release)
    pthread_mutex_unlock(&w.lock)
    write(w.wake_fd, &one, sizeof(one))


cdef void notice(worker_t *w) noexcept nogil:
    """Wake Python, which has closed the descriptor by the time that a stopped worker is freed."""
    cdef uint64_t one = 1
    if w.is_stopping:
        return
    write(w.notice_fd, &one, sizeof(one))


cdef void commands_run(worker_t *w) noexcept nogil:
    cdef command_t *command
    cdef command_t *each
    pthread_mutex_lock(&w.lock)
    command = w.commands
    w.commands = w.commands_last = NULL
    store_u32(&w.has_commands, 0, relaxed)
    pthread_mutex_unlock(&w.lock)
    while command != NULL:
        each = command
        command = each.next
        command_run(w, each)
        command_free(each)


cdef void command_free(command_t *command) noexcept nogil:
    if (command.kind == COMMAND_TIER2 or command.kind == COMMAND_LISTEN) and command.fd >= 0:
        close(command.fd)   # nobody took it over
    config_free(command.config)
    free(command.targets)
    free(command)


cdef void command_run(worker_t *w, command_t *command) noexcept nogil:
    cdef conn_t *conn
    if command.kind == COMMAND_CONFIG:
        config_use(w, command.config)
        command.config = NULL
    elif command.kind == COMMAND_LISTEN:
        listener_add(w, command.fd, command.role)
        command.fd = -1
    elif command.kind == COMMAND_TIER2:
        tier2_add(w, command)
        command.fd = -1
    elif command.kind == COMMAND_RUNTIME:
        runtime_set(w, command.targets)
    elif command.kind == COMMAND_PEERS:
        peers_set_all(w, command.targets, command.targets_count)
    elif command.kind == COMMAND_END_CALLS:
        calls_end(w)
    else:
        while w.listeners != NULL:
            listener_close(w, w.listeners)
        if command.kind == COMMAND_STOP:
            w.is_stopping = 1
        conn = w.conns
        while conn != NULL:
            if conn.is_server:
                conn_drain(conn)
            conn = conn.next


cdef void calls_end(worker_t *w) noexcept nogil:
    """Give up the calls that the wire serves itself; tier 2 answers those that it has."""
    cdef conn_t *conn = w.conns
    cdef call_t *call
    while conn != NULL:
        call = conn.calls if conn.is_server else NULL
        while call != NULL:
            if call.lane < LANE_MODEL:
                call_fail_as(call, UNAVAILABLE, SHUTTING_DOWN)
            call = call.down_next
        conn = conn.next


cdef void config_use(worker_t *w, config_t *config) noexcept nogil:
    cdef config_t *before = w.config
    cdef conn_t *conn = w.conns
    if w.reader < 0 and config.table != NULL:
        w.reader = reader_register(config.table)
        if w.reader < 0:
            config.table = NULL   # as if there were none: tier 2 does it all
        else:
            reader_online(config.table, w.reader)
    w.config = config
    while conn != NULL:
        conn.method = NULL   # of the old one
        shown_forget(&conn.shown)
        conn = conn.next
    config_free(before)


cdef void config_free(config_t *config) noexcept nogil:
    cdef uint32_t i
    cdef method_t *method
    if config == NULL:
        return
    for i in range(config.methods_size):
        while config.methods[i] != NULL:
            method = config.methods[i]
            config.methods[i] = method.next
            method_free(method)
    free(config.methods)
    method_free(config.others)
    i = 0
    while config.observed != NULL and config.observed[i].bytes != NULL:
        free(config.observed[i].bytes)
        i += 1
    free(config.observed)
    free(config.instance.bytes)
    for i in range(<uint32_t>ROLES):
        SSL_CTX_free(config.tls[i])
    SSL_CTX_free(config.tls_to_peers)
    access_free(config.access)
    free(config)


cdef void method_free(method_t *method) noexcept nogil:
    if method != NULL:
        free(method.path)
        free(method.numbers)
        free(method.extract_numbers)
        free(method)


cdef void tier2_add(worker_t *w, command_t *command) noexcept nogil:
    """Take over this end of a socketpair."""
    cdef int place = command.role * 2 + (1 if command.lane == LANE_OWN else 0)
    cdef target_t *target = w.tier2[place]
    cdef conn_t *conn
    if target == NULL:
        target = w.tier2[place] = target_new(command.lane)
        if target == NULL:
            close(command.fd)
            tier2_failed(w, place)
            return
        target.role = command.role
        memcpy(target.name, b"localhost", 10)
        target.name_length = 9
        memcpy(target.label, OWN_SERVER, strlen(OWN_SERVER))
    conn = conn_new(w, command.fd, command.role, target)
    if conn == NULL:
        tier2_failed(w, place)
        return
    target.failed_ms = 0
    target.failure[0] = 0
    target.conns[0] = conn
    target.conns_count = 1
    mark_dirty(conn)


cdef void tier2_failed(worker_t *w, int place) noexcept nogil:
    """There was no memory, or no place in epoll: Python makes another connection in a moment."""
    or_u32(&w.missing, <uint32_t>1 << place, release)
    timer_set(w, &w.tier2_timer, w.now_ms + TIER2_PAUSE_MS)


cdef void runtime_set(worker_t *w, const target_t *told) noexcept nogil:
    if w.runtime == NULL:
        w.runtime = target_new(LANE_HERE)
    if w.runtime != NULL:
        target_set(w.runtime, told)


cdef bint same_address(const target_t *a, const target_t *b) noexcept nogil:
    return (a.handle == b.handle and a.address_length == b.address_length
            and memcmp(&a.address, &b.address, a.address_length) == 0)


cdef void peers_set_all(worker_t *w, const target_t *told, uint32_t count_) noexcept nogil:
    """Take over who can be called, and where; the others are called no more."""
    cdef uint32_t i, index
    cdef target_t *target
    cdef uint8_t *present = <uint8_t *>calloc(PEERS_MAX, 1)
    if present == NULL:
        return   # with the old ones; the next news come soon
    for i in range(count_):
        index = told[i].handle & 0xFFFF
        present[index] = 1
        target = w.peers[index]
        if target != NULL and not same_address(target, &told[i]):
            w.peers[index] = NULL
            target_retire(w, target)
            target = NULL
        if target == NULL:
            target = w.peers[index] = target_new(LANE_THERE)
            if target == NULL:
                continue
            target_set(target, &told[i])
        target.away_until_ns = told[i].away_until_ns
    for index in range(<uint32_t>PEERS_MAX):
        target = w.peers[index]
        if target != NULL and not present[index]:
            w.peers[index] = NULL
            target_retire(w, target)
    free(present)

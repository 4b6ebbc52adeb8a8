# Attempts: one stream upstream after the other until a call has its answer, and what tier 2 is told
# of those that gave none. The twin in Python is mm/edge/pipe.py.
#
# `call_settle` alone frees a call, and is the last thing done to it.


cdef void call_settle(call_t *call) noexcept nogil:
    """Free a call that has no end left."""
    if call.down == NULL and call.up == NULL and call.waits_for == NULL and not call.in_turn:
        timer_stop(call.worker, &call.timer)
        leave(call)
        hit_count(call)  # one that ended before it was sent
        call_free(call)


cdef void enter_there(call_t *call) noexcept nogil:
    """Count among the calls at a peer, until `leave`."""
    cdef worker_t *w = call.worker
    cdef uint32_t index = call.handle & 0xFFFF
    call.is_there = 1
    count(w, COUNT_HITS_OPEN, 1)
    # The worker is the only writer. relaxed: numbers.
    store_u32(&w.peers_open[index], load_u32(&w.peers_open[index], relaxed) + 1, relaxed)


cdef void leave(call_t *call) noexcept nogil:
    """The attempt is over: let go of the copy, or of the place among the calls at a peer."""
    cdef worker_t *w = call.worker
    cdef uint32_t index = call.handle & 0xFFFF
    cdef uint32_t limit
    if call.slot != NULL:
        limit = load_u32(&call.slot.concurrency_max, relaxed)
        # Whoever waits for a slot is pinned: with somebody in the line as many stay as there are
        # slots, if not more.
        if unpin(call.slot) >= limit and limit != 0 and w.config.has_slots:
            notice(w)
        call.slot = NULL
        count(w, COUNT_HITS_OPEN, <uint64_t>-1)
    if call.is_there:
        call.is_there = 0
        count(w, COUNT_HITS_OPEN, <uint64_t>-1)
        # The worker is the only writer. relaxed: numbers.
        store_u32(&w.peers_open[index], load_u32(&w.peers_open[index], relaxed) - 1, relaxed)
        if call.has_trailers:
            store_u32(
                &w.peers_answers[index], load_u32(&w.peers_answers[index], relaxed) + 1, relaxed)


cdef void attempt(call_t *call, target_t *target) noexcept nogil:
    """Send a call to a target, now or when a connection is there."""
    cdef worker_t *w = call.worker
    cdef conn_t *conn
    call.target = target
    call.attempted_ns = w.now_ns
    if target == NULL:
        set_fault(call, b"tier 2 is not there")
        attempt_failed(call)
        return
    conn = target_conn(w, target)
    if conn != NULL:
        submit(call, conn)
    elif target.is_retired:
        leave(call)
        splice(call, LANE_MODEL, COUNT_LEFT_AWAY)
    elif target_is_coming(target) and target_wait(call, target):
        pass
    elif is_full_up(call, target):
        leave(call)
        splice(call, LANE_MODEL, COUNT_LEFT_BUSY)
    else:
        set_fault(call, why_failed(target))
        attempt_failed(call)
    if (call.deadline_ns != 0 and call.down != NULL
            and (call.lane < LANE_MODEL or call.waits_for != NULL)):
        timer_set(w, &call.timer, call.deadline_ns // 1000000 + 1)


cdef inline bint is_full_up(const call_t *call, const target_t *target) noexcept nogil:
    """Answer whether there are connections, none with room: tier 2 has a line for that."""
    return target.conns_count != 0 and call.lane < LANE_MODEL


cdef inline void hit_count(call_t *call) noexcept nogil:
    """Count a call that was sent from the table alone, or could not be, once. Those that are given
    to tier 2 before are counted there.
    """
    if call.lane == LANE_NONE or call.lane >= LANE_MODEL or call.is_counted:
        return
    call.is_counted = 1
    count(call.worker, COUNT_HERE if call.lane == LANE_HERE else COUNT_THERE, 1)


cdef void set_fault(call_t *call, const char *text) noexcept nogil:
    call.fault.length = 0
    arena_text(call, &call.fault, text, strlen(text))


cdef void submit(call_t *call, conn_t *conn) noexcept nogil:
    """Begin the stream upstream."""
    cdef worker_t *w = call.worker
    cdef size_t count_
    cdef nghttp2_data_provider provider
    cdef int32_t id = -1
    cdef bint is_empty = call.request_ended and buffer_left(&call.body) == 0
    if call.lane < LANE_MODEL and call.deadline_ns != 0 and call.deadline_ns <= w.now_ns:
        hit_count(call)
        call_expired(call)
        return
    if call.lane >= LANE_MODEL:
        timer_stop(w, &call.timer)   # tier 2 ends it in time
    count_ = build_request(call, conn)
    call.up_sent = call.sent_whole = call.up_deferred = 0
    call.status = -1
    call.hop_load = -1
    if is_injected(call):
        inject_reset(&call.injector)
        if not feed_injector(call):
            return
    if count_ != 0:
        provider.source.ptr = NULL
        provider.read_callback = read_request
        id = nghttp2_submit_request(
            conn.session, NULL, w.nv, count_, NULL if is_empty else &provider, call)
    if id == NGHTTP2_ERR_STREAM_ID_NOT_AVAILABLE:
        # After 2^30 of them the next one needs a new connection.
        conn.is_draining = 1
        mark_dirty(conn)
        if call.lane >= LANE_MODEL:
            tier2_missing(w, call.target)
        attempt(call, call.target)
        return
    if id < 0:
        set_fault(call, b"the connection takes no more streams")
        attempt_failed(call)
        return
    hit_count(call)
    call.up = conn
    call.up_id = id
    call.up_previous = NULL
    call.up_next = conn.calls
    if conn.calls != NULL:
        conn.calls.up_previous = call
    conn.calls = call
    conn.streams += 1
    mark_dirty(conn)


cdef void attempt_failed(call_t *call) noexcept nogil:
    """Nobody was reached. May free the call."""
    hit_count(call)
    invoked_count(call, UNAVAILABLE)
    if call.down == NULL:
        call_settle(call)
    elif may_repeat(call):
        leave(call)
        replay(call)
    else:
        call_unanswered(call, call.target)   # lets go when it is answered


cdef inline bint has_whole(const call_t *call) noexcept nogil:
    """Answer whether all of the request is here that has come: it is kept, or none has left."""
    return call.keeps or call.body_base + call.body.at == 0


cdef inline bint may_repeat(const call_t *call) noexcept nogil:
    """Answer whether tier 2 can have the whole call, without anyone's noticing."""
    return (call.lane < LANE_MODEL and has_whole(call) and not call.answer_begun
            and call.down != NULL)


cdef void replay(call_t *call) noexcept nogil:
    """Give a call to tier 2 with all of its request, and what the attempt here came to."""
    cdef headers_t held = call.held_response
    call.wants_replay = 0
    call.is_replayed = 1
    if call.answer_ended:
        call.has_held = 1
        call.held_response = call.response
        call.response = held
        held = call.held_trailers
        call.held_trailers = call.trailers
        call.trailers = held
    headers_clear(&call.response)
    headers_clear(&call.trailers)
    call.answer_ended = call.is_spoilt = 0
    call.body.at = 0
    count(call.worker, COUNT_REPLAYED, 1)
    count(call.worker, COUNT_AGAIN_ANSWER if call.has_held else COUNT_AGAIN_FAULT, 1)
    # The headers that tell of the attempt are built while has_response and has_trailers still say
    # what is held.
    call.is_replayed = 1
    splice_again(call)


cdef void splice_again(call_t *call) noexcept nogil:
    cdef uint8_t lane = call.lane
    call.tried_lane = lane
    call.held_has_response = call.has_response
    call.has_response = call.has_trailers = 0
    call.tried_status = call.status if call.has_held else -1
    call.lane = LANE_MODEL
    attempt(call, tier2_of(call.worker, call.role, LANE_MODEL))


cdef void answer_with_held(call_t *call) noexcept nogil:
    """Tier 2 has nothing better: the answer of the attempt here goes to the client."""
    cdef headers_t response = call.response
    cdef headers_t trailers = call.trailers
    cdef header_t *header
    cdef uint32_t i
    call.response = call.held_response
    call.trailers = call.held_trailers
    call.has_held = 0
    call.status = call.tried_status
    call.has_response = call.held_has_response
    for i in range(trailers.count):
        header = &trailers.items[i]
        if header.name_length > 7 and same(header.name, b"mm-hop-", 7):
            headers_add(call, &call.trailers, header.name, header.name_length, header.value,
                        header.value_length, PASS, header.flags)
    call.held_response = response
    call.held_trailers = trailers

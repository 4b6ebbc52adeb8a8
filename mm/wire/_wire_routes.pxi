# Where a call goes, from its headers and the table alone (spec core 2.4, 2.5; Router._hit in
# mm/mesh/router.py is the twin). What the table does not answer at once is tier 2's.

cdef enum:
    EXTRACT_BYTES_MAX = 131072   # half of a stream's window
    # Of longer ids runtimes are told one form only (PLAIN_ID_BYTES_MAX in mm/core/headers.py).
    ID_BYTES_MAX = 2500
    # More copies where nobody can be reached than this are for tier 2 to sort out.
    AWAY_MAX = 4


cdef method_t *find_method(conn_t *conn, const config_t *config, const text_t *path) noexcept nogil:
    """Answer what is known of a method."""
    cdef method_t *method = conn.method
    if (method != NULL and method.path_length == path.length
            and memcmp(method.path, path.bytes, path.length) == 0):
        return method
    # Paths come from the configuration, so nobody can fill the table with collisions.
    method = config.methods[text_place(path.bytes, path.length, config.methods_size)]
    while method != NULL:
        if method.path_length == path.length and memcmp(method.path, path.bytes, path.length) == 0:
            conn.method = method
            return method
        method = method.next
    return config.others


cdef bint is_forbidden(const text_t *path) noexcept nogil:
    """Answer whether it manages a runtime: for its own mesh alone (around 6.4). Or is what
    instances tell each other: at another one's port it would be served.
    """
    return (
        (path.length >= 20 and same(path.bytes, b"/mmesh.ModelRuntime/", 20))
        or (path.length >= 9 and same(path.bytes, b"/mm.peer.", 9))
        or (path.length >= 46
            and same(path.bytes, b"/com.ibm.watson.tas.internal.proto.ModelServer/", 46))
    )


cdef inline uint64_t drawn(worker_t *w) noexcept nogil:
    w.random ^= w.random << 13
    w.random ^= w.random >> 7
    w.random ^= w.random << 17
    return w.random


cdef void call_begin(worker_t *w, call_t *call) noexcept nogil:
    """All headers of a call are here, and whatever came with them: send it on its way.

    Or wait for its first message, if that names the model; then this is called once more.
    """
    cdef config_t *config = w.config
    cdef head_t *head = &call.head
    cdef method_t *method
    cdef bint is_hop
    cdef int extracted, why
    call.awaits_message = 0
    if (config == NULL or not is_plain_request(head)
            or call.request.bytes > config.header_bytes_max):
        splice(call, LANE_MODEL if has_id(head) else LANE_OWN, COUNT_LEFT_HEADERS)
        return
    method = find_method(call.down, config, &head.path)
    if (config.access != NULL and call.role == ROLE_EXTERNAL
            and not admit(call, config.access, method)):
        return
    if method.flags & METHOD_OWN or (method.flags & METHOD_OWN_UNLESS_ID and not has_id(head)):
        splice(call, LANE_OWN, 0)
        return
    is_hop = call.role == ROLE_PEER and head.hop_kind.bytes != NULL
    extracted = why = 0
    if config.table == NULL:
        why = COUNT_LEFT_NO_COPY
    elif is_forbidden(&head.path) or (not is_hop and method.flags & METHOD_DENIED):
        why = COUNT_LEFT_METHOD
    elif not is_hop and method.extract_count != 0:
        extracted = extract_id(call, method)
        if call.awaits_message:
            if call.deadline_ns != 0:
                timer_set(w, &call.timer, call.deadline_ns // 1000000 + 1)
            return
        if extracted < 0:
            why = COUNT_LEFT_MESSAGE
    if why == 0 and ((extracted == 0 and not choose_id(call))
                     or (is_hop and (head.is_tried or head.is_vmodel))
                     or head.model_id.length == 0 or head.model_id.length > ID_BYTES_MAX):
        why = COUNT_LEFT_HEADERS
    if why == 0:
        why = route(w, call, method, is_hop)
    if why != 0:
        splice(call, LANE_MODEL, why)


cdef int extract_id(call_t *call, const method_t *method) noexcept nogil:
    """Read the id from the first message: 1 if it is there, 0 if not, -1 if tier 2 is to say.

    Compressed and large messages are: here a message waits within its stream's window.
    """
    cdef const uint8_t *bytes = call.body.bytes
    cdef uint64_t length = 0
    cdef uint32_t budget = 0
    cdef size_t at = 0, found_length = 0
    cdef int found
    if call.body.length >= 5:
        length = big_endian4(bytes + 1)
        if bytes[0] != 0 or length > EXTRACT_BYTES_MAX:
            return -1
    if call.body.length < 5 or call.body.length - 5 < length:
        if call.request_ended:
            return -1
        call.awaits_message = 1
        return 0
    found = extract(bytes + 5, 0, length, method.extract_numbers, method.extract_count, &budget,
                    &at, &found_length)
    if found == 1:
        # The body may move when it grows.
        if not arena_text(call, &call.head.model_id, bytes + 5 + at, found_length):
            return -1
        call.head.is_vmodel = (method.flags & METHOD_EXTRACTS_VMODEL) != 0
    return found


cdef int route(worker_t *w, call_t *call, const method_t *method, bint is_hop) noexcept nogil:
    """Send a call for one model to a ready copy, and answer 0; else the counter of why not.

    The order of looks is that of Router._hit.
    """
    cdef config_t *config = w.config
    cdef table_t *t = config.table
    cdef head_t *head = &call.head
    cdef const char *id = <const char *>head.model_id.bytes
    cdef slot_t *s
    cdef bint is_here, is_away = False
    cdef int64_t chosen = CHOSE_LOCAL
    cdef target_t *target = NULL
    s = (find_alias if head.is_vmodel else find)(t, id, head.model_id.length)
    if s == t.slots:
        return COUNT_LEFT_NO_COPY
    if s.id_length > ID_BYTES_MAX:
        return COUNT_LEFT_HEADERS
    if method.flags & METHOD_OBSERVED and not is_hop and is_observed(config, s):
        return COUNT_LEFT_METHOD
    # relaxed: `pin` looks again, and counts.
    is_here = load_u8(&s.state, relaxed) == READY
    if not (is_here and (is_hop or head.is_balanced or in_flight_of(s) == 0)):
        if is_hop:
            return COUNT_LEFT_NO_COPY
        chosen = choose_reachable(w, s, &target, &is_away)
        if chosen == CHOSE_NONE:
            return COUNT_LEFT_AWAY if is_away else COUNT_LEFT_NO_COPY
    # The slot may be used again by the next turn: what is needed of its id is copied.
    if head.is_vmodel:
        if not arena_text(call, &call.model_id, id_of(s), s.id_length):
            return COUNT_LEFT_BUSY
    else:
        call.model_id = head.model_id
    if chosen == CHOSE_LOCAL:
        return route_here(w, call, method, s, is_hop)
    call.lane = LANE_THERE
    call.handle = <uint32_t>chosen
    call.may_redirect = is_here or has_other_peers(t, s)
    enter_there(call)
    attempt(call, target)
    return 0


cdef int64_t choose_reachable(
    worker_t *w, slot_t *s, target_t **target, bint *is_away
) noexcept nogil:
    """Choose a copy, and say where that is. An instance that is gone has no calls, and would be
    chosen for every one as long as its records stay: those that are to be left alone are passed
    over, and `is_away` says that there are some.
    """
    cdef int64_t away[AWAY_MAX]
    cdef int64_t chosen
    cdef target_t *found
    cdef size_t count_ = 0
    while True:
        chosen = choose_copy(w.config.table, s, drawn(w), away, count_)
        if chosen == CHOSE_NONE or chosen == CHOSE_LOCAL:
            return chosen
        found = w.peers[chosen & 0xFFFF]
        if (found != NULL and found.handle == <uint32_t>chosen
                and found.away_until_ns <= w.now_ns):
            target[0] = found
            return chosen
        is_away[0] = True
        if count_ == AWAY_MAX:
            return CHOSE_NONE
        away[count_] = chosen
        count_ += 1


cdef bint is_observed(const config_t *config, slot_t *s) noexcept nogil:
    """Answer whether somebody wants to see the calls of a model: tier 2 shows them."""
    cdef const text_t *observed = config.observed
    while observed != NULL and observed.bytes != NULL:
        if (observed.length == s.id_length
                and memcmp(observed.bytes, id_of(s), s.id_length) == 0):
            return True
        observed += 1
    return observed == NULL


cdef bint has_other_peers(const table_t *t, slot_t *s) noexcept nogil:
    """Answer whether more than one other instance has a copy."""
    cdef peers_t *more = <peers_t *>load_ptr(&s.more_peers, acquire)
    cdef uint32_t i, found = 0
    cdef uint64_t entry
    for i in range(peer_count(more)):
        entry = load_u64(peer_at(s, more, i), relaxed)
        if entry != 0 and live(t, <uint32_t>(entry >> 32)):
            found += 1
    return found > 1


cdef int route_here(
    worker_t *w, call_t *call, const method_t *method, slot_t *s, bint is_hop
) noexcept nogil:
    """Pin the copy here and send the call to the runtime; answers as ``route``."""
    cdef config_t *config = w.config
    cdef uint32_t limit = load_u32(&s.concurrency_max, relaxed)
    if w.runtime == NULL or method.flags & METHOD_REFUSED_HERE or config.leaves_here:
        return COUNT_LEFT_METHOD
    if is_hop and call.head.may_redirect and 0 < limit <= in_flight_of(s):
        return COUNT_LEFT_BUSY
    if method.numbers_count != 0 and (has_compression(call) or not inject_begin(call, method)):
        return COUNT_LEFT_MESSAGE
    if not slot_pin(config, s):
        return COUNT_LEFT_BUSY if config.has_slots else COUNT_LEFT_NO_COPY
    touch(s, w.wall_ms)
    call.slot = s
    count(w, COUNT_HITS_OPEN, 1)
    call.copy_word = load_u32(&s.flags, relaxed)
    call.lane = LANE_HERE
    if is_hop:
        report(call, -1)
    attempt(call, w.runtime)
    return 0


cdef bint slot_pin(const config_t *config, slot_t *s) noexcept nogil:
    """Pin a copy that takes one more call; if not, tier 2 has a line for that."""
    cdef uint32_t limit
    if not config.has_slots:
        return pin(s)
    # A runtime that says nothing of a copy wants one call at a time.
    limit = load_u32(&s.concurrency_max, relaxed)
    return pin_below(s, limit if limit else 1)


cdef bint has_compression(const call_t *call) noexcept nogil:
    """Answer whether the messages of a call may be compressed."""
    cdef const text_t *encoding = &call.head.encoding
    if call.body.length != 0 and call.body.bytes[0] != 0:
        return True
    return encoding.length != 0 and not (
        encoding.length == 8 and same(encoding.bytes, b"identity", 8))


cdef void splice(call_t *call, uint8_t lane, int why) noexcept nogil:
    """Pass a call on to tier 2, as it came; of a call for a model, ``why`` is counted, unless it
    was sent already, and sent back unread: that is no news of anybody, but it was an attempt.
    """
    cdef worker_t *w = call.worker
    call.lane = lane
    if call.is_counted:
        count(w, COUNT_REPLAYED, 1)
        count(w, COUNT_AGAIN_FAULT, 1)
    elif lane == LANE_MODEL:
        count(w, COUNT_SPLICED_MODEL, 1)
        count(w, why, 1)
    else:
        count(w, COUNT_SPLICED_OWN, 1)
    call.keeps = 0
    attempt(call, tier2_of(w, call.role, lane))


cdef inline target_t *tier2_of(worker_t *w, uint8_t role, uint8_t lane) noexcept nogil:
    return w.tier2[role * 2 + (1 if lane == LANE_OWN else 0)]

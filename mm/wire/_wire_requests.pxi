# The body of a request: kept while the call may be sent again, and passed on as upstreams take it.
#
# What is in `body` before `at` was sent; it stays while the call `keeps` everything.


cdef bint body_received(call_t *call, const uint8_t *bytes, size_t length) noexcept nogil:
    """Take a piece of the request's body; False if it is of no use any more."""
    cdef config_t *config = call.worker.config
    cdef int64_t too_long = METER_OK
    if call.head.has_length and not call.head.is_odd and (
            received_of(call) + length > call.head.content_length):
        call_break(call)
        return False
    if not call.has_first:
        first_follow(call, bytes, length)
    if call.wants_replay:
        return body_kept(call, bytes, length)
    if call.lane < LANE_MODEL and config != NULL:
        too_long = meter_feed(&call.request_meter, bytes, length, config.message_bytes_max)
        if too_long != METER_OK:
            if call.lane == LANE_NONE:
                call.head.is_odd = 1   # tier 2 refuses it
            else:
                fail_message(call, b"request", too_long)
                return False
    if is_greedy(call, length):
        if not call.keeps or call.lane == LANE_NONE:
            call_refuse(call)
            return False
        stop_keeping(call)   # what it keeps to be sent again goes first
    if not call.keeps:
        body_compact(call)
    if not buffer_add(&call.body, bytes, length):
        call_fail_as(call, 8, OUT_OF_MEMORY)
        return False
    if call.keeps and config != NULL and call.body.length > config.kept_bytes_max:
        stop_keeping(call)
    body_grew(call)
    call_weigh(call)
    return True


cdef inline uint64_t received_of(const call_t *call) noexcept nogil:
    """Answer how many bytes of the request's body have come."""
    return call.body_base + call.body.length


cdef void body_ended(call_t *call) noexcept nogil:
    """The request is complete, or says so: let it go on if it is."""
    if call.answer_ended and not call.wants_replay:
        return
    if call.head.has_length and not call.head.is_odd and (
            received_of(call) != call.head.content_length):
        call_break(call)
        return
    # Between an answer and its replay messages are not followed: tier 2 will.
    if call.lane < LANE_MODEL and not call.wants_replay and (
            call.request_meter.left != 0 or call.request_meter.head_length != 0):
        if call.lane != LANE_NONE:
            call_fail_as(call, 3, MESSAGE_CUT_OFF)
            return
        call.head.is_odd = 1   # tier 2 refuses it
    body_grew(call)


cdef bint body_kept(call_t *call, const uint8_t *bytes, size_t length) noexcept nogil:
    """Keep what comes between an answer and its replay: tier 2 gets the whole request, and measures
    its messages. What is too long to be kept has had its answer; False then.
    """
    cdef config_t *config = call.worker.config
    if ((config == NULL or call.body.length + length <= config.kept_bytes_max)
            and buffer_add(&call.body, bytes, length)):
        return True
    call.wants_replay = 0
    stop_keeping(call)
    answer_stands(call)
    answer_end(call)
    return False


cdef void body_grew(call_t *call) noexcept nogil:
    """There is more of the request, or it has ended: let it go on."""
    if call.awaits_message and not call.in_turn:
        call.awaits_message = 0
        fresh_add(call)
    if call.up == NULL or call.answer_ended:
        return
    if is_injected(call) and not feed_injector(call):
        return
    if call.up_deferred:
        call.up_deferred = 0
        nghttp2_session_resume_data(call.up.session, call.up_id)
        mark_dirty(call.up)


cdef bint feed_injector(call_t *call) noexcept nogil:
    """Put the id into what came; False if the request is at fault, and was answered."""
    cdef buffer_t *body = &call.body
    cdef size_t used
    cdef int said = inject_feed(
        &call.injector, body.bytes + body.at, buffer_left(body), &used)
    if said == WALK_OK:
        body.at += used
        return True
    if said == WALK_MALFORMED:
        call_fail_as(call, 3, MESSAGE_CUT_OFF)
    elif said == WALK_COMPRESSED:
        call_fail_as(call, UNIMPLEMENTED, UNREADABLE_IDENTITY)
    else:
        call_fail_as(call, 8, OUT_OF_MEMORY)
    return False


cdef void stop_keeping(call_t *call) noexcept nogil:
    """The call has this one attempt: what was sent need not stay."""
    call.keeps = 0
    call.worker.held_bytes -= call.held_bytes
    call.held_bytes = 0


cdef void body_compact(call_t *call) noexcept nogil:
    """Make room for more of the body; moves what is there."""
    cdef size_t before = call.body.length
    buffer_drop(&call.body)
    call.body_base += before - call.body.length


cdef inline bint is_injected(const call_t *call) noexcept nogil:
    """Answer whether the id goes into the messages of this attempt."""
    return call.injector.suffix_length != 0 and call.lane == LANE_HERE


cdef inline buffer_t *request_out(call_t *call) noexcept nogil:
    """Answer where what is to be sent of a request lies."""
    return &call.injector.out if is_injected(call) else &call.body


cdef void body_sent(call_t *call) noexcept nogil:
    """Something of the request has left: the client may send as much."""
    cdef uint64_t total = call.body_base + call.body.at
    cdef uint64_t more
    cdef config_t *config
    if is_injected(call):
        if buffer_left(&call.injector.out) != 0:
            return
        buffer_rewind(&call.injector.out)
    if total > call.body_passed:
        more = total - call.body_passed
        call.body_passed = total
        give_back(call.down, call.down_id, more, call.request_ended)
    if not call.keeps:
        call.body_base += call.body.length if call.body.at == call.body.length else 0
        buffer_rewind(&call.body)
        return
    more = call.body.at - call.held_bytes if call.body.at > call.held_bytes else 0
    config = call.worker.config
    if config != NULL and call.worker.held_bytes + more > config.held_bytes_max:
        stop_keeping(call)
        return
    call.held_bytes += more
    call.worker.held_bytes += more


cdef void give_back(conn_t *conn, int32_t id, uint64_t size, bint has_ended) noexcept nogil:
    """Let the other side of a connection send so many bytes more."""
    if conn == NULL or conn.is_closed:
        return
    if has_ended:
        nghttp2_session_consume_connection(conn.session, size)
    else:
        nghttp2_session_consume(conn.session, id, size)
    mark_dirty(conn)


cdef ssize_t read_request(
    nghttp2_session *session, int32_t id, uint8_t *_into, size_t length, uint32_t *flags,
    nghttp2_data_source *_source, void *_user
) noexcept nogil:
    """nghttp2 asks how much of a request's body there is to send (`send_data` moves it)."""
    cdef call_t *call = <call_t *>nghttp2_session_get_stream_user_data(session, id)
    cdef size_t left
    cdef bint is_all
    if call == NULL or call.up_id != id:
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    left = buffer_left(request_out(call))
    if left == 0 and is_injected(call) and buffer_left(&call.body) != 0:
        if not feed_injector(call):
            return NGHTTP2_ERR_DEFERRED   # it has its answer, and the stream is reset
        left = buffer_left(&call.injector.out)
    is_all = call.request_ended and (not is_injected(call) or buffer_left(&call.body) == 0)
    if left == 0:
        if is_all:
            flags[0] |= NGHTTP2_DATA_FLAG_EOF
            return 0
        call.up_deferred = 1
        return NGHTTP2_ERR_DEFERRED
    flags[0] |= NGHTTP2_DATA_FLAG_NO_COPY
    if left <= length:
        if is_all:
            flags[0] |= NGHTTP2_DATA_FLAG_EOF
        return <ssize_t>left
    return <ssize_t>length

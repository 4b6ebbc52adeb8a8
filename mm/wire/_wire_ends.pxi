# How calls end: with a status of our own, by the client, by the clock, by a stream that breaks.
#
# `down_closed` and `up_closed` are told by the sessions, or by a connection that closes, and may
# free the call; `call_fail` never does.


cdef void fail_message(call_t *call, const char *what, int64_t said) noexcept nogil:
    """End a call because of a message that ``meter_feed`` objects to."""
    cdef char text[160]
    cdef int n
    if said == METER_FLAG:
        n = snprintf(text, sizeof(text), MESSAGE_FLAG, what)
        call_fail(call, 13, <const uint8_t *>text, n)
        return
    n = snprintf(
        text, sizeof(text), MESSAGE_TOO_LONG, what, <long long>said,
        <long long>call.worker.config.message_bytes_max)
    call_fail(call, 8, <const uint8_t *>text, n)


cdef void call_break(call_t *call) noexcept nogil:
    """Reset the client's stream: its request breaks HTTP/2 (RFC 9113, 8.1.1). Leaves it alive."""
    if call.down == NULL or (call.answer_ended and not call.wants_replay):
        return
    call.answer_ended = 1
    call.wants_replay = 0
    call.status = CANCELLED
    timer_stop(call.worker, &call.timer)
    if call.waits_for != NULL:
        target_unwait(call)
    if call.up != NULL:
        nghttp2_submit_rst_stream(
            call.up.session, NGHTTP2_FLAG_NONE, call.up_id, NGHTTP2_CANCEL)
        mark_dirty(call.up)
    else:
        leave(call)   # see `call_end`
    nghttp2_submit_rst_stream(
        call.down.session, NGHTTP2_FLAG_NONE, call.down_id, NGHTTP2_PROTOCOL_ERROR)
    mark_dirty(call.down)


cdef void call_unanswered(call_t *call, const target_t *target) noexcept nogil:
    """End a call that nobody answered and that cannot be sent again: its `fault` says why.

    Tier 2, which would have had its own words for it (mm/mesh/retries.py), is told.
    """
    cdef char fault[400]
    cdef char text[800]
    cdef int n
    if call.lane < LANE_MODEL:
        failure_note(call, NULL)
    if call.lane >= LANE_MODEL or call.answer_begun or target == NULL:
        call_fail(call, 14, call.fault.bytes, call.fault.length)
        return
    n = snprintf(fault, sizeof(fault), b"%.*s", <int>call.fault.length, <char *>call.fault.bytes)
    n = snprintf(text, sizeof(text), RUNTIME_SILENT if call.lane == LANE_HERE else INSTANCE_GONE,
                 target.instance, fault)
    call_end(call, 14, <const uint8_t *>text, n, b"unreachable")


cdef inline void call_fail_as(call_t *call, int32_t status, const char *text) noexcept nogil:
    call_fail(call, status, <const uint8_t *>text, strlen(text))


cdef void call_fail(
    call_t *call, int32_t status, const uint8_t *text, size_t length
) noexcept nogil:
    """End a call with a status and a text of our own, as `call_end` does."""
    call_end(call, status, text, length, NULL)


cdef void call_end(
    call_t *call, int32_t status, const uint8_t *text, size_t length, const char *hop_result
) noexcept nogil:
    """End a call with a status of our own; nothing if it has one. Leaves the call alive.

    ``hop_result``: what a peer is told of it; NULL: nothing.
    """
    cdef char number[12]
    cdef int digits
    cdef const uint8_t *kind = <const uint8_t *>b"application/grpc"
    cdef uint32_t kind_length = 16
    if call.answer_ended or call.down == NULL:
        return
    call.answer_ended = 1
    call.status = status
    timer_stop(call.worker, &call.timer)
    if call.waits_for != NULL:
        target_unwait(call)
    if call.up != NULL:
        nghttp2_submit_rst_stream(
            call.up.session, NGHTTP2_FLAG_NONE, call.up_id, NGHTTP2_CANCEL)
        mark_dirty(call.up)
    headers_clear(&call.trailers)
    if not call.answer_begun:
        call.has_response = 0
        if call.head.content_type.length != 0 and not call.head.is_odd:
            kind = call.head.content_type.bytes
            kind_length = call.head.content_type.length
        headers_add(call, &call.trailers, <const uint8_t *>b":status", 7,
                    <const uint8_t *>b"200", 3, PASS, 0)
        headers_add(call, &call.trailers, <const uint8_t *>b"content-type", 12, kind, kind_length,
                    PASS, 0)
    digits = snprintf(number, sizeof(number), b"%d", status)
    headers_add(call, &call.trailers, <const uint8_t *>b"grpc-status", 11,
                <const uint8_t *>number, digits, PASS, 0)
    add_message(call, text, length)
    if hop_result != NULL and call.role == ROLE_PEER:
        headers_add(call, &call.trailers, <const uint8_t *>b"mm-hop-result", 13,
                    <const uint8_t *>hop_result, strlen(hop_result), PASS, 0)
    if status == UNIMPLEMENTED:
        # Of the wire's own there is one reason: a compression.
        headers_add(call, &call.trailers, <const uint8_t *>b"grpc-accept-encoding", 20,
                    <const uint8_t *>ENCODINGS_READ, strlen(ENCODINGS_READ), PASS, 0)
    answer_end(call)
    if call.up == NULL:
        # No stream upstream will end, and the client's may stay for as long as its client reads
        # nothing: whom the call waited for is free for others now. Nothing reads the slot of a call
        # that is answered; how busy the copy is has been laid out just now, if anybody is told.
        leave(call)


cdef void add_message(call_t *call, const uint8_t *text, size_t length) noexcept nogil:
    """Add grpc-message, percent-encoded as `encode_message` does it (mm/core/headers.py); the texts
    of the wire are short enough to be told whole.
    """
    cdef uint8_t *encoded = arena_take(call, 3 * length)
    cdef size_t i, n = 0
    cdef uint8_t c
    if length == 0 or encoded == NULL:
        return
    for i in range(length):
        c = text[i]
        if 32 <= c <= 126 and c != 37:
            encoded[n] = c
            n += 1
        else:
            encoded[n] = 37   # "%"
            encoded[n + 1] = HEX[c >> 4]
            encoded[n + 2] = HEX[c & 15]
            n += 3
    headers_add(call, &call.trailers, <const uint8_t *>b"grpc-message", 12, encoded, n, PASS, 0)


cdef void call_expired(call_t *call) noexcept nogil:
    """The client's time is up."""
    if call.wants_replay and call.down != NULL:
        # The stream upstream is not closed yet, because the socket there takes nothing: of the
        # answer that it gave nothing has left.
        failure_note(call, &call.trailers)
        call.wants_replay = call.answer_ended = 0
    if call.down == NULL or (call.answer_ended and answer_left(call) == 0):
        return
    count(call.worker, COUNT_DEADLINES, 1)
    if answer_left(call) != 0:
        # It does not take what it asked for: no trailers would reach it either.
        nghttp2_submit_rst_stream(
            call.down.session, NGHTTP2_FLAG_NONE, call.down_id, NGHTTP2_CANCEL)
        mark_dirty(call.down)
        if call.up != NULL and not call.answer_ended:
            # While the client's socket is full that does not leave: let go of the copy without it.
            nghttp2_submit_rst_stream(
                call.up.session, NGHTTP2_FLAG_NONE, call.up_id, NGHTTP2_CANCEL)
            mark_dirty(call.up)
        return
    call_fail_as(call, 4, DEADLINE_PASSED)


cdef void down_closed(call_t *call) noexcept nogil:
    """The client's stream is no more. May free the call."""
    cdef conn_t *conn = call.down
    cdef uint64_t received = call.body_base + call.body.length
    if call.down_previous != NULL:
        call.down_previous.down_next = call.down_next
    else:
        conn.calls = call.down_next
    if call.down_next != NULL:
        call.down_next.down_previous = call.down_previous
    conn.buffer_bytes -= call.weight
    conn.idle_since_ms = call.worker.now_ms
    call.down = NULL
    conn.streams -= 1
    count(call.worker, COUNT_CALLS_OPEN, <uint64_t>-1)
    answered_count(call, conn)
    if received > call.body_passed:
        give_back(conn, 0, received - call.body_passed, True)
        call.body_passed = received
    timer_stop(call.worker, &call.timer)
    if not call.answer_whole:
        count(call.worker, COUNT_CANCELLED, 1)
    if call.waits_for != NULL:
        target_unwait(call)
    if call.up != NULL and not (call.answer_ended and call.sent_whole):
        nghttp2_submit_rst_stream(
            call.up.session, NGHTTP2_FLAG_NONE, call.up_id,
            NGHTTP2_NO_ERROR if call.answer_ended else NGHTTP2_CANCEL)
        mark_dirty(call.up)
    if conn.is_draining and conn.calls == NULL:
        mark_dirty(conn)
    call_settle(call)


cdef void up_closed(call_t *call, uint32_t code, bint is_lost) noexcept nogil:
    """The stream upstream is no more. May free the call."""
    cdef conn_t *conn = call.up
    if call.up_previous != NULL:
        call.up_previous.up_next = call.up_next
    else:
        conn.calls = call.up_next
    if call.up_next != NULL:
        call.up_next.up_previous = call.up_previous
    call.up = NULL
    conn.streams -= 1
    conn.idle_since_ms = call.worker.now_ms
    if answer_left(call) != 0:
        give_back(conn, 0, answer_left(call), True)
    if conn.is_draining and conn.calls == NULL:
        mark_dirty(conn)
    invoked_count(call, attempt_status(call, code, is_lost))
    # The slot stays pinned for `up_broke` alone, whose answer tells how busy the copy is.
    if call.down == NULL or call.wants_replay or call.answer_ended:
        leave(call)
    if call.down == NULL:
        if call.wants_replay:
            failure_note(call, &call.trailers)
        call_settle(call)
    elif call.wants_replay:
        replay(call)
    elif not call.answer_ended:
        up_broke(call, conn, code, is_lost)


cdef int32_t attempt_status(const call_t *call, uint32_t code, bint is_lost) noexcept nogil:
    """Answer what an attempt came to."""
    if call.answer_ended:
        return call.status
    if call.down == NULL:
        return CANCELLED
    if is_lost or code == NGHTTP2_REFUSED_STREAM or not call.up_sent:
        return UNAVAILABLE
    return status_of_reset(code)


cdef void up_broke(call_t *call, conn_t *conn, uint32_t code, bint is_lost) noexcept nogil:
    """The stream upstream ended before its answer did. Lets go of the copy, on each way: before
    another attempt, else when the call has been answered (`call_end`).
    """
    cdef char text[400]
    cdef char name[16]
    cdef int n
    cdef bint is_refused = not is_lost and (code == NGHTTP2_REFUSED_STREAM or not call.up_sent)
    if is_refused and call.refusals < 3 and has_whole(call) and not call.answer_begun:
        call.refusals += 1
        call.body.at = 0
        headers_clear(&call.response)
        call.has_response = call.is_spoilt = 0
        leave(call)
        if call.lane != LANE_HERE or pin_again(call):
            if call.lane == LANE_THERE:
                enter_there(call)
            attempt(call, call.target)
            return
    if is_lost or is_refused:
        if is_lost:
            n = snprintf(text, sizeof(text), CONNECTION_LOST, conn.target.label)
        elif conn.is_draining:
            n = snprintf(text, sizeof(text), CONNECTION_CLOSING, conn.target.label)
        else:
            n = snprintf(text, sizeof(text), STREAM_REFUSED)
        arena_text(call, &call.fault, text, n)
        if may_repeat(call):
            leave(call)
            replay(call)
            return
        call_unanswered(call, conn.target)
        return
    if code < CODE_NAMES_COUNT:
        n = snprintf(text, sizeof(text), UPSTREAM_RESET, CODE_NAMES[code])
    else:
        snprintf(name, sizeof(name), b"code %u", code)
        n = snprintf(text, sizeof(text), UPSTREAM_RESET, name)
    call_fail(call, status_of_reset(code), <const uint8_t *>text, n)


cdef bint pin_again(call_t *call) noexcept nogil:
    """Pin the copy here once more for another stream; False if that cannot be."""
    cdef table_t *t = call.worker.config.table
    cdef slot_t *s = find(t, <const char *>call.model_id.bytes, call.model_id.length)
    if s == t.slots or not slot_pin(call.worker.config, s):
        return False
    call.slot = s
    call.copy_word = load_u32(&s.flags, relaxed)   # perhaps of another load
    count(call.worker, COUNT_HITS_OPEN, 1)
    return True


cdef int32_t status_of_reset(uint32_t code) noexcept nogil:
    """Answer what a RST_STREAM means to gRPC."""
    if code == NGHTTP2_REFUSED_STREAM:
        return 14
    if code == NGHTTP2_CANCEL:
        return 1
    if code == NGHTTP2_ENHANCE_YOUR_CALM:
        return 8
    if code == NGHTTP2_INADEQUATE_SECURITY:
        return 7
    return 13


cdef enum:
    CODE_NAMES_COUNT = 14

cdef const char *CODE_NAMES[CODE_NAMES_COUNT]
CODE_NAMES[:] = [
    b"NO_ERROR", b"PROTOCOL_ERROR", b"INTERNAL_ERROR", b"FLOW_CONTROL_ERROR", b"SETTINGS_TIMEOUT",
    b"STREAM_CLOSED", b"FRAME_SIZE_ERROR", b"REFUSED_STREAM", b"CANCEL", b"COMPRESSION_ERROR",
    b"CONNECT_ERROR", b"ENHANCE_YOUR_CALM", b"INADEQUATE_SECURITY", b"HTTP_1_1_REQUIRED",
]

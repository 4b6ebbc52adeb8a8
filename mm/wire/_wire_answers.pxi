# The answer: its headers are held for the turn in which they came, because most failures come with
# their trailers in one piece, and can then be tried elsewhere. The twin is mm/edge/attempt.py.


cdef void answer_headers_received(call_t *call) noexcept nogil:
    """Hold the initial headers until this turn's bytes are all looked at."""
    cdef worker_t *w = call.worker
    call.has_response = 1
    note_load(call)
    if not call.in_turn:
        call.in_turn = 1
        call.turn_next = w.held
        w.held = call


cdef void release_held(worker_t *w) noexcept nogil:
    """Pass on the headers of answers that did not end in the turn in which they began."""
    cdef call_t *call
    while w.held != NULL:
        call = w.held
        w.held = call.turn_next
        call.turn_next = NULL
        call.in_turn = 0
        if call.has_response and not call.answer_ended and call.down != NULL:
            answer_begin(call)
        call_settle(call)


cdef void answer_begin(call_t *call) noexcept nogil:
    """Give the initial headers to the client's session, once."""
    cdef nghttp2_data_provider provider
    cdef size_t count_
    if call.answer_begun or call.down == NULL:
        return
    call.answer_begun = 1
    if call.keeps:
        stop_keeping(call)
    count_ = build_answer(call, &call.response, tells_load(call))
    provider.source.ptr = NULL
    provider.read_callback = read_answer
    if nghttp2_submit_response(
            call.down.session, call.down_id, call.worker.nv, count_, &provider) != 0:
        nghttp2_submit_rst_stream(
            call.down.session, NGHTTP2_FLAG_NONE, call.down_id, NGHTTP2_INTERNAL_ERROR)
    mark_dirty(call.down)


cdef inline bint tells_load(const call_t *call) noexcept nogil:
    """Answer whether a peer hears from the wire how busy the copy is (tier 2 writes its own)."""
    return call.role == ROLE_PEER and call.lane == LANE_HERE


cdef void note_load(call_t *call) noexcept nogil:
    """Note how busy a peer's copy is, as its reply says."""
    cdef table_t *t
    if call.lane == LANE_THERE and call.hop_load >= 0:
        t = call.worker.config.table
        report_load(find(t, <const char *>call.model_id.bytes, call.model_id.length), call.handle,
                    <uint32_t>call.hop_load)
        call.hop_load = -1


cdef void answer_data_received(
    call_t *call, const uint8_t *bytes, size_t length
) noexcept nogil:
    """Take a piece of the answer's body."""
    cdef config_t *config = call.worker.config
    cdef int64_t too_long = METER_OK
    cdef conn_t *up = call.up
    if call.answer_ended or call.down == NULL:
        nghttp2_session_consume_connection(up.session, length)
        return
    if call.lane < LANE_MODEL:
        too_long = meter_feed(&call.answer_meter, bytes, length, config.message_bytes_max)
    if too_long != METER_OK:
        nghttp2_session_consume_connection(up.session, length)
        fail_message(call, b"response", too_long)
        return
    buffer_drop(&call.answer)
    if not call.has_response or not answer_add(call, bytes, length):
        nghttp2_session_consume_connection(up.session, length)
        call_fail_as(call, 13, MALFORMED_RESPONSE)
        return
    answer_begin(call)
    resume_answer(call)


cdef void resume_answer(call_t *call) noexcept nogil:
    if call.down_deferred and call.down != NULL:
        call.down_deferred = 0
        nghttp2_session_resume_data(call.down.session, call.down_id)
        mark_dirty(call.down)


cdef inline void answer_sent(call_t *call, size_t length) noexcept nogil:
    """Something of the answer has left: the upstream may send as much."""
    # What was here when its stream ended was given back then.
    if call.up != NULL:
        give_back(call.up, call.up_id, length, call.answer_ended)


cdef ssize_t read_answer(
    nghttp2_session *session, int32_t id, uint8_t *_into, size_t length, uint32_t *flags,
    nghttp2_data_source *_source, void *_user
) noexcept nogil:
    """nghttp2 asks how much of an answer's body there is to send (`send_data` moves it)."""
    cdef call_t *call = <call_t *>nghttp2_session_get_stream_user_data(session, id)
    cdef size_t left, count_
    if call == NULL:
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    left = answer_left(call)
    if left == 0 and not call.answer_ended:
        call.down_deferred = 1
        return NGHTTP2_ERR_DEFERRED
    if left != 0:
        flags[0] |= NGHTTP2_DATA_FLAG_NO_COPY
    if left > length:
        return <ssize_t>length
    if call.answer_ended:
        flags[0] |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM
        count_ = build_answer(call, &call.trailers, False)
        if nghttp2_submit_trailer(session, id, call.worker.nv, count_) != 0:
            return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    return <ssize_t>left


cdef void answer_trailers_received(call_t *call) noexcept nogil:
    """The answer is complete: pass its end on, or let tier 2 think about it."""
    if call.answer_ended:
        return
    if call.is_spoilt:
        call_fail_as(call, 13, MALFORMED_RESPONSE)
        return
    call.answer_ended = 1
    call.has_trailers = 1
    note_load(call)
    if not call.sent_whole and call.up != NULL:
        nghttp2_submit_rst_stream(
            call.up.session, NGHTTP2_FLAG_NONE, call.up_id, NGHTTP2_NO_ERROR)
        mark_dirty(call.up)
    if call.down == NULL:
        return
    if call.pass_on and call.has_held and not call.answer_begun:
        answer_with_held(call)
    elif call.lane < LANE_MODEL and needs_thought(call):
        if may_repeat(call):
            # Once the stream upstream is closed, which it is in a moment.
            call.wants_replay = 1
            return
        answer_stands(call)
    elif call.lane == LANE_HERE and not call.copy_word & 1:
        # It has the model: what makes a later NOT_FOUND news. The bit of an earlier copy is of no
        # harm: it was answered, too.
        or_u32(&call.slot.flags, 1, relaxed)
    answer_end(call)


cdef void answer_stands(call_t *call) noexcept nogil:
    """What the answer may mean is not to be tried again: tier 2 and a peer are told of it."""
    failure_note(call, &call.trailers)
    add_hop_result(call)


cdef void answer_end(call_t *call) noexcept nogil:
    """Send the end of the answer, and its beginning if that was held."""
    cdef size_t count_
    if call.has_response and not call.answer_begun:
        answer_begin(call)
    elif call.answer_begun:
        resume_answer(call)
    else:
        call.answer_begun = 1
        if call.keeps:
            stop_keeping(call)
        count_ = build_answer(call, &call.trailers, tells_load(call))
        if nghttp2_submit_response(
                call.down.session, call.down_id, call.worker.nv, count_, NULL) != 0:
            nghttp2_submit_rst_stream(
                call.down.session, NGHTTP2_FLAG_NONE, call.down_id, NGHTTP2_INTERNAL_ERROR)
        mark_dirty(call.down)


cdef bint needs_thought(const call_t *call) noexcept nogil:
    """Answer whether a status may mean more than it says (spec core 2.7, 2.8.4).

    Tier 2 reads it exactly; here it is enough to miss none.
    """
    if call.lane == LANE_THERE:
        return call.hop_result.bytes != NULL
    return (call.status == 5 or call.status == 8 or call.status == 14
            or (call.status == 3 and says_not_found(&call.trailers)))


cdef bint says_not_found(const headers_t *trailers) noexcept nogil:
    """Answer whether grpc-message speaks of something that was not found."""
    cdef uint32_t i, at
    cdef header_t *header
    for i in range(trailers.count):
        header = &trailers.items[i]
        if header.name_length == 12 and same(header.name, b"grpc-message", 12):
            for at in range(header.value_length):
                if header.value_length - at >= 9 and same(header.value + at, b"not found", 9):
                    return True
    return False


cdef void add_hop_result(call_t *call) noexcept nogil:
    """Tell a peer what the runtime's refusal means."""
    cdef const char *word = b"runtime-unavailable"
    if not tells_load(call) or call.status == 3:
        return
    if call.status == 5:
        word = b"lost"
    elif call.status == 8:
        word = b"exhausted"
    headers_add(call, &call.trailers, <const uint8_t *>b"mm-hop-result", 13,
                <const uint8_t *>word, strlen(word), PASS, 0)

# What nghttp2 tells: the callbacks of the sessions of both kinds.
#
# They run inside nghttp2_session_mem_recv or _mem_send of the connection that is their `user`. They
# submit to any session, and neither send, receive nor delete one.

cdef enum:
    # Of an answer (1xx). Runtimes of gRPC send none.
    ANNOUNCEMENTS_MAX = 8

cdef nghttp2_session_callbacks *server_callbacks = NULL
cdef nghttp2_session_callbacks *client_callbacks = NULL
cdef nghttp2_option *options = NULL


cdef void sessions_setup() except *:
    """Make what all sessions share; it is read only from then on."""
    global server_callbacks, client_callbacks, options
    if options != NULL:
        return
    if (nghttp2_session_callbacks_new(&server_callbacks) != 0
            or nghttp2_session_callbacks_new(&client_callbacks) != 0
            or nghttp2_option_new(&options) != 0):
        raise MemoryError
    # Windows move as the other end takes what came (back-pressure), and headers are checked here.
    nghttp2_option_set_no_auto_window_update(options, 1)
    nghttp2_option_set_no_http_messaging(options, 1)
    nghttp2_option_set_no_closed_streams(options, 1)
    lift_reset_limit(options)   # `reset_counted` has its own
    limit_continuations(options, CONTINUATIONS_MAX)
    nghttp2_option_set_max_send_header_block_length(options, 4 * HEADER_BYTES_MAX)
    nghttp2_session_callbacks_set_on_begin_frame_callback(server_callbacks, server_begin_frame)
    nghttp2_session_callbacks_set_on_begin_headers_callback(server_callbacks, server_begin_headers)
    nghttp2_session_callbacks_set_on_header_callback(server_callbacks, server_header)
    nghttp2_session_callbacks_set_on_frame_recv_callback(server_callbacks, server_frame)
    nghttp2_session_callbacks_set_on_frame_send_callback(server_callbacks, server_frame_sent)
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(server_callbacks, server_data)
    nghttp2_session_callbacks_set_on_stream_close_callback(server_callbacks, server_stream_close)
    nghttp2_session_callbacks_set_send_data_callback(server_callbacks, send_data)
    nghttp2_session_callbacks_set_on_begin_headers_callback(client_callbacks, client_begin_headers)
    nghttp2_session_callbacks_set_on_header_callback(client_callbacks, client_header)
    nghttp2_session_callbacks_set_on_frame_recv_callback(client_callbacks, client_frame)
    nghttp2_session_callbacks_set_on_frame_send_callback(client_callbacks, client_frame_sent)
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(client_callbacks, client_data)
    nghttp2_session_callbacks_set_on_stream_close_callback(client_callbacks, client_stream_close)
    nghttp2_session_callbacks_set_send_data_callback(client_callbacks, send_data)


cdef bint session_open(conn_t *conn) noexcept nogil:
    """Make the session, and submit what it says first; False without memory."""
    cdef nghttp2_settings_entry settings[3]
    cdef config_t *config = conn.worker.config
    cdef int32_t window = CONNECTION_WINDOW_BYTES
    settings[0].settings_id = NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
    settings[0].value = STREAM_WINDOW_BYTES
    settings[1].settings_id = NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE
    settings[1].value = HEADER_BYTES_MAX
    if conn.is_server:
        if nghttp2_session_server_new2(&conn.session, server_callbacks, conn, options) != 0:
            return False
        if config != NULL and conn.role == ROLE_EXTERNAL:
            settings[1].value = config.header_bytes_max
        settings[2].settings_id = NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS
        settings[2].value = 1000
        if config != NULL:
            settings[2].value = config.streams_max[conn.role]
    else:
        if nghttp2_session_client_new2(&conn.session, client_callbacks, conn, options) != 0:
            return False
        settings[2].settings_id = NGHTTP2_SETTINGS_ENABLE_PUSH
        settings[2].value = 0
        window = 0x7FFFFFFF   # carries many clients: each stream has its own window
    return (nghttp2_submit_settings(conn.session, NGHTTP2_FLAG_NONE, settings, 3) == 0
            and nghttp2_session_set_local_window_size(
                conn.session, NGHTTP2_FLAG_NONE, 0, window) == 0)


# --- clients and peers that call here -------------------------------------------------------------

cdef int server_begin_frame(
    nghttp2_session *session, const nghttp2_frame_hd *head, void *user
) noexcept nogil:
    if head.type == NGHTTP2_DATA:
        data_begun(
            <conn_t *>user,
            <call_t *>nghttp2_session_get_stream_user_data(session, head.stream_id), head)
    return 0


cdef int server_begin_headers(
    nghttp2_session *session, const nghttp2_frame *frame, void *user
) noexcept nogil:
    cdef conn_t *conn = <conn_t *>user
    cdef worker_t *w = conn.worker
    cdef call_t *call
    if frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        if nghttp2_session_get_stream_user_data(session, frame.hd.stream_id) != NULL:
            conn.strays -= 1
        return 0
    conn.strays -= 1
    call = call_new(w)
    if call == NULL:
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    call.down = conn
    call.down_id = frame.hd.stream_id
    call.role = conn.role
    call.keeps = 1
    call.status = -1
    call.hop_load = -1
    call.arrived_ns = w.now_ns
    call.down_next = conn.calls
    if conn.calls != NULL:
        conn.calls.down_previous = call
    conn.calls = call
    conn.streams += 1
    call_weigh(call)
    count(w, COUNT_CALLS_OPEN, 1)
    nghttp2_session_set_stream_user_data(session, frame.hd.stream_id, call)
    return 0


cdef int server_header(
    nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length,
    const uint8_t *value, size_t value_length, uint8_t flags, void *user
) noexcept nogil:
    cdef conn_t *conn = <conn_t *>user
    cdef call_t *call
    if frame.hd.type != NGHTTP2_HEADERS:
        return 0
    call = <call_t *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        # Trailers of a request mean nothing to gRPC but its end.
        if call != NULL and not is_trailer(name, name_length, value, value_length):
            call.head.trailers_odd = 1
        return 0
    if call == NULL or not take_request_header(
            call, name, name_length, value, value_length, flags):
        bomb_charge(conn)
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    return 0


cdef int server_frame(
    nghttp2_session *session, const nghttp2_frame *frame, void *user
) noexcept nogil:
    cdef conn_t *conn = <conn_t *>user
    cdef worker_t *w = conn.worker
    cdef call_t *call
    if frame.hd.type == NGHTTP2_SETTINGS:
        if not conn.is_ready and not frame.hd.flags & NGHTTP2_FLAG_ACK:
            client_settled(conn)
        return 0
    if frame.hd.type == NGHTTP2_RST_STREAM:
        reset_counted(conn, <call_t *>nghttp2_session_get_stream_user_data(
            session, frame.hd.stream_id))
        return 0
    if frame.hd.type != NGHTTP2_HEADERS and frame.hd.type != NGHTTP2_DATA:
        return 0
    call = <call_t *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if call == NULL:
        return 0
    if (frame.hd.type == NGHTTP2_HEADERS and frame.headers.cat != NGHTTP2_HCAT_REQUEST
            and (call.head.trailers_odd or not frame.hd.flags & NGHTTP2_FLAG_END_STREAM)):
        call_break(call)
    elif frame.hd.flags & NGHTTP2_FLAG_END_STREAM and not call.request_ended:
        call.request_ended = 1
        body_ended(call)
    if frame.hd.type == NGHTTP2_HEADERS and frame.headers.cat == NGHTTP2_HCAT_REQUEST:
        if call.head.has_timeout:
            call.deadline_ns = call.arrived_ns + call.head.timeout_ns
        # What follows in the same read comes first, most often the whole request.
        count(w, COUNT_CALLS, 1)
        fresh_add(call)
        call_weigh(call)
        if is_greedy(call, 0):
            call_refuse(call)
    return 0


cdef int server_data(
    nghttp2_session *session, uint8_t _flags, int32_t id, const uint8_t *bytes, size_t length,
    void *user
) noexcept nogil:
    cdef call_t *call = <call_t *>nghttp2_session_get_stream_user_data(session, id)
    if call == NULL or (call.answer_ended and not call.wants_replay):
        nghttp2_session_consume_connection(session, length)
        return 0
    if not body_received(call, bytes, length):
        nghttp2_session_consume_connection(session, length)
    return 0


cdef int server_frame_sent(
    nghttp2_session *session, const nghttp2_frame *frame, void *user
) noexcept nogil:
    cdef conn_t *conn = <conn_t *>user
    cdef call_t *call
    if frame.hd.type == NGHTTP2_RST_STREAM:
        reset_sent(conn, frame.rst_stream.error_code)
        return 0
    if frame.hd.type != NGHTTP2_HEADERS or not frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
        return 0
    call = <call_t *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if call != NULL:
        call.answer_whole = 1
        frames_earn(conn)
        if not call.request_ended:
            # What the client still sends is of no use (RFC 9113, 8.1).
            nghttp2_submit_rst_stream(
                session, NGHTTP2_FLAG_NONE, frame.hd.stream_id, NGHTTP2_NO_ERROR)
    return 0


cdef int server_stream_close(
    nghttp2_session *session, int32_t id, uint32_t _code, void *_user
) noexcept nogil:
    cdef call_t *call = <call_t *>nghttp2_session_get_stream_user_data(session, id)
    if call != NULL:
        nghttp2_session_set_stream_user_data(session, id, NULL)
        down_closed(call)
    return 0


# --- runtimes, peers and tier 2, which are called -------------------------------------------------

cdef int client_begin_headers(
    nghttp2_session *session, const nghttp2_frame *frame, void *_user
) noexcept nogil:
    cdef call_t *call
    if frame.hd.type != NGHTTP2_HEADERS:
        return 0
    call = <call_t *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if call != NULL:
        call.reads_trailers = (frame.hd.flags & NGHTTP2_FLAG_END_STREAM) != 0
        if call.has_response and not call.reads_trailers:
            call.is_spoilt = 1   # a second list that is not the last one
    return 0


cdef int client_header(
    nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length,
    const uint8_t *value, size_t value_length, uint8_t flags, void *_user
) noexcept nogil:
    cdef call_t *call
    if frame.hd.type != NGHTTP2_HEADERS:
        return 0
    call = <call_t *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if call == NULL or call.answer_ended or call.is_spoilt:
        return 0
    if not take_answer_header(call, name, name_length, value, value_length, flags):
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    return 0


cdef inline uint8_t status_class(const headers_t *headers) noexcept nogil:
    """Answer the first digit of :status, 0 if there is none."""
    cdef header_t *first = headers.items
    if (headers.count != 0 and first.name_length == 7 and same(first.name, b":status", 7)
            and first.value_length == 3):
        return first.value[0]
    return 0


cdef bint announcement_forgotten(call_t *call) noexcept nogil:
    """Forget headers that only announce the answer (1xx); False if there were too many. Their bytes
    stay in the call's arena until it ends.
    """
    if call.announcements == ANNOUNCEMENTS_MAX:
        return False
    call.announcements += 1
    headers_clear(&call.response)
    return True


cdef int client_frame(
    nghttp2_session *session, const nghttp2_frame *frame, void *user
) noexcept nogil:
    cdef conn_t *conn = <conn_t *>user
    cdef call_t *call
    if frame.hd.type == NGHTTP2_SETTINGS:
        if not frame.hd.flags & NGHTTP2_FLAG_ACK:
            conn_settled(conn)
        return 0
    if frame.hd.type == NGHTTP2_GOAWAY:
        conn.is_draining = 1
        mark_dirty(conn)
        return 0
    if frame.hd.type == NGHTTP2_PING:
        conn.awaits_ping = 0
        return 0
    if frame.hd.type != NGHTTP2_HEADERS and frame.hd.type != NGHTTP2_DATA:
        return 0
    conn.may_ping = 1
    call = <call_t *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if call == NULL or call.down == NULL or call.answer_ended:
        return 0
    if frame.hd.type == NGHTTP2_HEADERS:
        if call.reads_trailers:
            # Without headers before them they are those, too, and the last ones.
            if not call.has_response and status_class(&call.trailers) in (0, 49):
                call.is_spoilt = 1
            answer_trailers_received(call)
        elif call.is_spoilt or status_class(&call.response) == 0:
            call_fail_as(call, 13, MALFORMED_RESPONSE)
        elif status_class(&call.response) != 49:
            answer_headers_received(call)
        elif not announcement_forgotten(call):
            call_fail_as(call, 13, MALFORMED_RESPONSE)
    elif frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
        if call.has_response:
            answer_begin(call)   # as it came: initial headers, then the failure
        call_fail_as(call, 13, NO_STATUS)
    return 0


cdef int client_data(
    nghttp2_session *session, uint8_t _flags, int32_t id, const uint8_t *bytes, size_t length,
    void *_user
) noexcept nogil:
    cdef call_t *call = <call_t *>nghttp2_session_get_stream_user_data(session, id)
    if call == NULL:
        nghttp2_session_consume_connection(session, length)
    else:
        answer_data_received(call, bytes, length)
    return 0


cdef int client_frame_sent(
    nghttp2_session *session, const nghttp2_frame *frame, void *_user
) noexcept nogil:
    cdef call_t *call
    if frame.hd.type != NGHTTP2_HEADERS and not (
            frame.hd.type == NGHTTP2_DATA and frame.hd.flags & NGHTTP2_FLAG_END_STREAM):
        return 0
    call = <call_t *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if call != NULL:
        call.up_sent = 1
        if frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
            call.sent_whole = 1
    return 0


cdef int client_stream_close(
    nghttp2_session *session, int32_t id, uint32_t code, void *_user
) noexcept nogil:
    cdef call_t *call = <call_t *>nghttp2_session_get_stream_user_data(session, id)
    if call != NULL:
        nghttp2_session_set_stream_user_data(session, id, NULL)
        up_closed(call, code, False)
    return 0

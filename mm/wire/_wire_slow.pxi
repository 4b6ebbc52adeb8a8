# Answers that wait for their readers: what all of them may hold, and who goes when it is too much.
#
# A stream's window is what one reader can make wait here. Connections to the runtime and to
# instances grant all their streams' windows at once (CONN_STREAMS_MAX), so that no number of slow
# readers stops the answers of others; and what waits in all is bounded for a thread
# (`config_t.answer_bytes_max`), with what is packed for sockets that are full: a quarter of a
# megabyte each, which is no stream's any more. Beyond that the stream is reset, or the connection
# closed, that has taken nothing for the longest. The bound is looked at when a turn has written
# what it could, so a turn's reads may exceed it until then.


cdef inline void slow_leave(call_t *call) noexcept nogil:
    cdef worker_t *w = call.worker
    if not call.is_slow:
        return
    call.is_slow = 0
    if call.slow_previous != NULL:
        call.slow_previous.slow_next = call.slow_next
    else:
        w.slow = call.slow_next
    if call.slow_next != NULL:
        call.slow_next.slow_previous = call.slow_previous
    else:
        w.slow_last = call.slow_previous


cdef inline void slow_enter(call_t *call) noexcept nogil:
    """Something of the answer waits: behind those that have waited longer."""
    cdef worker_t *w = call.worker
    if call.is_slow:
        return
    call.is_slow = 1
    call.slow_ms = w.now_ms
    call.slow_next = NULL
    call.slow_previous = w.slow_last
    if w.slow_last != NULL:
        w.slow_last.slow_next = call
    else:
        w.slow = call
    w.slow_last = call


cdef inline void slow_moved(call_t *call) noexcept nogil:
    """The reader has taken something."""
    if call.is_slow:
        slow_leave(call)
        if answer_left(call) != 0:
            slow_enter(call)


cdef void answer_forget(call_t *call) noexcept nogil:
    """Let go of what waits of an answer."""
    call.worker.answers_bytes -= answer_left(call)
    slow_leave(call)
    pieces_drop(call)
    call.answer.at = call.answer.length = 0


cdef void blocked_leave(conn_t *conn) noexcept nogil:
    cdef worker_t *w = conn.worker
    if conn.unwritten == 0:
        return
    count(w, COUNT_UNWRITTEN_BYTES, <uint64_t>0 - conn.unwritten)
    conn.unwritten = 0
    if conn.blocked_previous != NULL:
        conn.blocked_previous.blocked_next = conn.blocked_next
    else:
        w.blocked = conn.blocked_next
    if conn.blocked_next != NULL:
        conn.blocked_next.blocked_previous = conn.blocked_previous
    else:
        w.blocked_last = conn.blocked_previous


cdef void blocked_enter(conn_t *conn) noexcept nogil:
    """Its socket is full since now: behind those that have been for longer. Connections of ours do
    not count: there are few to each target.
    """
    cdef worker_t *w = conn.worker
    blocked_leave(conn)
    if not conn.is_server or conn.out.length == 0:
        return
    conn.unwritten = conn.out.length   # what has been written of it is not freed yet
    count(w, COUNT_UNWRITTEN_BYTES, conn.unwritten)
    conn.blocked_next = NULL
    conn.blocked_previous = w.blocked_last
    if w.blocked_last != NULL:
        w.blocked_last.blocked_next = conn
    else:
        w.blocked = conn
    w.blocked_last = conn


cdef void blocked_grew(conn_t *conn) noexcept nogil:
    """More is packed for its socket, which is full: its place stays, if it has one."""
    if conn.unwritten == 0:
        blocked_enter(conn)
        return
    count(conn.worker, COUNT_UNWRITTEN_BYTES, conn.out.length - conn.unwritten)
    conn.unwritten = conn.out.length


cdef void slow_check(worker_t *w) noexcept nogil:
    """Keep what waits within its bounds."""
    cdef bint is_over
    while w.config != NULL:
        is_over = (w.answers_bytes + load_u64(&w.counts[COUNT_UNWRITTEN_BYTES], relaxed)
                   > w.config.answer_bytes_max)
        if is_over and w.blocked != NULL and (
                w.slow == NULL or w.blocked.blocked_ms <= w.slow.slow_ms):
            blocked_give_up(w.blocked)
        elif w.slow != NULL and (
                is_over or w.now_ms - w.slow.slow_ms >= w.config.unread_ms):
            slow_give_up(w.slow)
        else:
            return


cdef void blocked_give_up(conn_t *conn) noexcept nogil:
    """Close a connection whose client takes nothing, and let go of all that waits for it."""
    cdef call_t *call = conn.calls
    count(conn.worker, COUNT_SLOW_GIVEN_UP, 1)
    while call != NULL:
        if answer_left(call) != 0:
            slow_give_up(call)
        call = call.down_next
    conn_close(conn)


cdef void slow_give_up(call_t *call) noexcept nogil:
    """End a call whose answer its client does not take: no trailers would reach it either."""
    count(call.worker, COUNT_SLOW_GIVEN_UP, 1)
    timer_stop(call.worker, &call.timer)
    if call.up != NULL:
        give_back(call.up, call.up_id, answer_left(call), True)
        nghttp2_submit_rst_stream(
            call.up.session, NGHTTP2_FLAG_NONE, call.up_id, NGHTTP2_CANCEL)
    if call.down != NULL:
        nghttp2_submit_rst_stream(
            call.down.session, NGHTTP2_FLAG_NONE, call.down_id, NGHTTP2_ENHANCE_YOUR_CALM)
        mark_dirty(call.down)
    answer_forget(call)
    buffer_free(&call.answer)
    call.status = 8
    call.answer_ended = 1

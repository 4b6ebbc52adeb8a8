# Answers that wait for their readers: what all of them may hold, and who goes when it is too much.
#
# A stream's window is what one reader can make wait here. Connections to the runtime and to
# instances grant all their streams' windows at once (CONN_STREAMS_MAX), so that no number of slow
# readers stops the answers of others; and what waits in all is bounded for a thread
# (`config_t.answer_bytes_max`). Beyond that the stream is reset that has taken nothing for the
# longest. The bound is looked at when a turn has written what it could, so a turn's reads may
# exceed it until then.


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


cdef void slow_check(worker_t *w) noexcept nogil:
    """Keep what waits within its bounds."""
    while (w.slow != NULL and w.config != NULL
           and (w.answers_bytes > w.config.answer_bytes_max
                or w.now_ms - w.slow.slow_ms >= w.config.unread_ms)):
        slow_give_up(w.slow)


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

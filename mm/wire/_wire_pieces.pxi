# Answers that are passed on from where they were read: large pieces of a body are not copied, but
# noted, and the frames of the same turn point at them.
#
# A piece lies in the worker's input, so it is good until that is read into again. A turn therefore
# reads one connection behind the other while there is room, and what did not leave in it, because a
# window or a socket was full, is copied into the call's buffer at its end. Requests are not noted:
# most are kept, to be sent again (_wire_requests.pxi).

cdef enum:
    PIECE_BYTES_MIN = 2048   # of what is worth noting


cdef uint8_t *input_place(worker_t *w) noexcept nogil:
    """Answer where READ_BYTES can be read to; may write connections to make room."""
    if INPUT_BYTES - w.input_at < READ_BYTES:
        flush_all(w)
        pieces_settle(w)
    return w.input + w.input_at


cdef inline size_t answer_left(const call_t *call) noexcept nogil:
    """Answer the bytes of an answer that are here."""
    return buffer_left(&call.answer) + call.pieces_bytes


cdef bint answer_add(call_t *call, const uint8_t *bytes, size_t length) noexcept nogil:
    """Take bytes of an answer that lie in the input; False without memory."""
    cdef worker_t *w = call.worker
    cdef piece_t *piece
    if w.pieces_count == PIECES_MAX and not pieces_copy(call):
        return False
    if w.pieces_count == PIECES_MAX or (length < PIECE_BYTES_MIN and call.pieces == NULL):
        if not buffer_add(&call.answer, bytes, length):
            return False
        w.answers_bytes += length
        # Small ones are gone by the end of the turn, most often. But no other piece need ever come
        # that would show of this one that it is not, and nghttp2 does not tell of closed windows.
        slow_enter(call)
        return True
    piece = &w.pieces[w.pieces_count]
    w.pieces_count += 1
    piece.next = NULL
    piece.call = call
    piece.bytes = bytes
    piece.length = length
    if call.pieces != NULL:
        call.pieces_last.next = piece
    else:
        call.pieces = piece
    call.pieces_last = piece
    call.pieces_bytes += length
    w.answers_bytes += length
    return True


cdef void answer_send(call_t *call, size_t length) noexcept nogil:
    """Lay out the next bytes of an answer, of which there are so many: the client's frame."""
    cdef worker_t *w = call.worker
    cdef buffer_t *out = &call.answer
    cdef size_t left = length
    cdef size_t step = buffer_left(out)
    cdef piece_t *piece
    if step > left:
        step = left
    if step != 0:
        part_add(w, out.bytes + out.at, step)
        out.at += step
        left -= step
        buffer_rewind(out)
    while left != 0:
        piece = call.pieces
        step = piece.length if piece.length < left else left
        part_add(w, piece.bytes, step)
        piece.bytes += step
        piece.length -= step
        call.pieces_bytes -= step
        left -= step
        if piece.length == 0:
            piece.call = NULL
            call.pieces = piece.next
    w.answers_bytes -= length
    slow_moved(call)
    answer_sent(call, length)


cdef void pieces_drop(call_t *call) noexcept nogil:
    """Forget what is noted of an answer."""
    while call.pieces != NULL:
        call.pieces.call = NULL
        call.pieces = call.pieces.next
    call.pieces_bytes = 0


cdef bint pieces_copy(call_t *call) noexcept nogil:
    """Copy what is noted of an answer to the bytes before it; False without memory: it is lost, and
    its room on the connection upstream is given back.
    """
    cdef piece_t *piece = call.pieces
    cdef bint is_done = buffer_reserve(&call.answer, call.pieces_bytes)
    while is_done and piece != NULL:
        buffer_add(&call.answer, piece.bytes, piece.length)
        piece = piece.next
    if not is_done:
        call.worker.answers_bytes -= call.pieces_bytes
        # `up_closed` has done it where the stream is no more.
        give_back(call.up, 0, call.pieces_bytes, True)
    pieces_drop(call)
    return is_done


cdef void pieces_settle(worker_t *w) noexcept nogil:
    """The input is needed anew: copy what was not sent."""
    cdef uint32_t i
    cdef call_t *call
    for i in range(w.pieces_count):
        call = w.pieces[i].call
        if call == NULL:
            continue
        slow_enter(call)
        if not pieces_copy(call) and call.down != NULL:
            # A part of the answer is lost, so it must not end well.
            nghttp2_submit_rst_stream(
                call.down.session, NGHTTP2_FLAG_NONE, call.down_id, NGHTTP2_INTERNAL_ERROR)
            mark_dirty(call.down)
    w.pieces_count = 0
    w.input_at = 0
    slow_check(w)

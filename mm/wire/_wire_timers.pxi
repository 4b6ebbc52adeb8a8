# Timers of a worker: a wheel of 4 ms slots, so that setting and stopping one is a few words.
#
# A timer due later than one turn of the wheel (4 s) stays in its slot and is looked at once a turn.
# It fires at most one slot late.

cdef enum:
    TICK_MS = 4


cdef void timer_stop(worker_t *w, timer_t *timer) noexcept nogil:
    if not timer.is_set:
        return
    timer.is_set = 0
    w.timers -= 1
    if timer.next != NULL:
        timer.next.previous = timer.previous
    if timer.previous != NULL:
        timer.previous.next = timer.next
    else:
        w.wheel[timer.slot] = timer.next
        if timer.next == NULL:
            w.wheel_bits[timer.slot >> 6] &= ~(<uint64_t>1 << (timer.slot & 63))


cdef void timer_set(worker_t *w, timer_t *timer, uint64_t due_ms) noexcept nogil:
    cdef uint16_t slot
    timer_stop(w, timer)
    if due_ms <= w.wheel_ms:
        due_ms = w.wheel_ms + 1
    slot = <uint16_t>(((due_ms + TICK_MS - 1) // TICK_MS) & (WHEEL_SLOTS - 1))
    timer.due_ms = due_ms
    timer.slot = slot
    timer.is_set = 1
    timer.previous = NULL
    timer.next = w.wheel[slot]
    if timer.next != NULL:
        timer.next.previous = timer
    w.wheel[slot] = timer
    w.wheel_bits[slot >> 6] |= <uint64_t>1 << (slot & 63)
    w.timers += 1


cdef int timers_wait_ms(worker_t *w) noexcept nogil:
    """Answer how long epoll may sleep: to the next slot that holds something, -1 for ever."""
    cdef uint64_t tick
    cdef uint32_t step
    cdef uint16_t slot
    if w.timers == 0:
        return -1
    tick = w.wheel_ms // TICK_MS
    for step in range(1, WHEEL_SLOTS + 1):
        slot = <uint16_t>((tick + step) & (WHEEL_SLOTS - 1))
        if w.wheel_bits[slot >> 6] == 0 and (slot & 63) == 0:
            continue
        if w.wheel_bits[slot >> 6] >> (slot & 63) & 1:
            tick = (tick + step) * TICK_MS
            return <int>(tick - w.now_ms) if tick > w.now_ms else 0
    return -1


cdef void timers_run(worker_t *w) noexcept nogil:
    """Fire what is due."""
    cdef uint64_t tick = w.wheel_ms // TICK_MS
    cdef uint64_t last = w.now_ms // TICK_MS
    cdef timer_t *timer
    cdef timer_t *due = NULL
    cdef uint16_t slot
    if w.timers == 0 or last <= tick:
        if last > tick:
            w.wheel_ms = last * TICK_MS
        return
    if last - tick > WHEEL_SLOTS:
        tick = last - WHEEL_SLOTS
    w.wheel_ms = last * TICK_MS
    # First taken out, then fired: firing may set timers, also in these slots.
    while tick < last:
        tick += 1
        slot = <uint16_t>(tick & (WHEEL_SLOTS - 1))
        timer = w.wheel[slot]
        while timer != NULL:
            if timer.due_ms <= w.wheel_ms:
                timer_fire(w, timer)
                # It, or what it ended, may have changed the chain: begin anew. Each pass takes at
                # least one timer out of the slot.
                timer = w.wheel[slot]
            else:
                timer = timer.next


cdef void timer_fire(worker_t *w, timer_t *timer) noexcept nogil:
    timer_stop(w, timer)
    if timer.kind == TIMER_CALL:
        call_expired(<call_t *>timer.owner)
    elif timer.kind == TIMER_ACCEPT:
        accepts_resume(<worker_t *>timer.owner)
    elif timer.kind == TIMER_TIER2:
        notice(<worker_t *>timer.owner)
    else:
        conn_timer(<conn_t *>timer.owner)

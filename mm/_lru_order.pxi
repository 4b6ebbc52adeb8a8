# The order of copies that count: by (time last used, order of `put`), oldest first, in a ring
# through the sentinel. Touches raise `last_used_ms` only; the writer moves a slot when it comes to
# look at it. So `position_ms` is never above `last_used_ms`, the ring ascends by position, and a
# slot at the old end whose two times agree is the least recently used of all. Those that are kept
# stand behind all others, in the order in which that was said: linking and sorting end before them.

cdef inline bint goes_before(const slot_t *a, const slot_t *b) noexcept nogil:
    return a.position_ms < b.position_ms or (
        a.position_ms == b.position_ms and a.sequence < b.sequence)


cdef inline void unlink(table_t *t, uint32_t i) noexcept nogil:
    cdef slot_t *s = &t.slots[i]
    if i == t.kept_first:
        t.kept_first = s.newer
    t.slots[s.older].newer = s.newer
    t.slots[s.newer].older = s.older


cdef void link_by_time(table_t *t, uint32_t i, int64_t position_ms) noexcept nogil:
    """Put the slot in its place, looking from the new end, where nearly all belong."""
    cdef slot_t *s = &t.slots[i]
    cdef uint32_t at = t.slots[t.kept_first].older
    s.position_ms = position_ms
    while goes_before(s, &t.slots[at]):  # the sentinel's position is -1: nothing goes before it
        at = t.slots[at].older
        t.scan_debt += 1
    s.older = at
    s.newer = t.slots[at].newer
    t.slots[s.newer].older = i
    t.slots[at].newer = i


cdef void set_kept(table_t *t, uint32_t i, bint kept) noexcept nogil:
    """Put a copy in the order behind all others, or to its place among them."""
    cdef slot_t *s = &t.slots[i]
    unlink(t, i)
    s.kept = kept
    if not kept:
        t.kept_units -= s.weight_units
        link_by_time(t, i, load_i64(&s.last_used_ms, relaxed))
        return
    t.kept_units += s.weight_units
    t.sequence += 1
    s.sequence = t.sequence
    s.older = t.slots[0].older
    s.newer = 0
    t.slots[s.older].newer = i
    t.slots[0].older = i
    if t.kept_first == 0:
        t.kept_first = i


cdef uint32_t merged(slot_t *slots, uint32_t a, uint32_t b) noexcept nogil:
    """Merge two ascending chains (linked by `newer`, ended by 0)."""
    cdef uint32_t first = 0, last = 0, i
    while a != 0 and b != 0:
        if goes_before(&slots[b], &slots[a]):
            i = b
            b = slots[b].newer
        else:
            i = a
            a = slots[a].newer
        if first == 0:
            first = i
        else:
            slots[last].newer = i
        last = i
    if first == 0:
        return a if a != 0 else b
    slots[last].newer = a if a != 0 else b
    return first


cdef void sort_all(table_t *t) noexcept nogil:
    """Bring every slot that is not kept to its place at once: merge sort, bottom up."""
    cdef uint32_t bins[32]  # bins[k]: a sorted chain of 2**k slots, or none
    cdef uint32_t i = t.slots[0].newer, following, older, k
    cdef slot_t *slots = t.slots
    memset(bins, 0, sizeof(bins))
    while i != t.kept_first:
        following = slots[i].newer
        slots[i].newer = 0
        slots[i].position_ms = load_i64(&slots[i].last_used_ms, relaxed)
        k = 0
        while bins[k] != 0:
            i = merged(slots, bins[k], i)
            bins[k] = 0
            k += 1
        bins[k] = i
        i = following
    i = 0
    for k in range(32):
        i = merged(slots, bins[k], i)
    slots[0].newer = i
    older = 0
    while i != 0:
        slots[i].older = older
        older = i
        i = slots[i].newer
    slots[older].newer = t.kept_first
    slots[t.kept_first].older = older
    t.scan_debt = 0


cdef uint32_t oldest_of(table_t *t) noexcept nogil:
    """Answer the least recently used copy, 0 if none counts, moving those touched meanwhile. One
    that is kept only if all are.

    A slot is looked at anew at most once, so readers that go on touching cannot hold the writer.
    When moving has cost more steps than there are copies, a sort is cheaper.
    """
    cdef uint32_t i = t.slots[0].newer, looks = 0
    cdef int64_t last_used_ms
    while i != t.kept_first and looks <= t.cached_count:
        last_used_ms = load_i64(&t.slots[i].last_used_ms, relaxed)
        if last_used_ms == t.slots[i].position_ms:
            return i
        if t.scan_debt > <uint64_t>t.cached_count + 64:
            sort_all(t)
            return t.slots[0].newer
        unlink(t, i)
        link_by_time(t, i, last_used_ms)
        looks += 1
        i = t.slots[0].newer
    return i

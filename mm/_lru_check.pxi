# Walking everything: raises AssertionError at the first thing that is not as it must be.
# The invariants are numbered in _lru_order.pxi's and the twin's words; here is how each is seen.

cdef int must(bint truth, str what) except -1:
    if not truth:
        raise AssertionError(what)
    return 0


cdef int check_order(table_t *t) except -1:
    """The ring: linked both ways, without a loop, ascending, positions not above the times."""
    cdef uint32_t i = t.slots[0].newer, before = 0, steps = 0
    cdef int64_t used_units = 0, kept_units = 0
    cdef bint kept = False
    cdef slot_t *s
    must(t.slots[0].position_ms == -1, "the sentinel has moved")
    while i != 0:
        s = &t.slots[i]
        must(i < t.slot_count and s.kind == KIND_MODEL, "the order leads to no model")
        must(s.cached == 1, "a copy in the order does not count")
        must(s.older == before, "the order is not linked both ways")
        must(kept or (i == t.kept_first) == s.kept, "the first that is kept is another one")
        if before != 0 and not s.kept:
            must(goes_before(&t.slots[before], s), "the order does not ascend")
        elif kept:
            must(t.slots[before].sequence < s.sequence, "what is kept is not in order")
        kept = kept or s.kept
        must(kept == s.kept, "a copy stands behind one that is kept")
        kept_units += s.weight_units if s.kept else 0
        must(s.position_ms <= load_i64(&s.last_used_ms, relaxed), "a position is above its time")
        must(s.sequence <= t.sequence, "a copy was put after the last one")
        used_units += s.weight_units
        steps += 1
        must(steps <= t.cached_count, "the order has a loop, or more copies than were counted")
        before = i
        i = s.newer
    must(t.slots[0].older == before, "the order does not end at its newest")
    must(steps == t.cached_count, "the order has fewer copies than were counted")
    must(used_units == t.used_units, "the weights do not add up")
    must(kept or t.kept_first == 0, "the first that is kept does not count")
    must(kept_units == t.kept_units, "what is kept does not add up")
    must(t.used_units <= t.capacity_units, "more in use than there is room")
    return 0


cdef int check_index(table_t *t, index_t *x, uint8_t kind) except -1:
    """Each entry leads to a slot that is found by its own id, and the counts are right."""
    cdef uint32_t i, used = 0, live_entries = 0, tag
    cdef uint64_t entry
    cdef slot_t *s
    for i in range(x.size):
        entry = load_u64(&x.entries[i], relaxed)
        used += entry != 0
        if <uint32_t>entry == 0:
            must(entry == 0 or entry == TOMBSTONE, "an entry is half empty")
            continue
        live_entries += 1
        must(<uint32_t>entry < t.slot_count, "an entry leads out of the arena")
        s = &t.slots[<uint32_t>entry]
        must(s.kind == kind, "an entry leads to another kind of slot")
        tag = tag_of(t, id_of(s), s.id_length)
        must(tag == <uint32_t>(entry >> 32), "an entry has another id's tag")
        must(find_in(t, x, id_of(s), s.id_length, tag) == <uint32_t>entry,
             "an id does not lead to its slot")
        if kind == KIND_ALIAS:
            s = &t.slots[load_u32(&s.alias, relaxed)]
            must(s.kind == KIND_MODEL and find(t, id_of(s), s.id_length) == s,
                 "an alias names a model that is not here")
    must(used == x.used_count, "entries in use were counted wrong")
    must(live_entries == x.live_count, "ids were counted wrong")
    must(x.used_count < x.size, "no empty entry: a search would not end")
    return 0


cdef int check_indexes(table_t *t) except -1:
    check_index(t, <index_t *>load_ptr(&t.models, relaxed), KIND_MODEL)
    check_index(t, <index_t *>load_ptr(&t.aliases, relaxed), KIND_ALIAS)
    return 0


cdef int check_slots(table_t *t, set marked) except -1:
    """Each slot of the arena is in use, retired or free, and nothing is held for nothing."""
    cdef index_t *models = <index_t *>load_ptr(&t.models, relaxed)
    cdef index_t *aliases = <index_t *>load_ptr(&t.aliases, relaxed)
    cdef uint32_t i, free_count = 0, retired_count = 0, cached_count = 0
    cdef uint32_t free_kind_count = 0, discarded_count = 0, alias_count = 0
    cdef uint64_t epoch = 0
    cdef bint readers = False  # where there are, a call may have ended a moment ago: see `reclaim`
    cdef slot_t *s
    for i in range(<uint32_t>READERS):
        readers = readers or load_u32(&t.readers[i].taken, relaxed) != 0
    i = t.free_slot
    while i != 0:
        must(t.slots[i].kind == KIND_FREE, "a slot in use is in the chain of free ones")
        free_count += 1
        must(free_count < t.slot_count, "the chain of free slots has a loop")
        i = t.slots[i].newer
    i = t.retired_first
    while i != 0:
        must(t.slots[i].sequence > epoch, "slots were not retired in order")
        epoch = t.slots[i].sequence
        retired_count += 1
        must(t.slots[i].newer != 0 or i == t.retired_last, "the retired do not end at their last")
        i = t.slots[i].newer
    must(epoch <= load_u64(&t.epoch, relaxed), "a slot was retired in the future")
    for i in range(1, t.slot_count):
        s = &t.slots[i]
        free_kind_count += s.kind == KIND_FREE
        cached_count += s.cached
        discarded_count += s.discarded
        if s.discarded:
            must(i in marked, "a discarded slot is not marked")
            must(s.kind == KIND_MODEL, "a slot is discarded that is no model")
            must(readers or held(t, s), "discarded and free, but still here")
        if s.kind == KIND_MODEL:
            alias_count += load_u32(&s.alias, relaxed)
    must(free_kind_count == free_count, "a free slot is in no chain")
    must(cached_count == t.cached_count, "a copy that counts is not in the order")
    must(discarded_count == <uint32_t>len(marked), "a marked slot is not discarded")
    must(alias_count == aliases.live_count, "aliases were counted wrong")
    must(t.slot_count - 1 == models.live_count + aliases.live_count + free_count + retired_count,
         "a slot is lost")
    return 0

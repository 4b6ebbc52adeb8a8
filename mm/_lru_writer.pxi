# What the methods of `Table` share: from Python's words to slots, and the steps that writing is
# made of. Unlike the other parts it sees Python objects.

cdef tuple STATES = tuple(CopyState)


cdef struct id_t:
    const char *bytes
    size_t length


cdef id_t id_from(str text) except *:
    """Answer the UTF-8 of an id, which lives as long as the string; ValueError naming the limit."""
    cdef Py_ssize_t length
    cdef id_t id
    id.bytes = PyUnicode_AsUTF8AndSize(text, &length)
    id.length = <size_t>length
    if not 1 <= length <= ID_BYTES_MAX:
        checked_id(text)
    return id


cdef inline int64_t number(str name, object value, object value_max) except? -1:
    return checked(name, value, value_max)


cdef str text_of(const slot_t *s):
    return PyUnicode_DecodeUTF8(id_of(s), s.id_length, NULL)


cdef bint held(table_t *t, slot_t *s) noexcept nogil:
    """Answer whether something keeps a discarded slot here."""
    # seq_cst: a reader that finds the slot after this look adds its call, then finds it ABSENT.
    return (s.cached != 0 or load_u8(&s.state, relaxed) != ABSENT
            or load_u32(&s.alias, relaxed) != 0 or <uint32_t>load_u64(&s.calls, seq_cst) != 0)


cdef void uncache(table_t *t, slot_t *s, uint32_t i) noexcept nogil:
    """Take a copy out of the order."""
    cdef uint8_t state = load_u8(&s.state, relaxed)
    unlink(t, i)
    if s.kept:
        s.kept = 0
        t.kept_units -= s.weight_units
    s.cached = 0
    t.cached_count -= 1
    t.used_units -= s.weight_units
    s.weight_units = 0
    if state == LOADING or state == READY:
        store_u8(&s.state, UNLOADING, seq_cst)  # no call pins it any more: see `pin`

cdef uint32_t found(Table self, id_t id) noexcept:
    return <uint32_t>(find(self.core, id.bytes, id.length) - self.core.slots)


cdef uint32_t known(Table self, str model_id) except 0:
    cdef uint32_t i = found(self, id_from(model_id))
    if i == 0:
        raise KeyError(model_id)
    return i


cdef uint32_t slot_for(Table self, id_t id) except 0:
    """Answer the model's slot, a new one if need be, and forget that it was discarded."""
    cdef table_t *t = self.core
    cdef uint32_t tag = tag_of(t, id.bytes, id.length)
    cdef uint32_t i = find_in(t, <index_t *>load_ptr(&t.models, relaxed), id.bytes,
                              id.length, tag)
    if i == 0:
        if index_make_room(t, &t.models):
            i = slot_new(t, KIND_MODEL, id.bytes, id.length)
        if i == 0:
            raise MemoryError(f"no room for more than {t.slot_count - 1} models")
        index_insert(t, &t.models, tag, i)
    elif t.slots[i].discarded:
        t.slots[i].discarded = 0
        self.marked.discard(i)
    return i


cdef void weigh(Table self, slot_t *s, uint32_t weight_units) noexcept:
    cdef int64_t delta_units = <int64_t>weight_units - <int64_t>s.weight_units
    self.core.used_units += delta_units
    if s.kept:
        self.core.kept_units += delta_units
    s.weight_units = weight_units


cdef list evict(Table self):
    """Take copies out of the old end until the rest fits; answer them, oldest first."""
    cdef table_t *t = self.core
    cdef list evicted = []
    cdef uint32_t i
    cdef uint64_t sequence
    cdef slot_t *s
    while t.used_units > t.capacity_units:
        i = oldest_of(t)
        s = &t.slots[i]
        sequence = s.sequence
        evicted.append(Evicted(text_of(s), s.weight_units,
                               load_i64(&s.last_used_ms, relaxed)))
        # Making the tuple may have run other code (the collector's), even this very method.
        if not s.cached or s.sequence != sequence:
            evicted.pop()
            continue
        uncache(t, s, i)
        let_go(self, i)
    return evicted


cdef int let_go(Table self, uint32_t i) except -1:
    """Take a discarded slot away if nothing holds it any more."""
    cdef table_t *t = self.core
    cdef slot_t *s = &t.slots[i]
    if s.discarded and not held(t, s):
        self.marked.discard(i)
        index_remove(t, &t.models, tag_of(t, id_of(s), s.id_length), i)
        slot_retire(t, i)
        s.discarded = 0
    return 0


cdef int count_alias(Table self, uint32_t i, int change) except -1:
    cdef slot_t *s = &self.core.slots[i]
    store_u32(&s.alias, load_u32(&s.alias, relaxed) + <uint32_t>change, relaxed)
    return let_go(self, i)


cdef int reader_number(Table self, object reader) except -1:
    cdef int i
    if not (0 <= reader < READERS
            and load_u32(&self.core.readers[<int>reader].taken, relaxed)):
        raise ValueError(f"no reader {reader}")
    i = reader
    return i


cdef list snapshot_of(table_t *t):
    """Answer (model id, weight, last used) of all copies in order, with the times that made it."""
    cdef uint32_t i
    cdef slot_t *s
    cdef list snapshot = []
    sort_all(t)
    i = t.slots[0].newer
    while i != 0:
        s = &t.slots[i]
        snapshot.append((text_of(s), s.weight_units,
                         load_i64(&s.last_used_ms, relaxed) if s.kept else s.position_ms))
        i = s.newer
    return snapshot


cdef list busy_of(table_t *t):
    """Take the calls counted since the last time; answer them, and those in flight, by copy."""
    cdef uint32_t i = t.slots[0].newer
    cdef uint64_t both
    cdef int32_t calls
    cdef list busy = []
    while i != 0:
        # A pin that fails takes its count back: until it does we may have read one too many, and
        # after it one too few, below zero, which the next calls make good.
        both = load_u64(&t.slots[i].calls, relaxed)
        calls = max(0, <int32_t>(both >> 32))
        if calls != 0:
            sub_u64(&t.slots[i].calls, <uint64_t>calls << 32, relaxed)
        if calls != 0 or <uint32_t>both != 0:
            busy.append((text_of(&t.slots[i]), calls, <uint32_t>both))
        i = t.slots[i].newer
    return busy

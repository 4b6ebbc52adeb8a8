# Where slots live and when memory is used again: arena, chains, epochs (see the life of a slot in
# _lru.pxd). It knows nothing of ids, order or peers. Functions that may lack memory answer 0.

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int mprotect(void *address, size_t length, int protection)
    int madvise(void *address, size_t length, int advice)
    void *MAP_FAILED
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MADV_HUGEPAGE

cdef enum:
    # A page of the larger kind. From this size on the arena grows by it and asks for such pages:
    # with 4 KiB pages a lookup in a large table costs a page walk or two on top.
    PAGE_BYTES = 2 << 20
    SLOTS_FIRST = 512          # 64 KiB: what a small table takes
    SLOTS_PAGE = PAGE_BYTES // 128
    SLOTS_MAX = 1 << 24        # SLOT_COUNT_MAX and the sentinel
    GENERATIONS = 1 << 16


cdef inline size_t heap_cost(size_t size_bytes) noexcept nogil:
    """What the allocator takes for a block of this size, its own words included."""
    return max(<size_t>32, (size_bytes + 8 + 15) & ~<size_t>15)


cdef bint arena_open(table_t *t) noexcept nogil:
    """Reserve address space for all slots there may ever be: so none ever moves."""
    cdef size_t length = <size_t>SLOTS_MAX * sizeof(slot_t)
    cdef char *start = <char *>mmap(
        NULL, length + PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef char *aligned
    if start == MAP_FAILED:
        return False
    aligned = <char *>((<size_t>start + PAGE_BYTES - 1) & ~<size_t>(PAGE_BYTES - 1))
    if aligned != start:
        munmap(start, aligned - start)
    if aligned + length != start + length + PAGE_BYTES:
        munmap(aligned + length, start + PAGE_BYTES - aligned)
    madvise(aligned, length, MADV_HUGEPAGE)  # where the kernel cannot, small pages do
    t.slots = <slot_t *>aligned
    t.slot_count_committed = 0
    return arena_grow(t)


cdef void arena_close(table_t *t) noexcept nogil:
    if t.slots != NULL:
        munmap(t.slots, <size_t>SLOTS_MAX * sizeof(slot_t))


cdef bint arena_grow(table_t *t) noexcept nogil:
    """Make more of the reserved space usable: doubling up to one large page, then by pages."""
    cdef uint32_t step = min(<uint32_t>SLOTS_PAGE, max(<uint32_t>SLOTS_FIRST,
                                                       t.slot_count_committed))
    if t.slot_count_committed + step > SLOTS_MAX:
        return False
    if mprotect(&t.slots[t.slot_count_committed], step * sizeof(slot_t),
                PROT_READ | PROT_WRITE) != 0:
        return False
    t.slot_count_committed += step
    return True


cdef inline uint64_t epoch_raised(table_t *t) noexcept nogil:
    # seq_cst: see `reader_online`; being a release it also hands over what was unlinked before.
    return add_u64(&t.epoch, 1, seq_cst) + 1


cdef uint64_t epoch_seen(table_t *t) noexcept nogil:
    """Answer the epoch that every reader online has seen."""
    cdef uint64_t seen, least = load_u64(&t.epoch, relaxed)
    cdef int i
    for i in range(READERS):
        # seq_cst: see `reader_online`; being an acquire it puts that reader's reads before ours.
        seen = load_u64(&t.readers[i].epoch, seq_cst)
        if seen != 0 and seen < least:
            least = seen
    return least


cdef void *block_new(table_t *t, size_t size_bytes, size_t alignment) noexcept nogil:
    cdef void *memory = NULL
    if posix_memalign(&memory, alignment, size_bytes) != 0:
        return NULL
    if alignment == PAGE_BYTES:
        madvise(memory, size_bytes, MADV_HUGEPAGE)
    memset(memory, 0, size_bytes)
    (<block_t *>memory).size_bytes = heap_cost(size_bytes)
    t.heap_bytes += heap_cost(size_bytes)
    return memory


cdef void block_free(table_t *t, block_t *block) noexcept nogil:
    if block != NULL:
        t.heap_bytes -= block.size_bytes
        free(block)


cdef void block_retire(table_t *t, block_t *block) noexcept nogil:
    """Free the block when no reader can look at it any more; it must be out of reach already."""
    cdef uint64_t seen
    if block == NULL:
        return
    block.next = NULL
    block.epoch = epoch_raised(t)
    if t.retired_blocks_first == NULL:
        t.retired_blocks_first = block
    else:
        t.retired_blocks_last.next = block
    t.retired_blocks_last = block
    seen = epoch_seen(t)
    while t.retired_blocks_first != NULL and t.retired_blocks_first.epoch <= seen:
        block = t.retired_blocks_first
        t.retired_blocks_first = block.next
        block_free(t, block)


cdef void slot_retire(table_t *t, uint32_t i) noexcept nogil:
    """Use the slot again when no reader can look at it any more; it must be out of the index."""
    t.slots[i].newer = 0
    t.slots[i].sequence = epoch_raised(t)
    if t.retired_first == 0:
        t.retired_first = i
    else:
        t.slots[t.retired_last].newer = i
    t.retired_last = i


cdef void slot_empty(table_t *t, slot_t *s) noexcept nogil:
    """Free what a slot has outside itself."""
    block_free(t, <block_t *>load_ptr(&s.more_peers, relaxed))
    store_ptr(&s.more_peers, NULL, relaxed)
    if s.id_length > ID_INLINE:
        t.heap_bytes -= heap_cost(s.id_length)
        free((<void **>s.id)[0])
    s.id_length = 0
    s.kind = KIND_FREE


cdef int slots_claim(table_t *t) noexcept nogil:
    """Move retired slots that every reader has let go to the free ones; answer how many."""
    cdef uint64_t seen
    cdef uint32_t i
    cdef int count = 0
    if t.retired_first == 0:
        return 0
    seen = epoch_seen(t)
    while t.retired_first != 0 and t.slots[t.retired_first].sequence <= seen:
        i = t.retired_first
        t.retired_first = t.slots[i].newer
        slot_empty(t, &t.slots[i])
        t.slots[i].newer = t.free_slot
        t.free_slot = i
        count += 1
    return count


cdef uint32_t slot_new(table_t *t, uint8_t kind, const char *id, size_t length) noexcept nogil:
    """Answer a slot with this id and nothing else known, not yet in an index; 0 without memory."""
    cdef uint32_t i
    cdef slot_t *s
    cdef char *long_id = NULL
    slots_claim(t)
    if t.free_slot == 0 and t.slot_count == t.slot_count_committed and not arena_grow(t):
        return 0
    if length > ID_INLINE:
        long_id = <char *>malloc(length)
        if long_id == NULL:
            return 0
        t.heap_bytes += heap_cost(length)
    if t.free_slot != 0:
        i = t.free_slot
        t.free_slot = t.slots[i].newer
    else:
        i = t.slot_count
        t.slot_count += 1
    s = &t.slots[i]
    memset(<void *>s, 0, sizeof(slot_t))  # nobody else can see it
    s.kind = kind
    s.id_length = <uint16_t>length
    if long_id != NULL:
        memcpy(long_id, id, length)
        (<char **>s.id)[0] = long_id
    else:
        memcpy(s.id, id, length)
    return i


cdef table_t *table_open(int64_t capacity_units, uint64_t seed) noexcept nogil:
    """Answer an empty table, NULL without memory."""
    cdef table_t *t
    cdef void *memory = NULL
    if posix_memalign(&memory, 64, sizeof(table_t)) != 0:
        return NULL
    t = <table_t *>memory
    memset(memory, 0, sizeof(table_t))
    t.capacity_units = capacity_units
    t.seed = seed
    store_u64(&t.epoch, 1, relaxed)
    t.generations = <atomic_u16 *>calloc(GENERATIONS, sizeof(atomic_u16))
    store_ptr(&t.models, index_new(t, INDEX_SIZE_MIN), relaxed)
    store_ptr(&t.aliases, index_new(t, INDEX_SIZE_MIN), relaxed)
    if (not arena_open(t) or t.generations == NULL or load_ptr(&t.models, relaxed) == NULL
            or load_ptr(&t.aliases, relaxed) == NULL):
        table_close(t)
        return NULL
    t.slots[0].kind = KIND_SENTINEL
    t.slots[0].position_ms = -1
    t.slot_count = 1
    return t


cdef void table_close(table_t *t) noexcept nogil:
    """Free everything; no reader may be left."""
    cdef block_t *block
    cdef uint32_t i
    if t == NULL:
        return
    for i in range(t.slot_count):
        slot_empty(t, &t.slots[i])
    while t.retired_blocks_first != NULL:
        block = t.retired_blocks_first
        t.retired_blocks_first = block.next
        block_free(t, block)
    block_free(t, <block_t *>load_ptr(&t.models, relaxed))
    block_free(t, <block_t *>load_ptr(&t.aliases, relaxed))
    arena_close(t)
    free(t.generations)
    free(t)

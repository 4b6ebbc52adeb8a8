# Which peers have a copy: how the one writer changes what readers choose from meanwhile.

cdef uint64_t peer_found(slot_t *s, uint32_t handle) noexcept nogil:
    """Answer the entry of this peer with the load it told, or a new one."""
    cdef peers_t *more = <peers_t *>load_ptr(&s.more_peers, relaxed)
    cdef uint32_t i
    cdef uint64_t entry
    for i in range(peer_count(more)):
        entry = load_u64(peer_at(s, more, i), relaxed)
        if entry != 0 and entry >> 32 == handle:
            return entry
    return <uint64_t>handle << 32


cdef bint peers_set(table_t *t, slot_t *s, uint64_t *wanted, uint32_t count) noexcept nogil:
    """Replace the peers by these handles, keeping loads told; False, and no change, without memory.

    A reader may see some of the old and some of the new: each is a peer that had a copy a moment
    ago. A load told meanwhile for an entry that moves may be lost; the next call tells it again.
    """
    cdef peers_t *before = <peers_t *>load_ptr(&s.more_peers, relaxed)
    cdef peers_t *more = NULL
    cdef uint32_t i
    if count > PEERS_INLINE:
        more = <peers_t *>block_new(t, sizeof(peers_t) + count * sizeof(atomic_u64), 64)
        if more == NULL:
            return False
        more.count = count - PEERS_INLINE
    for i in range(count):
        wanted[i] = peer_found(s, <uint32_t>wanted[i])
    for i in range(<uint32_t>PEERS_INLINE, count):
        store_u64(&more.entries[i - PEERS_INLINE], wanted[i], relaxed)
    for i in range(<uint32_t>PEERS_INLINE):
        store_u64(&s.peers[i], wanted[i] if i < count else 0, relaxed)
    store_ptr(&s.more_peers, more, release)  # with the pointer come count and entries
    block_retire(t, <block_t *>before)
    return True

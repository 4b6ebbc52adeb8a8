# How many connect: clients and peers each have their number, all threads of a wire together, and no
# address of clients may take all of theirs.
#
# Shared by the threads, under its own lock: a connection costs far more than that. Freed with the
# last worker that uses it.

cdef enum:
    CROWD_CHAINS = 4096

cdef const uint8_t *CROWDED = (
    # SETTINGS, and GOAWAY: ENHANCE_YOUR_CALM, "too many connections".
    <const uint8_t *>b"\0\0\0\4\0\0\0\0\0" b"\0\0\x1c\7\0\0\0\0\0" b"\0\0\0\0\0\0\0\x0b"
    b"too many connections")


cdef struct seat_t:
    seat_t *next
    uint8_t address[16]
    uint32_t count


cdef struct crowd_t:
    pthread_mutex_t lock
    uint32_t users
    uint32_t open[ROLES]
    uint64_t seed              # so that nobody can choose addresses of one chain
    seat_t *chains[CROWD_CHAINS]
    uint8_t refused[16]        # the last address that had too many
    uint8_t has_refused


cdef crowd_t *crowd_new(uint64_t seed) noexcept nogil:
    cdef crowd_t *crowd = <crowd_t *>calloc(1, sizeof(crowd_t))
    if crowd != NULL:
        crowd.users = 1
        crowd.seed = seed
        pthread_mutex_init(&crowd.lock, NULL)
    return crowd


cdef crowd_t *crowd_share(crowd_t *crowd) noexcept nogil:
    pthread_mutex_lock(&crowd.lock)
    crowd.users += 1
    pthread_mutex_unlock(&crowd.lock)
    return crowd


cdef void crowd_release(crowd_t *crowd) noexcept nogil:
    """The worker is gone, and its connections with it."""
    cdef bint is_last
    if crowd == NULL:
        return
    pthread_mutex_lock(&crowd.lock)
    crowd.users -= 1
    is_last = crowd.users == 0
    pthread_mutex_unlock(&crowd.lock)
    if is_last:
        pthread_mutex_destroy(&crowd.lock)
        free(crowd)


cdef void address_key(const sockaddr_storage *address, uint8_t *key) noexcept nogil:
    """Write what a client is told apart by: an IPv4 address, mapped or not, or an IPv6 /64."""
    cdef const uint8_t *bytes
    memset(key, 0, 16)
    if address.ss_family == AF_INET:
        key[10] = key[11] = 0xFF
        memcpy(key + 12, <const uint8_t *>address + 4, 4)
    elif address.ss_family == AF_INET6:
        bytes = <const uint8_t *>address + 8
        memcpy(key, bytes, 16)
        if key[10] != 0xFF or key[11] != 0xFF or memcmp(key, b"\0\0\0\0\0\0\0\0\0\0", 10) != 0:
            memset(key + 8, 0, 8)


cdef seat_t **seat_find(crowd_t *crowd, const uint8_t *key) noexcept nogil:
    """Answer where the seat of an address hangs, or would."""
    cdef uint64_t hash = crowd.seed
    cdef uint64_t word
    cdef seat_t **at
    cdef int i
    for i in range(2):
        memcpy(&word, key + 8 * i, 8)
        hash = (hash ^ word) * 0x9E3779B97F4A7C15U
        hash ^= hash >> 29
    at = &crowd.chains[hash & (CROWD_CHAINS - 1)]
    while at[0] != NULL and memcmp(at[0].address, key, 16) != 0:
        at = &at[0].next
    return at


cdef int crowd_enter(
    crowd_t *crowd, const config_t *config, uint8_t role, const uint8_t *key
) noexcept nogil:
    """Give a connection its place, and answer 0; else the counter of why there is none."""
    cdef int why = 0
    cdef seat_t **at
    cdef seat_t *seat
    pthread_mutex_lock(&crowd.lock)
    if config != NULL and crowd.open[role] >= config.connections_max[role]:
        why = COUNT_CROWDED if role == ROLE_EXTERNAL else COUNT_CROWDED_PEERS
    elif role == ROLE_EXTERNAL:
        at = seat_find(crowd, key)
        seat = at[0]
        if seat == NULL:
            seat = at[0] = <seat_t *>calloc(1, sizeof(seat_t))
            if seat != NULL:
                memcpy(seat.address, key, 16)
        if seat == NULL or (config != NULL and seat.count >= config.per_address_max):
            why = COUNT_CROWDED_ADDRESS
            memcpy(crowd.refused, key, 16)
            crowd.has_refused = 1
        else:
            seat.count += 1
    if why == 0:
        crowd.open[role] += 1
    pthread_mutex_unlock(&crowd.lock)
    return why


cdef void crowd_leave(crowd_t *crowd, uint8_t role, const uint8_t *key) noexcept nogil:
    cdef seat_t **at
    cdef seat_t *seat
    pthread_mutex_lock(&crowd.lock)
    crowd.open[role] -= 1
    if role == ROLE_EXTERNAL:
        at = seat_find(crowd, key)
        seat = at[0]
        seat.count -= 1
        if seat.count == 0:
            at[0] = seat.next
            free(seat)
    pthread_mutex_unlock(&crowd.lock)


cdef void crowd_refuse(worker_t *w, int fd, uint8_t role, int why) noexcept nogil:
    """Say why as far as that goes without waiting, and close."""
    count(w, why, 1)
    if w.config.tls[role] == NULL:
        send(fd, CROWDED, 46, MSG_NOSIGNAL)
    close(fd)

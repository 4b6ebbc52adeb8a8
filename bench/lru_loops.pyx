"""The loops of ``bench/lru.py`` that run without the GIL, and the plain C hash beside them.

Each lookup brings its own copy of the id, as a call does; the copies stand one after the other in
a block larger than the CPU's caches.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from mm._lru cimport (
    BATCH,
    Table,
    find,
    lookup_batch,
    pin,
    reader_offline,
    reader_online,
    reader_register,
    reader_unregister,
    slot_t,
    table_t,
    touch,
    unpin,
)

cdef extern from "chash.h" nogil:
    ctypedef struct chash:
        pass
    chash *chash_new(size_t count)
    void chash_put(chash *c, const char *id, size_t length)
    void chash_hit(const chash *c, const char *id, size_t length, int64_t now_ms)
    void chash_hit_many(const chash *c, const char **ids, const size_t *lengths, size_t count,
                        int64_t now_ms)
    void chash_free(chash *c)

cdef enum:
    LOOKUPS_PER_MS = 20_000  # so fast does time go: as at the rate that is the goal


cdef inline double seconds() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef class Stream:
    """Lookups: for each its own bytes of an id."""

    cdef char *block
    cdef const char **ids
    cdef size_t *lengths
    cdef readonly size_t count

    def __cinit__(self, list keys, list order):
        cdef size_t total = 0, i
        cdef bytes key
        cdef char *at
        self.count = len(order)
        for each in order:
            total += len(<bytes>keys[each])
        self.block = <char *>malloc(total)
        self.ids = <const char **>malloc(self.count * sizeof(char *))
        self.lengths = <size_t *>malloc(self.count * sizeof(size_t))
        if self.block == NULL or self.ids == NULL or self.lengths == NULL:
            raise MemoryError
        at = self.block
        for i in range(self.count):
            key = keys[order[i]]
            memcpy(at, <const char *>key, len(key))
            self.ids[i] = at
            self.lengths[i] = len(key)
            at += len(key)

    def __dealloc__(self):
        free(self.block)
        free(self.ids)
        free(self.lengths)


cdef inline bint hit(slot_t *s, int64_t now_ms) noexcept nogil:
    if not pin(s):
        return False
    touch(s, now_ms)
    unpin(s)
    return True


cdef uint64_t run_single(table_t *t, Stream stream, int64_t now_ms) noexcept nogil:
    cdef uint64_t hits = 0
    cdef size_t i
    for i in range(stream.count):
        if i % LOOKUPS_PER_MS == 0:
            now_ms += 1
        hits += hit(find(t, stream.ids[i], stream.lengths[i]), now_ms)
    return hits


cdef uint64_t run_batch(table_t *t, Stream stream, int64_t now_ms) noexcept nogil:
    cdef uint64_t hits = 0
    cdef size_t i = 0, k, n
    cdef slot_t *found[BATCH]
    while i < stream.count:
        if i % LOOKUPS_PER_MS < BATCH:
            now_ms += 1
        n = min(<size_t>BATCH, stream.count - i)
        lookup_batch(t, stream.ids + i, stream.lengths + i, n, found)
        for k in range(n):
            hits += hit(found[k], now_ms)
        i += n
    return hits


def look_up(Table table not None, Stream stream not None, int64_t now_ms, bint batched):
    """Find, pin, touch and unpin each; answer the seconds it took, all without the GIL."""
    cdef table_t *t = table.core
    cdef uint64_t hits
    cdef double began_s, ended_s
    cdef int reader = reader_register(t)
    with nogil:
        reader_online(t, reader)
        began_s = seconds()
        hits = run_batch(t, stream, now_ms) if batched else run_single(t, stream, now_ms)
        ended_s = seconds()
        reader_offline(t, reader)
    reader_unregister(t, reader)
    if hits != stream.count:
        raise AssertionError(f"{stream.count - hits} lookups found no ready copy")
    return ended_s - began_s


cdef class PlainHash:
    """The plain C hash with the same ids."""

    cdef chash *core

    def __cinit__(self, list keys):
        cdef bytes key
        self.core = chash_new(len(keys))
        for key in keys:
            chash_put(self.core, key, len(key))

    def __dealloc__(self):
        chash_free(self.core)

    def look_up(self, Stream stream not None, int64_t now_ms, bint batched):
        """Find each and do the same work without atomics; answer the seconds it took."""
        cdef double began_s, ended_s
        cdef size_t i = 0, n, step = BATCH if batched else 1
        with nogil:
            began_s = seconds()
            while i < stream.count:
                if i % LOOKUPS_PER_MS < step:
                    now_ms += 1
                n = min(step, stream.count - i)
                if batched:
                    chash_hit_many(self.core, stream.ids + i, stream.lengths + i, n, now_ms)
                else:
                    chash_hit(self.core, stream.ids[i], stream.lengths[i], now_ms)
                i += n
            ended_s = seconds()
        return ended_s - began_s

# The few things that the table takes from C and Cython has no words for: C11 atomics (no fences
# of their own, nothing volatile), unaligned words, prefetching, and assertions that a release
# leaves out.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <assert.h>
    #include <stdatomic.h>
    #include <stdint.h>
    #include <string.h>

    typedef _Atomic(uint8_t) mm_atomic_u8;
    typedef _Atomic(uint16_t) mm_atomic_u16;
    typedef _Atomic(uint32_t) mm_atomic_u32;
    typedef _Atomic(uint64_t) mm_atomic_u64;
    typedef _Atomic(int64_t) mm_atomic_i64;
    typedef void *_Atomic mm_atomic_ptr;

    static inline uint64_t mm_bytes8(const char *p) { uint64_t v; memcpy(&v, p, 8); return v; }
    static inline uint64_t mm_bytes4(const char *p) { uint32_t v; memcpy(&v, p, 4); return v; }

    /* Both halves of a 128-bit product, folded: every bit in reaches every bit out. */
    static inline uint64_t mm_fold(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    """
    ctypedef uint8_t atomic_u8 "mm_atomic_u8"
    ctypedef uint16_t atomic_u16 "mm_atomic_u16"
    ctypedef uint32_t atomic_u32 "mm_atomic_u32"
    ctypedef uint64_t atomic_u64 "mm_atomic_u64"
    ctypedef int64_t atomic_i64 "mm_atomic_i64"
    ctypedef void *atomic_ptr "mm_atomic_ptr"

    ctypedef enum memory_order:
        relaxed "memory_order_relaxed"
        acquire "memory_order_acquire"
        release "memory_order_release"
        seq_cst "memory_order_seq_cst"

    uint8_t load_u8 "atomic_load_explicit" (atomic_u8 *, memory_order) noexcept nogil
    void store_u8 "atomic_store_explicit" (atomic_u8 *, uint8_t, memory_order) noexcept nogil
    uint16_t load_u16 "atomic_load_explicit" (atomic_u16 *, memory_order) noexcept nogil
    void store_u16 "atomic_store_explicit" (atomic_u16 *, uint16_t, memory_order) noexcept nogil
    uint32_t load_u32 "atomic_load_explicit" (atomic_u32 *, memory_order) noexcept nogil
    void store_u32 "atomic_store_explicit" (atomic_u32 *, uint32_t, memory_order) noexcept nogil
    bint cas_u32 "atomic_compare_exchange_strong_explicit" (
        atomic_u32 *, uint32_t *, uint32_t, memory_order, memory_order) noexcept nogil
    uint32_t or_u32 "atomic_fetch_or_explicit" (
        atomic_u32 *, uint32_t, memory_order) noexcept nogil
    uint32_t swap_u32 "atomic_exchange_explicit" (
        atomic_u32 *, uint32_t, memory_order) noexcept nogil
    uint64_t load_u64 "atomic_load_explicit" (atomic_u64 *, memory_order) noexcept nogil
    void store_u64 "atomic_store_explicit" (atomic_u64 *, uint64_t, memory_order) noexcept nogil
    uint64_t add_u64 "atomic_fetch_add_explicit" (
        atomic_u64 *, uint64_t, memory_order) noexcept nogil
    uint64_t sub_u64 "atomic_fetch_sub_explicit" (
        atomic_u64 *, uint64_t, memory_order) noexcept nogil
    bint cas_u64 "atomic_compare_exchange_weak_explicit" (
        atomic_u64 *, uint64_t *, uint64_t, memory_order, memory_order) noexcept nogil
    int64_t load_i64 "atomic_load_explicit" (atomic_i64 *, memory_order) noexcept nogil
    void store_i64 "atomic_store_explicit" (atomic_i64 *, int64_t, memory_order) noexcept nogil
    bint cas_i64 "atomic_compare_exchange_weak_explicit" (
        atomic_i64 *, int64_t *, int64_t, memory_order, memory_order) noexcept nogil
    void *load_ptr "atomic_load_explicit" (atomic_ptr *, memory_order) noexcept nogil
    void store_ptr "atomic_store_explicit" (atomic_ptr *, void *, memory_order) noexcept nogil

    uint64_t bytes8 "mm_bytes8" (const char *) noexcept nogil
    uint64_t bytes4 "mm_bytes4" (const char *) noexcept nogil
    uint64_t fold "mm_fold" (uint64_t, uint64_t) noexcept nogil
    void prefetch "__builtin_prefetch" (const void *) noexcept nogil
    void c_assert "assert" (bint) noexcept nogil  # compiled in by MM_BUILD_DEBUG=1

"""The wire's threads: calls for ready models, from socket to socket without Python (design 5).

Owns connections, HTTP/2 sessions, and the way of each call; docs/wire.md tells the whole path. The
struct of everything, who owns it and when it is freed is in ``_wire.pxd``. What a call needs that
the table does not answer is tier 2's, to which it is passed on as it came. Python code talks to it
through ``mm.wire.Wire``.
"""

from libc.errno cimport EAGAIN, EINPROGRESS, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset, strerror, strlen

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize

import os

from mm._lru cimport (
    CHOSE_LOCAL,
    CHOSE_NONE,
    READY,
    Table,
    choose_copy,
    find,
    find_alias,
    id_of,
    in_flight_of,
    live,
    peer_at,
    peer_count,
    peers_t,
    pin,
    pin_below,
    reader_offline,
    reader_online,
    reader_register,
    reader_unregister,
    report_load,
    slot_t,
    table_t,
    touch,
    unpin,
)
from mm._lru_atomics cimport (
    acquire,
    c_assert,
    load_ptr,
    load_u8,
    load_u32,
    load_u64,
    or_u32,
    relaxed,
    release,
    store_u32,
    store_u64,
    swap_u32,
)
from mm.wire._wire_access cimport *
from mm.wire._wire_counters cimport *
from mm.wire._wire_values cimport *
from mm.wire.nghttp2 cimport *
from mm.wire.openssl cimport *
from mm.wire.system cimport *

include "_wire_texts.pxi"
include "_wire_memory.pxi"
include "_wire_timers.pxi"
include "_wire_headers.pxi"
include "_wire_inject.pxi"
include "_wire_reports.pxi"
include "_wire_statistics.pxi"
include "_wire_build.pxi"
include "_wire_access.pxi"
include "_wire_routes.pxi"
include "_wire_attempts.pxi"
include "_wire_requests.pxi"
include "_wire_answers.pxi"
include "_wire_ends.pxi"
include "_wire_slow.pxi"
include "_wire_budget.pxi"
include "_wire_pieces.pxi"
include "_wire_crowd.pxi"
include "_wire_writing.pxi"
include "_wire_guards.pxi"
include "_wire_clients.pxi"
include "_wire_conns.pxi"
include "_wire_tls_contexts.pxi"
include "_wire_tls.pxi"
include "_wire_sessions.pxi"
include "_wire_targets.pxi"
include "_wire_commands.pxi"
include "_wire_worker.pxi"
include "_wire_told.pxi"

headers_setup()
sessions_setup()
tls_setup()


cdef object read_numbers(atomic_u64 *numbers, int count_):
    return [load_u64(&numbers[i], relaxed) for i in range(count_)]


cdef object row_told(worker_t *w, row_t *row):
    """Lay out the copy of a row for Python. Methods stay where they are."""
    cdef text_t *path = &w.methods[row.method]
    return (
        path.bytes[:path.length] if path.length else b"",
        row.code,
        row.ids[:row.model_length],
        row.ids[row.model_length:row.model_length + row.vmodel_length],
        read_numbers(row.invoked.counts, TIME_BUCKETS),
        read_numbers(row.invoked.sums, TIME_BUCKETS),
        read_numbers(row.answered.counts, TIME_BUCKETS),
        read_numbers(row.answered.sums, TIME_BUCKETS),
        read_numbers(row.requests.counts, SIZE_BUCKETS),
        read_numbers(row.requests.sums, SIZE_BUCKETS),
        read_numbers(row.responses.counts, SIZE_BUCKETS),
        read_numbers(row.responses.sums, SIZE_BUCKETS),
    )


cdef list failure_told(failure_t *failure):
    """Lay out what an attempt came to for Python."""
    cdef const uint8_t *at = <const uint8_t *>(failure + 1)
    cdef const uint8_t *end = at + failure.length
    cdef uint32_t lengths[2]
    cdef list found = []
    while at < end:
        memcpy(lengths, at, sizeof(lengths))
        at += sizeof(lengths)
        found.append((at[:lengths[0]], at[lengths[0]:lengths[0] + lengths[1]]))
        at += lengths[0] + lengths[1]
    return found


# The table has to be there until the worker is deallocated, which gives its reader back to it: the
# garbage collector must not clear it before.
@cython.no_gc_clear
cdef class Worker:
    """One thread's worth of wire. Methods may be called from any thread but ``run``'s."""

    cdef worker_t *core
    cdef object table   # kept alive: the thread reads it

    def __cinit__(self, int notice_fd, measures, Worker beside=None):
        cdef worker_t *w = worker_new(
            int.from_bytes(os.urandom(8), "little"), notice_fd,
            0 if measures is None else measures.models_max or METHODS_MAX * CODES,
            measures is not None and measures.models_max > 0,
            NULL if beside is None else beside.core.crowd)
        self.core = w
        if measures is not None:
            for i, bound in enumerate(measures.bounds_us[:TIME_BUCKETS - 1]):
                w.by.times[i] = bound
            for i, bound in enumerate(measures.bounds_bytes[:SIZE_BUCKETS - 1]):
                w.by.sizes[i] = bound

    def __dealloc__(self):
        if self.core != NULL:
            worker_free(self.core)

    def run(self):
        """Serve until ``stop``; the GIL is not held."""
        with nogil:
            worker_run(self.core)

    cdef command_t *_command(self, int kind) except NULL:
        cdef command_t *command = <command_t *>calloc(1, sizeof(command_t))
        if command == NULL:
            raise MemoryError
        command.kind = kind
        command.fd = -1
        return command

    def configure(self, told):
        """Go by this configuration from now on. It names the table of the one before."""
        cdef config_t *config
        cdef command_t *command
        if self.table is not None and told.table is not self.table:
            raise ValueError("the wire reads one table, from its first configuration on")
        config = config_new(told)
        try:
            command = self._command(COMMAND_CONFIG)
        except MemoryError:
            config_free(config)
            raise
        command.config = config
        self.table = told.table
        post(self.core, command)

    def listen(self, int fd, int role):
        """Take over a listening socket, and accept connections on it."""
        cdef command_t *command = self._command(COMMAND_LISTEN)
        command.fd = fd
        command.role = role
        post(self.core, command)

    def set_tier2(self, int fd, int role, bint own):
        """Take over a connected socket that leads to tier 2."""
        cdef command_t *command = self._command(COMMAND_TIER2)
        command.fd = fd
        command.role = role
        command.lane = LANE_OWN if own else LANE_MODEL
        post(self.core, command)

    def set_runtime(self, told):
        """Say where the runtime is."""
        self._tell_targets(COMMAND_RUNTIME, [told])

    def set_peers(self, told):
        """Say which instances can be called, and where: all of them."""
        self._tell_targets(COMMAND_PEERS, list(told))

    def _tell_targets(self, int kind, list told):
        cdef command_t *command = self._command(kind)
        cdef uint32_t i
        try:
            command.targets = <target_t *>calloc(len(told) + 1, sizeof(target_t))
            if command.targets == NULL:
                raise MemoryError
            for i in range(len(told)):
                fill_target(&command.targets[i], told[i])
            command.targets_count = <uint32_t>len(told)
        except BaseException:
            command_free(command)
            raise
        post(self.core, command)

    def drain(self):
        """Accept no more, say GOAWAY, and let what runs finish."""
        post(self.core, self._command(COMMAND_DRAIN))

    def end_calls(self):
        """Answer the calls that are under way here that we stop."""
        post(self.core, self._command(COMMAND_END_CALLS))

    def stop(self):
        """Let ``run`` return at the end of its turn."""
        post(self.core, self._command(COMMAND_STOP))

    def take_missing(self):
        """Answer the tier 2 connections that are gone, as (role, own)."""
        cdef uint32_t bits = swap_u32(&self.core.missing, 0, acquire)
        return [(place // 2, bool(place % 2)) for place in range(ROLES * 2) if bits >> place & 1]

    def take_reports(self):
        """Answer (sender, model id, calls, answers, told, service ns) of peers that called."""
        cdef worker_t *w = self.core
        cdef report_t *each
        cdef uint32_t i, n
        cdef list found = []
        cdef report_t *copied
        with nogil:
            pthread_mutex_lock(&w.reports_lock)
            n = w.reports_count
            copied = <report_t *>malloc((n + 1) * sizeof(report_t))
            if copied != NULL:
                memcpy(copied, w.reports, n * sizeof(report_t))
                w.reports_count = 0
                w.reports_noticed = 0
                memset(w.reports_index, 0, 2 * REPORTS_MAX * sizeof(uint16_t))
            pthread_mutex_unlock(&w.reports_lock)
        if copied == NULL:
            raise MemoryError
        try:
            for i in range(n):
                each = &copied[i]
                found.append((
                    each.bytes[:each.sender_length],
                    each.bytes[each.sender_length:each.sender_length + each.id_length],
                    each.calls, each.answers, each.told, each.service_ns,
                ))
        finally:
            free(copied)
        return found

    def take_failures(self):
        """Answer what attempts came to whose calls cannot be sent again: lists of headers."""
        cdef worker_t *w = self.core
        cdef failure_t *first
        cdef failure_t *each
        cdef list found = []
        with nogil:
            pthread_mutex_lock(&w.reports_lock)
            first = w.failures
            w.failures = NULL
            w.failures_count = 0
            pthread_mutex_unlock(&w.reports_lock)
        try:
            each = first
            while each != NULL:
                found.append(failure_told(each))
                each = each.next
        finally:
            failures_free(first)
        found.reverse()
        return found

    def take_tls_failure(self):
        """Answer (role, text) of the handshake at a listener that failed last; once."""
        cdef worker_t *w = self.core
        cdef char text[120]
        cdef int role
        pthread_mutex_lock(&w.reports_lock)
        memcpy(text, w.tls_failure, sizeof(text))
        role = w.tls_failure_role
        w.tls_failure[0] = 0
        pthread_mutex_unlock(&w.reports_lock)
        return (role, text.decode()) if text[0] else None

    def take_flood(self):
        """Answer (address as IPv6, what it sent too much of) of the client cut off last; once."""
        cdef worker_t *w = self.core
        cdef char text[40]
        cdef uint8_t address[16]
        pthread_mutex_lock(&w.reports_lock)
        memcpy(text, w.flood, sizeof(text))
        memcpy(address, w.flood_address, 16)
        w.flood[0] = 0
        pthread_mutex_unlock(&w.reports_lock)
        return (address[:16], text.decode()) if text[0] else None

    def take_crowded_address(self):
        """Answer the last client's address that had too many connections, as IPv6; once."""
        cdef crowd_t *crowd = self.core.crowd
        cdef bytes found = b""
        pthread_mutex_lock(&crowd.lock)
        if crowd.has_refused:
            found = crowd.refused[:16]
        crowd.has_refused = 0
        pthread_mutex_unlock(&crowd.lock)
        return found

    def counts(self):
        """Answer the counters, in the order of COUNT_*."""
        return [load_u64(&self.core.counts[i], relaxed) for i in range(COUNTS)]

    def calls(self):
        """Answer (path, status, model id, vmodel id, then each of the series as two lists: how many
        values fell into each bucket, and what they came to).
        """
        cdef worker_t *w = self.core
        cdef list found = []
        cdef uint32_t at = 0
        cdef row_t copied[ROWS_AT_ONCE]
        cdef int i, n = ROWS_AT_ONCE
        while n == ROWS_AT_ONCE:
            with nogil:
                n = rows_copy(w, at, copied)
            if n < 0:
                raise MemoryError
            try:
                for i in range(n):
                    found.append(row_told(w, &copied[i]))
            finally:
                rows_free(copied, n)
            at += n
        return found

    def peer_traffic(self, list handles):
        """Answer, for each handle, the calls under way there and the answers since the start."""
        return [
            (load_u32(&self.core.peers_open[handle & 0xFFFF], relaxed),
             load_u32(&self.core.peers_answers[handle & 0xFFFF], relaxed))
            for handle in handles
        ]

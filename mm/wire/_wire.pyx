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
from mm.wire._wire_counters cimport *
from mm.wire._wire_values cimport *
from mm.wire.nghttp2 cimport *
from mm.wire.openssl cimport *
from mm.wire.system cimport *

include "_wire_memory.pxi"
include "_wire_timers.pxi"
include "_wire_headers.pxi"
include "_wire_inject.pxi"
include "_wire_reports.pxi"
include "_wire_statistics.pxi"
include "_wire_build.pxi"
include "_wire_routes.pxi"
include "_wire_attempts.pxi"
include "_wire_requests.pxi"
include "_wire_answers.pxi"
include "_wire_ends.pxi"
include "_wire_pieces.pxi"
include "_wire_crowd.pxi"
include "_wire_writing.pxi"
include "_wire_conns.pxi"
include "_wire_tls_contexts.pxi"
include "_wire_tls.pxi"
include "_wire_sessions.pxi"
include "_wire_targets.pxi"
include "_wire_commands.pxi"
include "_wire_worker.pxi"

headers_setup()
sessions_setup()
tls_setup()


cdef void fill_target(target_t *target, object told) except *:
    """Lay out an address as ``connect`` wants it."""
    cdef bytes raw = told.sockaddr
    cdef bytes name = told.name.encode()
    if <size_t>len(raw) > sizeof(target.address):
        raise ValueError(f"the address {told.name} is too long")
    memset(target, 0, sizeof(target_t))
    target.handle = told.handle
    target.away_until_ns = told.away_until_ns
    memcpy(&target.address, <const char *>raw, len(raw))
    target.address_length = <uint32_t>len(raw)
    name = name[:sizeof(target.name) - 1]
    memcpy(target.name, <const char *>name, len(name))
    target.name_length = <uint32_t>len(name)


cdef uint8_t *copied(bytes text) except NULL:
    cdef uint8_t *bytes_ = <uint8_t *>malloc(len(text) + 1)
    if bytes_ == NULL:
        raise MemoryError
    memcpy(bytes_, <const char *>text, len(text) + 1)
    return bytes_


cdef uint32_t *copied_numbers(object numbers) except NULL:
    cdef uint32_t *found = <uint32_t *>calloc(len(numbers) + 1, sizeof(uint32_t))
    cdef Py_ssize_t i
    if found == NULL:
        raise MemoryError
    for i in range(len(numbers)):
        found[i] = numbers[i]
    return found


cdef method_t *method_new(bytes path, object told) except NULL:
    cdef method_t *method = <method_t *>calloc(1, sizeof(method_t))
    if method == NULL:
        raise MemoryError
    try:
        method.flags = told.flags
        method.path = copied(path)
        method.path_length = <uint32_t>len(path)
        method.numbers = copied_numbers(told.injection_path)
        method.numbers_count = <uint32_t>len(told.injection_path)
        method.extract_numbers = copied_numbers(told.extraction_path)
        method.extract_count = <uint32_t>len(told.extraction_path)
    except BaseException:
        method_free(method)
        raise
    return method


cdef config_t *config_new(object told) except NULL:
    """Make a worker's own copy of the configuration."""
    cdef config_t *config = <config_t *>calloc(1, sizeof(config_t))
    cdef uint32_t size = 64, place, i
    cdef uint64_t hash
    cdef method_t *method
    if config == NULL:
        raise MemoryError
    try:
        while size < 2 * len(told.methods):
            size *= 2
        config.methods = <method_t **>calloc(size, sizeof(method_t *))
        if config.methods == NULL:
            raise MemoryError
        config.methods_size = size
        config.others = method_new(b"", told.others)
        for path, each in told.methods.items():
            method = method_new(path, each)
            hash = 0xCBF29CE484222325U
            for i in range(method.path_length):
                hash = (hash ^ method.path[i]) * 0x100000001B3U
            place = <uint32_t>(hash ^ hash >> 32) & (size - 1)
            method.next = config.methods[place]
            config.methods[place] = method
        if told.table is not None:
            config.table = (<Table?>told.table).core
        config.header_bytes_max = told.header_bytes_max
        config.message_bytes_max = told.message_bytes_max
        config.kept_bytes_max = told.kept_bytes_max
        config.held_bytes_max = told.held_bytes_max
        config.streams_max[ROLE_EXTERNAL] = told.external_streams_max
        config.streams_max[ROLE_PEER] = told.peer_streams_max
        config.connections_max[ROLE_EXTERNAL] = told.clients.connections_max
        config.connections_max[ROLE_PEER] = told.peer_connections_max
        config.per_address_max = told.clients.per_address_max
        config.upstream_idle_ms = told.upstream_idle_ms
        config.leaves_here = told.leaves_here
        config.has_slots = told.has_slots
        if told.observed_models is not None:
            config.observed = <text_t *>calloc(len(told.observed_models) + 1, sizeof(text_t))
            if config.observed == NULL:
                raise MemoryError
            for i, model_id in enumerate(told.observed_models):
                config.observed[i].bytes = copied(model_id)
                config.observed[i].length = <uint32_t>len(model_id)
        config.tls[ROLE_EXTERNAL] = context_of(told.tls.clients)
        config.tls[ROLE_PEER] = context_of(told.tls.peers)
        config.tls_to_peers = context_of(told.tls.to_peers)
        config.handshake_ms = told.tls.handshake_ms
        config.instance.bytes = copied(told.instance)
        config.instance.length = <uint32_t>len(told.instance)
    except BaseException:
        config_free(config)
        raise
    return config


cdef object read_numbers(atomic_u64 *numbers, int count_):
    return [load_u64(&numbers[i], relaxed) for i in range(count_)]


cdef object row_told(worker_t *w, row_t *row):
    """Lay out a row for Python; under the lock."""
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
        """Go by this configuration from now on."""
        cdef config_t *config = config_new(told)
        cdef command_t *command
        try:
            command = self._command(COMMAND_CONFIG)
        except MemoryError:
            config_free(config)
            raise
        command.config = config
        if told.table is not None:
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
        cdef list found = []
        cdef uint32_t at = 0
        while at < self.core.rows_count:
            # A few at a time: the thread waits for us only where it begins a row.
            pthread_mutex_lock(&self.core.rows_lock)
            try:
                while at < self.core.rows_count:
                    found.append(row_told(self.core, self.core.rows[at]))
                    at += 1
                    if at % 16 == 0:
                        break
            finally:
                pthread_mutex_unlock(&self.core.rows_lock)
        return found

    def peer_traffic(self, list handles):
        """Answer, for each handle, the calls under way there and the answers since the start."""
        return [
            (load_u32(&self.core.peers_open[handle & 0xFFFF], relaxed),
             load_u32(&self.core.peers_answers[handle & 0xFFFF], relaxed))
            for handle in handles
        ]

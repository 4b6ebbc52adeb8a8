# TLS of a connection, under its HTTP/2 session: OpenSSL on bytes that the worker reads and writes.
#
# Records that were read lie in `records` of the worker, and only as long as one connection is read:
# OpenSSL takes all of them, for it is asked until it wants more. What it has to say gathers in
# `sealed`, which is sent, or kept in the connection's `out`, before anything else is asked of it.
# So a connection holds nothing but OpenSSL's state and a record that has not come whole.
#
# Lifetimes. A context (SSL_CTX) is counted by OpenSSL: one count has each Python object, each
# configuration of a worker, and each SSL that was made of it. So new files are one more
# configuration; connections of the old one keep its context until the last of them ends. An SSL is
# freed with its connection, in `bury`: nothing calls OpenSSL for a connection that is closed. The
# BIO is the SSL's; it names the connection, which outlives it.

cdef enum:
    # Read at once. With a record that came in part before it, less than READ_BYTES.
    RECORDS_BYTES = 98304
    # What a client may leave unread of answers to its own records before it is dropped.
    TLS_UNREAD_BYTES_MAX = 1048576
    # A turn's time for handshakes of clients; one goes on in any case.
    SHAKES_NS = 500000

cdef BIO_METHOD *records_method = NULL
# The same as mm.edge.h2.tls says.
cdef const char *PLAIN_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain\r\n"
    b"content-length: 26\r\n\r\nthis port speaks TLS only\n")
cdef const char *NOT_H2 = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nconnection: close\r\n"
    b"content-type: text/plain\r\ncontent-length: 32\r\n\r\ngRPC over HTTP/2 only (ALPN h2)\n")


cdef void tls_setup() except *:
    """Make what all connections share."""
    global records_method
    if records_method != NULL:
        return
    records_method = BIO_meth_new(BIO_TYPE_SOURCE_SINK, b"records")
    if (records_method == NULL or not BIO_meth_set_read(records_method, records_read)
            or not BIO_meth_set_write(records_method, records_write)
            or not BIO_meth_set_ctrl(records_method, records_control)):
        raise MemoryError


# --- what OpenSSL reads and writes ----------------------------------------------------------------

cdef int records_read(BIO *bio, char *to, int length) noexcept nogil:
    cdef conn_t *conn = <conn_t *>BIO_get_data(bio)
    cdef worker_t *w = conn.worker
    BIO_clear_retry_flags(bio)
    if w.records_of != conn or buffer_left(&w.records) == 0 or conn.flood != NULL:
        BIO_set_retry_read(bio)
        return -1
    if <size_t>length > buffer_left(&w.records):
        length = <int>buffer_left(&w.records)
    memcpy(to, w.records.bytes + w.records.at, length)
    w.records.at += length
    return length


cdef int records_write(BIO *bio, const char *bytes, int length) noexcept nogil:
    cdef conn_t *conn = <conn_t *>BIO_get_data(bio)
    BIO_clear_retry_flags(bio)
    return length if buffer_add(&conn.worker.sealed, bytes, length) else -1


cdef long records_control(BIO *_bio, int command, long _number, void *_pointer) noexcept nogil:
    return command == BIO_CTRL_FLUSH


cdef bint tls_open(conn_t *conn, SSL_CTX *context) noexcept nogil:
    """Have a connection speak TLS; False without memory."""
    cdef BIO *bio
    conn.ssl = SSL_new(context)
    if conn.ssl == NULL:
        return False
    bio = BIO_new(records_method)
    if bio == NULL:
        return False
    BIO_set_data(bio, conn)
    BIO_set_init(bio, 1)
    SSL_set_bio(conn.ssl, bio, bio)
    if conn.is_server:
        SSL_set_accept_state(conn.ssl)
    else:
        SSL_set_connect_state(conn.ssl)
    conn.is_shaking = 1
    if is_guarded(conn):
        SSL_set_msg_callback(conn.ssl, key_updates_watch)
    return True


cdef inline void tls_begin(conn_t *conn) noexcept nogil:
    """Before OpenSSL is asked anything: what it says is about this."""
    ERR_clear_error()
    conn.worker.sealed.at = conn.worker.sealed.length = 0


cdef bint tls_send(conn_t *conn) noexcept nogil:
    """Send what OpenSSL has said, or keep it for later. False if the connection is closed."""
    cdef worker_t *w = conn.worker
    if buffer_left(&w.sealed) == 0:
        return True
    if buffer_left(&conn.out) == 0 and not write_some(conn, &w.sealed):
        conn_close(conn)
        return False
    if buffer_left(&w.sealed) == 0:
        return True
    if not conn.is_blocked:
        conn.is_blocked = 1
        conn.blocked_ms = w.now_ms
        conn_watch(conn)
    if (buffer_left(&conn.out) > TLS_UNREAD_BYTES_MAX
            or not buffer_add(&conn.out, w.sealed.bytes + w.sealed.at, buffer_left(&w.sealed))):
        conn_close(conn)
        return False
    blocked_grew(conn)
    return True


cdef bint tls_seal(conn_t *conn) noexcept nogil:
    """Put what is packed into records, which then are what is packed; False if that fails."""
    cdef worker_t *w = conn.worker
    cdef part_t *part
    cdef const uint8_t *bytes
    cdef uint32_t i
    tls_begin(conn)
    for i in range(w.parts_count):
        part = &w.parts[i]
        bytes = part.bytes if part.bytes != NULL else w.gather.bytes + part.at
        if SSL_write(conn.ssl, bytes, <int>part.length) <= 0:
            return False
    w.parts_count = 0
    if w.sealed.length != 0:
        w.parts[0].bytes = w.sealed.bytes
        w.parts[0].length = w.sealed.length
        w.parts_count = 1
    return True


cdef void tls_goodbye(conn_t *conn) noexcept nogil:
    """Say that nothing follows, if that can be said at once."""
    if buffer_left(&conn.out) != 0:
        return
    tls_begin(conn)
    SSL_shutdown(conn.ssl)
    write_some(conn, &conn.worker.sealed)


# --- reading --------------------------------------------------------------------------------------

cdef ssize_t tls_read(conn_t *conn, uint8_t *to) noexcept nogil:
    """Read at most READ_BYTES, in plain. 0: nothing yet, -1: closed."""
    cdef worker_t *w = conn.worker
    cdef ssize_t n
    n = recv(conn.fd, w.records.bytes, RECORDS_BYTES, 0)
    if n == 0 or (n < 0 and errno != EAGAIN and errno != EINTR):
        conn_close(conn)
        return -1
    if n < 0:
        return 0
    conn.heard_ms = w.now_ms
    count(w, COUNT_BYTES_IN + conn.side, n)
    w.records.at = 0
    w.records.length = n
    w.records_of = conn
    n = 0
    if not conn.is_shaking or tls_shake(conn):
        n = tls_open_records(conn, to)
    w.records_of = NULL
    return -1 if conn.is_closed else n


cdef ssize_t tls_open_records(conn_t *conn, uint8_t *to) noexcept nogil:
    """Answer what is in the records that were read; closes the connection if they are wrong."""
    cdef ssize_t length = 0
    cdef int n, why
    cdef bint is_http
    tls_begin(conn)
    while True:
        n = SSL_read(conn.ssl, to + length, <int>(READ_BYTES - length))
        if n <= 0:
            break
        length += n
    why = SSL_get_error(conn.ssl, n)
    if conn.flood != NULL:
        conn_cut(conn)
        return 0
    # Answers to the other side's change of keys, or the alert.
    if not tls_send(conn):
        return 0
    if why == SSL_ERROR_ZERO_RETURN:
        conn.is_ended = 1
    elif why != SSL_ERROR_WANT_READ:
        if not conn.is_server and not conn.is_ready:
            # In TLS 1.3 the other side may refuse us after our handshake is complete.
            tls_note(conn, why_refused(conn.ssl, &is_http))
        conn_close(conn)
        return 0
    return length


# --- the handshake --------------------------------------------------------------------------------

# What a server computes for a client that has only said hello, a signature most of all, takes up to
# a hundred times what a hit takes. So clients in their handshakes stand in line, in the order in
# which they spoke, and go on after everybody else had a turn: a flood of hellos takes the time that
# others leave. The line holds open connections only, so it is as long as these are many; how long
# each may stand in it is the handshake's own limit.

cdef void shake_wait(conn_t *conn) noexcept nogil:
    """Have a client that has spoken wait for its turn; what it says meanwhile is not looked at."""
    cdef worker_t *w = conn.worker
    if conn.awaits_shake:
        return
    conn.awaits_shake = 1
    conn.shake_previous = w.shaking_last
    conn.shake_next = NULL
    if w.shaking_last != NULL:
        w.shaking_last.shake_next = conn
    else:
        w.shaking = conn
    w.shaking_last = conn
    count(w, COUNT_HANDSHAKES_WAITING, 1)
    conn_watch(conn)


cdef void shake_leave(conn_t *conn) noexcept nogil:
    cdef worker_t *w = conn.worker
    if not conn.awaits_shake:
        return
    conn.awaits_shake = 0
    if conn.shake_previous != NULL:
        conn.shake_previous.shake_next = conn.shake_next
    else:
        w.shaking = conn.shake_next
    if conn.shake_next != NULL:
        conn.shake_next.shake_previous = conn.shake_previous
    else:
        w.shaking_last = conn.shake_previous
    count(w, COUNT_HANDSHAKES_WAITING, <uint64_t>-1)


cdef void shakes_go_on(worker_t *w) noexcept nogil:
    """Let those go on who stand in front, at least one, as long as a turn has time for it."""
    cdef conn_t *conn
    cdef uint64_t until_ns
    clocks_read(w)
    until_ns = w.now_ns + SHAKES_NS
    while w.shaking != NULL and w.now_ns < until_ns:
        conn = w.shaking
        shake_leave(conn)
        conn_watch(conn)
        conn_readable(conn)
        clocks_read(w)


cdef bint tls_shake(conn_t *conn) noexcept nogil:
    """Go on with the handshake; answers whether it is complete, and the connection still there."""
    cdef int done
    tls_begin(conn)
    done = SSL_do_handshake(conn.ssl)
    if done != 1:
        if SSL_get_error(conn.ssl, done) == SSL_ERROR_WANT_READ:
            tls_send(conn)
        else:
            tls_failed(conn)
        return False
    if not tls_send(conn):
        return False
    if not speaks_h2(conn.ssl):
        if conn.is_server:
            tls_begin(conn)
            SSL_write(conn.ssl, NOT_H2, <int>strlen(NOT_H2))
            SSL_shutdown(conn.ssl)
            write_some(conn, &conn.worker.sealed)
        tls_note(conn, b"it does not offer h2 by ALPN")
        conn_close(conn)
        return False
    conn.is_shaking = 0
    count(conn.worker, COUNT_HANDSHAKES, 1)
    mark_dirty(conn)
    return True


cdef void tls_failed(conn_t *conn) noexcept nogil:
    """Tell the other side why, and close."""
    cdef worker_t *w = conn.worker
    cdef bint is_http
    cdef const char *why = why_refused(conn.ssl, &is_http)
    if conn.is_server and is_http:
        w.sealed.at = w.sealed.length = 0
        buffer_add(&w.sealed, PLAIN_HTTP, strlen(PLAIN_HTTP))
    tls_note(conn, why)
    if tls_send(conn):
        conn_close(conn)


cdef void tls_note(conn_t *conn, const char *why) noexcept nogil:
    """Keep why a handshake failed, for whoever waits for the connection, or for the log."""
    cdef worker_t *w = conn.worker
    if not conn.is_server:
        snprintf(conn.target.failure, sizeof(conn.target.failure), NO_TLS, conn.target.label, why)
        target_missed(w, conn.target)
        return
    pthread_mutex_lock(&w.reports_lock)
    snprintf(w.tls_failure, sizeof(w.tls_failure), b"%s", why)
    w.tls_failure_role = conn.role
    pthread_mutex_unlock(&w.reports_lock)

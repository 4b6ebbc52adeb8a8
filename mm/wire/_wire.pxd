# The map of the wire's memory: what a thread owns, and how its parts hang together.
#
# Threads. A worker is one thread and owns everything that it can reach: its connections, calls,
# targets, timers and buffers. No two workers share a byte of these. What crosses threads is four
# things: the mailbox (a lock; Python puts commands in, the worker takes them), the counters (one
# writer, relaxed atomics, Python reads), the table (its own rules, see _lru.pxd) and the eventfds.
#
# Lifetimes.
# * conn_t lives from accept or connect until the end of the turn in which it was closed: events of
#   the same turn may still name it, so it is only marked `is_closed` and freed by `bury`.
# * call_t lives while its client's stream (`down`) or its upstream's stream (`up`) lives: either
#   session's stream-close callback clears its end, `call_settle` frees it when both are NULL and no
#   list holds it. What nghttp2 was told to send without copying (header blocks) lies in the call's
#   arena; nghttp2 reads it when it packs the frame, which it never does after it has told that the
#   stream is closed.
# * A session is never deleted inside its own callbacks, and never sent or received on there:
#   callbacks only submit, and mark connections dirty. Sending is `flush`, at the end of the turn.
# * What `pack` lays out points at bytes of calls, and of the input that the turn has read, until it
#   is written: calls that end meanwhile stay until then (`call_free`), and no buffer moves, because
#   only what is received makes one grow or compacts it. Pieces (see there) point at the input for
#   the rest of the turn, at whose end what has not left is copied.
# * The pinned slot of a call stays valid until it is unpinned (see _lru.pxd); any other slot is
#   looked up again in each turn.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from mm._lru cimport slot_t, table_t
from mm._lru_atomics cimport atomic_u32, atomic_u64
from mm.wire._wire_access cimport access_t, shown_t
from mm.wire._wire_counters cimport COUNTS, failure_t, report_t, row_t, rows_t
from mm.wire._wire_values cimport (
    allowance_t, buffer_t, head_t, headers_t, injector_t, meter_t, text_t)
from mm.wire.nghttp2 cimport nghttp2_nv, nghttp2_session
from mm.wire.openssl cimport SSL, SSL_CTX
from mm.wire.system cimport pthread_mutex_t, sockaddr_storage

cdef enum:
    # What epoll events name (source_t.kind).
    SOURCE_MAILBOX = 0
    SOURCE_LISTENER = 1
    SOURCE_CONN = 2

    # Who calls on a listener, or is called on a target.
    ROLE_EXTERNAL = 0
    ROLE_PEER = 1
    ROLES = 2

    # Where a call goes.
    LANE_NONE = 0
    LANE_HERE = 1      # the runtime beside this instance
    LANE_THERE = 2     # another instance
    LANE_MODEL = 3     # tier 2, a call for a model
    LANE_OWN = 4       # tier 2, one of the mesh's own services

    # Timers.
    TIMER_CALL = 0
    TIMER_CONN = 1
    TIMER_ACCEPT = 2
    TIMER_TIER2 = 3

    # What is known of a method (method_t.flags).
    METHOD_OWN = 1             # the mesh's own
    METHOD_OWN_UNLESS_ID = 2   # the same, except if the call names a model
    METHOD_DENIED = 4          # not in the data-plane configuration's list
    METHOD_EXTRACTS_VMODEL = 8  # the id in its message is a vmodel's
    METHOD_REFUSED_HERE = 16   # the runtime does not allow it
    METHOD_OBSERVED = 32       # somebody observes calls of it, of `config_t.observed`

    CALL_ARENA_BYTES = 2048
    TARGET_CONNS = 16
    WHEEL_SLOTS = 1024
    WHEEL_WORDS = 16           # of 64 bits
    PARTS_MAX = 128            # of what is written at once
    PIECES_MAX = 256           # of bodies that lie in the input
    RECENT_IDS = 16            # a power of two


cdef struct worker_t
cdef struct conn_t
cdef struct call_t
cdef struct target_t
cdef struct method_t
cdef struct crowd_t


cdef struct source_t:
    uint8_t kind


# A part of what is written at once: at a place of `gather`, which may move when it grows, or, with
# `bytes`, of a body.
cdef struct part_t:
    const uint8_t *bytes
    size_t at
    size_t length


# A piece of an answer's body that lies where it was read; its bytes come after those of `answer`.
cdef struct piece_t:
    piece_t *next
    call_t *call               # NULL: it has left
    const uint8_t *bytes
    size_t length


cdef struct chunk_t:
    chunk_t *next


cdef struct timer_t:
    timer_t *previous
    timer_t *next
    uint64_t due_ms
    void *owner
    uint16_t slot
    uint8_t kind
    uint8_t is_set


cdef struct call_t:
    worker_t *worker
    call_t *pool_next
    # The client's end: a stream of an accepted connection.
    conn_t *down
    call_t *down_previous
    call_t *down_next
    # The other end: a stream of a connection of ours.
    conn_t *up
    call_t *up_previous, *up_next
    # While a connection to it is made.
    target_t *waits_for
    call_t *wait_previous
    call_t *wait_next
    # Until this turn is over.
    call_t *turn_next
    uint8_t in_turn
    int32_t down_id, up_id
    uint8_t role               # of the listener
    uint8_t lane
    # Request.
    uint8_t request_ended
    uint8_t has_first          # its first message is whole; if not:
    uint8_t first_head         # how much of its head is here, and
    uint32_t first_left        # of its bytes not
    uint8_t awaits_message     # the first one, which names the model
    uint8_t keeps              # every request byte so far is in `body`
    uint8_t sent_whole         # END_STREAM of the request has left
    uint8_t up_sent            # its HEADERS have left
    uint8_t up_deferred        # nghttp2 waits for more of the body
    uint8_t refusals
    uint8_t is_counted         # among those sent here or there
    # Answer.
    uint8_t answer_begun       # its headers were given to nghttp2
    uint8_t answer_ended       # its trailers are known
    uint8_t down_deferred      # nghttp2 waits for more of the answer
    uint8_t answer_whole       # its END_STREAM has left
    uint8_t has_response       # headers are in `response`
    uint8_t has_trailers
    uint8_t reads_trailers     # the header block being read now is the last one
    uint8_t wants_replay       # when its stream upstream is closed
    uint8_t is_replayed
    uint8_t has_held           # an answer waits in held_*, while tier 2 thinks
    uint8_t pass_on            # tier 2 says: that answer is the answer
    uint8_t is_spoilt
    uint8_t is_there           # counts among the calls open at a peer
    uint8_t may_redirect
    uint8_t tried_lane         # of the attempt that tier 2 is told of
    uint8_t held_has_response
    uint8_t announcements      # 1xx that came before the answer
    int32_t tried_status
    int32_t status             # grpc-status, -1 when there is none
    int64_t hop_load           # mm-hop-load, -1
    text_t hop_result          # of the answer
    text_t fault               # why the last attempt got no answer
    slot_t *slot               # pinned
    uint32_t handle            # of the peer it went to
    uint32_t copy_word         # the slot's flags when it was pinned
    target_t *target
    uint64_t arrived_ns
    uint64_t attempted_ns
    uint64_t deadline_ns       # 0: none
    timer_t timer
    head_t head
    headers_t request, response, trailers, held_response, held_trailers
    text_t model_id            # concrete, in the arena
    buffer_t body
    buffer_t answer
    piece_t *pieces
    piece_t *pieces_last
    size_t pieces_bytes
    # While something of the answer waits: in the order of who has waited longest for its reader.
    call_t *slow_previous
    call_t *slow_next
    uint8_t is_slow
    uint64_t slow_ms           # since then
    # Of all bytes of the request, counted from its first: where `body` begins, and how many were
    # given back to the client's window.
    uint64_t body_base
    uint64_t body_passed
    size_t held_bytes          # bytes of `body` that were sent and are kept
    meter_t request_meter
    meter_t answer_meter
    injector_t injector
    size_t weight              # as counted in the budget
    chunk_t *chunks
    size_t chunks_bytes
    size_t arena_used
    uint8_t arena[CALL_ARENA_BYTES]


cdef struct conn_t:
    source_t source
    worker_t *worker
    nghttp2_session *session
    uint64_t buffer_bytes      # that the calls of a client or peer take
    uint8_t address[16]        # of a client, as it is told apart
    uint64_t number            # of the worker's connections, from 1
    SSL *ssl                   # NULL: plain text
    int fd
    uint8_t is_server
    uint8_t side               # who is at the other end
    uint8_t role
    uint8_t is_closed
    uint8_t is_dirty
    uint8_t is_connecting
    uint8_t is_shaking         # the TLS handshake is not complete
    uint8_t awaits_shake       # and goes on when its turn comes (_wire_tls.pxi)
    uint8_t is_resting         # `rest` is looked at in the next turn (_wire_guards.pxi)
    uint8_t is_late            # it took too long until it could be used
    uint8_t is_ended           # the other side has said in TLS that nothing follows
    uint8_t is_ready           # SETTINGS of the other side are here
    uint8_t is_blocked         # the socket takes no more; EPOLLOUT is asked for
    uint8_t is_mute            # it takes nothing any more; what has come is still read
    uint8_t is_in_line         # the listener's backlog is full: connecting is tried again
    uint8_t is_draining        # GOAWAY was sent, or received: no new streams
    uint8_t goaway_sent        # the final one
    uint8_t awaits_ping
    uint8_t may_ping           # a runtime has answered something since the last one
    conn_t *dirty_next
    conn_t *shake_previous, *shake_next
    conn_t *rest_previous, *rest_next
    conn_t *previous, *next    # all of the worker
    call_t *calls
    uint32_t streams
    uint32_t streams_max
    target_t *target           # of a connection of ours
    method_t *method           # of the last call: the next is likely of the same
    row_t *row                 # of the last one that was measured
    shown_t shown              # who calls, where that counts
    buffer_t out               # what the socket did not take
    buffer_t rest              # what was read of a client or peer and not looked at
    # While there is such of a client or peer: in the order of who has taken nothing for longest.
    conn_t *blocked_previous, *blocked_next
    size_t unwritten           # as counted among what waits; 0: in no line
    timer_t timer
    uint64_t until_ms          # tries to connect until then
    uint64_t heard_ms
    uint64_t blocked_ms        # since then the socket has taken nothing, if it is full
    uint64_t pinged_ms
    uint64_t idle_since_ms     # of a connection of ours: its last call ended then
    uint64_t recent_ids[RECENT_IDS]   # hashes of ids that were sent on it
    # What a client or peer may send besides calls (_wire_guards.pxi), and where its frames stand.
    const char *flood          # what it sent too much of
    double frames_left
    uint64_t frames_ms
    double resets_left
    uint64_t resets_ms
    int64_t strays             # HEADERS and DATA of the read that no call is known for
    uint32_t frame_left
    uint8_t frame_head[9]
    uint8_t frame_head_length, continuations, is_aged
    uint8_t is_in_headers      # more of the list follows in another frame
    uint8_t is_begun           # a frame or list of headers that is not whole, since:
    uint64_t begun_ms


# An address that calls are sent to.
cdef struct target_t:
    uint8_t lane
    uint8_t role               # of the tier 2 server behind it
    uint8_t is_retired
    uint8_t uses_ping
    uint32_t handle
    uint32_t conns_max
    uint32_t conns_count
    conn_t *conns[TARGET_CONNS]
    target_t *next_retired
    call_t *waiting
    call_t *waiting_last
    uint32_t waiting_count
    uint64_t failed_ms         # a connect failed then; 0: none did
    uint32_t failures          # one after the other, since a connection was there
    uint64_t away_until_ns     # tier 2 says: leave it alone until then
    sockaddr_storage address
    uint32_t address_length
    char name[256]             # host:port, for :authority
    uint32_t name_length
    char label[256]            # for texts
    char instance[256]         # whose it is
    char failure[400]


cdef struct method_t:
    uint8_t *path
    uint32_t path_length
    uint32_t flags
    uint8_t needs              # of the mesh's own: the role of who may call it
    uint32_t numbers_count
    uint32_t *numbers          # idInjectionPath
    uint32_t extract_count
    uint32_t *extract_numbers  # idExtractionPath
    method_t *next


# What a worker goes by; one copy each, replaced as a whole.
cdef struct config_t:
    table_t *table
    method_t **methods         # hashed by path
    uint32_t methods_size      # a power of two
    method_t *others           # any method that is not listed
    uint32_t header_bytes_max
    uint64_t message_bytes_max
    uint64_t kept_bytes_max    # of one request
    uint64_t held_bytes_max    # of all requests of a worker
    uint64_t answer_bytes_max  # of all answers of a worker that wait for their readers
    uint64_t buffer_bytes_max  # of all that its calls take (_wire_budget.pxi)
    uint32_t streams_max[ROLES]
    uint32_t connections_max[ROLES]   # of all workers
    uint32_t per_address_max   # of these, of clients
    allowance_t resets[ROLES]  # of one connection (_wire_guards.pxi)
    allowance_t frames[ROLES]
    uint32_t headers_ms, message_ms   # for a list of headers, a first message, to be whole,
    uint32_t waiting_max       # calls that wait for a connection to one place
    uint32_t unread_ms         # for an answer to be taken
    uint32_t idle_ms, age_ms, age_grace_ms   # 0: no limit
    uint32_t upstream_idle_ms
    uint32_t quiet_ms          # of a runtime with calls, until it is asked for a sign of life
    uint32_t quiet_answer_ms   # and then until it is given up
    uint8_t leaves_here        # calls for copies here are tier 2's: it logs each
    uint8_t has_slots          # copies take few calls at a time (mm/mesh/concurrency.py)
    text_t *observed           # models that somebody observes, up to one without bytes; NULL: all
    access_t *access           # of clients; NULL: anybody may do anything
    SSL_CTX *tls[ROLES]        # by role of the listener; NULL: plain text
    SSL_CTX *tls_to_peers
    uint32_t handshake_ms      # of TLS, and to SETTINGS
    text_t instance            # our id, as mm-hop-from has it


cdef struct listener_t:
    source_t source
    int fd
    uint8_t role, is_closed
    listener_t *next


cdef struct command_t:
    command_t *next
    uint8_t kind
    int fd
    uint8_t role, lane
    config_t *config
    target_t *targets          # an array: address, handle, name, away_until_ns
    uint32_t targets_count


cdef struct worker_t:
    # Crosses threads.
    pthread_mutex_t lock
    command_t *commands
    command_t *commands_last
    atomic_u32 has_commands
    int wake_fd
    int notice_fd              # tells Python
    atomic_u32 missing         # bits: tier 2 connections that are gone
    atomic_u64 counts[COUNTS]
    atomic_u32 *peers_open     # by instance index: calls under way there,
    atomic_u32 *peers_answers  # and answers since the start
    pthread_mutex_t rows_lock  # for which rows there are, not for their numbers:
    row_t **rows
    uint32_t rows_count
    text_t *methods            # the first stands for all others
    uint32_t methods_count
    pthread_mutex_t reports_lock   # for these:
    report_t *reports
    uint16_t *reports_index    # hashed: a place in `reports`, counted from 1
    uint32_t reports_count
    uint8_t reports_noticed    # Python knows that there are some
    failure_t *failures        # the last one first
    uint32_t failures_count
    char tls_failure[120]      # why a handshake at a listener failed last
    uint8_t tls_failure_role
    char flood[40]             # why a client was cut off last, and which
    uint8_t flood_address[16]
    crowd_t *crowd             # shared with the other workers, under its own lock
    # The worker's own.
    rows_t by                  # rows, by what they are of
    uint16_t *methods_index    # hashed: a place in `methods`
    source_t mailbox
    int epoll_fd
    int reader                 # number at the table, -1 before there is one
    uint8_t is_stopping
    uint64_t now_ns, now_ms
    int64_t wall_ms
    uint64_t random
    config_t *config
    listener_t *listeners, *dead_listeners
    timer_t accept_timer       # set while listeners rest
    timer_t tier2_timer        # set while Python is to be told that tier 2 is missing
    conn_t *conns
    uint64_t conns_made
    conn_t *dead
    conn_t *dirty, *dirty_last
    conn_t *shaking, *shaking_last   # handshakes that go on in turn (_wire_tls.pxi)
    conn_t *resting, *resting_last   # more was read of them than a turn looks at
    size_t resting_count
    call_t *fresh, *fresh_last
    call_t *held
    call_t *pool
    uint32_t pool_count
    size_t held_bytes
    call_t *slow, *slow_last   # calls with answers that wait (_wire_slow.pxi)
    size_t answers_bytes       # of answers that are here
    conn_t *blocked, *blocked_last   # their sockets are full (_wire_slow.pxi)
    target_t *runtime
    target_t *tier2[ROLES * 2]
    target_t **peers           # by instance index
    target_t *retired
    nghttp2_nv *nv             # scratch
    uint32_t nv_capacity
    uint8_t *input
    size_t input_at            # before it lie bytes that pieces point at
    piece_t pieces[PIECES_MAX]
    uint32_t pieces_count
    # Scratch of `flush`: what is written at once, and calls that ended while it was laid out.
    buffer_t gather
    part_t parts[PARTS_MAX]
    uint32_t parts_count
    size_t packed_bytes
    uint8_t is_packing
    uint8_t copies_parts       # so that records are as long as they may be
    # Of the connection that is read, and what OpenSSL made of what it was asked last.
    buffer_t records
    conn_t *records_of
    buffer_t sealed
    call_t *leaving
    size_t spare_bytes         # of large buffers in `pool`
    timer_t *wheel[WHEEL_SLOTS]
    uint64_t wheel_bits[WHEEL_WORDS]
    uint64_t wheel_ms          # up to here it has run
    uint32_t timers

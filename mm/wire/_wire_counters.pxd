# The numbers that a worker keeps, which Python reads at any time: relaxed atomics with one writer.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from mm._lru_atomics cimport atomic_u64

cdef enum:
    # Counters of a worker; `Wire.statistics` names them, in this order.
    COUNT_CONNECTIONS = 0      # accepted
    COUNT_CONNECTIONS_OPEN
    COUNT_CALLS
    COUNT_CALLS_OPEN
    COUNT_HERE             # answered by the runtime beside
    COUNT_THERE            # sent to another instance
    COUNT_SPLICED_MODEL
    COUNT_SPLICED_OWN
    COUNT_REPLAYED         # given to tier 2 after an attempt here
    COUNT_DEADLINES
    COUNT_CANCELLED
    COUNT_CONNECT_FAILURES
    COUNT_RESETS_REFUSED  # connections dropped because they reset too fast
    COUNT_ACCEPT_PAUSES   # there was no file descriptor for a connection
    COUNT_UPSTREAMS_IDLE  # closed because nobody needed them
    COUNT_REPORTS_DROPPED  # calls of peers that no push tells of: too many peers and models
    COUNT_HITS_OPEN       # attempts of the wire under way, here and there
    COUNT_HANDSHAKES      # of TLS, at either end
    COUNT_HANDSHAKES_FAILED
    COUNT_HANDSHAKES_LATE   # of these
    COUNT_HANDSHAKES_WAITING   # for their turn
    COUNT_RESTS_BYTES     # read of clients, more than a turn has time for
    # Why calls for models were left to tier 2: the sum of these is COUNT_SPLICED_MODEL.
    COUNT_LEFT_HEADERS    # what they say is tier 2's to read
    COUNT_LEFT_METHOD     # it may not be called, or somebody watches its calls
    COUNT_LEFT_MESSAGE    # where an id is to be read or put in
    COUNT_LEFT_NO_COPY    # none that is ready
    COUNT_LEFT_AWAY       # where the copy is nobody could be reached a moment ago
    COUNT_LEFT_BUSY       # all slots of the copy, or all connections, are taken
    # Why after an attempt: the sum is COUNT_REPLAYED.
    COUNT_AGAIN_FAULT     # there was no answer
    COUNT_AGAIN_ANSWER    # it may mean more than it says
    # Connections that were refused: clients' and peers', all together or of one address.
    COUNT_CROWDED
    COUNT_CROWDED_ADDRESS
    COUNT_CROWDED_PEERS
    # Attempts that failed and whose calls cannot be sent again: tier 2 is told of them,
    COUNT_FAILURES_TOLD
    COUNT_FAILURES_UNTOLD  # or is not, for want of room
    COUNT_FLOODS          # clients and peers that were cut off for what they sent
    COUNT_SLOW_GIVEN_UP   # calls and connections ended because nobody took what waited
    COUNT_BUFFER_BYTES    # that calls take now, without their answers
    COUNT_BUFFERS_FULL    # calls that there was no memory for
    # Calls of clients that were refused: by nobody who is known, and by those without the role.
    COUNT_UNAUTHENTICATED
    COUNT_DENIED
    # Clients' connections: without SETTINGS in time, too old, without calls for too long.
    COUNT_PREFACES_LATE
    COUNT_AGED
    COUNT_IDLE
    COUNT_MESSAGES_LATE   # first messages that did not get whole
    # Calls that wait for a connection of ours to be made; those that found too many there.
    COUNT_WAITING
    COUNT_WAITING_FULL
    COUNT_UNWRITTEN_BYTES   # what is packed for sockets that are full
    # Each for SIDE_CLIENT, SIDE_PEER, SIDE_RUNTIME and SIDE_TIER2.
    COUNT_BYTES_IN
    COUNT_BYTES_OUT = COUNT_BYTES_IN + 4
    COUNT_UPSTREAMS_OPEN = COUNT_BYTES_OUT + 4  # from SIDE_PEER on
    COUNTS = COUNT_UPSTREAMS_OPEN + 3

    # Who is at the other end of a connection, whichever of both made it.
    SIDE_CLIENT = 0
    SIDE_PEER = 1
    SIDE_RUNTIME = 2
    SIDE_TIER2 = 3

    METHODS_MAX = 257          # told apart, and one place for all others
    METHOD_PATH_BYTES = 1000   # of longer ones: with the others
    CODES = 17                 # of gRPC
    TIME_BUCKETS = 20          # as many as mm.core.histograms has bounds, and one beyond
    SIZE_BUCKETS = 9

    # Pairs of a peer and a model that Python is told of in one look, and the bytes of their ids.
    REPORTS_MAX = 1024
    REPORT_BYTES = 224

    # Failed attempts that Python has not looked at yet, and bytes of one text among what they say.
    # A look follows at once, and what is not told of is told of with the next call.
    FAILURES_MAX = 256
    FAILURE_TEXT_BYTES = 4096


# How many values fell between which bounds, and what they came to (`worker_t.bounds`).
cdef struct times_t:
    atomic_u64 counts[TIME_BUCKETS]
    atomic_u64 sums[TIME_BUCKETS]     # of microseconds


cdef struct sizes_t:
    atomic_u64 counts[SIZE_BUCKETS]
    atomic_u64 sums[SIZE_BUCKETS]     # of bytes


# What calls of one method that ended with one status came to; of one model, if that is wanted
# (_wire_statistics.pxi).
cdef struct row_t:
    times_t invoked, answered
    sizes_t requests, responses
    row_t *next                # in its chain
    row_t *older               # used before it, and after it: only with models
    row_t *newer
    uint8_t *ids               # the model's, then the vmodel's
    uint32_t model_length, vmodel_length
    uint32_t hash
    uint16_t method            # its place among the worker's methods
    uint8_t code


# What the rows of a worker are found by; the thread's own.
cdef struct rows_t:
    row_t **chains             # hashed
    row_t *oldest
    row_t *newest
    uint32_t size              # of `chains`, a power of two
    uint32_t rows_max          # 0: nothing is measured
    uint8_t by_model
    uint64_t times[TIME_BUCKETS]   # bounds
    uint64_t sizes[SIZE_BUCKETS]


# The calls of one peer for one model here, since Python looked last.
cdef struct report_t:
    uint64_t service_ns        # from a call to its reply, of all answers
    int64_t told               # calls in flight, in the last reply; -1: none yet
    uint32_t calls
    uint32_t answers
    uint32_t hash
    uint16_t sender_length
    uint16_t id_length
    uint8_t bytes[REPORT_BYTES]   # the peer's id, as its header has it, and the model's


# What a failed attempt came to, in the headers of `build_tried`. Behind it lie, for each, the
# lengths of name and value, and both.
cdef struct failure_t:
    failure_t *next
    size_t length

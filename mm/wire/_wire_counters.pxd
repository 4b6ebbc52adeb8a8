# The numbers that a worker keeps, which Python reads at any time: relaxed atomics with one writer.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from mm._lru_atomics cimport atomic_u64

cdef enum:
    # Counters of a worker; `Wire.statistics` names them.
    COUNT_CONNECTIONS = 0      # accepted
    COUNT_CONNECTIONS_OPEN = 1
    COUNT_CALLS = 2
    COUNT_CALLS_OPEN = 3
    COUNT_HERE = 4             # answered by the runtime beside
    COUNT_THERE = 5            # sent to another instance
    COUNT_SPLICED_MODEL = 6
    COUNT_SPLICED_OWN = 7
    COUNT_REPLAYED = 8         # given to tier 2 after an attempt here
    COUNT_BYTES_IN = 9
    COUNT_BYTES_OUT = 10
    COUNT_DEADLINES = 11
    COUNT_CANCELLED = 12
    COUNT_UPSTREAMS_OPEN = 13
    COUNT_CONNECT_FAILURES = 14
    COUNT_RESETS_REFUSED = 15  # connections dropped because they reset too fast
    COUNT_ACCEPT_PAUSES = 16   # there was no file descriptor for a connection
    COUNT_UPSTREAMS_IDLE = 17  # closed because nobody needed them
    COUNT_REPORTS_DROPPED = 18  # calls of peers that no push tells of: too many peers and models
    COUNT_HITS_OPEN = 19       # attempts of the wire under way, here and there
    COUNTS = 20

    METHODS_MAX = 256
    METHOD_PATH_BYTES = 160
    CODES = 17                 # of gRPC
    BUCKETS = 100              # up to a minute and a half

    # Pairs of a peer and a model that Python is told of in one look, and the bytes of their ids.
    REPORTS_MAX = 1024
    REPORT_BYTES = 224


# What calls of one method at one kind of listener came to (_wire_statistics.pxi).
cdef struct method_counts_t:
    atomic_u64 codes[CODES]
    atomic_u64 buckets[BUCKETS]   # of durations
    atomic_u64 duration_us, request_bytes, response_bytes
    uint32_t path_length
    uint8_t role
    uint8_t path[METHOD_PATH_BYTES]


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

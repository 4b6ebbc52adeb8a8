# Values that calls and connections are made of: bytes, headers, where a stream of messages stands.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


# A growing run of bytes; [at, length) is what has not gone on yet.
cdef struct buffer_t:
    uint8_t *bytes
    size_t length
    size_t at
    size_t capacity


# How many of something may come at once, and how many more each second.
cdef struct allowance_t:
    double burst, per_s


# One header. `kind` tells what becomes of it (PASS .. in _wire_headers.pxi).
cdef struct header_t:
    uint8_t *name
    uint8_t *value
    uint32_t name_length
    uint32_t value_length
    uint8_t kind
    uint8_t flags


cdef struct headers_t:
    header_t *items
    uint32_t count
    uint32_t capacity
    size_t bytes       # as HTTP/2 counts


cdef struct text_t:
    uint8_t *bytes
    uint32_t length


# What a request's headers say to the wire.
cdef struct head_t:
    text_t path, method, content_type, encoding, accept_encoding
    text_t model_id          # or the vmodel's
    text_t hop_kind
    text_t hop_from
    uint64_t timeout_ns      # of grpc-timeout, when there is one
    uint64_t content_length  # when there is one
    text_t bin_id
    uint32_t authorization_at   # the last of them in the list
    uint16_t authorizations
    uint16_t ids             # how many of each there are
    uint16_t vmodel_ids, bin_ids, bin_vmodel_ids
    uint8_t legacy_ids       # tas-model-id: tier 2 reads those
    uint8_t is_vmodel        # what model_id names, once it is known
    uint8_t has_timeout
    uint8_t has_scheme
    uint8_t has_authority
    uint8_t has_length
    uint8_t trailers_odd     # what ends the request breaks HTTP/2
    uint8_t is_balanced
    uint8_t is_odd           # whatever is wrong or strange with it is tier 2's to say
    uint8_t is_tried         # mm-hop-tried
    uint8_t may_redirect     # mm-hop-redirect
    uint8_t regular_seen


# Follows the messages of a stream.
cdef struct meter_t:
    uint64_t left
    uint64_t total             # bytes of messages, without what is before each
    uint8_t head[5]
    uint8_t head_length


# Puts an id behind each message of a request (see _wire_inject.pxi).
cdef struct injector_t:
    uint8_t *suffix
    uint32_t suffix_length     # 0: nothing is put in
    uint64_t left              # of the message
    uint64_t skip              # of the field
    uint64_t value
    uint32_t fields
    uint32_t groups[100]
    uint8_t groups_count
    uint8_t shift
    uint8_t has_tag
    uint8_t length_follows
    uint8_t head[5]
    uint8_t head_length
    uint8_t in_message
    buffer_t out

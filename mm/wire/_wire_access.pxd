# Who may do what, as each configuration of a worker has it (mm/core/access.py is the twin).

from libc.stdint cimport uint8_t, uint32_t

from mm.wire._wire_values cimport text_t

cdef enum:
    # What a call needs (mm.core.access.Role).
    ANYBODY = 0
    INFER = 2
    ACCESS_ROLES = 4

    # Why nobody is known by what a call shows (WireAccess.unknown).
    NOTHING_SHOWN = 0
    NOT_A_TOKEN = 1
    SHOWN_TWICE = 2
    UNKNOWN_TOKEN = 3
    UNKNOWN_CERTIFICATE = 4
    UNKNOWNS = 5

    DIGEST_BYTES = 32
    TOKEN_BYTES_MAX = 4096
    CERTIFICATE_NAME_BYTES_MAX = 260


cdef struct identity_t:
    text_t name
    text_t refusals[ACCESS_ROLES]   # by what is needed; without bytes: it may


# Something that an identity is known by: the digest of a token, or a name in a certificate.
cdef struct known_t:
    known_t *next
    text_t by
    identity_t *identity


cdef struct access_t:
    known_t **known            # hashed
    uint32_t known_size        # a power of two
    identity_t *identities
    uint32_t identities_count
    text_t unknown[UNKNOWNS]
    uint8_t passes_tokens


# What a connection has shown, as long as the configuration is the same.
cdef struct shown_t:
    identity_t *by_certificate
    identity_t *by_token       # of the last token that was known,
    text_t token               # which is kept for that; its own memory
    uint8_t has_looked         # at the certificate
    uint8_t has_certificate

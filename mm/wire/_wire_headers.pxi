# What headers mean: which go on, which are for the mesh, and what a request asks for (spec core
# 2.1, 2.12; around 6.1). The twin in Python is mm/core/headers.py, which tells why.
#
# The wire reads what it needs to serve a plain hit. Whatever is wrong with a request, or beyond
# that, makes it `is_odd`, and tier 2 answers it: there is one place for every error text.

cdef enum:
    # What becomes of a header (header_t.kind).
    PASS = 0          # metadata of the client: goes on
    HELD_BACK = 1     # read here, or meant for this connection only
    STRIPPED = 2      # `mm-wire-`: not even tier 2 gets it from outside

    HEADER_BYTES_MAX = 65536   # of a list, beyond which its stream is reset


cdef uint8_t TOKEN[256]    # characters of a header's name
cdef uint8_t DIGIT64[256]  # what a character of base64 stands for; 64: it is none


cdef void headers_setup() noexcept:
    cdef int each, place
    memset(TOKEN, 0, 256)
    for each in b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz":
        TOKEN[each] = 1
    memset(DIGIT64, 64, 256)
    for place in range(64):
        DIGIT64[<uint8_t>BASE64[place]] = place


cdef inline bint same(const uint8_t *a, const char *b, size_t length) noexcept nogil:
    return memcmp(a, b, length) == 0


cdef inline bint is_token(const uint8_t *name, size_t length) noexcept nogil:
    cdef size_t i
    cdef uint8_t all = 1
    for i in range(length):
        all &= TOKEN[name[i]]
    return all and length != 0


cdef inline bint is_value(const uint8_t *value, size_t length) noexcept nogil:
    cdef size_t i
    cdef uint8_t c
    for i in range(length):
        c = value[i]
        if c <= 13 and (c == 0 or c == 10 or c == 13):
            return False
    return True


cdef inline bint is_ascii(const uint8_t *value, size_t length) noexcept nogil:
    """Answer whether a path is made of what is printed; others have ended servers of gRPC."""
    cdef size_t i
    cdef uint8_t wrong = 0
    for i in range(length):
        wrong |= value[i] < 33 or value[i] > 126
    return not wrong


cdef inline bint is_of_connection(const uint8_t *name, size_t length) noexcept nogil:
    """Answer whether a header makes a message of HTTP/2 malformed (RFC 9113, 8.2.2)."""
    if length == 10:
        return same(name, b"connection", 10) or same(name, b"keep-alive", 10)
    if length == 16:
        return same(name, b"proxy-connection", 16)
    if length == 17:
        return same(name, b"transfer-encoding", 17)
    return length == 7 and same(name, b"upgrade", 7)


cdef void take_text(text_t *text, header_t *header) noexcept nogil:
    text.bytes = header.value
    text.length = header.value_length


cdef bint take_timeout(head_t *head, const uint8_t *value, size_t length) noexcept nogil:
    """Read grpc-timeout; False if it is none."""
    cdef uint64_t number = 0
    cdef uint64_t unit
    cdef size_t i
    if length < 2 or length > 9:
        return False
    for i in range(length - 1):
        if value[i] < 48 or value[i] > 57:
            return False
        number = number * 10 + value[i] - 48
    if value[length - 1] == 72:      # H
        unit = 3600000000000U
    elif value[length - 1] == 77:    # M
        unit = 60000000000U
    elif value[length - 1] == 83:    # S
        unit = 1000000000
    elif value[length - 1] == 109:   # m
        unit = 1000000
    elif value[length - 1] == 117:   # u
        unit = 1000
    elif value[length - 1] == 110:   # n
        unit = 1
    else:
        return False
    # Eight digits of hours are 3.6e20 ns, beyond 64 bits: a year stands for all that is longer.
    if number > 31536000000000000U // unit:
        head.timeout_ns = 31536000000000000U
    else:
        head.timeout_ns = number * unit
    head.has_timeout = 1
    return True


cdef void take_length(head_t *head, const header_t *header) noexcept nogil:
    """Read content-length: eighteen digits, which no body has, and once at most."""
    cdef uint32_t i
    if head.has_length or header.value_length == 0 or header.value_length > 18:
        head.is_odd = 1
    head.has_length = 1
    head.content_length = 0
    for i in range(header.value_length):
        if header.value[i] < 48 or header.value[i] > 57:
            head.is_odd = 1
        head.content_length = head.content_length * 10 + header.value[i] - 48


cdef void take_pseudo(head_t *head, header_t *header) noexcept nogil:
    cdef text_t *into = NULL
    if header.name_length == 5 and same(header.name, b":path", 5):
        into = &head.path
    elif header.name_length == 7 and same(header.name, b":method", 7):
        into = &head.method
    elif header.name_length == 7 and same(header.name, b":scheme", 7):
        head.is_odd |= head.has_scheme
        head.has_scheme = 1
    elif header.name_length == 10 and same(header.name, b":authority", 10):
        head.is_odd |= head.has_authority
        head.has_authority = 1
    else:
        head.is_odd = 1
    if into != NULL:
        head.is_odd |= into.bytes != NULL
        take_text(into, header)
        head.is_odd |= not is_ascii(header.value, header.value_length)
    head.is_odd |= head.regular_seen


cdef void take_mesh(head_t *head, header_t *header) noexcept nogil:
    """Read one of ours: the name begins with "mm-"."""
    cdef const uint8_t *name = header.name + 3
    cdef uint32_t length = header.name_length - 3
    if length == 8 and same(name, b"model-id", 8):
        head.ids += 1
        take_text(&head.model_id, header)
    elif length == 9 and same(name, b"vmodel-id", 9):
        head.vmodel_ids += 1
        take_text(&head.model_id, header)
    elif length == 12 and same(name, b"model-id-bin", 12):
        head.bin_ids += 1
        take_text(&head.bin_id, header)
    elif length == 13 and same(name, b"vmodel-id-bin", 13):
        head.bin_vmodel_ids += 1
        take_text(&head.bin_id, header)
    elif length == 8 and same(name, b"balanced", 8):
        head.is_balanced |= header.value_length == 4 and same(header.value, b"true", 4)
    elif length >= 5 and same(name, b"wire-", 5):
        header.kind = STRIPPED
    elif length == 8 and same(name, b"hop-kind", 8):
        take_text(&head.hop_kind, header)
    elif length == 8 and same(name, b"hop-from", 8):
        take_text(&head.hop_from, header)
    elif length == 9 and same(name, b"hop-tried", 9):
        head.is_tried = 1
    elif length == 12 and same(name, b"hop-redirect", 12):
        head.may_redirect = header.value_length == 1 and header.value[0] == 49


cdef void take_consumed(head_t *head, header_t *header) noexcept nogil:
    """Read a header that the wire writes anew, or that ends here (exact names)."""
    cdef const uint8_t *name = header.name
    cdef uint32_t length = header.name_length
    header.kind = HELD_BACK
    if length == 12 and same(name, b"content-type", 12):
        take_text(&head.content_type, header)
    elif length == 12 and same(name, b"tas-model-id", 12):
        head.legacy_ids = 1
    elif length == 2 and same(name, b"te", 2):
        head.is_odd |= not (header.value_length == 8 and same(header.value, b"trailers", 8))
    elif length == 4 and same(name, b"host", 4):
        pass
    elif length == 10 and same(name, b"user-agent", 10):
        pass
    elif length == 14 and same(name, b"content-length", 14):
        take_length(head, header)
    elif length > 5 and same(name, b"grpc-", 5):
        if length == 12 and same(name, b"grpc-timeout", 12):
            if not take_timeout(head, header.value, header.value_length):
                head.is_odd = 1
        elif length == 13 and same(name, b"grpc-encoding", 13):
            take_text(&head.encoding, header)
        elif length == 20 and same(name, b"grpc-accept-encoding", 20):
            take_text(&head.accept_encoding, header)
    else:
        header.kind = PASS


cdef bint take_request_header(
    call_t *call, const uint8_t *name, size_t name_length, const uint8_t *value,
    size_t value_length, uint8_t flags
) noexcept nogil:
    """Keep and sort one header of a request; False if it cannot be kept."""
    cdef head_t *head = &call.head
    cdef header_t *header
    if call.request.bytes + name_length + value_length + 32 > HEADER_BYTES_MAX:
        return False
    header = headers_add(
        call, &call.request, name, name_length, value, value_length, PASS,
        flags & NGHTTP2_NV_FLAG_NO_INDEX)
    if header == NULL:
        return False
    if name_length == 0 or not is_value(header.value, value_length):
        head.is_odd = 1
        return True
    if header.name[0] == 58:   # ":"
        header.kind = HELD_BACK
        take_pseudo(head, header)
        return True
    head.regular_seen = 1
    if not is_token(header.name, name_length) or is_of_connection(header.name, name_length):
        head.is_odd = 1
    elif name_length >= 3 and same(header.name, b"mm-", 3):
        header.kind = HELD_BACK
        take_mesh(head, header)
    else:
        take_consumed(head, header)
        if name_length == 13 and same(header.name, b"authorization", 13):
            head.authorizations += 1
            head.authorization_at = call.request.count - 1
    return True


cdef bint is_trailer(
    const uint8_t *name, size_t name_length, const uint8_t *value, size_t value_length
) noexcept nogil:
    """Answer whether a header may stand behind a request; a pseudo-header is no token."""
    if name_length == 2 and same(name, b"te", 2):
        return value_length == 8 and same(value, b"trailers", 8)
    return (is_token(name, name_length) and not is_of_connection(name, name_length)
            and is_value(value, value_length))


cdef inline bint has_id(const head_t *head) noexcept nogil:
    """Answer whether any id header is there, empty or not."""
    return (head.ids or head.vmodel_ids or head.bin_ids or head.bin_vmodel_ids
            or head.legacy_ids)


cdef bint choose_id(call_t *call) noexcept nogil:
    """Find the one id that the headers name (around 6.1); False if that is tier 2's to say.

    An ASCII header makes its -bin twin ignored, even a broken one.
    """
    cdef head_t *head = &call.head
    cdef bint is_model = head.ids != 0 or head.bin_ids != 0
    cdef bint is_vmodel = head.vmodel_ids != 0 or head.bin_vmodel_ids != 0
    cdef uint16_t ascii_ids = head.ids if is_model else head.vmodel_ids
    if is_model == is_vmodel:
        return False   # both, or none
    head.is_vmodel = is_vmodel
    if ascii_ids != 0:
        return ascii_ids == 1
    if (head.bin_ids if is_model else head.bin_vmodel_ids) != 1:
        return False
    return decode_base64(call, &head.bin_id, &head.model_id)


cdef bint decode_base64(call_t *call, const text_t *text, text_t *into) noexcept nogil:
    """Read base64, padded or not; False if it is none."""
    cdef uint32_t length = text.length, i, n = 0
    cdef uint32_t word = 0
    cdef uint8_t digit
    cdef uint8_t *out
    while length != 0 and text.bytes[length - 1] == 61:   # "="
        length -= 1
    out = arena_take(call, <size_t>length * 3 // 4 + 1)
    if out == NULL or length % 4 == 1:
        return False
    for i in range(length):
        digit = DIGIT64[text.bytes[i]]
        if digit == 64:
            return False
        word = word << 6 | digit
        if i % 4 == 3:
            out[n] = <uint8_t>(word >> 16)
            out[n + 1] = <uint8_t>(word >> 8)
            out[n + 2] = <uint8_t>word
            n += 3
    if length % 4 == 2:
        out[n] = <uint8_t>(word >> 4)
        n += 1
    elif length % 4 == 3:
        out[n] = <uint8_t>(word >> 10)
        out[n + 1] = <uint8_t>(word >> 2)
        n += 2
    into.bytes = out
    into.length = n
    return True


cdef bint is_plain_request(const head_t *head) noexcept nogil:
    """Answer whether a request's headers are in order as far as the wire can tell."""
    return (
        not head.is_odd
        and head.has_scheme
        and head.method.length == 4 and same(head.method.bytes, b"POST", 4)
        and head.path.length != 0 and head.path.bytes[0] == 47
        and is_grpc(&head.content_type)
    )


cdef bint is_grpc(const text_t *content_type) noexcept nogil:
    """Answer whether it is application/grpc, and not only begins so, as application/grpc-web."""
    cdef uint8_t next
    if content_type.length < 16 or not same(content_type.bytes, b"application/grpc", 16):
        return False
    if content_type.length == 16:
        return True
    next = content_type.bytes[16]
    return next == 43 or next == 59   # "+", ";"


# --- answers --------------------------------------------------------------------------------------

cdef int64_t read_number(const uint8_t *value, size_t length) noexcept nogil:
    """Read up to nine digits; -1 for anything else."""
    cdef int64_t number = 0
    cdef size_t i
    if length == 0 or length > 9:
        return -1
    for i in range(length):
        if value[i] < 48 or value[i] > 57:
            return -1
        number = number * 10 + value[i] - 48
    return number


cdef bint take_answer_header(
    call_t *call, const uint8_t *name, size_t name_length, const uint8_t *value,
    size_t value_length, uint8_t flags
) noexcept nogil:
    """Keep one header, or trailer, of an answer; False if it cannot be kept."""
    cdef headers_t *headers = &call.trailers if call.reads_trailers else &call.response
    cdef header_t *header
    cdef uint8_t kind = PASS
    if headers.bytes + name_length + value_length + 32 > HEADER_BYTES_MAX:
        return False
    header = headers_add(
        call, headers, name, name_length, value, value_length, PASS,
        flags & NGHTTP2_NV_FLAG_NO_INDEX)
    if header == NULL:
        return False
    name = header.name
    value = header.value
    if name_length == 0 or not is_value(value, value_length):
        call.is_spoilt = 1
        return True
    if name[0] == 58:
        # The one, before all others, and none behind an answer that has begun.
        call.is_spoilt |= not (name_length == 7 and same(name, b":status", 7)
                               and value_length == 3 and headers.count == 1
                               and not (call.reads_trailers and call.has_response))
        return True
    if not is_token(name, name_length) or is_of_connection(name, name_length):
        call.is_spoilt = 1
        return True
    if name_length >= 3 and same(name, b"mm-", 3):
        if call.lane >= LANE_MODEL:
            # Tier 2 has filtered already what it sends; this is its word to the wire.
            if name_length == 15 and same(name, b"mm-wire-pass-on", 15):
                call.pass_on = 1
                kind = STRIPPED
        elif name_length >= 7 and same(name, b"mm-hop-", 7):
            kind = STRIPPED
            if name_length == 11 and same(name, b"mm-hop-load", 11):
                call.hop_load = read_number(value, value_length)
            elif name_length == 13 and same(name, b"mm-hop-result", 13):
                take_text(&call.hop_result, header)
        elif not call.reads_trailers or (name_length >= 8 and same(name, b"mm-wire-", 8)):
            kind = STRIPPED
        header.kind = kind
    elif name_length == 11 and same(name, b"grpc-status", 11):
        call.status = <int32_t>read_number(value, value_length)
    return True

# Messages of a stream: their limit, and the model's id put behind each one (spec core 2.14).
#
# The twins in Python are mm/edge/h2/messages.py, mm/edge/h2/injection.py and the field walk of
# mm/core/protobuf_ids.py, which tell why. Compressed messages that need an id are tier 2's.

cdef enum:
    FIELDS_MAX = 100000
    GROUPS_MAX = 100
    # An id is put behind each message, and messages may be empty: what a window of them becomes is
    # made piece by piece, as the runtime takes it. With this much waiting no more is made.
    INJECTED_BYTES_MAX = 131072

    # What a walk may say.
    WALK_OK = 0
    WALK_MALFORMED = 1
    WALK_NO_MEMORY = 2
    WALK_COMPRESSED = 3

    # What a meter may say, beside a length.
    METER_OK = -1
    METER_FLAG = -2             # that is neither 0 nor 1


cdef int64_t meter_feed(
    meter_t *m, const uint8_t *bytes, size_t length, uint64_t length_max
) noexcept nogil:
    """Follow the messages; answer the length of one that is too long, METER_FLAG, or METER_OK."""
    cdef size_t step
    cdef uint64_t announced
    while length != 0:
        if m.left != 0:
            step = length if length < m.left else <size_t>m.left
            m.left -= step
            bytes += step
            length -= step
            continue
        m.head[m.head_length] = bytes[0]
        m.head_length += 1
        bytes += 1
        length -= 1
        if m.head_length == 5:
            m.head_length = 0
            announced = big_endian4(&m.head[1])
            if m.head[0] > 1:
                return METER_FLAG
            if announced > length_max:
                return <int64_t>announced
            m.left = announced
            m.total += announced
    return METER_OK


cdef inline uint64_t big_endian4(const uint8_t *bytes) noexcept nogil:
    return (<uint64_t>bytes[0] << 24 | <uint64_t>bytes[1] << 16 | <uint64_t>bytes[2] << 8
            | <uint64_t>bytes[3])


cdef uint32_t varint_put(uint8_t *into, uint64_t value) noexcept nogil:
    cdef uint32_t n = 0
    while value > 0x7F:
        into[n] = <uint8_t>(value & 0x7F | 0x80)
        value >>= 7
        n += 1
    into[n] = <uint8_t>value
    return n + 1


cdef bint inject_begin(call_t *call, const method_t *method) noexcept nogil:
    """Prepare what goes behind each message: path -> id; False without memory."""
    cdef uint32_t lengths[101]
    cdef uint32_t i, n = method.numbers_count
    cdef uint64_t total = call.model_id.length
    cdef uint8_t scratch[10]
    cdef uint8_t *at
    if n > 100:
        return False
    for i in range(n):
        lengths[n - 1 - i] = <uint32_t>total
        total += varint_put(scratch, <uint64_t>method.numbers[n - 1 - i] << 3 | 2)
        total += varint_put(scratch, lengths[n - 1 - i])
    at = arena_take(call, total)
    if at == NULL:
        return False
    call.injector.suffix = at
    call.injector.suffix_length = <uint32_t>total
    for i in range(n):
        at += varint_put(at, <uint64_t>method.numbers[i] << 3 | 2)
        at += varint_put(at, lengths[i])
    memcpy(at, call.model_id.bytes, call.model_id.length)
    return True


cdef void inject_reset(injector_t *j) noexcept nogil:
    """Begin anew, with the first byte of the request."""
    j.left = j.skip = j.value = 0
    j.fields = 0
    j.groups_count = j.shift = j.has_tag = j.length_follows = j.head_length = j.in_message = 0
    j.out.at = j.out.length = 0


cdef bint walk_number(injector_t *j) noexcept nogil:
    """A varint is complete: a tag, a value or a length; False if it does not belong there."""
    cdef uint64_t value = j.value
    cdef uint64_t number = value >> 3
    cdef int wire_type = value & 7
    j.value = 0
    j.shift = 0
    if j.has_tag:
        j.has_tag = 0
        if j.length_follows:
            j.skip = value
            j.length_follows = 0
        return True
    j.fields += 1
    if j.fields > FIELDS_MAX or number == 0:
        return False
    if wire_type == 0 or wire_type == 2:
        j.has_tag = 1
        j.length_follows = wire_type == 2
    elif wire_type == 1:
        j.skip = 8
    elif wire_type == 5:
        j.skip = 4
    elif wire_type == 3:
        if j.groups_count >= GROUPS_MAX or number > 0xFFFFFFFFU:
            return False
        j.groups[j.groups_count] = <uint32_t>number
        j.groups_count += 1
    elif wire_type == 4:
        if j.groups_count == 0 or j.groups[j.groups_count - 1] != number:
            return False
        j.groups_count -= 1
    else:
        return False
    return True


cdef bint walk(injector_t *j, const uint8_t *bytes, size_t length) noexcept nogil:
    """Follow the top-level fields of a message; False if they make no message."""
    cdef size_t step
    while length != 0:
        if j.skip != 0:
            step = length if length < j.skip else <size_t>j.skip
            j.skip -= step
            bytes += step
            length -= step
            continue
        if j.shift > 63:
            return False
        j.value |= <uint64_t>(bytes[0] & 0x7F) << j.shift
        if bytes[0] >= 0x80:
            j.shift += 7
            if j.shift > 63:
                return False
        elif not walk_number(j):
            return False
        bytes += 1
        length -= 1
    return True


cdef int inject_feed(
    injector_t *j, const uint8_t *bytes, size_t length, size_t *used
) noexcept nogil:
    """Take the next bytes of the request; what is to be sent gathers in ``out``.

    ``used``: how many bytes were taken, which is not all of them once enough waits.
    """
    cdef const uint8_t *first = bytes
    cdef size_t step
    cdef uint64_t announced
    cdef uint8_t head[5]
    used[0] = 0
    while length != 0 or (j.in_message and j.left == 0):
        if not j.in_message and buffer_left(&j.out) >= INJECTED_BYTES_MAX:
            break
        if not j.in_message:
            j.head[j.head_length] = bytes[0]
            j.head_length += 1
            bytes += 1
            length -= 1
            if j.head_length < 5:
                continue
            j.head_length = 0
            if j.head[0] != 0:
                return WALK_COMPRESSED
            j.left = big_endian4(&j.head[1])
            announced = j.left + j.suffix_length
            head[0] = 0
            head[1] = <uint8_t>(announced >> 24)
            head[2] = <uint8_t>(announced >> 16)
            head[3] = <uint8_t>(announced >> 8)
            head[4] = <uint8_t>announced
            if not buffer_add(&j.out, head, 5):
                return WALK_NO_MEMORY
            j.in_message = 1
            j.fields = 0
        step = length if length < j.left else <size_t>j.left
        if step != 0:
            if not walk(j, bytes, step):
                return WALK_MALFORMED
            if not buffer_add(&j.out, bytes, step):
                return WALK_NO_MEMORY
            j.left -= step
            bytes += step
            length -= step
        if j.left == 0:
            if j.skip or j.shift or j.has_tag or j.groups_count:
                return WALK_MALFORMED
            if not buffer_add(&j.out, j.suffix, j.suffix_length):
                return WALK_NO_MEMORY
            j.in_message = 0
    used[0] = bytes - first
    return WALK_OK


# --- reading an id ------------------------------------------------------------------------------

cdef bint read_varint(
    const uint8_t *bytes, size_t *at, size_t end, uint64_t *value
) noexcept nogil:
    cdef int shift = 0
    value[0] = 0
    while at[0] < end:
        value[0] |= <uint64_t>(bytes[at[0]] & 0x7F) << shift
        at[0] += 1
        if bytes[at[0] - 1] < 0x80:
            return True
        shift += 7
        if shift > 63:
            return False
    return False


cdef int extract(
    const uint8_t *bytes, size_t at, size_t end, const uint32_t *path, uint32_t depth,
    uint32_t *budget, size_t *found_at, size_t *found_length
) noexcept nogil:
    """Find the string at a path, the last one of several: 1 if there is one, 0 if there is none,
    -1 for what is no message, or a field of the path that is none or no string (around 7.3).

    ``depth``: how much of the path is left. Groups are tier 2's: nobody uses them.
    """
    cdef uint64_t tag = 0, length = 0
    cdef int wire_type, inner, found = 0
    while at < end:
        budget[0] += 1
        if budget[0] > FIELDS_MAX or not read_varint(bytes, &at, end, &tag) or tag >> 3 == 0:
            return -1
        wire_type = tag & 7
        if tag >> 3 == path[0] and wire_type != 2:
            return -1
        if wire_type == 0:
            if not read_varint(bytes, &at, end, &length):
                return -1
        elif wire_type == 2:
            if not read_varint(bytes, &at, end, &length) or length > end - at:
                return -1
            if tag >> 3 == path[0] and depth == 1:
                found_at[0] = at
                found_length[0] = length
                found = 1
            elif tag >> 3 == path[0]:
                inner = extract(bytes, at, at + length, path + 1, depth - 1, budget, found_at,
                                found_length)
                if inner < 0:
                    return -1
                found |= inner
            at += length
        elif wire_type == 1 and end - at >= 8:
            at += 8
        elif wire_type == 5 and end - at >= 4:
            at += 4
        else:
            return -1
    return found

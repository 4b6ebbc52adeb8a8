# What Python tells a worker, laid out as the worker has it: addresses, methods, the configuration.


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
    name = (told.label or told.name).encode()[:sizeof(target.label) - 1]
    memcpy(target.label, <const char *>name, len(name))
    name = told.instance.encode()[:sizeof(target.instance) - 1]
    memcpy(target.instance, <const char *>name, len(name))


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
        method.needs = told.needs
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


cdef void text_copy(text_t *text, bytes told) except *:
    text.bytes = copied(told)
    text.length = <uint32_t>len(told)


cdef access_t *access_new(object told) except NULL:
    """Lay out who may do what; an index leads there from what each is known by."""
    cdef access_t *access = <access_t *>calloc(1, sizeof(access_t))
    cdef uint32_t size = 64, place, i, j
    cdef known_t *known
    if access == NULL:
        raise MemoryError
    try:
        access.passes_tokens = told.passes_tokens
        for i in range(<uint32_t>UNKNOWNS):
            text_copy(&access.unknown[i], told.unknown[i])
        while size < 2 * sum(len(each.known_by) for each in told.identities):
            size *= 2
        access.known = <known_t **>calloc(size, sizeof(known_t *))
        access.identities = <identity_t *>calloc(len(told.identities) + 1, sizeof(identity_t))
        if access.known == NULL or access.identities == NULL:
            raise MemoryError
        access.known_size = size
        access.identities_count = <uint32_t>len(told.identities)
        for i, each in enumerate(told.identities):
            text_copy(&access.identities[i].name, each.name)
            for j in range(<uint32_t>ACCESS_ROLES):
                if each.refusals[j]:
                    text_copy(&access.identities[i].refusals[j], each.refusals[j])
            for by in each.known_by:
                known = <known_t *>calloc(1, sizeof(known_t))
                if known == NULL:
                    raise MemoryError
                known.identity = &access.identities[i]
                place = text_place(by, len(by), size)
                known.next = access.known[place]
                access.known[place] = known
                text_copy(&known.by, by)
    except BaseException:
        access_free(access)
        raise
    return access


cdef void guards_set(config_t *config, object told) except *:
    """Lay out what a client may send besides calls, and a peer."""
    config.resets[ROLE_EXTERNAL].burst = told.resets_burst
    config.resets[ROLE_EXTERNAL].per_s = told.resets_per_s
    config.frames[ROLE_EXTERNAL].burst = told.frames_burst
    config.frames[ROLE_EXTERNAL].per_s = told.frames_per_s
    config.resets[ROLE_PEER].burst = PEER_RESETS * config.resets[ROLE_EXTERNAL].burst
    config.resets[ROLE_PEER].per_s = PEER_RESETS * config.resets[ROLE_EXTERNAL].per_s
    config.frames[ROLE_PEER].burst = PEER_FRAMES * config.frames[ROLE_EXTERNAL].burst
    config.frames[ROLE_PEER].per_s = PEER_FRAMES * config.frames[ROLE_EXTERNAL].per_s


cdef config_t *config_new(object told) except NULL:
    """Make a worker's own copy of the configuration."""
    cdef config_t *config = <config_t *>calloc(1, sizeof(config_t))
    cdef uint32_t size = 64, place, i
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
            place = text_place(method.path, method.path_length, size)
            method.next = config.methods[place]
            config.methods[place] = method
        if told.table is not None:
            config.table = (<Table?>told.table).core
        config.header_bytes_max = told.header_bytes_max
        config.message_bytes_max = told.message_bytes_max
        config.kept_bytes_max = told.kept_bytes_max
        config.held_bytes_max = told.held_bytes_max
        config.answer_bytes_max = told.answer_bytes_max
        config.waiting_max = told.waiting_max
        config.buffer_bytes_max = told.buffer_bytes_max
        config.streams_max[ROLE_EXTERNAL] = told.external_streams_max
        config.streams_max[ROLE_PEER] = told.peer_streams_max
        config.connections_max[ROLE_EXTERNAL] = told.clients.connections_max
        config.connections_max[ROLE_PEER] = told.peer_connections_max
        config.per_address_max = told.clients.per_address_max
        guards_set(config, told.clients)
        config.headers_ms = told.clients.headers_ms
        config.message_ms = told.clients.message_ms
        config.unread_ms = told.clients.unread_ms
        config.idle_ms = told.clients.idle_ms
        config.age_ms = told.clients.age_ms
        config.age_grace_ms = told.clients.age_grace_ms
        config.upstream_idle_ms = told.upstream_idle_ms
        config.quiet_ms = told.quiet_ms
        config.quiet_answer_ms = told.quiet_answer_ms
        config.leaves_here = told.leaves_here
        config.has_slots = told.has_slots
        if told.observed_models is not None:
            config.observed = <text_t *>calloc(len(told.observed_models) + 1, sizeof(text_t))
            if config.observed == NULL:
                raise MemoryError
            for i, model_id in enumerate(told.observed_models):
                text_copy(&config.observed[i], model_id)
        if told.access is not None:
            config.access = access_new(told.access)
        config.tls[ROLE_EXTERNAL] = context_of(told.tls.clients)
        config.tls[ROLE_PEER] = context_of(told.tls.peers)
        config.tls_to_peers = context_of(told.tls.to_peers)
        config.handshake_ms = told.tls.handshake_ms
        text_copy(&config.instance, told.instance)
    except BaseException:
        config_free(config)
        raise
    return config

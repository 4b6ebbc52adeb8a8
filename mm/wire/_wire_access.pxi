# Who calls, and whether that is somebody who may: asked of each call before anything is done for
# it. mm/core/access.py is the twin, and has the texts; calls that go to tier 2 are asked there
# again.
#
# A client shows the same with each call. So the last token that was known stays with its
# connection, and costs a comparison from then on; what it says holds as long as the configuration.


cdef identity_t *known_by(
    const access_t *access, const uint8_t *by, size_t length
) noexcept nogil:
    """Answer who is known by a digest or name, NULL if nobody is. In constant time.

    Nobody can choose digests, or names that an authority signs, so that they fill one place.
    """
    cdef known_t *each = access.known[text_place(by, length, access.known_size)]
    while each != NULL:
        if each.by.length == length and CRYPTO_memcmp(each.by.bytes, by, length) == 0:
            return each.identity
        each = each.next
    return NULL


cdef void access_free(access_t *access) noexcept nogil:
    cdef uint32_t i, j
    cdef known_t *known
    if access == NULL:
        return
    for i in range(access.known_size):
        while access.known[i] != NULL:
            known = access.known[i]
            access.known[i] = known.next
            free(known.by.bytes)
            free(known)
    free(access.known)
    for i in range(access.identities_count):
        free(access.identities[i].name.bytes)
        for j in range(<uint32_t>ACCESS_ROLES):
            free(access.identities[i].refusals[j].bytes)
    free(access.identities)
    for i in range(<uint32_t>UNKNOWNS):
        free(access.unknown[i].bytes)
    free(access)


# --- what is shown --------------------------------------------------------------------------------

cdef bint bearer_token(const text_t *value, text_t *token) noexcept nogil:
    """Find the token in a value of ``authorization``; False if it has another form."""
    cdef uint32_t at = 6, i
    cdef uint8_t c
    cdef const char *scheme = b"bearer"
    if value.length < 8:
        return False
    for i in range(6):
        if (value.bytes[i] | 32) != <uint8_t>scheme[i]:
            return False
    while at < value.length and value.bytes[at] == 32:
        at += 1
    if at == 6 or at == value.length:
        return False
    token.bytes = value.bytes + at
    token.length = value.length - at
    # RFC 6750, 2.1: these, and then "=".
    while at < value.length:
        c = value.bytes[at]
        if not (48 <= c <= 57 or 65 <= (c & 223) <= 90 and c < 128 or c == 45 or c == 46 or c == 95
                or c == 126 or c == 43 or c == 47):
            break
        at += 1
    if value.bytes + at == token.bytes:
        return False
    while at < value.length and value.bytes[at] == 61:
        at += 1
    return at == value.length


cdef void token_forget(shown_t *shown) noexcept nogil:
    if shown.token.bytes != NULL:
        OPENSSL_cleanse(shown.token.bytes, shown.token.length)
        free(shown.token.bytes)
        shown.token.bytes = NULL
    shown.by_token = NULL


cdef void shown_forget(shown_t *shown) noexcept nogil:
    """The connection ends, or there is another configuration."""
    token_forget(shown)
    memset(shown, 0, sizeof(shown_t))


cdef identity_t *token_identity(
    conn_t *conn, const access_t *access, const text_t *token
) noexcept nogil:
    """Answer whose a token is, NULL if nobody's."""
    cdef shown_t *shown = &conn.shown
    cdef unsigned char digest[DIGEST_BYTES]
    cdef identity_t *identity
    if (shown.by_token != NULL and shown.token.length == token.length
            and CRYPTO_memcmp(shown.token.bytes, token.bytes, token.length) == 0):
        return shown.by_token
    if (token.length > TOKEN_BYTES_MAX
            or EVP_Digest(token.bytes, token.length, digest, NULL, EVP_sha256(), NULL) != 1):
        return NULL
    identity = known_by(access, digest, DIGEST_BYTES)
    if identity == NULL:
        return NULL
    token_forget(shown)
    shown.token.bytes = <uint8_t *>malloc(token.length)
    if shown.token.bytes != NULL:
        memcpy(shown.token.bytes, token.bytes, token.length)
        shown.token.length = token.length
        shown.by_token = identity
    return identity


# --- names in certificates ------------------------------------------------------------------------

ctypedef bint (*name_told)(
    void *user, const char *kind, const uint8_t *name, size_t length) noexcept nogil


cdef bint tell_names(SSL *ssl, name_told told, void *user) noexcept nogil:
    """Tell each name in the other side's certificate until ``told`` wants no more; answers whether
    there is a certificate.
    """
    cdef X509 *shown = SSL_get_peer_certificate(ssl)
    cdef X509_NAME *subject
    cdef GENERAL_NAMES *others
    cdef ASN1_STRING *text
    cdef const char *prefix
    cdef int at = -1, kind = 0
    cdef bint goes_on = True
    if shown == NULL:
        return False
    subject = X509_get_subject_name(shown)
    at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1)
    while goes_on and at >= 0:
        text = X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at))
        goes_on = told(user, b"CN:", ASN1_STRING_get0_data(text), ASN1_STRING_length(text))
        at = X509_NAME_get_index_by_NID(subject, NID_commonName, at)
    others = <GENERAL_NAMES *>X509_get_ext_d2i(shown, NID_subject_alt_name, NULL, NULL)
    at = 0
    while goes_on and others != NULL and at < sk_GENERAL_NAME_num(others):
        text = <ASN1_STRING *>GENERAL_NAME_get0_value(sk_GENERAL_NAME_value(others, at), &kind)
        if kind == GEN_DNS or kind == GEN_URI:
            prefix = b"URI:"
            if kind == GEN_DNS:
                prefix = b"DNS:"
            goes_on = told(user, prefix, ASN1_STRING_get0_data(text), ASN1_STRING_length(text))
        at += 1
    GENERAL_NAMES_free(others)
    X509_free(shown)
    return True


cdef struct looked_t:
    const access_t *access
    identity_t *found


cdef bint look_for(
    void *user, const char *kind, const uint8_t *name, size_t length
) noexcept nogil:
    cdef looked_t *looked = <looked_t *>user
    cdef uint8_t by[CERTIFICATE_NAME_BYTES_MAX]
    cdef size_t kind_length = strlen(kind), i
    if kind_length + length > CERTIFICATE_NAME_BYTES_MAX:
        return True
    memcpy(by, kind, kind_length)
    memcpy(by + kind_length, name, length)
    if kind[0] == 68:   # names of DNS are the same in any case
        for i in range(kind_length, kind_length + length):
            if 65 <= by[i] <= 90:
                by[i] |= 32
    looked.found = known_by(looked.access, by, kind_length + length)
    return looked.found == NULL


cdef void look_at_certificate(conn_t *conn, const access_t *access) noexcept nogil:
    cdef looked_t looked
    if conn.shown.has_looked:
        return
    conn.shown.has_looked = 1
    if conn.ssl != NULL:
        looked.access = access
        looked.found = NULL
        conn.shown.has_certificate = tell_names(conn.ssl, look_for, &looked)
        conn.shown.by_certificate = looked.found


# --- calls ----------------------------------------------------------------------------------------

cdef void refuse_unknown(call_t *call, const access_t *access, int why) noexcept nogil:
    count(call.worker, COUNT_UNAUTHENTICATED, 1)
    call_fail(call, UNAUTHENTICATED, access.unknown[why].bytes, access.unknown[why].length)


cdef identity_t *caller_of(call_t *call, const access_t *access) noexcept nogil:
    """Answer who calls; NULL if nobody is known, and then the call has its answer."""
    cdef conn_t *conn = call.down
    cdef head_t *head = &call.head
    cdef header_t *header
    cdef text_t value, token
    cdef identity_t *found
    cdef bint is_token = False
    if head.authorizations > 1:
        refuse_unknown(call, access, SHOWN_TWICE)
        return NULL
    if head.authorizations:
        header = &call.request.items[head.authorization_at]
        value.bytes = header.value
        value.length = header.value_length
        is_token = bearer_token(&value, &token)
        found = token_identity(conn, access, &token) if is_token else NULL
        if found != NULL:
            if not access.passes_tokens:
                header.kind = HELD_BACK   # of hits; tier 2 looks at it itself
            return found
    look_at_certificate(conn, access)
    if conn.shown.by_certificate != NULL:
        return conn.shown.by_certificate
    if not head.authorizations:
        refuse_unknown(
            call, access, UNKNOWN_CERTIFICATE if conn.shown.has_certificate else NOTHING_SHOWN)
    else:
        refuse_unknown(call, access, UNKNOWN_TOKEN if is_token else NOT_A_TOKEN)
    return NULL


cdef bint admit(call_t *call, const access_t *access, const method_t *method) noexcept nogil:
    """Answer whether a client may make a call; if not, it has its answer."""
    cdef identity_t *caller
    cdef text_t *refusal
    cdef uint8_t needs = INFER
    if method.flags & METHOD_OWN or (
            method.flags & METHOD_OWN_UNLESS_ID and not has_id(&call.head)):
        needs = method.needs
    if needs == ANYBODY:
        return True
    caller = caller_of(call, access)
    if caller == NULL:
        return False
    refusal = &caller.refusals[needs]
    if refusal.bytes == NULL:
        return True
    count(call.worker, COUNT_DENIED, 1)
    call_fail(call, PERMISSION_DENIED, refusal.bytes, refusal.length)
    return False


cdef uint32_t put_certificate(call_t *call, nghttp2_nv *nv) noexcept nogil:
    """Tell tier 2 who the certificate of the client says that it is, if it has one."""
    cdef config_t *config = call.worker.config
    cdef conn_t *conn = call.down
    cdef identity_t *identity
    if config == NULL or config.access == NULL or conn == NULL or conn.ssl == NULL:
        return 0
    look_at_certificate(conn, config.access)
    if not conn.shown.has_certificate:
        return 0
    identity = conn.shown.by_certificate
    # The configuration may be replaced while the frame waits, so the name is copied.
    put(nv, b"mm-wire-certificate", 19, b"mm-wire-certificate", 0, 0)
    if identity != NULL:
        nv.value = identity.name.bytes
        nv.valuelen = identity.name.length
    nv.flags = NGHTTP2_NV_FLAG_NO_COPY_NAME
    return 1

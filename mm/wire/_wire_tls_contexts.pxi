# How TLS is spoken: contexts, which both data planes go by, and sessions for the one in Python.

cdef bint speaks_h2(const SSL *ssl) noexcept nogil:
    """Answer whether that was agreed on."""
    cdef const unsigned char *chosen = NULL
    cdef unsigned int length = 0
    SSL_get0_alpn_selected(ssl, &chosen, &length)
    return length == 2 and memcmp(chosen, b"h2", 2) == 0


cdef const char *why_refused(const SSL *ssl, bint *is_http) noexcept nogil:
    """Answer why OpenSSL gave up, in words, and whether the other side speaks plain HTTP."""
    cdef unsigned long error = ERR_peek_error()
    cdef int reason = ERR_GET_REASON(error)
    cdef const char *text = ERR_reason_error_string(error)
    is_http[0] = reason == SSL_R_HTTP_REQUEST or reason == SSL_R_HTTPS_PROXY_REQUEST
    if is_http[0]:
        return b"it speaks plain HTTP"
    if SSL_get_verify_result(ssl) != X509_V_OK:
        return X509_verify_cert_error_string(SSL_get_verify_result(ssl))
    if text == NULL:
        text = b"it failed"
    return text


cdef int choose_h2(
    SSL *_ssl, const unsigned char **out, unsigned char *length, const unsigned char *offered,
    unsigned int offered_length, void *_user
) noexcept nogil:
    # Who offers nothing is told after the handshake.
    if SSL_select_next_proto(
            <unsigned char **>out, length, b"\x02h2", 3, offered, offered_length
            ) == OPENSSL_NPN_NEGOTIATED:
        return SSL_TLSEXT_ERR_OK
    return SSL_TLSEXT_ERR_ALERT_FATAL


cdef int verified(int is_good, X509_STORE_CTX *store) noexcept nogil:
    """What is in the list is trusted itself, whatever it says it is for: OpenSSL asks that of it
    if the authority that signed it is in the list, too.
    """
    cdef X509 *shown
    cdef X509s *listed
    cdef int i
    if (is_good or X509_STORE_CTX_get_error(store) != X509_V_ERR_INVALID_PURPOSE
            or X509_STORE_CTX_get_error_depth(store) != 0):
        return is_good
    shown = X509_STORE_CTX_get_current_cert(store)
    listed = X509_STORE_CTX_get1_certs(store, X509_get_subject_name(shown))
    if listed == NULL:
        return 0
    for i in range(sk_X509_num(listed)):
        if X509_cmp(shown, sk_X509_value(listed, i)) == 0:
            is_good = 1
    sk_X509_pop_free(listed, X509_free)
    if is_good:
        X509_STORE_CTX_set_error(store, X509_V_OK)
    return is_good


cdef class TlsContext:
    """How one kind of connection speaks TLS; never changed once it is made.

    The certificates to trust are those of the system if there are none (None).
    """

    cdef SSL_CTX *core

    def __cinit__(
        self, bytes chain, bytes key, trust, *, bint is_server, bint asks, bint demands,
        bytes ciphers
    ):
        self.core = SSL_CTX_new(TLS_server_method() if is_server else TLS_client_method())
        if self.core == NULL:
            raise MemoryError
        SSL_CTX_set_options(self.core, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION)
        # Idle connections give their buffers back.
        SSL_CTX_set_mode(self.core, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER)
        # Sessions are resumed by tickets, for which nothing is kept.
        SSL_CTX_set_session_cache_mode(self.core, SSL_SESS_CACHE_OFF)
        if (not SSL_CTX_set_min_proto_version(self.core, TLS1_2_VERSION)
                or not SSL_CTX_set_cipher_list(self.core, ciphers)
                or not SSL_CTX_set_session_id_context(self.core, b"mm", 2)):
            raise self._refused("ciphers")
        if is_server:
            SSL_CTX_set_alpn_select_cb(self.core, choose_h2, NULL)
        elif SSL_CTX_set_alpn_protos(self.core, b"\x02h2", 3) != 0:
            raise MemoryError
        self._show(chain, key)
        if asks:
            self._trust(trust)
            SSL_CTX_set_verify(
                self.core,
                SSL_VERIFY_PEER | (SSL_VERIFY_FAIL_IF_NO_PEER_CERT if demands else 0), verified)

    def __dealloc__(self):
        SSL_CTX_free(self.core)

    def _refused(self, what):
        cdef const char *reason = ERR_reason_error_string(ERR_peek_error())
        ERR_clear_error()
        return ValueError(f"{what}: {reason.decode() if reason != NULL else 'not valid'}")

    def _show(self, bytes chain, bytes key):
        cdef list certificates = []
        cdef BIO *bio = BIO_new_mem_buf(<const char *>key, <int>len(key))
        cdef EVP_PKEY *secret = PEM_read_bio_PrivateKey(bio, NULL, NULL, NULL)
        cdef X509 *certificate
        cdef bint is_done = True
        cdef bint is_first = True
        BIO_free(bio)
        bio = BIO_new_mem_buf(<const char *>chain, <int>len(chain))
        while is_done:
            certificate = PEM_read_bio_X509_AUX(bio, NULL, NULL, NULL)
            if certificate == NULL:
                break
            if is_first:
                is_done = SSL_CTX_use_certificate(self.core, certificate)
            else:
                is_done = SSL_CTX_add1_chain_cert(self.core, certificate)
            is_first = False
            X509_free(certificate)
        BIO_free(bio)
        if is_done:
            ERR_clear_error()   # the end of the file is one
            is_done = (
                not is_first and secret != NULL
                and SSL_CTX_use_PrivateKey(self.core, secret) == 1)
        EVP_PKEY_free(secret)
        if not is_done:
            raise self._refused("certificate or key")

    def _trust(self, trust):
        cdef bytes pem
        cdef BIO *bio
        cdef X509 *certificate
        cdef bint is_done = True
        # A certificate in the list is trusted itself, whoever signed it.
        X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(self.core), X509_V_FLAG_PARTIAL_CHAIN)
        if trust is None:
            SSL_CTX_set_default_verify_paths(self.core)
            return
        pem = trust
        bio = BIO_new_mem_buf(<const char *>pem, <int>len(pem))
        while is_done:
            certificate = PEM_read_bio_X509_AUX(bio, NULL, NULL, NULL)
            if certificate == NULL:
                break
            is_done = X509_STORE_add_cert(SSL_CTX_get_cert_store(self.core), certificate)
            X509_free(certificate)
        BIO_free(bio)
        if not is_done:
            raise self._refused("trusted certificates")
        ERR_clear_error()


cdef SSL_CTX *context_of(object told) except? NULL:
    """Answer a context, counted for whoever keeps it; NULL for None."""
    cdef TlsContext context
    if told is None:
        return NULL
    context = <TlsContext?>told
    SSL_CTX_up_ref(context.core)
    return context.core


cdef bint list_name(
    void *user, const char *kind, const uint8_t *name, size_t length
) noexcept nogil:
    cdef bint is_dns = kind[0] == 68
    with gil:
        text = name[:length].decode("utf-8", "replace")
        (<list>user).append(kind.decode() + (text.lower() if is_dns else text))
    return True


class TlsError(Exception):
    """OpenSSL gave a connection up; the text says why."""

    def __init__(self, str why, bint is_http):
        super().__init__(why)
        #: The other side speaks plain HTTP.
        self.is_http = is_http


cdef class TlsSession:
    """TLS of one connection for Python: bytes in, bytes out, and no socket.

    After each call that may have something to say, also one that raised, ``take`` answers it.
    """

    cdef SSL *ssl
    cdef BIO *incoming   # both are the SSL's
    cdef BIO *outgoing

    def __cinit__(self, TlsContext context not None, bint is_server):
        self.ssl = SSL_new(context.core)
        self.incoming = BIO_new(BIO_s_mem())
        self.outgoing = BIO_new(BIO_s_mem())
        if self.ssl == NULL or self.incoming == NULL or self.outgoing == NULL:
            raise MemoryError
        SSL_set_bio(self.ssl, self.incoming, self.outgoing)
        if is_server:
            SSL_set_accept_state(self.ssl)
        else:
            SSL_set_connect_state(self.ssl)

    def __dealloc__(self):
        SSL_free(self.ssl)

    cdef _gave_up(self):
        cdef bint is_http
        cdef const char *why = why_refused(self.ssl, &is_http)
        return TlsError(why.decode("ascii", "replace"), is_http)

    def feed(self, bytes data):
        """Take what came from the socket."""
        if BIO_write(self.incoming, <const char *>data, <int>len(data)) != len(data):
            raise MemoryError

    def take(self):
        """Answer what has to be sent."""
        cdef int length = <int>BIO_ctrl_pending(self.outgoing)
        cdef bytes data
        if length == 0:
            return b""
        data = PyBytes_FromStringAndSize(NULL, length)
        BIO_read(self.outgoing, <char *>data, length)
        return data

    def shake(self):
        """Go on with the handshake; answers whether it is complete."""
        cdef int done
        ERR_clear_error()
        done = SSL_do_handshake(self.ssl)
        if done == 1:
            return True
        if SSL_get_error(self.ssl, done) != SSL_ERROR_WANT_READ:
            raise self._gave_up()
        return False

    def speaks_h2(self):
        """Answer whether the handshake has agreed on HTTP/2."""
        return speaks_h2(self.ssl)

    def certificate_names(self):
        """Answer what the other side's certificate calls it."""
        cdef list found = []
        tell_names(self.ssl, list_name, <void *>found)
        return tuple(found)

    def read(self):
        """Answer what is there in plain; None if nothing is, and nothing follows."""
        cdef list pieces = []
        cdef char piece[16384]
        cdef int n, why
        ERR_clear_error()
        while True:
            n = SSL_read(self.ssl, piece, sizeof(piece))
            if n <= 0:
                break
            pieces.append(piece[:n])
        why = SSL_get_error(self.ssl, n)
        if why == SSL_ERROR_ZERO_RETURN and not pieces:
            return None
        if why != SSL_ERROR_WANT_READ and why != SSL_ERROR_ZERO_RETURN:
            raise self._gave_up()
        return b"".join(pieces)

    def write(self, bytes data):
        """Seal bytes."""
        ERR_clear_error()
        if len(data) != 0 and SSL_write(self.ssl, <const char *>data, <int>len(data)) <= 0:
            raise self._gave_up()

    def close(self):
        """Say that nothing follows."""
        ERR_clear_error()
        SSL_shutdown(self.ssl)

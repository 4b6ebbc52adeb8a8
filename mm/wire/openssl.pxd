# What the wire takes from OpenSSL (1.1.1 or newer; the build asks for it).

from libc.stddef cimport size_t

cdef extern from "openssl/ssl.h" nogil:
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct SSL_METHOD:
        pass
    ctypedef struct BIO:
        pass
    ctypedef struct BIO_METHOD:
        pass
    ctypedef struct X509:
        pass
    ctypedef struct X509_STORE:
        pass
    ctypedef struct X509_VERIFY_PARAM:
        pass
    ctypedef struct X509_STORE_CTX:
        pass
    ctypedef struct X509_NAME:
        pass
    ctypedef struct X509s "STACK_OF(X509)":
        pass
    ctypedef struct X509_NAME_ENTRY:
        pass
    ctypedef struct ASN1_STRING:
        pass
    ctypedef struct GENERAL_NAME:
        pass
    ctypedef struct GENERAL_NAMES:
        pass
    ctypedef struct EVP_MD:
        pass
    ctypedef struct ENGINE:
        pass
    ctypedef struct EVP_PKEY:
        pass
    int X509_V_ERR_INVALID_PURPOSE
    int TLS1_2_VERSION
    int SSL_ERROR_WANT_READ, SSL_ERROR_ZERO_RETURN
    int SSL_VERIFY_NONE, SSL_VERIFY_PEER, SSL_VERIFY_FAIL_IF_NO_PEER_CERT
    int SSL_SESS_CACHE_OFF, SSL_RECEIVED_SHUTDOWN
    int SSL_TLSEXT_ERR_OK, SSL_TLSEXT_ERR_ALERT_FATAL, OPENSSL_NPN_NEGOTIATED
    int SSL3_RT_HANDSHAKE, SSL3_MT_KEY_UPDATE
    int SSL_R_HTTP_REQUEST, SSL_R_HTTPS_PROXY_REQUEST
    unsigned long SSL_OP_NO_COMPRESSION, SSL_OP_NO_RENEGOTIATION
    long SSL_MODE_RELEASE_BUFFERS, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER
    unsigned long X509_V_FLAG_PARTIAL_CHAIN
    int X509_V_OK
    int NID_commonName, NID_subject_alt_name, GEN_DNS, GEN_URI
    int BIO_CTRL_FLUSH, BIO_TYPE_SOURCE_SINK

    const SSL_METHOD *TLS_server_method()
    const SSL_METHOD *TLS_client_method()
    SSL_CTX *SSL_CTX_new(const SSL_METHOD *)
    void SSL_CTX_free(SSL_CTX *)
    int SSL_CTX_up_ref(SSL_CTX *)
    int SSL_CTX_set_min_proto_version(SSL_CTX *, int)
    unsigned long SSL_CTX_set_options(SSL_CTX *, unsigned long)
    long SSL_CTX_set_mode(SSL_CTX *, long)
    long SSL_CTX_set_session_cache_mode(SSL_CTX *, long)
    int SSL_CTX_set_session_id_context(SSL_CTX *, const unsigned char *, unsigned int)
    int SSL_CTX_set_cipher_list(SSL_CTX *, const char *)
    int SSL_CTX_use_certificate(SSL_CTX *, X509 *)
    int SSL_CTX_add1_chain_cert(SSL_CTX *, X509 *)
    int SSL_CTX_use_PrivateKey(SSL_CTX *, EVP_PKEY *)
    int SSL_CTX_set_default_verify_paths(SSL_CTX *)
    void SSL_CTX_set_verify(SSL_CTX *, int, int (*)(int, X509_STORE_CTX *) noexcept nogil)
    int X509_STORE_CTX_get_error(X509_STORE_CTX *)
    int X509_STORE_CTX_get_error_depth(X509_STORE_CTX *)
    void X509_STORE_CTX_set_error(X509_STORE_CTX *, int)
    X509 *X509_STORE_CTX_get_current_cert(X509_STORE_CTX *)
    X509s *X509_STORE_CTX_get1_certs(X509_STORE_CTX *, X509_NAME *)
    X509_NAME *X509_get_subject_name(X509 *)
    int X509_cmp(const X509 *, const X509 *)
    int sk_X509_num(const X509s *)
    X509 *sk_X509_value(const X509s *, int)
    void sk_X509_pop_free(X509s *, void (*)(X509 *) nogil)
    X509_STORE *SSL_CTX_get_cert_store(const SSL_CTX *)
    X509_VERIFY_PARAM *SSL_CTX_get0_param(SSL_CTX *)
    int X509_VERIFY_PARAM_set_flags(X509_VERIFY_PARAM *, unsigned long)
    int X509_STORE_add_cert(X509_STORE *, X509 *)
    ctypedef int (*alpn_select_cb)(
        SSL *, const unsigned char **, unsigned char *, const unsigned char *, unsigned int,
        void *) noexcept nogil
    void SSL_CTX_set_alpn_select_cb(SSL_CTX *, alpn_select_cb, void *)
    int SSL_CTX_set_alpn_protos(SSL_CTX *, const unsigned char *, unsigned int)
    int SSL_select_next_proto(
        unsigned char **, unsigned char *, const unsigned char *, unsigned int,
        const unsigned char *, unsigned int)
    SSL *SSL_new(SSL_CTX *)
    void SSL_free(SSL *)
    void SSL_set_bio(SSL *, BIO *, BIO *)
    BIO *SSL_get_rbio(const SSL *)
    void SSL_set_msg_callback(
        SSL *, void (*)(int, int, int, const void *, size_t, SSL *, void *) noexcept nogil)
    void SSL_set_accept_state(SSL *)
    void SSL_set_connect_state(SSL *)
    int SSL_do_handshake(SSL *)
    int SSL_in_before(const SSL *)
    int SSL_read(SSL *, void *, int)
    int SSL_write(SSL *, const void *, int)
    int SSL_shutdown(SSL *)
    int SSL_get_shutdown(const SSL *)
    int SSL_get_error(const SSL *, int)
    long SSL_get_verify_result(const SSL *)
    void SSL_get0_alpn_selected(const SSL *, const unsigned char **, unsigned int *)
    const char *X509_verify_cert_error_string(long)
    void X509_free(X509 *)
    void EVP_PKEY_free(EVP_PKEY *)

cdef extern from "openssl/bio.h" nogil:
    BIO *BIO_new(const BIO_METHOD *)
    BIO *BIO_new_mem_buf(const void *, int)
    const BIO_METHOD *BIO_s_mem()
    int BIO_free(BIO *)
    int BIO_read(BIO *, void *, int)
    int BIO_write(BIO *, const void *, int)
    size_t BIO_ctrl_pending(BIO *)
    void BIO_set_data(BIO *, void *)
    void *BIO_get_data(BIO *)
    void BIO_set_init(BIO *, int)
    void BIO_set_retry_read(BIO *)
    void BIO_clear_retry_flags(BIO *)
    BIO_METHOD *BIO_meth_new(int, const char *)
    int BIO_meth_set_read(BIO_METHOD *, int (*)(BIO *, char *, int) noexcept nogil)
    int BIO_meth_set_write(BIO_METHOD *, int (*)(BIO *, const char *, int) noexcept nogil)
    int BIO_meth_set_ctrl(BIO_METHOD *, long (*)(BIO *, int, long, void *) noexcept nogil)

cdef extern from "openssl/pem.h" nogil:
    X509 *PEM_read_bio_X509_AUX(BIO *, X509 **, void *, void *)
    EVP_PKEY *PEM_read_bio_PrivateKey(BIO *, EVP_PKEY **, void *, void *)

cdef extern from "openssl/err.h" nogil:
    void ERR_clear_error()
    unsigned long ERR_peek_error()
    const char *ERR_reason_error_string(unsigned long)
    int ERR_GET_REASON(unsigned long)

cdef extern from "openssl/x509v3.h" nogil:
    X509 *SSL_get_peer_certificate(const SSL *)
    int X509_NAME_get_index_by_NID(X509_NAME *, int, int)
    X509_NAME_ENTRY *X509_NAME_get_entry(const X509_NAME *, int)
    ASN1_STRING *X509_NAME_ENTRY_get_data(const X509_NAME_ENTRY *)
    const unsigned char *ASN1_STRING_get0_data(const ASN1_STRING *)
    int ASN1_STRING_length(const ASN1_STRING *)
    void *X509_get_ext_d2i(const X509 *, int, int *, int *)
    int sk_GENERAL_NAME_num(const GENERAL_NAMES *)
    GENERAL_NAME *sk_GENERAL_NAME_value(const GENERAL_NAMES *, int)
    void *GENERAL_NAME_get0_value(const GENERAL_NAME *, int *)
    void GENERAL_NAMES_free(GENERAL_NAMES *)

cdef extern from "openssl/evp.h" nogil:
    const EVP_MD *EVP_sha256()
    int EVP_Digest(
        const void *, size_t, unsigned char *, unsigned int *, const EVP_MD *, ENGINE *)

cdef extern from "openssl/crypto.h" nogil:
    int CRYPTO_memcmp(const void *, const void *, size_t)
    void OPENSSL_cleanse(void *, size_t)

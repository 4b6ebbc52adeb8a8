"""What is needed for TLS to etcd: the roots to trust, and who we are (around 4.1, interop 2.3).

Owns the reading of keys and certificates in PEM form, and what is said of those that are no good;
no text repeats what stands in one. Which attributes they come from is ``mm.edge.kv_config``'s.
"""

from __future__ import annotations

import datetime
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

#: Where Debian, Alpine and Red Hat keep the certificates that the system trusts.
_SYSTEM_ROOTS: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/ssl/cert.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
)
_PEM_BEGINS: Final = b"-----BEGIN "


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """TLS to etcd. Not shown: one of them is a key, and the others are long."""

    #: Certificates in PEM form; empty: those that come with gRPC.
    roots: bytes = field(default=b"", repr=False)
    #: Both or neither, in PEM form.
    client_key: bytes = field(default=b"", repr=False)
    client_chain: bytes = field(default=b"", repr=False)


def system_roots() -> bytes:
    """Answer the certificates that the system trusts; nothing if it has none."""
    found = ssl.get_default_verify_paths().cafile
    for path in (os.environ.get("SSL_CERT_FILE"), found, *_SYSTEM_ROOTS):
        if path and Path(path).is_file():
            return Path(path).read_bytes()
    return b""


def certificates_fault(pem: bytes, *, is_chain: bool) -> str:
    """Answer what is wrong with certificates in PEM form; nothing if they can be used.

    ``is_chain``: the first is the one that counts; else any is of use.
    """
    # Takes a tenth of a second to import, which most instances have no use for.
    from cryptography import x509

    if _PEM_BEGINS not in pem:
        return 'it is not in PEM form; allowed: "-----BEGIN CERTIFICATE-----" and so on, in lines'
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except ValueError:
        return "it holds no certificate in PEM form that can be read"
    counting = certificates[:1] if is_chain else certificates
    ends = max(each.not_valid_after_utc for each in counting)
    if ends < datetime.datetime.now(datetime.UTC):
        return f"it expired on {ends:%Y-%m-%d}; a new one is needed"
    return ""


def key_fault(key_pem: bytes, chain_pem: bytes) -> str:
    """Answer what is wrong with a private key in PEM form, or with it and its certificate."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    if _PEM_BEGINS not in key_pem:
        return 'it is not in PEM form; allowed: "-----BEGIN PRIVATE KEY-----" and so on, in lines'
    try:
        key = serialization.load_pem_private_key(key_pem, None)
    except TypeError:
        return "it is encrypted; allowed: a key without a passphrase (openssl pkey -in FILE)"
    except (ValueError, UnsupportedAlgorithm):
        return "it holds no private key in PEM form that can be read"
    # The first certificate is the client's own.
    if x509.load_pem_x509_certificates(chain_pem)[0].public_key() != key.public_key():
        return "it is not the key of the client certificate"
    return ""

"""The TLS of the page of metrics: a certificate of our own, or that of the service (around 13.2).

Our own is for scrapers that verify none. It is made at the start and kept in memory: the file
system may be read-only, and nobody else needs the key. Where the files of the service's are, and
when they change, is ``mm.edge.tls``'s.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

#: Longer than an instance lives.
VALID_DAYS: Final = 3650
#: Clocks differ, and a certificate that begins tomorrow is refused even by those who trust all.
BEGINS_EARLIER_DAYS: Final = 1


def page_context() -> ssl.SSLContext:
    """Answer the TLS of the page; a certificate is still to be given to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def use(context: ssl.SSLContext, key_and_chain: bytes) -> None:
    """Show this certificate, PEM, on connections from now on."""
    # The ssl module reads keys from files alone; this one has no name and no place on a disk.
    memory = os.memfd_create("certificate", os.MFD_CLOEXEC)
    with os.fdopen(memory, "wb") as file:
        file.write(key_and_chain)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{memory}")


def self_signed(host: str) -> bytes:
    """Answer a key and a certificate for a server at ``host``, made now, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "modelmesh")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=BEGINS_EARLIER_DAYS))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + certificate.public_bytes(serialization.Encoding.PEM)


def _names(host: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    host = host.removeprefix("[").removesuffix("]")
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        names.append(x509.DNSName(host))
    return names

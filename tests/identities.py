"""Keys and certificates for tests of TLS, made in memory and written where a test wants them.

An ``Identity`` is both as objects; an ``Authority`` issues a ``Pair``, which is both as PEM.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Identity:
    """A key with its certificate."""

    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    certificate: x509.Certificate

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self, passphrase: bytes = b"") -> bytes:
        return key_pem(self.key, passphrase)

    def write(self, directory: Path, *chain: Identity, passphrase: bytes = b"") -> dict[str, str]:
        """Write both files; answers the settings that name them."""
        directory.mkdir(exist_ok=True)
        key, certificate = directory / "tls.key", directory / "tls.crt"
        key.write_bytes(self.key_pem(passphrase))
        certificate.write_bytes(b"".join(each.certificate_pem for each in (self, *chain)))
        return {"MM_TLS_PRIVATE_KEY_PATH": str(key), "MM_TLS_KEY_CERT_PATH": str(certificate)}


def make(
    name: str,
    issuer: Identity | None = None,
    *,
    is_authority: bool = False,
    days: int = 30,
    hosts: Sequence[str] | None = None,
    usage: x509.ObjectIdentifier | None = None,
    key: rsa.RSAPrivateKey | None = None,
) -> Identity:
    """Make a certificate for ``hosts``, else for ``name`` and localhost, signed by itself if nobody
    else does.
    """
    own = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = ("localhost", name) if hosts is None else hosts
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 400 * _DAY)
        .not_valid_after(now + days * _DAY)
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
    )
    if names:
        alternatives = x509.SubjectAlternativeName([_host(host) for host in names])
        builder = builder.add_extension(alternatives, critical=False)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return Identity(own, builder.sign(issuer.key if issuer else own, hashes.SHA256()))


def spoilt_pem(identity: Identity, flaw: str) -> bytes:
    """Answer the certificate with a flaw that its signature would tell, but only if asked."""
    der = bytearray(identity.certificate.public_bytes(serialization.Encoding.DER))
    if flaw == "end":
        del der[-20:]
    else:
        # After what stands in the certificate, how far on, and which bits are turned.
        mark, distance, bits = {
            "point": ("03420004", 10, 1),  # of the public key: off its curve
            "version": ("a003020102", 4, 3),
            "curve": ("06082a8648ce3d030107", 9, 0x52),
            "key": ("06072a8648ce3d0201", 8, 0x54),
            "name": ("0603550403", 7, 0x80),  # of the issuer: not UTF-8
        }[flaw]
        der[der.index(bytes.fromhex(mark)) + distance] ^= bits
    return (
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    )


def make_authority(name: str = "authority") -> Identity:
    """Make an authority."""
    return make(name, is_authority=True)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both as PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates; whoever trusts ``certificate`` trusts them."""

    def __init__(self, name: str = "test authority") -> None:
        self._identity = make(name, is_authority=True, hosts=())
        self.certificate = self._identity.certificate_pem

    def issue(self, name: str, hosts: Sequence[str] = (), *, days: int = 30) -> Pair:
        """Sign a certificate for a server at ``hosts``, or a client called ``name``."""
        own = make(name, self._identity, hosts=hosts, days=days)
        return Pair(own.certificate_pem, own.key_pem())


def key_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, passphrase: bytes = b"") -> bytes:
    """Answer a private key as PEM, encrypted if there is a passphrase."""
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        protection = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


#: What a certificate is for.
SERVERS, CLIENTS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH

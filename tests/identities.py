"""Keys and certificates for tests of TLS, made in memory and written where a test wants them."""

from __future__ import annotations

import datetime
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
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase)
            if passphrase
            else serialization.NoEncryption(),
        )

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
    usage: x509.ObjectIdentifier | None = None,
    key: rsa.RSAPrivateKey | None = None,
) -> Identity:
    """Make a certificate for ``name`` and localhost, signed by itself if nobody else."""
    own = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.DNSName(name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 400 * _DAY)
        .not_valid_after(now + days * _DAY)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return Identity(own, builder.sign(issuer.key if issuer else own, hashes.SHA256()))


def make_authority(name: str = "authority") -> Identity:
    """Make an authority."""
    return make(name, is_authority=True)


#: What a certificate is for.
SERVERS, CLIENTS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH

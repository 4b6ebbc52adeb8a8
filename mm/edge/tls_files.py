"""What the files of TLS say: the key, the certificate, and whom to trust (around 13).

Owns reading them, and everything that can be wrong with them, so that it is told in words and
before anybody connects. Who goes by it is ``mm.edge.tls``'s; which files there are,
``mm.tls_settings``'s.
"""

from __future__ import annotations

import base64
import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from mm.errors import ConfigError
from mm.tls_settings import CERTIFICATE, KEY, PASSPHRASE, PEERS_TRUST, TRUST, TlsSettings

#: Of a directory these are read.
TRUST_SUFFIXES: Final = (".pem", ".crt")
#: The largest bundles of authorities have a third of a MiB.
FILE_BYTES_MAX: Final = 4 * 2**20
#: A certificate that ends within this time is worth a warning.
SOON_S: Final = 7 * 86400
#: Behind a certificate, this says what it is trusted for (OpenSSL's X509_CERT_AUX): clients and
#: servers. Java does not ask what a certificate is meant for if the certificate itself is in the
#: list, and the controller of modelmesh-serving shows the server's own one (interop 1.5).
_TRUSTED_FOR: Final = bytes.fromhex("3016 3014 06082b06010505070302 06082b06010505070301")


#: By path: device, inode, size and time; or why there is nothing.
Signature = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """All of it as PEM, checked; what OpenSSL takes without asking for more."""

    #: The certificate, then those that lead to its authority.
    chain: bytes
    #: Not encrypted.
    key: bytes = field(repr=False)
    #: Of clients; None: the authorities that the system trusts.
    trust: bytes | None
    #: Of other instances.
    peers_trust: bytes
    #: When the certificate ends, in seconds since the epoch.
    expiry_s: float


def read_files(settings: TlsSettings) -> TlsFiles:
    """Read everything; raises ``ConfigError`` with all that is wrong."""
    complaints: list[str] = []
    chain = _certificates(settings.certificate_path, CERTIFICATE, complaints)
    key = _key(settings, chain, complaints)
    trust = _trust(settings.trust_paths, TRUST, complaints) if settings.trust_paths else None
    peers_trust = _trust(settings.peers_trust_paths, PEERS_TRUST, complaints)
    if complaints:
        raise ConfigError(*complaints)
    own = chain[0]
    return TlsFiles(
        chain=b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain),
        key=key,
        trust=trust,
        # Not the authorities that it comes from: those may be public, and would let anybody in.
        peers_trust=_trusted(own) + peers_trust,
        expiry_s=own.not_valid_after_utc.timestamp(),
    )


def warnings_of(files: TlsFiles, now_s: float) -> Iterator[str]:
    """Answer what will keep clients away, now or soon."""
    left_s = files.expiry_s - now_s
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(files.expiry_s))
    if left_s <= 0:
        yield f"{CERTIFICATE}: the certificate ended at {when}; nobody who checks it will connect"
    elif left_s < SOON_S:
        yield f"{CERTIFICATE}: the certificate ends at {when}"


def signature(settings: TlsSettings) -> Signature:
    """Answer what differs after any change of the files: edits, renames, and new ones."""
    paths = [settings.key_path, settings.certificate_path]
    for path in (*settings.trust_paths, *settings.peers_trust_paths):
        try:
            paths += map(str, _expanded(path))
        except OSError:
            paths.append(path)
    return tuple((path, _look(path)) for path in paths)


def _look(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError as exc:
        return (exc.errno or 0,)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _expanded(path: str) -> list[Path]:
    """Answer the files that a path of a list stands for. Raises ``OSError``."""
    place = Path(path)
    if not place.is_dir():
        return [place]
    return sorted(each for each in place.iterdir() if each.suffix in TRUST_SUFFIXES)


def _content(path: Path | str) -> bytes:
    """Raises ``OSError`` or ``ValueError``."""
    with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"more than {FILE_BYTES_MAX} bytes")
    return content


def _why(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        return "OpenSSL does not take it"
    if isinstance(exc, OSError):
        return os.strerror(exc.errno).lower() if exc.errno else str(exc)
    # What the parser says may end with a page of advice.
    return str(exc).split(". ")[0].rstrip(".")


def _certificates(path: Path | str, name: str, complaints: list[str]) -> list[x509.Certificate]:
    if not path:
        return []
    try:
        found = x509.load_pem_x509_certificates(_content(path))
    except OSError as exc:
        complaints.append(f"{name}: {path} cannot be read: {_why(exc)}")
        return []
    except ValueError as exc:
        complaints.append(f"{name}: {path} has no certificates in PEM: {_why(exc)}")
        return []
    except x509.InvalidVersion as exc:
        complaints.append(f"{name}: {path} has a certificate that cannot be used: {_why(exc)}")
        return []
    flaws = [
        f"{name}: certificate {number} in {path} cannot be used: {flaw}"
        for number, each in enumerate(found, 1)
        if (flaw := _flaw(each))
    ]
    complaints += flaws
    return [] if flaws else found


def _flaw(certificate: x509.Certificate) -> str:
    """Answer why nobody could go by a certificate; empty if somebody could.

    Its parser looks at the key only when asked, and takes some that OpenSSL leaves out of a list
    without a word.
    """
    try:
        certificate.public_key()
        _ = certificate.not_valid_after_utc
        der = certificate.public_bytes(serialization.Encoding.DER)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=der)
    except (ValueError, UnsupportedAlgorithm, ssl.SSLError) as exc:
        return _why(exc)
    return ""


def _key(settings: TlsSettings, chain: list[x509.Certificate], complaints: list[str]) -> bytes:
    path = settings.key_path
    try:
        content = _content(path)
    except (OSError, ValueError) as exc:
        complaints.append(f"{KEY}: {path} cannot be read: {_why(exc)}")
        return b""
    encrypted = b"ENCRYPTED" in content
    if encrypted and not settings.passphrase:
        complaints.append(f"{KEY}: {path} is encrypted, and {PASSPHRASE} is not set")
        return b""
    # A passphrase for a key that has none is as harmless as it was in the Java mesh.
    passphrase = settings.passphrase.encode() if encrypted else None
    try:
        key = serialization.load_pem_private_key(content, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        if encrypted:
            complaints.append(f"{PASSPHRASE} does not open {path}")
        else:
            complaints.append(f"{KEY}: {path} has no private key in PEM: {_why(ValueError(exc))}")
        return b""
    if chain and chain[0].public_key() != key.public_key():
        complaints.append(
            f"{KEY}: {path} is not the key of the first certificate in"
            f" {settings.certificate_path} ({CERTIFICATE})"
        )
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _trust(paths: tuple[str, ...], name: str, complaints: list[str]) -> bytes:
    found: dict[bytes, None] = {}
    for path in paths:
        try:
            files = _expanded(path)
        except OSError as exc:
            complaints.append(f"{name}: {path} cannot be read: {_why(exc)}")
            continue
        if not files:
            complaints.append(f"{name}: {path} has no files that end in .pem or .crt")
        for file in files:
            for each in _certificates(file, name, complaints):
                found[_trusted(each)] = None
    return b"".join(found)


def _trusted(certificate: x509.Certificate) -> bytes:
    text = base64.encodebytes(certificate.public_bytes(serialization.Encoding.DER) + _TRUSTED_FOR)
    return b"-----BEGIN TRUSTED CERTIFICATE-----\n" + text + b"-----END TRUSTED CERTIFICATE-----\n"

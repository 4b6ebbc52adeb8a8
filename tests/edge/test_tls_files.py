"""The files of TLS: what is taken, and what is said of those that are not."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from mm.edge.tls import make_contexts
from mm.edge.tls_files import read_files, signature, warnings_of
from mm.errors import ConfigError
from mm.tls_settings import TlsSettings
from tests.identities import Identity, make, make_authority, spoilt_pem


@pytest.fixture(scope="module")
def server() -> Identity:
    return make("server")


def settings_for(identity: Identity, directory: Path, *chain: Identity) -> TlsSettings:
    key, certificate = identity.write(directory, *chain).values()
    return TlsSettings(key_path=key, certificate_path=certificate, peers=True)


def complaints_of(settings: TlsSettings) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        make_contexts(settings, read_files(settings))
    return caught.value.complaints


def test_a_chain_and_its_key(tmp_path: Path) -> None:
    authority = make_authority()
    server = make("server", authority)
    settings = settings_for(server, tmp_path, authority)
    files = read_files(settings)
    assert files.chain == server.certificate_pem + authority.certificate_pem
    assert files.key == server.key_pem()
    assert files.trust is None
    assert files.expiry_s == server.certificate.not_valid_after_utc.timestamp()
    assert "PRIVATE" not in repr(files)
    make_contexts(settings, files)
    # Itself alone: the authority may be a public one.
    assert files.peers_trust.count(b"BEGIN TRUSTED CERTIFICATE") == 1


@pytest.mark.parametrize("form", ["pkcs8", "pkcs8 sealed", "traditional", "traditional sealed"])
def test_forms_of_keys(form: str, server: Identity, tmp_path: Path) -> None:
    """The Java mesh took PKCS8 alone."""
    settings = settings_for(server, tmp_path)
    is_sealed = form.endswith("sealed")
    pem = server.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8
        if form.startswith("pkcs8")
        else serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"open sesame")
        if is_sealed
        else serialization.NoEncryption(),
    )
    Path(settings.key_path).write_bytes(pem)
    opened = replace(settings, passphrase="open sesame")
    assert read_files(opened).key == server.key_pem()
    if is_sealed:
        key = settings.key_path
        assert complaints_of(settings) == (
            f"MM_TLS_PRIVATE_KEY_PATH: {key} is encrypted,"
            " and MM_TLS_PRIVATE_KEY_PASSPHRASE is not set",
        )
        wrong = replace(settings, passphrase="open barley")
        assert complaints_of(wrong) == (f"MM_TLS_PRIVATE_KEY_PASSPHRASE does not open {key}",)


def test_directories_and_files_of_whom_to_trust(server: Identity, tmp_path: Path) -> None:
    directory = tmp_path / "trusted"
    directory.mkdir()
    one, other, third = (make(name) for name in ("one", "other", "third"))
    (directory / "a.pem").write_bytes(one.certificate_pem + other.certificate_pem)
    (directory / "b.crt").write_bytes(one.certificate_pem)
    (directory / "c.txt").write_bytes(b"not looked at")
    (tmp_path / "single").write_bytes(third.certificate_pem)
    settings = replace(
        settings_for(server, tmp_path / "own"),
        client_auth="require",
        trust_paths=(str(directory), str(tmp_path / "single")),
        peers_trust_paths=(str(directory),),
    )
    files = read_files(settings)
    assert files.trust is not None
    assert files.trust.count(b"BEGIN TRUSTED CERTIFICATE") == 3
    assert files.peers_trust.count(b"BEGIN TRUSTED CERTIFICATE") == 3
    make_contexts(settings, files)


def test_everything_that_is_wrong_is_told(server: Identity, tmp_path: Path) -> None:
    settings = settings_for(server, tmp_path)
    Path(settings.key_path).write_bytes(b"no key")
    Path(settings.certificate_path).write_bytes(b"no certificate")
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = replace(
        settings, trust_paths=(str(empty),), peers_trust_paths=(str(tmp_path / "gone"),)
    )
    found = complaints_of(settings)
    assert [each.split(":")[0] for each in found] == [
        "MM_TLS_KEY_CERT_PATH",
        "MM_TLS_PRIVATE_KEY_PATH",
        "MM_TLS_TRUST_CERT_PATH",
        "MM_INTERNAL_TRUST_CERTS",
    ]
    assert "has no certificates in PEM" in found[0]
    assert "has no private key in PEM" in found[1]
    assert found[2].endswith("empty has no files that end in .pem or .crt")
    assert found[3].endswith("gone cannot be read: no such file or directory")


def test_key_and_certificate_have_to_fit(server: Identity, tmp_path: Path) -> None:
    settings = settings_for(server, tmp_path)
    Path(settings.key_path).write_bytes(make("other").key_pem())
    (complaint,) = complaints_of(settings)
    assert "is not the key of the first certificate in" in complaint


@pytest.mark.parametrize(
    ("flaw", "text"),
    [
        ("point", "certificate 2 in {} cannot be used: Invalid key"),
        ("version", "{} has a certificate that cannot be used: 1 is not a valid X509 version"),
        ("curve", "certificate 2 in {} cannot be used: Curve 1.2.840.10045.3.1.85 is not"),
        ("key", "certificate 2 in {} cannot be used: Unknown key type: 1.2.840.10045.2.85"),
        ("name", "certificate 2 in {} cannot be used: OpenSSL does not take it"),
        ("end", "{} has no certificates in PEM: error parsing asn1 value"),
    ],
)
def test_certificates_that_cannot_be_used(
    server: Identity, tmp_path: Path, flaw: str, text: str
) -> None:
    """Nowhere: as the own one, behind it, and among those to trust."""
    settings = settings_for(server, tmp_path)
    spoilt = tmp_path / "trusted.pem"
    spoilt.write_bytes(server.certificate_pem + spoilt_pem(server, flaw))
    trusting = replace(settings, trust_paths=(str(spoilt),), peers_trust_paths=(str(spoilt),))
    for complaint, name in zip(
        complaints_of(trusting), ("MM_TLS_TRUST_CERT_PATH", "MM_INTERNAL_TRUST_CERTS"), strict=True
    ):
        assert complaint.startswith(f"{name}: {text.format(spoilt)}")
    own = Path(settings.certificate_path)
    own.write_bytes(server.certificate_pem + spoilt_pem(server, flaw))
    (complaint,) = complaints_of(settings)
    assert complaint.startswith(f"MM_TLS_KEY_CERT_PATH: {text.format(own)}")
    own.write_bytes(spoilt_pem(server, flaw))
    (complaint,) = complaints_of(settings)
    assert complaint.startswith(f"MM_TLS_KEY_CERT_PATH: {text.format(own).replace(' 2 ', ' 1 ')}")


def test_a_key_that_openssl_finds_too_short(tmp_path: Path) -> None:
    short = rsa.generate_private_key(65537, 1024)
    settings = settings_for(make("short", key=short), tmp_path)
    (complaint,) = complaints_of(settings)
    assert complaint.startswith("MM_TLS_KEY_CERT_PATH: OpenSSL does not take it")


def test_a_certificate_that_ends_is_told_of(server: Identity, tmp_path: Path) -> None:
    files = read_files(settings_for(server, tmp_path))
    assert not list(warnings_of(files, time.time()))
    assert "ends at" in next(warnings_of(files, files.expiry_s - 86400))
    assert "ended at" in next(warnings_of(files, files.expiry_s + 1))


def test_every_change_is_seen(server: Identity, tmp_path: Path) -> None:
    directory = tmp_path / "trusted"
    directory.mkdir()
    settings = replace(
        settings_for(server, tmp_path / "own"), trust_paths=(str(directory), "/none")
    )
    seen = {signature(settings)}
    (directory / "a.pem").touch()
    seen.add(signature(settings))
    (directory / "a.pem").write_text("longer")
    seen.add(signature(settings))
    Path(settings.key_path).unlink()
    seen.add(signature(settings))
    assert len(seen) == 4
    assert signature(settings) in seen


def test_files_that_are_too_large(server: Identity, tmp_path: Path) -> None:
    settings = settings_for(server, tmp_path)
    Path(settings.certificate_path).write_bytes(b"x" * (4 * 2**20 + 1))
    assert "has no certificates in PEM: more than" in complaints_of(settings)[0]

"""Keys and certificates of the etcd secret (around 4.1, interop 2.3): where they come from, and
what is said of those that are no good.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import cast

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mm.edge.etcd_tls import EtcdTls, system_roots
from mm.edge.kv_config import EtcdTarget, parse
from mm.errors import ConfigError
from tests.identities import Authority, key_pem

AUTHORITY = Authority()
ROOTS = AUTHORITY.certificate
CLIENT = AUTHORITY.issue("client")


def _target(directory: Path, **attributes: str) -> EtcdTarget:
    path = directory / "etcd.json"
    path.write_text(json.dumps({"endpoints": "https://etcd"} | attributes))
    return cast(EtcdTarget, parse(f"etcd:{path}"))


@pytest.mark.parametrize(
    ("endpoints", "is_tls"),
    [("https://a", True), ("a", True), ("a,https://b", True), ("http://a", False)],
)
def test_an_inline_certificate_means_tls_where_no_scheme_says_otherwise(
    tmp_path: Path, endpoints: str, is_tls: bool
) -> None:
    target = _target(tmp_path, endpoints=endpoints, certificate=ROOTS.decode())
    assert target.tls == (EtcdTls(roots=ROOTS) if is_tls else None)


def test_files_are_beside_the_json_file_or_absolute(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(ROOTS)
    (tmp_path / "client").mkdir()
    (tmp_path / "client/chain.pem").write_bytes(CLIENT.certificate)
    key = tmp_path / "client/key.pem"
    key.write_bytes(CLIENT.key)

    target = _target(
        tmp_path,
        certificate_file="ca.pem",
        client_certificate_file="client/chain.pem",
        client_key_file=str(key),
        override_authority="etcd.example",
    )

    assert target.tls == EtcdTls(ROOTS, CLIENT.key, CLIENT.certificate)
    assert target.authority == "etcd.example"
    assert "PRIVATE" not in repr(target)


def test_a_file_wins_over_what_stands_inline(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(ROOTS)
    other = Authority().certificate.decode()
    target = _target(tmp_path, certificate_file="ca.pem", certificate=other)
    assert target.tls == EtcdTls(roots=ROOTS)


def test_a_missing_file_gives_way_to_what_stands_inline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        target = _target(tmp_path, certificate_file="ca.pem", certificate=ROOTS.decode())
    assert target.tls == EtcdTls(roots=ROOTS)
    assert f'"certificate_file"={tmp_path}/ca.pem: no such file or directory' in caplog.text
    assert 'attribute "certificate" holds instead' in caplog.text


def test_without_certificates_those_of_the_system_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _target(tmp_path).tls == EtcdTls(system_roots())
    roots = tmp_path / "roots.pem"
    roots.write_bytes(ROOTS)
    monkeypatch.setenv("SSL_CERT_FILE", str(roots))
    assert _target(tmp_path).tls == EtcdTls(ROOTS)


ENCRYPTED = key_pem(ec.generate_private_key(ec.SECP256R1()), b"hunter2").decode()
EXPIRED = AUTHORITY.issue("client", days=-1)
CHAIN, KEY = CLIENT.certificate.decode(), CLIENT.key.decode()
BROKEN = "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("attributes", "parts"),
    [
        ({"certificate_file": "no.pem"}, ['"certificate_file"=', "no.pem: no such file", "inline"]),
        ({"certificate_file": "."}, ['"certificate_file"=', "is a directory"]),
        ({"certificate": "hunter2"}, ['"certificate": it is not in PEM form; allowed: "-----BE']),
        ({"certificate": BROKEN}, ['"certificate": it holds no certificate']),
        ({"client_certificate": CHAIN}, ['"client_key" (or "client_key_file") is missing']),
        ({"client_key": KEY}, ['"client_certificate" (or "client_certificate_file") is missing']),
        (
            {"client_certificate": CHAIN, "client_key": "hunter2"},
            ['"client_key": it is not in PEM form'],
        ),
        (
            {"client_certificate": CHAIN, "client_key": BROKEN},
            ['"client_key": it holds no private key'],
        ),
        (
            {"client_certificate": CHAIN, "client_key": ENCRYPTED},
            ['"client_key": it is encrypted', "without a passphrase"],
        ),
        (
            {"client_certificate": ROOTS.decode(), "client_key": KEY},
            ['"client_key": it is not the key of the client certificate'],
        ),
        (
            {"client_certificate": EXPIRED.certificate.decode(), "client_key": KEY},
            ['"client_certificate": it expired on 20'],
        ),
    ],
)
def test_what_is_no_good_is_named_with_the_way_out(
    tmp_path: Path, attributes: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        _target(tmp_path, **attributes)
    text = str(caught.value)
    if "inline" in parts:
        parts = [*parts[:-1], 'PEM as text in attribute "certificate"']
    for part in [*parts, f"KV_STORE=etcd:{tmp_path}/etcd.json: attribute "]:
        assert part in text
    assert "hunter2" not in text
    assert KEY.splitlines()[1] not in text


def test_all_that_is_no_good_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _target(tmp_path, certificate="x", client_certificate="y", client_key_file="z")
    assert len(caught.value.complaints) == 3


def test_a_key_of_another_form_is_taken(tmp_path: Path) -> None:
    key = serialization.load_pem_private_key(CLIENT.key, None)
    older = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    target = _target(tmp_path, client_certificate=CHAIN, client_key=older.decode())
    assert target.tls is not None
    assert target.tls.client_key == older

"""The settings of TLS: what is asked for, under which names, and what makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.config import Config
from mm.errors import ConfigError
from mm.tls_settings import PLAIN_TEXT, TlsSettings

KEY, CERTIFICATE = "MM_TLS_PRIVATE_KEY_PATH", "MM_TLS_KEY_CERT_PATH"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name in ("key", "certificate", "ca"):
        (tmp_path / name).touch()
    return {KEY: str(tmp_path / "key"), CERTIFICATE: str(tmp_path / "certificate")}


def read(variables: dict[str, str]) -> tuple[TlsSettings, tuple[str, ...]]:
    config = Config.from_environment({"KV_STORE": "memory", **variables})
    return config.tls, config.warnings


def error_of(variables: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(variables)
    return str(caught.value)


def test_nothing_is_plain_text() -> None:
    assert read({}) == (PLAIN_TEXT, ())
    no_tls = {
        "MM_ENABLE_SSL": "false",
        "MM_INTRACLUSTER_CLIENTAUTH": "false",
        "MM_TLS_CLIENT_AUTH": "NONE",
    }
    assert read(no_tls) == (PLAIN_TEXT, ())


def test_a_key_secures_both_ports(files: dict[str, str]) -> None:
    """In the Java mesh the documented name left instances in plain text (around 13.3)."""
    found, warnings = read(files)
    assert (found.key_path, found.certificate_path) == tuple(files.values())
    assert (found.peers, found.peers_auth, found.client_auth) == (True, True, "none")
    assert warnings == ()


def test_older_names(files: dict[str, str], tmp_path: Path) -> None:
    key, certificate = files.values()
    other = str(tmp_path / "ca")
    for age in ("MM", "TAS"):
        old = {
            f"{age}_SVC_GRPC_PRIVATE_KEY_PATH": key,
            f"{age}_SVC_GRPC_CA_CERT_PATH": certificate,
            "MM_SVC_GRPC_PRIVATE_KEY_PASSPHRASE": " so it is ",
            "MM_TRUST_CERTS": other,
        }
        found, warnings = read(old)
        assert (found.key_path, found.certificate_path) == (key, certificate)
        assert found.passphrase == " so it is "
        assert found.peers_trust_paths == (other,)
        assert warnings == ()
    both, _ = read({**files, "MM_SVC_GRPC_PRIVATE_KEY_PATH": "/none"})
    assert both.key_path == key


def test_lists_of_whom_to_trust(files: dict[str, str], tmp_path: Path) -> None:
    one, other = str(tmp_path / "ca"), str(tmp_path)
    settings = {
        "MM_TLS_CLIENT_AUTH": "Require",
        "MM_TLS_TRUST_CERT_PATH": f"{one}, {other},",
        "MM_INTERNAL_TRUST_CERTS": other,
    }
    found, warnings = read(files | settings)
    assert found.client_auth == "require"
    assert found.trust_paths == (one, other)
    assert found.peers_trust_paths == (other,)
    assert warnings == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (CERTIFICATE, "/"),
        ("MM_SVC_GRPC_CA_CERT_PATH", "/"),
        ("MM_TLS_PRIVATE_KEY_PASSPHRASE", "x"),
        ("MM_TLS_CLIENT_AUTH", "optional"),
        ("MM_TLS_TRUST_CERT_PATH", "/"),
        ("MM_ENABLE_SSL", "true"),
        ("MM_INTRACLUSTER_CLIENTAUTH", "true"),
        ("MM_TRUST_CERTS", "/"),
    ],
)
def test_whoever_asks_for_tls_does_not_get_plain_text(name: str, value: str) -> None:
    assert f"{name} asks for TLS, but {KEY} is not set; set it" in error_of({name: value})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (KEY, "/none", 'MM_TLS_PRIVATE_KEY_PATH="/none" is not valid; allowed: a file that exists'),
        (KEY, "", 'MM_TLS_PRIVATE_KEY_PATH="" is not valid; allowed: anything but empty'),
        (CERTIFICATE, "/tmp", "allowed: a file that exists, not a directory"),
        ("MM_TLS_CLIENT_AUTH", "yes", "allowed: none or optional or require"),
        ("MM_TLS_TRUST_CERT_PATH", "/none", "allowed: files and directories that exist"),
        ("MM_INTERNAL_TRUST_CERTS", ",", "allowed: files and directories that exist"),
        ("MM_ENABLE_SSL", "1", "allowed: true or false"),
    ],
)
def test_wrong_values(files: dict[str, str], name: str, value: str, text: str) -> None:
    assert text in error_of(files | {name: value})


def test_a_key_needs_a_certificate(files: dict[str, str]) -> None:
    del files[CERTIFICATE]
    assert error_of(files) == f"{KEY} is set, but {CERTIFICATE} is not; set both for TLS"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"MM_ENABLE_SSL": "false"},
            "MM_ENABLE_SSL=false: instances call each other in plain text",
        ),
        ({"MM_INTRACLUSTER_CLIENTAUTH": "false"}, "anybody may call at the port of the other"),
        ({"MM_TLS_CLIENT_AUTH": "require"}, "a certificate of any authority that this system"),
        ({"MM_TLS_TRUST_CERT_PATH": "/tmp"}, "with MM_TLS_CLIENT_AUTH=none no client is asked"),
    ],
)
def test_what_is_odd_is_told(files: dict[str, str], settings: dict[str, str], text: str) -> None:
    _, warnings = read(files | settings)
    assert len(warnings) == 1
    assert text in warnings[0]


def test_the_passphrase_is_not_shown(files: dict[str, str]) -> None:
    config = Config.from_environment(
        {"KV_STORE": "memory", **files, "MM_TLS_PRIVATE_KEY_PASSPHRASE": "secret"}
    )
    assert "secret" not in repr(config)

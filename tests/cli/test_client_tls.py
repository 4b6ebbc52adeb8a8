"""`mm model` and `mm vmodel` over TLS: whom they trust, who they are, and how failures are told."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm.cli.client_tls import split_scheme
from mm.pb import mmesh
from tests.cli.fake_mesh import FakeMesh, fake_mesh, run_command
from tests.identities import Authority, key_pem

EMPTY = (0, "", "no models\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a server called ``models.example``, and of one client."""
    place = tmp_path_factory.mktemp("tls")
    authority = Authority()
    server, client = authority.issue("server", ["models.example"]), authority.issue("client")
    (place / "ca.pem").write_bytes(authority.certificate)
    (place / "server.pem").write_bytes(server.certificate + server.key)
    (place / "client.pem").write_bytes(client.certificate)
    (place / "client.key").write_bytes(client.key)
    (place / "other.pem").write_bytes(Authority("other").certificate)
    (place / "empty.pem").write_bytes(b"")
    return place


def server_context(files: Path, *, asks: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(files / "ca.pem"))
    context.load_cert_chain(files / "server.pem")
    context.set_alpn_protocols(["h2"])
    context.verify_mode = ssl.CERT_REQUIRED if asks else ssl.CERT_NONE
    return context


@pytest.fixture
def tls_mesh(files: Path) -> Iterator[FakeMesh]:
    with fake_mesh(server_context(files)) as mesh:
        mesh.answer = mmesh.ListModelsResponse()
        yield mesh


def run(mesh: FakeMesh, address: str = "", **variables: str) -> tuple[int, str, str]:
    options = ("--address", f"{address}127.0.0.1:{mesh.port}") if address else ()
    return run_command(mesh, "model", "list", *options, **variables)


def test_a_mesh_that_speaks_tls(tls_mesh: FakeMesh, files: Path) -> None:
    trusts = {"MM_ADDRESS_CA_PATH": str(files / "ca.pem"), "MM_ADDRESS_NAME": "models.example"}
    assert run(tls_mesh, "https://", **trusts) == EMPTY
    assert run(tls_mesh, **trusts) == EMPTY, "the file alone asks for TLS, too"


@pytest.mark.parametrize(
    ("file", "name", "complaint"),
    [
        ("ca.pem", "other.example", "not valid for 'other.example'"),
        ("ca.pem", "", "not valid for '127.0.0.1'"),
        ("other.pem", "models.example", "its certificate is not trusted"),
        ("", "models.example", "its certificate is not trusted"),
    ],
)
def test_a_mesh_that_is_not_trusted(
    tls_mesh: FakeMesh, files: Path, file: str, name: str, complaint: str
) -> None:
    ca = str(files / file) if file else ""
    variables = {"MM_ADDRESS_CA_PATH": ca, "MM_ADDRESS_NAME": name}
    code, out, err = run(tls_mesh, "https://", **variables)
    assert (code, out) == (6, "")
    assert complaint in err
    assert "MM_ADDRESS_CA_PATH says which authorities are" in err
    assert not tls_mesh.requests


def test_plain_text_where_tls_is_spoken_and_the_other_way_round(
    tls_mesh: FakeMesh, mesh: FakeMesh, files: Path
) -> None:
    trusts = {"MM_ADDRESS_CA_PATH": str(files / "ca.pem"), "MM_ADDRESS_NAME": "models.example"}
    for address, variables in (("", {}), ("http://", trusts)):
        code, _out, err = run(tls_mesh, address, **variables)
        assert code == 6
        assert "does it speak TLS? Then say https://" in err
    code, _out, err = run(mesh, "https://", **trusts)
    assert code == 6
    assert err.startswith(f"mm: cannot connect to 127.0.0.1:{mesh.port}: no TLS: ")


def test_a_mesh_that_asks_for_a_certificate(files: Path) -> None:
    trusts = {"MM_ADDRESS_CA_PATH": str(files / "ca.pem"), "MM_ADDRESS_NAME": "models.example"}
    own = {
        "MM_ADDRESS_CERT_PATH": str(files / "client.pem"),
        "MM_ADDRESS_KEY_PATH": str(files / "client.key"),
    }
    with fake_mesh(server_context(files, asks=True)) as mesh:
        mesh.answer = mmesh.ListModelsResponse()
        assert run(mesh, **trusts, **own) == EMPTY
        code, _out, err = run(mesh, **trusts)
    assert code == 6
    assert "MM_ADDRESS_CERT_PATH and MM_ADDRESS_KEY_PATH name one" in err


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"CA": "none.pem"}, "none.pem' cannot be used: no such file or directory"),
        ({"CA": "empty.pem"}, "empty.pem' cannot be used: "),
        ({"CERT": "client.pem"}, "MM_ADDRESS_CERT_PATH: '"),
        (
            {"CERT": "client.pem", "KEY": "none.pem"},
            "MM_ADDRESS_CERT_PATH and MM_ADDRESS_KEY_PATH: '",
        ),
        ({"CERT": "client.pem", "KEY": "locked.key"}, "the key without a passphrase"),
        ({"KEY": "client.key"}, "MM_ADDRESS_KEY_PATH is set, and MM_ADDRESS_CERT_PATH is not"),
    ],
)
def test_files_that_cannot_be_used(
    mesh: FakeMesh, files: Path, variables: dict[str, str], complaint: str
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    locked = key_pem(ec.generate_private_key(ec.SECP256R1()), b"secret")
    (files / "locked.key").write_bytes(locked)
    named = {f"MM_ADDRESS_{name}_PATH": str(files / file) for name, file in variables.items()}
    code, out, err = run(mesh, "https://", **named)
    assert (code, out) == (2, "")
    assert complaint in err
    assert not mesh.requests


@pytest.mark.parametrize(
    ("address", "split"),
    [
        ("h:1", (None, "h:1")),
        ("https://h:1/", (True, "h:1")),
        ("HTTP://h", (False, "h")),
        ("ftp://h", (None, "ftp://h")),
    ],
)
def test_schemes(address: str, split: tuple[bool | None, str]) -> None:
    assert split_scheme(address) == split

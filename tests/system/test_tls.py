"""TLS and mTLS of both listeners, on each data plane (around 13, interop 1.5)."""

from __future__ import annotations

import socket
import ssl
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest

from tests.identities import SERVERS, Identity, make, make_authority
from tests.system.meshes import Instance, channel_to, mesh_of, refusal

_WAIT_S = 30.0


def credentials(
    trust: Identity, own: Identity | None = None, *chain: Identity
) -> grpc.ChannelCredentials:
    """What a grpcio client trusts and shows."""
    if own is None:
        return grpc.ssl_channel_credentials(trust.certificate_pem)
    shown = b"".join(each.certificate_pem for each in (own, *chain))
    return grpc.ssl_channel_credentials(trust.certificate_pem, own.key_pem(), shown)


@dataclass(frozen=True, slots=True)
class World:
    """An authority, whom it signed, and who signed itself."""

    authority: Identity
    server: Identity
    client: Identity
    stranger: Identity


@pytest.fixture(scope="module")
def world() -> World:
    authority = make_authority()
    return World(
        authority,
        # Not for clients: the controller shows it all the same.
        make("server", authority, usage=SERVERS),
        make("client", authority),
        make("stranger"),
    )


@contextmanager
def secured(dataplane: str, world: World, directory: Path, **settings: str) -> Iterator[Instance]:
    """One instance with TLS, alone in its mesh."""
    own = world.server.write(directory)
    with mesh_of("memory", {"MM_DATAPLANE": dataplane, **own, **settings}, "tls") as mesh:
        mesh.credentials = credentials(world.authority, world.client)
        mesh.peer_credentials = credentials(world.authority, world.server)
        yield mesh.add("secured")


@pytest.fixture(scope="module")
def instance(
    dataplane: str, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """Clients may show a certificate of the authority, or none."""
    directory = tmp_path_factory.mktemp("tls")
    trust = directory / "ca.crt"
    trust.write_bytes(world.authority.certificate_pem)
    settings = {"MM_TLS_CLIENT_AUTH": "Optional", "MM_TLS_TRUST_CERT_PATH": str(trust)}
    with secured(dataplane, world, directory, **settings) as found:
        found.register("echo", "SIZE_1000_0_0", load_now=True, sync=True)
        yield found


def ask(port: int, with_credentials: grpc.ChannelCredentials | None) -> str:
    """Call with these; answers the code of a call for a model that there is not."""
    with channel_to(port, credentials=with_credentials) as channel:
        call = channel.unary_unary("/mmesh.ExamplePredictor/predict")
        metadata = (("mm-model-id", "none"),)
        return refusal(partial(call, b"", metadata=metadata, timeout=_WAIT_S))[0].name


def client_context(trust: Identity, own: dict[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=trust.certificate_pem.decode())
    if own:
        context.load_cert_chain(own["MM_TLS_KEY_CERT_PATH"], own["MM_TLS_PRIVATE_KEY_PATH"])
    return context


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=_WAIT_S)


def read_all(sock: socket.socket) -> bytes:
    """Answer everything up to the end of the connection, however it ends."""
    found = b""
    with closing(sock):
        try:
            while piece := sock.recv(65536):
                found += piece
        except (ConnectionResetError, ssl.SSLError):
            pass
    return found


# --- who may call ---------------------------------------------------------------------------------


def test_calls_go_through(instance: Instance) -> None:
    text = "x" * 3_000_000
    assert text in instance.predict("echo", text).results[0].category


def test_clients_need_no_certificate_if_it_is_optional(instance: Instance, world: World) -> None:
    assert ask(instance.port, credentials(world.authority)) == "NOT_FOUND"


def test_a_certificate_that_is_shown_has_to_be_good(instance: Instance, world: World) -> None:
    assert ask(instance.port, credentials(world.authority, world.stranger)) == "UNAVAILABLE"


def test_clients_do_not_take_another_server(instance: Instance, world: World) -> None:
    assert ask(instance.port, credentials(world.stranger)) == "UNAVAILABLE"


def test_plain_text_gets_no_answer(instance: Instance, world: World) -> None:
    assert ask(instance.port, None) == "UNAVAILABLE"
    assert ask(instance.peer_port, None) == "UNAVAILABLE"


# --- what else may come ---------------------------------------------------------------------------


def test_http_1_without_tls_is_told_what_is_spoken_here(instance: Instance) -> None:
    for port in (instance.port, instance.peer_port):
        with connect(port) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert answer.endswith(b"\r\n\r\nthis port speaks TLS only\n")


@pytest.mark.parametrize("protocols", [["http/1.1"], []])
def test_http_1_over_tls_is_told_so(instance: Instance, world: World, protocols: list[str]) -> None:
    context = client_context(world.authority)
    if protocols:
        context.set_alpn_protocols(protocols)
    sock = context.wrap_socket(connect(instance.port), server_hostname="localhost")
    assert sock.selected_alpn_protocol() is None
    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 505 HTTP Version Not Supported\r\n")
    assert answer.endswith(b"\r\n\r\ngRPC over HTTP/2 only (ALPN h2)\n")


@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda each: each.name
)
def test_sessions_are_resumed(instance: Instance, world: World, version: ssl.TLSVersion) -> None:
    context = client_context(world.authority)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.minimum_version = context.maximum_version = version
    session: ssl.SSLSession | None = None
    for is_second in (False, True):
        sock = context.wrap_socket(
            connect(instance.port), server_hostname="localhost", session=session
        )
        with sock:
            assert sock.selected_alpn_protocol() == "h2"
            # The server's SETTINGS; tickets come before them.
            assert sock.recv(9)[3] == 4
            assert sock.session_reused == is_second
            session = sock.session
    assert session is not None
    assert session.has_ticket


def test_old_versions_are_refused(instance: Instance, world: World) -> None:
    context = client_context(world.authority)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with connect(instance.port) as sock, pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        context.wrap_socket(sock, server_hostname="localhost")

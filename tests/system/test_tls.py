"""TLS and mTLS of both listeners, on each data plane (around 13, interop 1.5)."""

from __future__ import annotations

import socket
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mm.cli.errors import UNREACHABLE
from mm.edge.h2.tls import NOT_H2, PLAIN_HTTP
from tests.system.meshes import Instance, mesh_of
from tests.system.processes import Program, eventually
from tests.system.secured import (
    WAIT_S,
    World,
    ask,
    client_context,
    connect,
    credentials,
    make_world,
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


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
        assert answer == PLAIN_HTTP


def test_http_1_over_tls_is_told_so(instance: Instance, world: World) -> None:
    context = client_context(world.authority)
    sock = context.wrap_socket(connect(instance.port), server_hostname="localhost")
    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert read_all(sock) == NOT_H2


def test_who_offers_another_protocol_is_refused(instance: Instance, world: World) -> None:
    context = client_context(world.authority)
    context.set_alpn_protocols(["http/1.1"])
    for port in (instance.port, instance.peer_port):
        with (
            connect(port) as sock,
            pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"),
        ):
            context.wrap_socket(sock, server_hostname="localhost")


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


# --- who has to show a certificate ----------------------------------------------------------------


@pytest.fixture(scope="module")
def demanding(
    dataplane: str, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """As the controller of modelmesh-serving has it: the list has the server's own certificate;
    here also a directory, the key is sealed, and a handshake may take half a second.
    """
    directory = tmp_path_factory.mktemp("tls")
    own = world.server.write(directory, passphrase=b" open sesame ")
    trusted = directory / "trusted"
    trusted.mkdir()
    (trusted / "stranger.pem").write_bytes(world.stranger.certificate_pem)
    settings = {
        "MM_DATAPLANE": dataplane,
        **own,
        "MM_SVC_GRPC_PRIVATE_KEY_PASSPHRASE": " open sesame ",
        "MM_TLS_CLIENT_AUTH": "require",
        "MM_TLS_TRUST_CERT_PATH": f"{own['MM_TLS_KEY_CERT_PATH']}, {trusted}",
        "MM_METRICS": "prometheus:port=0;scheme=http",
    }
    with mesh_of("memory", settings, "tls") as mesh:
        mesh.credentials = credentials(world.authority, world.server)
        mesh.peer_credentials = mesh.credentials
        mesh.limits = {"tls_handshake_s": 2.0}
        yield mesh.add("demanding")


def test_clients_have_to_show_one(demanding: Instance, world: World) -> None:
    failed = metric(demanding, "mm_tls_handshakes_failed_total")
    assert ask(demanding.port, credentials(world.authority)) == "UNAVAILABLE"
    eventually(lambda: metric(demanding, "mm_tls_handshakes_failed_total") > failed)
    demanding.serve.wait_line("no TLS .*: peer did not return a certificate")


def test_the_list_names_who_may_call(demanding: Instance, world: World) -> None:
    """What is in it is trusted itself: the server's certificate is signed by somebody who is not,
    and says that it is for servers.
    """
    for client in (world.server, world.stranger):
        assert ask(demanding.port, credentials(world.authority, client)) == "NOT_FOUND"
    # Signed by who signed one that is in the list.
    assert ask(demanding.port, credentials(world.authority, world.client)) == "UNAVAILABLE"


def test_commands_in_a_pod_show_the_certificate_of_its_instance(demanding: Instance) -> None:
    tls = {name: value for name, value in demanding.settings.items() if "TLS" in name}
    tls["MM_SVC_GRPC_PRIVATE_KEY_PASSPHRASE"] = " open sesame "
    for settings, code in ((tls, 0), ({}, UNREACHABLE)):
        own = {**settings, "MM_ADDRESS": f"127.0.0.1:{demanding.port}"}
        command = Program.forked("mm model list", "mm", "model", "list", settings=own)
        try:
            assert command.wait_end(WAIT_S) == code, command.output()
        finally:
            command.close()


def test_peers_take_their_own_certificate_alone(demanding: Instance, world: World) -> None:
    port = demanding.peer_port
    assert ask(port, credentials(world.authority, world.server)) == "NOT_FOUND"
    for client in (world.client, world.stranger):
        assert ask(port, credentials(world.authority, client)) == "UNAVAILABLE"
    assert ask(port, credentials(world.authority)) == "UNAVAILABLE"


def test_who_says_nothing_is_dropped(demanding: Instance) -> None:
    late = metric(demanding, "mm_tls_handshakes_late_total")
    ports = (demanding.port, demanding.peer_port)
    begun = [(connect(port), data) for port in ports for data in (b"", b"\x16\x03\x01\x02\x00\x01")]
    for sock, data in begun:
        sock.sendall(data)
    for sock, _ in begun:
        assert read_all(sock) == b""
    eventually(lambda: metric(demanding, "mm_tls_handshakes_late_total") == late + 4)


def metric(instance: Instance, name: str) -> float:
    """Answer the value of a series that has no labels."""
    port = instance.serve.wait_line(r"metrics for Prometheus: http, port (\d+)").group(1)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return float(line.split()[1])

"""TLS and mTLS of both listeners, on each data plane (around 13, interop 1.5)."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from mm.cli.errors import UNREACHABLE
from mm.edge.h2.tls import NOT_H2, PLAIN_HTTP
from tests.identities import SERVERS, Identity, make, make_authority
from tests.system.meshes import Instance, channel_to, mesh_of, refusal
from tests.system.processes import Program, eventually

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
            assert command.wait_end(_WAIT_S) == code, command.output()
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
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return float(line.split()[1])


# --- between instances, and new files -------------------------------------------------------------


class Secret:
    """A directory as Kubernetes mounts it: files are links into one that is replaced at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0

    def write(self, identity: Identity, authority: Identity) -> dict[str, str]:
        """Have these in it; answers the settings that name them."""
        self._count += 1
        version = self.directory / f"..{self._count}"
        identity.write(version)
        (version / "ca.crt").write_bytes(authority.certificate_pem)
        link = self.directory / "..new"
        link.symlink_to(version.name)
        link.rename(self.directory / "..data")
        for name in ("tls.key", "tls.crt", "ca.crt"):
            if not (self.directory / name).is_symlink():
                (self.directory / name).symlink_to(f"..data/{name}")
        return {
            "MM_TLS_PRIVATE_KEY_PATH": str(self.directory / "tls.key"),
            "MM_TLS_KEY_CERT_PATH": str(self.directory / "tls.crt"),
            "MM_TLS_CLIENT_AUTH": "require",
            "MM_TLS_TRUST_CERT_PATH": str(self.directory / "ca.crt"),
            "MM_INTERNAL_TRUST_CERTS": str(self.directory / "ca.crt"),
        }


def shown_by(port: int, trust: Identity, own: dict[str, str]) -> bytes:
    """Answer the certificate that a new connection is shown."""
    context = client_context(trust, own)
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(connect(port), server_hostname="localhost") as sock:
        return sock.getpeercert(binary_form=True) or b""


class Returning:
    """A client that resumes its session."""

    def __init__(self, trust: Identity, other: Identity, own: dict[str, str]) -> None:
        self._context = client_context(trust, own)
        self._context.load_verify_locations(cadata=other.certificate_pem.decode())
        self._context.set_alpn_protocols(["h2"])
        self._session: ssl.SSLSession | None = None

    def is_resumed(self, port: int) -> bool:
        """Connect, and answer whether that went on where the last time ended."""
        with self._context.wrap_socket(
            connect(port), server_hostname="localhost", session=self._session
        ) as sock:
            assert sock.recv(9)[3] == 4
            self._session = sock.session
            return bool(sock.session_reused)


class Caller(threading.Thread):
    """Calls all the time, one call after the other."""

    def __init__(self, instance: Instance) -> None:
        super().__init__(daemon=True)
        self._instance = instance
        self.done = 0
        self.failures: list[grpc.RpcError] = []
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            try:
                self._instance.predict("echo", "hello")
                self.done += 1
            except grpc.RpcError as error:
                self.failures.append(error)

    def wait_more(self, count: int) -> None:
        """Return when so many more calls were answered, or one was not."""
        target = self.done + count
        eventually(lambda: self.done >= target or self.failures, what="calls are answered")


def test_instances_go_over_to_new_files_without_losing_a_call(
    dataplane: str,
    world: World,
    kv_store: str,
    new_service_name: Callable[[], str],
    tmp_path: Path,
) -> None:
    (tmp_path / "secret").mkdir()
    secret = Secret(tmp_path / "secret")
    own = secret.write(world.server, world.authority)
    settings = {
        **own,
        "MM_DATAPLANE": dataplane,
        "MM_TYPE_CONSTRAINTS": json.dumps({"held": {"required": ["holder"]}}),
    }
    client = world.client.write(tmp_path / "client")
    authority = make_authority("another")
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        mesh.credentials = mesh.peer_credentials = credentials(world.authority, world.client)
        holder = mesh.add("holder", settings={"MM_LABELS": "holder"})
        other = mesh.add("other")
        holder.register("echo", "SIZE_1000_0_0", load_now=True, sync=True, model_type="held")
        other.predict("echo")
        ports = [port for each in (holder, other) for port in (each.port, each.peer_port)]
        returning = Returning(world.authority, authority, client)
        assert not returning.is_resumed(other.port)
        assert returning.is_resumed(other.port)
        caller = Caller(other)
        caller.start()
        caller.wait_more(20)

        # Another certificate of the same authority.
        renewed = make("server", world.authority)
        secret.write(renewed, world.authority)
        der = renewed.certificate.public_bytes(serialization.Encoding.DER)
        for port in ports:
            eventually(lambda p=port: shown_by(p, world.authority, client) == der, what="renewed")
        caller.wait_more(20)

        # Half of it: the key is not the certificate's, so everything stays.
        (tmp_path / "secret" / "..data" / "tls.key").write_bytes(world.stranger.key_pem())
        for instance in (holder, other):
            instance.serve.wait_line("TLS: .* is not the key of the first certificate")
        assert [shown_by(port, world.authority, client) for port in ports] == [der] * 4
        caller.wait_more(20)

        # Another authority: who was let in before is not any more, but who is in stays.
        secret.write(make("server", authority), authority)
        newcomer = make("client", authority)
        for port in ports:
            eventually(
                lambda p=port: ask(p, credentials(authority, newcomer)) == "NOT_FOUND",
                what="another authority",
            )
            assert ask(port, credentials(authority, world.client)) == "UNAVAILABLE"
        with pytest.raises(ssl.SSLError, match="ALERT_UNKNOWN_CA"):
            returning.is_resumed(other.port)
        caller.wait_more(20)
        caller.is_over.set()
        caller.join(_WAIT_S)
        assert caller.failures == []

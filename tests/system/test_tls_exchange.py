"""New files of TLS: between instances, for clients and for the page of metrics (around 13)."""

from __future__ import annotations

import json
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from tests.identities import Identity, make, make_authority, spoilt_pem
from tests.system.meshes import Instance, mesh_of
from tests.system.processes import eventually
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


def page_of_metrics(instance: Instance) -> int:
    """Answer the port of its page over https."""
    return int(instance.serve.wait_line(r"metrics for Prometheus: https, port (\d+)").group(1))


def scraped(port: int, trust: Identity) -> str:
    """Answer the page, as a scraper sees it that verifies who shows it."""
    url = f"https://localhost:{port}/metrics"
    with urllib.request.urlopen(url, timeout=WAIT_S, context=client_context(trust)) as answer:
        return str(answer.read().decode())


def is_trusted_by(port: int, trust: Identity) -> bool:
    """Answer whether such a scraper is shown a certificate that it takes."""
    try:
        return "mm_tls_exchanges_total" in scraped(port, trust)
    except urllib.error.URLError as exc:
        if not isinstance(exc.reason, ssl.SSLCertVerificationError):
            raise
        return False


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


def spoil(
    folder: Path, renewed: Identity, stranger: Identity, instances: Sequence[Instance]
) -> None:
    """Write a certificate that cannot be used, what was there, and then the key of another one."""
    (folder / "tls.crt").write_bytes(spoilt_pem(renewed, "point"))
    for instance in instances:
        instance.serve.wait_line("TLS: .*certificate 1 in .* cannot be used: Invalid key")
    (folder / "tls.crt").write_bytes(renewed.certificate_pem)
    for instance in instances:
        instance.serve.wait_line("TLS: the files can be used again")
    (folder / "tls.key").write_bytes(stranger.key_pem())
    for instance in instances:
        instance.serve.wait_line("TLS: .* is not the key of the first certificate")


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
        "MM_METRICS": "prometheus:port=0;scheme=https",
        "MM_METRICS_CERTIFICATE": "serving",
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
        page = page_of_metrics(other)
        ports.append(page)
        assert "mm_tls_exchanges_total 0.0" in scraped(page, world.authority)
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

        # A certificate that is none, then the key of another one: everything stays.
        spoil(tmp_path / "secret" / "..data", renewed, world.stranger, mesh.instances)
        assert [shown_by(port, world.authority, client) for port in ports] == [der] * 5
        caller.wait_more(20)

        # Another authority: who was let in before is not any more, but who is in stays.
        secret.write(make("server", authority), authority)
        newcomer = make("client", authority)
        ports.remove(page)
        eventually(lambda: is_trusted_by(page, authority), what="the page of metrics")
        assert not is_trusted_by(page, world.authority)
        assert "mm_tls_exchanges_total 2.0" in scraped(page, authority)
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
        caller.join(WAIT_S)
        assert caller.failures == []

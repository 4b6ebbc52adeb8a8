"""Roles before real instances, on each data plane: certificates, tokens, a file that changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest

from mm.mesh.watches import WATCHES_OF_CALLER_MAX, WATCHES_OF_CLIENT_MAX
from tests.identities import Identity, make, make_authority
from tests.system.meshes import Instance, Mesh, channel_to, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

TIMEOUT_S = 60.0
CANNOT_START = 1
OK, UNAUTHENTICATED, DENIED = "OK", "UNAUTHENTICATED", "PERMISSION_DENIED"
STATUS, ENSURE = "/mmesh.ModelMesh/getModelStatus", "/mmesh.ModelMesh/ensureLoaded"
WATCH = "/mmesh.ModelMesh/watchModels"
PREDICT = "/mmesh.ExamplePredictor/predict"
FILE = "access.json"


def write(path: Path, **identities: dict[str, list[str]]) -> None:
    """As editors do: all of it at once."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"identities": identities}))
    new.rename(path)


def token_of(*roles: str, token: str) -> dict[str, list[str]]:
    return {"roles": [*roles], "tokenSha256": [hashlib.sha256(token.encode()).hexdigest()]}


@dataclass
class World:
    """An instance that asks, and those who call."""

    instance: Instance
    access: Path
    authority: Identity
    clients: dict[str, Identity]

    def channel(self, name: str = "") -> grpc.Channel:
        authority = self.authority.certificate_pem
        if not name:
            return channel_to(
                self.instance.port, credentials=grpc.ssl_channel_credentials(authority)
            )
        client = self.clients[name]
        shown = grpc.ssl_channel_credentials(authority, client.key_pem(), client.certificate_pem)
        return channel_to(self.instance.port, credentials=shown)


ALL = {
    "shop": {"roles": ["infer"], "certificateNames": ["DNS:shop"]},
    "board": {"roles": ["read"], "certificateNames": ["CN:board"]},
    "ops": token_of("read", "infer", "manage", token="ops-token"),
}


@pytest.fixture(scope="module")
def world(dataplane: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("access")
    authority = make_authority()
    own = make("server", authority).write(directory)
    (directory / "ca.crt").write_bytes(authority.certificate_pem)
    access = directory / FILE
    write(access, **ALL)
    settings = {
        **own,
        "MM_DATAPLANE": dataplane,
        "MM_TLS_CLIENT_AUTH": "optional",
        "MM_TLS_TRUST_CERT_PATH": str(directory / "ca.crt"),
        "MM_ACCESS_CONFIG_PATH": str(access),
    }
    with mesh_of("memory", settings, "access") as mesh:
        server = (directory / "tls.key").read_bytes(), (directory / "tls.crt").read_bytes()
        ca = authority.certificate_pem
        mesh.peer_credentials = grpc.ssl_channel_credentials(ca, *server)
        mesh.credentials = grpc.ssl_channel_credentials(ca)
        found = World(
            mesh.add("asks"),
            access,
            authority,
            {name: make(name, authority) for name in ("shop", "board", "stranger")},
        )
        found.instance.register(
            "m", "SIZE_1000_0_0", load_now=True, sync=True, metadata=bearer("ops-token")
        )
        yield found


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def ask(channel: grpc.Channel, path: str, token: str = "") -> str:
    """Answer with which status a call ends."""
    metadata = (("mm-model-id", "m"), *bearer(token))
    stub = channel.unary_unary(path)
    try:
        stub(b"\x0a\x01m" if path != PREDICT else b"", metadata=metadata, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return str(error.code().name)
    return OK


def test_an_identity_has_half_of_the_watches(world: World) -> None:
    kept = []  # gRPC cancels calls that nobody keeps
    with ExitStack() as stack:
        for number in range(WATCHES_OF_CALLER_MAX):
            if number % WATCHES_OF_CLIENT_MAX == 0:
                channel = stack.enter_context(world.channel("board"))
            watch = channel.unary_stream(WATCH)(b"", timeout=TIMEOUT_S)
            watch.initial_metadata()  # sent when the watch is there, or is refused
            assert watch.is_active(), number
            kept.append(watch)
        more = channel.unary_stream(WATCH)(b"", timeout=TIMEOUT_S)
        status, text = refusal(partial(next, more))
        assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text == f'"board" has {WATCHES_OF_CALLER_MAX} watches open, the limit'
        ops = channel.unary_stream(WATCH)(b"", timeout=TIMEOUT_S, metadata=bearer("ops-token"))
        ops.initial_metadata()
        assert ops.is_active()


def test_certificates_and_tokens_say_who_calls(world: World) -> None:
    told = {}
    for name in ("", "shop", "board", "stranger"):
        with world.channel(name) as channel:
            told[name] = [ask(channel, path) for path in (STATUS, PREDICT, ENSURE)]
    assert told == {
        "": 3 * [UNAUTHENTICATED],
        "shop": [DENIED, OK, DENIED],
        "board": [OK, DENIED, DENIED],
        "stranger": 3 * [UNAUTHENTICATED],
    }
    with world.channel("stranger") as channel:
        assert [ask(channel, path, "ops-token") for path in (STATUS, PREDICT, ENSURE)] == 3 * [OK]
        _, text = refusal(partial(channel.unary_unary(STATUS), b"", timeout=TIMEOUT_S))
        assert text.startswith("no bearer token, and no name in the certificate of the client")


def test_changes_of_the_file_hold_on_connections_that_are_there(world: World) -> None:
    with world.channel("shop") as shop, world.channel() as ops:
        assert [ask(shop, PREDICT), ask(ops, STATUS, "ops-token")] == [OK, OK]
        write(world.access, board=ALL["board"])
        eventually(lambda: ask(ops, STATUS, "ops-token") == UNAUTHENTICATED, what="token gone")
        assert ask(shop, PREDICT) == UNAUTHENTICATED
        # What cannot be used changes nothing, and is said once.
        after = len(world.instance.serve.lines)
        world.access.write_text('{"identities": {"shop": {"roles": ["all"]}}}')
        world.instance.serve.wait_line(
            r'access configuration file .*: "shop": roles\[0\] is no role; allowed: read, infer,'
            r" manage; what it said before still holds",
            after=after,
        )
        assert ask(shop, PREDICT) == UNAUTHENTICATED
        write(world.access, **ALL)
        eventually(lambda: ask(shop, PREDICT) == OK, what="back again")
        assert ask(ops, STATUS, "ops-token") == OK


def test_a_file_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text('{"identities": {"ops": {"roles": ["manage"], "tokenSha256": ["secret"]}}}')
    mesh = Mesh("memory", {"MM_ACCESS_CONFIG_PATH": str(path)}, "bad")
    try:
        serve = mesh.start_serve("bad", {"INTERNAL_GRPC_SOCKET_PATH": str(tmp_path / "none")})
        assert serve.wait_end(TIMEOUT_S) == CANNOT_START
        assert serve.complaint.startswith(
            f'mm: access configuration file {path}: "ops": tokenSha256[0] is no SHA-256'
        )
        assert not any("secret" in line for line in serve.lines)
    finally:
        mesh.close()

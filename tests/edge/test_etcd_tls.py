"""etcd over TLS: who it is, who we are to it, and what is told when one of both is not so."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import aetcd.rpc as rpc
import anyio
import anyio.to_thread
import grpc
import pytest

from mm.edge.etcd_process import EtcdProcess, find_binary
from mm.edge.etcd_store import EtcdStore
from mm.edge.etcd_tls import EtcdTls
from mm.edge.kv_config import Endpoint, EtcdTarget, parse
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Put, Resync, Write
from mm.testing.losing_proxy import losing_proxy
from tests.edge.store_world import put, resync, until, wait_answers
from tests.identities import Authority, Pair

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

AUTHORITY = Authority()
ROOTS = AUTHORITY.certificate
CLIENT = AUTHORITY.issue("root")
STRANGER = Authority().issue("root")
TRUSTED = EtcdTls(ROOTS)
KNOWN = EtcdTls(ROOTS, CLIENT.key, CLIENT.certificate)
PASSWORD = "hunter2"
TIMEOUT_S = 3.5


@contextmanager
def tls_etcd(
    server: Pair, *, asks_clients: bool, args: Sequence[str] = ()
) -> Iterator[EtcdProcess]:
    """An etcd that speaks TLS only; ``asks_clients``: and only to those that AUTHORITY signed."""
    with tempfile.TemporaryDirectory(prefix="mm-test-etcd-") as name, ExitStack() as stack:
        directory = Path(name)
        write_pair(directory, server)
        (directory / "ca.pem").write_bytes(ROOTS)
        files = [f"--cert-file={directory}/server.pem", f"--key-file={directory}/server.key"]
        if asks_clients:
            files += [f"--trusted-ca-file={directory}/ca.pem", "--client-cert-auth"]
        etcd = EtcdProcess(
            find_binary(), directory, [*files, "--bcrypt-cost=4", *args], scheme="https"
        )
        stack.callback(etcd.kill)  # an orderly stop would wait for connections
        etcd.start()
        yield etcd


def write_pair(directory: Path, server: Pair) -> None:
    """Have the etcd in ``directory`` use another certificate: it looks at each handshake."""
    (directory / "server.pem").write_bytes(server.certificate)
    (directory / "server.key").write_bytes(server.key)


@pytest.fixture(scope="module")
def open_etcd() -> Iterator[EtcdProcess]:
    """Known by a name only, and whoever trusts it may come."""
    with tls_etcd(AUTHORITY.issue("etcd", ["etcd.example"]), asks_clients=False) as etcd:
        yield etcd


@pytest.fixture(scope="module")
def closed_etcd() -> Iterator[EtcdProcess]:
    """Known by its address, and asks who comes; tokens are good for a second, used or not."""
    with tempfile.TemporaryDirectory(prefix="mm-test-jwt-") as name:
        key = Path(name, "jwt.key")
        key.write_bytes(AUTHORITY.issue("tokens").key)
        public = Path(name, "jwt.pub")
        public.write_bytes(_public(key.read_bytes()))
        token = f"--auth-token=jwt,pub-key={public},priv-key={key},sign-method=ES256,ttl=1s"
        server = AUTHORITY.issue("etcd", ["127.0.0.1"])
        with tls_etcd(server, asks_clients=True, args=[token]) as etcd:
            anyio.run(enable_users, etcd.endpoint)
            yield etcd


def _public(key_pem: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(key_pem, None)
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


async def enable_users(endpoint: Endpoint) -> None:
    """Have an etcd that asks clients who they are know ``root``, and nobody else."""
    credentials = grpc.ssl_channel_credentials(ROOTS, CLIENT.key, CLIENT.certificate)
    channel = rpc.secure_channel(str(endpoint), credentials)
    auth = rpc.AuthStub(channel)
    await auth.UserAdd(rpc.AuthUserAddRequest(name="root", password=PASSWORD))
    await auth.RoleAdd(rpc.AuthRoleAddRequest(name="root"))
    await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
    await auth.AuthEnable(rpc.AuthEnableRequest())
    await channel.close()


async def _reason(target: EtcdTarget) -> str:
    async with EtcdStore(target, timeout_s=TIMEOUT_S) as store:
        with pytest.raises(StoreUnavailableError) as caught:
            await store.check()
    return str(caught.value)


async def _use(store: EtcdStore) -> None:
    async with store.session(5) as session, store.watch("/t/") as batches:
        assert isinstance((await anext(batches))[0], Resync)
        result = await store.write(Write("/t/a", b"1", None, session.lease_id))
        assert result.item is not None
        assert await anext(batches) == [Put(result.item)]
        assert await store.get("/t/a") == result.item


async def _secret(directory: Path, attributes: Mapping[str, str]) -> EtcdTarget:
    path = anyio.Path(directory) / "etcd.json"
    await path.write_text(json.dumps(attributes))
    target = await anyio.to_thread.run_sync(parse, f"etcd:{path}")
    return cast(EtcdTarget, target)


async def test_everything_works_by_the_secret_of_the_controller(
    closed_etcd: EtcdProcess, tmp_path: Path
) -> None:
    target = await _secret(
        tmp_path,
        {
            "endpoints": f"https://{closed_etcd.endpoint}",
            "userid": "root",
            "password": PASSWORD,
            "root_prefix": "modelmesh-serving/mm_ns/x",
            "certificate": ROOTS.decode(),
            "client_certificate": CLIENT.certificate.decode(),
            "client_key": CLIENT.key.decode(),
        },
    )
    async with EtcdStore(target) as store:
        await _use(store)


async def test_a_client_certificate_alone_is_a_user(closed_etcd: EtcdProcess) -> None:
    target = EtcdTarget((closed_etcd.endpoint,), tls=KNOWN, root_prefix="by-name")
    async with EtcdStore(target) as store:
        await _use(store)


@pytest.mark.parametrize("tls", [TRUSTED, EtcdTls(ROOTS, STRANGER.key, STRANGER.certificate)])
async def test_a_client_that_is_nobody_is_told(closed_etcd: EtcdProcess, tls: EtcdTls) -> None:
    reason = await _reason(EtcdTarget((closed_etcd.endpoint,), tls=tls))
    assert reason.startswith(f"etcd at {closed_etcd.endpoint}: it refuses our client certificate")
    assert 'attributes "client_certificate" and "client_key"' in reason


async def test_a_name_may_stand_for_all_addresses(open_etcd: EtcdProcess) -> None:
    target = EtcdTarget((open_etcd.endpoint,), tls=TRUSTED)
    reason = await _reason(target)
    assert "its certificate bears another name than its endpoint" in reason
    assert 'attribute "override_authority"' in reason
    async with EtcdStore(replace(target, authority="etcd.example")) as store:
        await _use(store)


async def test_a_stranger_is_not_trusted(open_etcd: EtcdProcess) -> None:
    for roots, telling in (
        (Authority("another").certificate, "unable to get local issuer certificate"),
        (Authority().certificate, "certificate signature failure"),
        (b"", "unable to get local issuer certificate"),
    ):
        target = EtcdTarget((open_etcd.endpoint,), tls=EtcdTls(roots), authority="etcd.example")
        reason = await _reason(target)
        assert f"its certificate is not trusted ({telling})" in reason
        assert 'attribute "certificate" or "certificate_file"' in reason


async def test_plain_text_and_tls_do_not_understand_each_other(
    open_etcd: EtcdProcess, shared_etcd: EtcdProcess
) -> None:
    reason = await _reason(EtcdTarget((open_etcd.endpoint,)))
    assert "if it wants TLS, write https:// before the endpoints" in reason
    reason = await _reason(EtcdTarget((shared_etcd.endpoint,), tls=TRUSTED))
    assert "it does not speak TLS; with http:// before the endpoints neither do we" in reason


async def test_another_member_takes_over(closed_etcd: EtcdProcess) -> None:
    endpoint = closed_etcd.endpoint
    async with (
        losing_proxy(endpoint.host, endpoint.port) as one,
        losing_proxy(endpoint.host, endpoint.port) as two,
    ):
        ways = tuple(Endpoint(way.host, way.port) for way in (one, two))
        target = EtcdTarget(ways, tls=KNOWN, root_prefix="members")
        async with EtcdStore(target, timeout_s=TIMEOUT_S, silence_s=1.0) as store:
            # A table that is empty is not followed on, but read again.
            await store.write(Write("/t/a", b"0", None))
            async with store.session(30) as session, store.watch("/t/") as batches:
                assert isinstance((await anext(batches))[0], Resync)
                lease_id = session.lease_id
                (one if one.accepted_count else two).lose()
                result = await store.write(Write("/t/a", b"1", None, lease_id))
                assert result.item is not None
                with anyio.fail_after(60):
                    assert await anext(batches) == [Put(result.item)]
                assert session.lease_id == lease_id


async def _token(store: EtcdStore) -> str:
    """Answer who the store says it is."""
    connection = await store._connector.connection(anyio.current_time() + 60)
    return dict(connection.metadata)["token"]


async def test_tokens_that_expire_in_use_are_renewed(
    closed_etcd: EtcdProcess, caplog: pytest.LogCaptureFixture
) -> None:
    # This etcd's tokens say themselves until when they are good.
    logins: set[str] = set()
    target = EtcdTarget(
        (closed_etcd.endpoint,), tls=KNOWN, user="root", password=PASSWORD, root_prefix="tokens"
    )
    with caplog.at_level(logging.DEBUG):
        async with EtcdStore(target) as store, store.session(5) as session:
            lease_id = session.lease_id
            async with store.watch("/t/") as batches:
                assert isinstance((await anext(batches))[0], Resync)
                with anyio.fail_after(60):
                    while len(logins) < 2:
                        result = await store.write(Write("/t/a", b"1", None))
                        assert result.item is not None
                        assert await anext(batches) == [Put(result.item)]
                        logins.add(await _token(store))
            assert session.lease_id == lease_id
    assert PASSWORD not in caplog.text
    assert not any(token in caplog.text for token in logins)


async def _lose_history_and_lease(etcd: EtcdProcess, revision: int, lease_id: int) -> None:
    """Have etcd forget what was before a revision, and end a lease."""
    credentials = grpc.ssl_channel_credentials(ROOTS, CLIENT.key, CLIENT.certificate)
    channel = rpc.secure_channel(str(etcd.endpoint), credentials)
    request = rpc.CompactionRequest(revision=revision, physical=True)
    await rpc.KVStub(channel).Compact(request)
    await rpc.LeaseStub(channel).LeaseRevoke(rpc.LeaseRevokeRequest(ID=lease_id))
    await channel.close()


async def test_history_lease_and_token_are_lost_at_once(closed_etcd: EtcdProcess) -> None:
    """All of it while there is no way to etcd, as after a night of maintenance."""
    endpoint = closed_etcd.endpoint
    target = EtcdTarget(
        (endpoint,), tls=KNOWN, user="root", password=PASSWORD, root_prefix="all-lost"
    )
    async with (
        losing_proxy(endpoint.host, endpoint.port) as proxy,
        EtcdStore(
            replace(target, endpoints=(Endpoint(proxy.host, proxy.port),)), timeout_s=TIMEOUT_S
        ) as store,
        EtcdStore(target) as other,
        store.watch("/t/") as batches,
        store.session(5) as session,
    ):
        await resync(batches)
        lease_id = session.lease_id
        leased = (await store.write(Write("/t/leased", b"1", None, lease_id))).item
        assert leased is not None
        await until(batches, Put(leased))
        token = await _token(store)
        await proxy.cut()
        kept = await put(other, "/t/kept")
        await _lose_history_and_lease(closed_etcd, kept.mod_revision, lease_id)
        await proxy.restore()

        table = await resync(batches)
        assert list(table.items) == [kept], "what was bound to the lease is gone"
        with anyio.fail_after(60):
            renewed_id = await session.wait_change(lease_id)
            await wait_answers(store)
        result = await store.write(Write("/t/leased", b"2", None, renewed_id))
        assert result.item is not None
        assert await until(batches, Put(result.item)) == [Put(result.item)]
        with anyio.fail_after(60):
            while await _token(store) == token:
                await store.write(Write("/t/leased", b"3", None, renewed_id))

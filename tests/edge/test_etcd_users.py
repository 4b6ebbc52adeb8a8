"""etcd with users: who we are, and what is told when we are nobody."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aetcd.rpc as rpc
import anyio
import pytest

from mm.edge.etcd_connection import Connection
from mm.edge.etcd_process import EtcdProcess, find_binary
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import EtcdTarget
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Put, Resync, Write

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdProcess]:
    with tempfile.TemporaryDirectory(prefix="mm-test-etcd-") as directory:
        etcd = EtcdProcess(find_binary(), Path(directory), ["--bcrypt-cost=4"])
        try:
            etcd.start()
            anyio.run(_enable_users, etcd)
            yield etcd
        finally:
            etcd.stop()


async def _enable_users(etcd: EtcdProcess) -> None:
    channel = rpc.insecure_channel(str(etcd.endpoint))
    auth = rpc.AuthStub(channel)
    for name in ("root", "guest"):
        await auth.UserAdd(rpc.AuthUserAddRequest(name=name, password=PASSWORD))
        await auth.RoleAdd(rpc.AuthRoleAddRequest(name=name))
        await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=name, role=name))
    permission = rpc.Permission(
        permType=rpc.Permission.READWRITE, key=b"guests/", range_end=b"guests0"
    )
    await auth.RoleGrantPermission(
        rpc.AuthRoleGrantPermissionRequest(name="guest", perm=permission)
    )
    await auth.AuthEnable(rpc.AuthEnableRequest())
    await channel.close()


async def _change_password(etcd: EtcdProcess, user: str) -> None:
    """Set the same password again: etcd then forgets all of the user's tokens."""
    channel = rpc.insecure_channel(str(etcd.endpoint))
    auth = rpc.AuthStub(channel)
    login = await auth.Authenticate(rpc.AuthenticateRequest(name="root", password=PASSWORD))
    request = rpc.AuthUserChangePasswordRequest(name=user, password=PASSWORD)
    await auth.UserChangePassword(request, metadata=(("token", login.token),))
    await channel.close()


def _store(etcd: EtcdProcess, user: str, password: str = PASSWORD, prefix: str = "") -> EtcdStore:
    target = EtcdTarget((etcd.endpoint,), user=user, password=password, root_prefix=prefix)
    return EtcdStore(target, silence_s=1.0)


@pytest.mark.parametrize(
    ("user", "password", "text"),
    [
        ("root", "wrong-secret", "user 'root' is refused: unknown, or the password is wrong"),
        ("nobody", "wrong-secret", "user 'nobody' is refused: unknown, or the password is wrong"),
        ("", "", "requires a user and a password"),
    ],
)
async def test_a_refused_user_is_told(
    etcd: EtcdProcess, user: str, password: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with _store(etcd, user, password) as store:
            start_s = anyio.current_time()
            with pytest.raises(StoreUnavailableError, match=text) as caught:
                await store.check()
            assert anyio.current_time() - start_s < 2
    assert str(etcd.endpoint) in str(caught.value)
    assert "wrong-secret" not in str(caught.value) + caplog.text


async def test_everything_works_with_a_user(etcd: EtcdProcess) -> None:
    async with _store(etcd, "root") as store, store.session(5) as session:
        async with store.watch("/t/") as batches:
            assert isinstance((await anext(batches))[0], Resync)
            result = await store.write(Write("/t/a", b"1", 0, session.lease_id))
            assert result.item is not None
            assert await anext(batches) == [Put(result.item)]
        assert await store.get("/t/a") == result.item


async def test_a_forgotten_token_is_renewed(etcd: EtcdProcess) -> None:
    async with _store(etcd, "root") as store, store.session(2) as session:
        first = session.lease_id
        await store.write(Write("/renewed/a", b"1", None))
        for call in (
            lambda: store.get("/renewed/a"),
            lambda: store.list("/renewed/"),
            lambda: store.write(Write("/renewed/a", b"2", None)),
            lambda: store.transact([Write("/renewed/a", b"3", None)]),
        ):
            await _change_password(etcd, "root")
            await call()
        await _change_password(etcd, "root")
        async with store.watch("/renewed/") as batches:
            with anyio.fail_after(60):
                [resync] = await anext(batches)
                assert isinstance(resync, Resync)
                await _change_password(etcd, "root")
                result = await store.write(Write("/renewed/a", b"4", None))
                assert result.item is not None
                assert await anext(batches) == [Put(result.item)]
        assert session.lease_id == first


async def test_all_whose_token_was_forgotten_share_one_login(
    etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    logins = []
    authenticate = Connection.authenticate

    async def counted(self: Connection, user: str, password: str, limit_s: float) -> None:
        logins.append(user)
        await authenticate(self, user, password, limit_s)

    monkeypatch.setattr(Connection, "authenticate", counted)
    async with _store(etcd, "root") as store:
        await store.check()
        assert len(logins) == 1
        await _change_password(etcd, "root")
        async with anyio.create_task_group() as tg:
            for number in range(30):
                tg.start_soon(store.get, f"/{number}")
        assert len(logins) == 2


async def test_a_user_of_few_rights_is_told_what_is_not_permitted(etcd: EtcdProcess) -> None:
    async with _store(etcd, "guest", prefix="guests") as store:
        await store.check()
        assert (await store.write(Write("/a", b"", None))).succeeded
    async with _store(etcd, "guest", prefix="others") as store:
        with pytest.raises(StoreUnavailableError, match="not permitted"):
            await store.write(Write("/a", b"", None))


async def test_a_password_for_an_etcd_without_users_is_no_harm(shared_etcd: EtcdProcess) -> None:
    async with _store(shared_etcd, "root", prefix="no-users") as store:
        await store.check()

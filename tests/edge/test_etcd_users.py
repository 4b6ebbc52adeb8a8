"""etcd with users: who we are, and what is told when we are nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import anyio
import pytest

from mm.edge.etcd_connection import Connection
from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import EtcdTarget
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Put, Resync, Write
from tests.edge.etcd_users import change_password, etcd_with_users

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdProcess]:
    with etcd_with_users(PASSWORD, ("root", "guest"), guest_keys=(b"guests/", b"guests0")) as etcd:
        yield etcd


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
            await change_password(etcd, "root", root=PASSWORD, new=PASSWORD)
            await call()
        await change_password(etcd, "root", root=PASSWORD, new=PASSWORD)
        async with store.watch("/renewed/") as batches:
            with anyio.fail_after(60):
                [resync] = await anext(batches)
                assert isinstance(resync, Resync)
                await change_password(etcd, "root", root=PASSWORD, new=PASSWORD)
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
        await change_password(etcd, "root", root=PASSWORD, new=PASSWORD)
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

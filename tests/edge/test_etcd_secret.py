"""The secret of etcd changes while a store is in use: it goes over to what works, and to nothing
that does not.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from mm.edge import etcd_connector, etcd_secret
from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_secret import EtcdSecret
from mm.edge.etcd_store import EtcdStore
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Put, Resync, Write
from tests.edge.etcd_users import change_password, etcd_with_users
from tests.edge.store_world import PATIENCE_S, wait_answers
from tests.edge.test_etcd_tls import AUTHORITY, CLIENT, tls_etcd, write_pair
from tests.identities import Authority

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

OLD, NEW = "hunter2-old", "hunter2-new"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look as often as the event loop turns, more or less."""
    monkeypatch.setattr(etcd_secret, "POLL_S", 0.02)
    monkeypatch.setattr(etcd_secret, "SECOND_LOOK_S", 0.05)
    monkeypatch.setattr(etcd_connector, "EXCHANGE_RETRY_S", 0.02)


class Secret:
    """A directory as Kubernetes mounts it: files are links, and all turn over at once."""

    def __init__(self, directory: Path, endpoint: object) -> None:
        self._directory = directory
        self._endpoint = endpoint
        self._turns = 0
        self.path = directory / "etcd_connection"

    def write(self, files: dict[str, bytes] | None = None, **attributes: str) -> None:
        """Have the directory hold this and nothing else."""
        self._turns += 1
        turn = self._directory / f"..{self._turns}"
        turn.mkdir()
        given = {"endpoints": str(self._endpoint)} | attributes
        contents = {"etcd_connection": json.dumps(given).encode()} | (files or {})
        for name, content in contents.items():
            (turn / name).write_bytes(content)
            link = self._directory / name
            if not link.is_symlink():
                link.symlink_to(Path("..data", name))
        fresh = self._directory / "..data_tmp"
        fresh.symlink_to(turn.name)
        os.replace(fresh, self._directory / "..data")

    async def change(self, files: dict[str, bytes] | None = None, **attributes: str) -> None:
        """The same, beside an event loop."""
        await anyio.to_thread.run_sync(lambda: self.write(files, **attributes))


@asynccontextmanager
async def _followed(secret: Secret) -> AsyncIterator[EtcdStore]:
    files = EtcdSecret(secret.path)
    target = await anyio.to_thread.run_sync(files.read)
    async with EtcdStore(target, timeout_s=2.0) as store, files.followed(store.exchange):
        yield store


class Heard(logging.Handler):
    """What was logged, to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self._more = anyio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Note a line."""
        self.text += record.getMessage() + "\n"
        self._more.set()

    async def until(self, words: str, count: int = 1) -> None:
        """Return when the words were logged so many times."""
        with anyio.fail_after(PATIENCE_S):
            while self.text.count(words) < count:
                self._more = anyio.Event()
                await self._more.wait()


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Everything that is logged."""
    logger, handler = logging.getLogger("mm"), Heard()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


# --- a password -------------------------------------------------------------------------------


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    with etcd_with_users(OLD) as etcd:
        yield etcd


async def test_a_secret_that_comes_before_the_password_waits_for_it(
    etcd: EtcdProcess, tmp_path: Path, heard: Heard
) -> None:
    secret = Secret(tmp_path, etcd.endpoint)
    await secret.change(userid="root", password=OLD)
    async with _followed(secret) as store, store.session(30) as session:
        lease_id = session.lease_id
        await secret.change(userid="root", password=NEW)
        await heard.until("so the ones before hold on: user 'root' is refused")
        await store.check()

        await change_password(etcd, "root", root=OLD, new=NEW)

        await heard.until("the changed settings are in use")
        assert (await store.write(Write("/a", b"1", None))).succeeded
        assert session.lease_id == lease_id
    assert "hunter2" not in heard.text


async def test_a_password_that_comes_before_the_secret_is_an_outage_until_it_comes(
    etcd: EtcdProcess, tmp_path: Path, heard: Heard
) -> None:
    secret = Secret(tmp_path, etcd.endpoint)
    await secret.change(userid="root", password=OLD)
    async with _followed(secret) as store:
        await store.check()
        await change_password(etcd, "root", root=OLD, new=NEW)
        with pytest.raises(StoreUnavailableError, match="user 'root' is refused"):
            await store.check()

        await secret.change(userid="root", password=NEW)

        await wait_answers(store)
    assert "hunter2" not in heard.text


# --- what cannot be used ----------------------------------------------------------------------


def _rubbish(secret: Secret) -> Awaitable[None]:
    return secret.change({"etcd_connection": b'{"password": "hunter2'})


def _another_prefix(secret: Secret) -> Awaitable[None]:
    return secret.change(root_prefix="elsewhere")


def _no_key(secret: Secret) -> Awaitable[None]:
    chain = CLIENT.certificate.decode()
    endpoints = f"https://{secret._endpoint}"
    return secret.change(endpoints=endpoints, client_certificate=chain, client_key="hunter2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rubbish, "the file is not JSON"),
        (_another_prefix, "root_prefix has changed, which takes a restart of all instances"),
        (_no_key, 'attribute "client_key": it is not in PEM form'),
    ],
)
async def test_a_change_that_cannot_be_used_is_told_and_changes_nothing(
    shared_etcd: EtcdProcess,
    tmp_path: Path,
    heard: Heard,
    change: Callable[[Secret], Awaitable[None]],
    words: str,
) -> None:
    prefix = tmp_path.name
    secret = Secret(tmp_path, shared_etcd.endpoint)
    await secret.change(root_prefix=prefix)
    async with _followed(secret) as store:
        await store.write(Write("/a", b"1", None))
        await change(secret)
        await heard.until(words)
        item = await store.get("/a")
        assert item is not None
        assert item.value == b"1"
        # What is put right afterwards counts.
        await secret.change(root_prefix=prefix, endpoints=f"{shared_etcd.endpoint},127.0.0.1:1")
        await heard.until("the changed settings are in use")
        assert await store.get("/a") == item
    assert "hunter2" not in heard.text


async def test_what_is_changed_back_is_not_waited_for(
    shared_etcd: EtcdProcess, tmp_path: Path, heard: Heard
) -> None:
    secret = Secret(tmp_path, shared_etcd.endpoint)
    await secret.change()
    async with _followed(secret) as store:
        await store.check()
        await secret.change(endpoints="127.0.0.1:1")
        await heard.until("so the ones before hold on: connection refused")
        await secret.change()
        await heard.until("those that are wanted again")
        await store.check()
    assert "are in use" not in heard.text


# --- certificates -----------------------------------------------------------------------------


@pytest.fixture
def careful_etcd() -> Iterator[EtcdProcess]:
    """Asks who comes."""
    with tls_etcd(AUTHORITY.issue("etcd", ["127.0.0.1"]), asks_clients=True) as etcd:
        yield etcd


async def test_certificates_are_exchanged_under_load(
    careful_etcd: EtcdProcess, tmp_path: Path, heard: Heard
) -> None:
    # The operator's order: trust both authorities, exchange the server's certificate, then our own.
    secret = Secret(tmp_path, f"https://{careful_etcd.endpoint}")
    names = {
        "certificate_file": "ca.crt",
        "client_certificate_file": "tls.crt",
        "client_key_file": "tls.key",
    }
    files = {"ca.crt": AUTHORITY.certificate, "tls.crt": CLIENT.certificate}
    files["tls.key"] = CLIENT.key
    await secret.change(files, **names)
    async with _followed(secret) as store, store.session(30) as session:
        lease_id = session.lease_id
        await store.write(Write("/t/n", b"-1", None))
        async with store.watch("/t/") as batches, anyio.create_task_group() as group:
            assert isinstance((await anext(batches))[0], Resync)
            group.start_soon(_write_on, store)
            successor = Authority("successor")
            files["ca.crt"] += successor.certificate
            await secret.change(files, **names)
            await heard.until("the changed settings are in use", 1)

            renewed = successor.issue("etcd", ["127.0.0.1"])
            await anyio.to_thread.run_sync(write_pair, careful_etcd._directory, renewed)
            pair = AUTHORITY.issue("root")
            files["tls.crt"], files["tls.key"] = pair.certificate, pair.key
            await secret.change(files, **names)
            await heard.until("the changed settings are in use", 2)

            item = await store.get("/t/n")
            assert item is not None
            numbers: list[int] = []
            while not numbers or numbers[-1] < int(item.value):
                with anyio.fail_after(PATIENCE_S):
                    for event in await anext(batches):
                        assert isinstance(event, Put)
                        numbers.append(int(event.item.value))
            group.cancel_scope.cancel()
        assert numbers == list(range(numbers[-1] + 1))
        assert session.lease_id == lease_id
    assert "PRIVATE KEY" not in heard.text


async def _write_on(store: EtcdStore) -> None:
    """Write one number after the other; each write succeeds at once."""
    number = 0
    while True:
        assert (await store.write(Write("/t/n", b"%d" % number, None))).succeeded
        number += 1

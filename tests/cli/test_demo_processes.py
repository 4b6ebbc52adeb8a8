"""The demo's children and its directory: nothing is left behind, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import anyio
import pytest

from mm.demo import processes
from mm.demo.cluster import Cluster, Instance, instance_names, make_instances
from mm.demo.directory import private_directory
from mm.demo.processes import ChildProcess, DemoError, environment, free_ports, tail
from mm.demo.traffic import Target

pytestmark = pytest.mark.anyio


def child(tmp_path: Path, *args: str, name: str = "a child") -> ChildProcess:
    return ChildProcess(name, args, {}, tmp_path / f"{name}.log")


async def test_a_child_that_ends_leaves_its_last_words(tmp_path: Path) -> None:
    process = child(tmp_path, "model", "status", "x", "--address", "x:0")
    await process.start()
    assert process.pid
    with anyio.fail_after(60):
        assert await process.wait() == 2
    await process.reap()
    assert process.pid == 0
    assert await process.last_words() == (
        "    mm: 'x:0' (--address or MM_ADDRESS) is no address; allowed: host or host:port, an IPv6"
        " address in brackets, a port from 1 to 65535, and https:// before it for TLS"
    )


async def test_a_child_that_does_not_stop_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = tmp_path / "deaf.py"
    deaf.write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\n"
        "signal.pause()\n"
    )
    monkeypatch.setattr(processes, "_PROGRAM", (str(deaf),))
    process = child(tmp_path)
    await process.start()
    pid = process.pid
    with anyio.fail_after(60):
        while "deaf" not in await process.last_words():
            await anyio.lowlevel.checkpoint()
        process.terminate()
        await process.reap(grace_s=0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """SIGKILL to the parent, which cannot clean up; the kernel does."""
    log = tmp_path / "grandchild.log"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import anyio, sys\n"
            "from pathlib import Path\n"
            "from mm.demo import processes\n"
            "processes._PROGRAM = ('-c', 'import signal; print(1, flush=True); signal.pause()')\n"
            "async def main():\n"
            f"    child = processes.ChildProcess('c', [], {{}}, Path({str(log)!r}))\n"
            "    await child.start()\n"
            "    while not await child.last_words() == '    1':\n"
            "        await anyio.lowlevel.checkpoint()\n"
            "    print(child.pid, flush=True)\n"
            "    await child.wait()\n"
            "anyio.run(main)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    handle = os.pidfd_open(pid)
    try:
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
        import select

        # A pidfd is readable once its process has ended.
        ready, _, _ = select.select([handle], [], [], 10)
        assert ready
    finally:
        os.close(handle)


def test_settings_of_another_mesh_do_not_reach_a_child() -> None:
    variables = {
        "HOME": "/h",
        "PYTHONPATH": "/p",
        "MM_LABELS": "x",
        "KV_STORE": "x",
        "TAS_SERVICE_NAME": "x",
        "INTERNAL_GRPC_PORT": "1",
        "SHUTDOWN_TIMEOUT_MS": "1",
        "ZOOKEEPER": "x",
    }
    answer = environment(variables)
    assert set(answer) == {"HOME", "PYTHONPATH", "PYTHONUNBUFFERED"}
    assert answer["PYTHONPATH"].endswith(":/p")
    root = Path(answer["PYTHONPATH"].split(":")[0])
    assert (root / "mm" / "__main__.py").is_file()


def test_free_ports_differ_and_are_not_the_kernels() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(20_000 <= port < 32_000 for port in ports)


def test_no_free_port_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(processes, "_PORTS", range(port, port + 1))
        with pytest.raises(DemoError, match=f"no 1 free ports on 127.0.0.1 between {port} and"):
            free_ports(1)


async def test_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert await tail(log, 2) == "    (no log: No such file or directory)"
    log.write_text("")
    assert await tail(log, 2) == "    (it said nothing)"
    log.write_text("1\n2\n3\n")
    assert await tail(log, 2) == "    2\n    3"


async def test_an_instance_that_cannot_start_tells_why(tmp_path: Path) -> None:
    (instance,) = make_instances(
        1, kv_store="nonsense", capacity_bytes=2**24, models=tmp_path, directory=tmp_path
    )
    with anyio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        await instance.start()
    for process in instance.processes:
        await process.reap()
    (error,) = caught.value.exceptions
    assert isinstance(error, DemoError)
    assert str(error).startswith("instance alpha ended with exit code 2")
    assert "mm: KV_STORE=" in error.details


async def test_a_death_that_nobody_wanted_ends_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_PROGRAM", ("-c", "import signal; signal.pause()"))
    runtime, serve = child(tmp_path, name="the runtime"), child(tmp_path, name="the instance")
    instance = Instance("alpha", Target("alpha", "127.0.0.1", 1), 2, runtime, serve)
    for process in instance.processes:
        await process.start()
    os.kill(serve.pid, signal.SIGKILL)
    with anyio.fail_after(60), pytest.raises(ExceptionGroup) as caught:
        await Cluster((instance,)).watch()
    instance.kill()
    await instance.reap()
    assert "the instance was killed by signal 9" in repr(caught.value)


async def test_a_kill_on_purpose_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PROGRAM", ("-c", "import signal; signal.pause()"))
    runtime, serve = child(tmp_path, name="the runtime"), child(tmp_path, name="the instance")
    instance = Instance("alpha", Target("alpha", "127.0.0.1", 1), 2, runtime, serve)
    for process in instance.processes:
        await process.start()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Cluster((instance,)).watch)
            await anyio.lowlevel.checkpoint()
            instance.kill()
            assert await serve.wait() == -signal.SIGKILL
            assert await runtime.wait() == -signal.SIGKILL
            await instance.reap()
            tasks.cancel_scope.cancel()


def test_instance_names() -> None:
    assert instance_names(3) == ("alpha", "bravo", "charlie")
    assert instance_names(7)[5:] == ("instance-6", "instance-7")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_directory_is_removed(temporary: Path) -> None:
    with private_directory() as directory:
        assert directory.models.is_dir()
        assert directory.path.stat().st_mode & 0o077 == 0
    assert list(temporary.iterdir()) == []


def test_logs_are_kept_after_a_failure_and_models_are_not(temporary: Path) -> None:
    with private_directory() as directory:
        (directory.path / "a.log").write_text("x")
        (directory.models / "m").write_text("x")
        directory.keep_logs()
    assert [path.name for path in directory.path.iterdir()] == ["a.log"]
    with private_directory():
        assert directory.path.exists()
    assert directory.path.exists()


def test_what_a_killed_demo_left_is_swept(temporary: Path) -> None:
    left = temporary / "mm-demo-left"
    left.mkdir()
    (left / "owner.lock").touch()
    with private_directory() as alive:
        assert not left.exists()
        with private_directory():
            assert alive.models.is_dir()

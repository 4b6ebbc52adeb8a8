"""An instance in a pod: probes, hooks, SIGTERM, termination message (interop 3.6, around 20)."""

from __future__ import annotations

import http.client
import queue
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from mm.pb import mmesh
from mm.pb.mm.testing import EchoRequest, EchoResponse
from tests.system.callers import Caller, wait_calls
from tests.system.grpcio_runtime import grpcio_runtime
from tests.system.meshes import READY, Instance, Mesh, channel_to, mesh_of
from tests.system.processes import Program, eventually

pytestmark = pytest.mark.system

#: Ends what hangs.
LIMIT_S = 60.0
IMAGE = Path(__file__).parents[2] / "config/image"
STOP_SCRIPT = IMAGE / "stop.sh"
PORTS = {"MM_PROBE_PORT": "0", "MM_PRESTOP_WAIT_PORT": "0"}
#: A load takes a fifth of a second: a call that waits for one would show.
SIZE = "SIZE_1000000_200_0"
MODELS = [f"pod-{number}" for number in range(4)]


def port_of(program: Program, paths: str) -> int:
    return int(program.wait_line(rf"{paths}.* on port (\d+)")[1])


def ask(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    """Answer status and body, as kubelet would see them."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)) as connection:
        connection.request(method, path, headers={"User-Agent": "kube-probe/1.31"})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    settings = {**PORTS, "MM_DATAPLANE": dataplane, "MM_SCALEUP_RPM_THRESHOLD": "1000000"}
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        yield mesh


# --- probes -------------------------------------------------------------------------------------


def test_interop_16_probes_from_the_first_second(mesh: Mesh) -> None:
    """`/live` while the runtime is waited for, `/ready` only once clients are let in."""
    path = mesh.socket_path("late")
    program = mesh.start_serve("late", {"INTERNAL_GRPC_SOCKET_PATH": path})
    port = port_of(program, "/live and /ready")
    # Before the store is connected, even.
    assert ask(port, "/live") == (200, b"")
    assert is_healthy(MM_PROBE_PORT=str(port), MM_BIND_HOST="0.0.0.0")
    assert ask(port, "/ready") == (503, b"")
    program.wait_line("connected to etcd")
    # Nothing that takes time comes before it.
    assert "life_cycle: /live and /ready" in program.lines[0], program.output()
    assert [ask(port, each) for each in ("/live/", "/ready/")] == [(200, b""), (503, b"")]
    with grpcio_runtime(f"unix:{path}"):
        program.wait_line(READY)
        eventually(lambda: ask(port, "/ready") == (200, b""), what="ready")
        for method in ("HEAD", "POST", "BREW"):
            assert ask(port, "/ready?verbose", method) == (200, b"")
        for other in ("/", "/metrics", "/readyz", "/prestop"):
            assert ask(port, other) == (404, b"")
        disturb(port, port_of(program, "/prestop"))
        program.terminate()
        assert program.wait_end(LIMIT_S) == 0


def is_healthy(**settings: str) -> bool:
    """Run the image's health check with these settings and Python's own library alone."""
    command = [sys.executable, "-IS", IMAGE / "health.py"]
    ran = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    assert ran.returncode == 0 or ran.stderr.startswith("health.py: no answer from "), ran.stderr
    return ran.returncode == 0


def test_the_health_check_of_the_image() -> None:
    assert is_healthy(MM_PROBE_PORT="none"), "nobody is meant to ask"
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = str(silent.getsockname()[1])
    assert not is_healthy(MM_PROBE_PORT=port)
    assert not is_healthy(MM_PROBE_PORT="a port")


def disturb(probe_port: int, hook_port: int) -> None:
    """What scanners and broken clients send; probes are answered all the while."""
    # Of TLS, HTTP/2, and nobody.
    sent = [
        b"\x16\x03\x01" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0\r\n\r\n",
        b"",
    ]
    with ExitStack() as stack:
        for port in (probe_port, hook_port):
            for number in range(150):
                connection = socket.create_connection(("127.0.0.1", port), LIMIT_S)
                stack.enter_context(connection)
                with suppress(ConnectionError):  # it made way for a newer one
                    connection.sendall(sent[number % len(sent)])
            assert ask(port, "/none") == (404, b"")
        assert ask(probe_port, "/live") == (200, b"")
        assert ask(probe_port, "/ready") == (200, b"")


# --- hooks --------------------------------------------------------------------------------------


class HeldCall:
    """A call that goes on until it is told to end."""

    def __init__(self, instance: Instance, model_id: str) -> None:
        self._requests: queue.Queue[EchoRequest | None] = queue.Queue()
        stub: Any = instance.channel.stream_stream(
            "/mm.testing.Echo/bidiStream",
            request_serializer=bytes,
            response_deserializer=EchoResponse.parse,
        )
        metadata = (("mm-model-id", model_id),)
        self._replies = stub(iter(self._requests.get, None), metadata=metadata, timeout=LIMIT_S)

    def go_on(self) -> None:
        """Send something, and see that the runtime answers."""
        self._requests.put(EchoRequest(payload=b"still here?"))
        assert next(self._replies).payload == b"still here?"

    def end(self) -> None:
        """Let it end as it should."""
        self._requests.put(None)
        assert list(self._replies) == []


def proc_of(program: Program, directory: Path) -> Path:
    """Answer a /proc of the one process, and of those that only look like it.

    That of this machine has the processes of other tests.
    """
    own = directory / str(program.process.pid)
    for path, command in (
        (own, "/usr/bin/python3 /opt/mm/bin/mm serve"),
        (directory / "1", "tini -- mm serve"),
        (directory / "77", "python -m mm demo"),
    ):
        path.mkdir()
        (path / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")
    (own / "exe").symlink_to("/usr/local/bin/python3.13")
    (directory / "1" / "exe").symlink_to("/sbin/tini")
    (directory / "78").mkdir()
    return directory


def test_interop_15_17_a_pod_ends_in_order(mesh: Mesh, tmp_path: Path) -> None:
    """Kubelet runs all hooks of a pod at a time: the stop script here, `/prestop` for each of the
    runtime's containers. Their SIGTERM comes when their hook has ended; until then calls need them.
    """
    mesh.add_all("goes", "stays")
    goes, stays = mesh.instances
    for model_id in MODELS:
        goes.register(model_id, SIZE)
        goes.load_here(model_id)
    probe_port, hook_port = port_of(goes.serve, "/live"), port_of(goes.serve, "/prestop")
    eventually(lambda: ask(probe_port, "/ready")[0] == 200, what="ready")
    proc = proc_of(goes.serve, tmp_path)
    callers = [Caller(MODELS, stays), Caller(MODELS, goes, stays)]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for caller in callers:
            caller.start()
            stack.callback(caller.end)
        wait_calls(callers)
        hooks = [pool.submit(ask, hook_port, "/prestop") for _ in range(3)]
        eventually(lambda: goes.serve.output().count("waits at /prestop") == 3, what="hooks")
        # The hooks stop nothing themselves.
        assert ask(probe_port, "/ready") == (200, b"")
        held = HeldCall(goes, MODELS[0])
        held.go_on()
        stop = subprocess.Popen([STOP_SCRIPT, "wait"], env={"MM_PROC": str(proc)})
        # At once, while models move and calls come: whoever sends clients should know.
        eventually(lambda: ask(probe_port, "/ready") == (503, b""), what="not ready")
        goes.serve.wait_line("models have moved")
        held.go_on()
        assert ask(probe_port, "/live") == (200, b"")
        assert (stop.poll(), [hook.done() for hook in hooks]) == (None, [False] * 3)
        held.end()
        assert [hook.result(LIMIT_S) for hook in hooks] == [(200, b"")] * 3
        assert "stopped serving" in goes.serve.output()
        assert goes.serve.wait_end(LIMIT_S) == 0
        assert stop.wait(LIMIT_S) == 0
        told = re.search(r"(\d+) of (\d+) models have moved", goes.serve.output())
        assert told is not None
        assert told[1] == told[2] == str(len(MODELS))
        wait_calls(callers)
    assert [caller.failures for caller in callers] == [[], []]
    # Told again, or where there is none.
    assert subprocess.call([STOP_SCRIPT, "wait"], env={"MM_PROC": str(proc)}) == 0
    assert subprocess.call([STOP_SCRIPT], env={"MM_PROC": str(tmp_path / "77")}) == 0


def test_one_that_does_not_hear_yet_is_waited_for(tmp_path: Path) -> None:
    """Process 1 ignores SIGTERM until it has a handler; between two looks the script sleeps."""
    target = subprocess.Popen(["/bin/sleep", str(LIMIT_S)])
    own, looks = tmp_path / str(target.pid), tmp_path / "looks"
    own.mkdir()
    (own / "cmdline").write_bytes(b"python\0-m\0mm\0serve\0")
    (own / "exe").symlink_to("/usr/bin/python3.11")
    (own / "status").write_text("Name:\tmm\nSigCgt:\t0000000180000002\n")
    sleep = tmp_path / "sleep"
    sleep.write_text(
        f"#!/bin/sh\nkill -0 {target.pid} && echo alive >>{looks}\n"
        f'[ "$(wc -l <{looks})" -lt 3 ] || echo "SigCgt: 0000000180004002" >{own}/status\n'
    )
    sleep.chmod(0o755)
    try:
        env = {"MM_PROC": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
        assert subprocess.call([STOP_SCRIPT], env=env, timeout=LIMIT_S) == 0
        assert target.wait(LIMIT_S) == -signal.SIGTERM
        assert looks.read_text().split() == ["alive"] * 3
    finally:
        target.kill()
        target.wait(LIMIT_S)


def test_two_that_could_be_meant_are_not_stopped(tmp_path: Path) -> None:
    for number in ("400000000", "400000001"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "cmdline").write_bytes(b"python\0-m\0mm\0serve\0")
        (tmp_path / number / "exe").symlink_to("/usr/bin/python3.11")
    answer = subprocess.run(
        [STOP_SCRIPT], env={"MM_PROC": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == "stop.sh: more than one mm serve runs here: 400000000 400000001\n"


# --- a pod that may write nothing ---------------------------------------------------------------


def test_nothing_is_written_and_nobody_is_known(mesh: Mesh, tmp_path: Path) -> None:
    """Any user, known by no name, with a read-only root file system."""
    path, message = mesh.socket_path("strict"), tmp_path / "message"
    settings = {
        **mesh.settings,
        "MM_INSTANCE_ID": "strict",
        "INTERNAL_GRPC_SOCKET_PATH": path,
        "LL_TERMINATION_MSG_PATH": str(message),
        "HOME": "/nonexistent",
    }
    program = Program.forked("strict", "tests.system.strict_serve", settings=settings)
    try:
        with grpcio_runtime(f"unix:{path}"):
            match = program.wait_line(READY)
            with closing(channel_to(int(match[1]))) as channel:
                stub: Any = channel.unary_unary("/mmesh.ModelMesh/getModelStatus")
                assert stub(bytes(mmesh.GetStatusRequest("m")), timeout=LIMIT_S) is not None
            program.terminate()
            assert program.wait_end(LIMIT_S) == 0
        assert program.lines[-2].startswith("written: "), program.output()
        assert program.lines[-2] == "written: []"
        # It was told to stop: there is nothing to explain.
        assert not message.exists()
    finally:
        program.close()


# --- the termination message --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (
            {"MM_PROBE_PORT": "x"},
            2,
            'Service startup failed: MM_PROBE_PORT="x" is not valid; allowed: an integer from 0 to'
            " 65535 (a TCP port; 0 chooses a free one, NONE does without)",
        ),
        (
            {"MM_BIND_HOST": "203.0.113.7"},
            1,
            "Service startup failed: cannot listen on 203.0.113.7:0 (MM_BIND_HOST): cannot assign"
            " requested address; set an address of this machine, or 0.0.0.0 for all",
        ),
    ],
    ids=["a setting", "a start"],
)
def test_a_start_that_fails_says_why(
    settings: Mapping[str, str], code: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "message"
    path.write_text("before\n")
    own = {"KV_STORE": "memory", "LL_TERMINATION_MSG_PATH": str(path), **PORTS, **settings}
    program = Program.forked("serve", "mm", "serve", settings=own)
    try:
        assert program.wait_end(LIMIT_S) == code
        assert path.read_text() == f"before\n{message}\n"
        assert program.complaint == message.replace("Service startup failed", "mm")
    finally:
        program.close()

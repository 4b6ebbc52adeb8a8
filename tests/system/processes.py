"""Real processes for system tests, watched by the lines they print.

Nothing here sleeps: a process is waited for by the lines it prints, a port by the line that names
it. Every process is ended with the test that started it. Meshes of them are ``meshes.py``'s.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from mm.demo.processes import environment
from tests.system.forge import Forked, forge

T = TypeVar("T")

#: Far more than it takes, because other work may want the machine; a start has its own bench.
START_TIMEOUT_S = 120.0
EVENTUALLY_S = 60.0
_POLL_S = 0.05


class Program:
    """A child process whose output is kept, line by line."""

    def __init__(self, name: str, process: subprocess.Popen[str] | Forked) -> None:
        self.name = name
        self.process = process
        self.lines: list[str] = []
        self.started_s = time.monotonic()
        #: When its output ended; 0 until then.
        self.ended_s = 0.0
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def mm(cls, name: str, *args: str, settings: Mapping[str, str] | None = None) -> Program:
        """Start ``python -m mm ARGS``."""
        process = subprocess.Popen(
            [sys.executable, "-m", "mm", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment(os.environ) | dict(settings or {}),
            start_new_session=True,
        )
        return cls(name, process)

    @classmethod
    def forked(
        cls, name: str, module: str, *args: str, settings: Mapping[str, str] | None = None
    ) -> Program:
        """Start ``python -m MODULE ARGS`` without waiting for its imports (``forge``)."""
        own = environment(os.environ) | dict(settings or {})
        return cls(name, Forked(module, args, own, forge()))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()
        self.ended_s = time.monotonic()
        with self._grown:
            self.lines.append("<end of output>")
            self._grown.notify_all()

    def wait_line(
        self, pattern: str, *, timeout_s: float = START_TIMEOUT_S, after: int = 0
    ) -> re.Match[str]:
        """Answer the first match among the lines from number ``after`` on."""
        seen = after
        with self._grown:
            while True:
                for line in self.lines[seen:]:
                    match = re.search(pattern, line)
                    if match:
                        return match
                    assert line != "<end of output>", f"{self.name} ended:\n{self.output()}"
                seen = len(self.lines)
                assert self._grown.wait(timeout_s), (
                    f"{self.name} did not print {pattern!r} in {timeout_s} s:\n{self.output()}"
                )

    def output(self) -> str:
        """Answer everything printed so far."""
        return "\n".join(self.lines)

    def wait_end(self, timeout_s: float) -> int:
        """Answer the exit code; fails if it still runs after ``timeout_s``."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} still runs after {timeout_s} s:\n{self.output()}"
            ) from None
        self._reader.join(5)
        return code

    @property
    def complaint(self) -> str:
        """The one line with which it ended; fails if there was more, or a traceback."""
        complaints = [line for line in self.lines if line.startswith("mm: ")]
        assert len(complaints) == 1, self.output()
        assert self.lines[-2:] == [complaints[0], "<end of output>"], self.output()
        assert "Traceback" not in self.output()
        return complaints[0]

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and collect it."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """End it, whatever its state, and release what the test holds of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()
        if isinstance(self.process, Forked):
            self.process.close()


def eventually(check: Callable[[], T], *, timeout_s: float = EVENTUALLY_S, what: str = "") -> T:
    """Answer the first true answer of ``check``: for what no line and no event tells."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (answer := check()):
        assert time.monotonic() < deadline_s, f"not in {timeout_s} s: {what or check}"
        pause.wait(_POLL_S)
    return answer


def is_running(pid: int) -> bool:
    """Answer whether there is such a process, other than one that only waits to be collected."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # A zombie waits for somebody to look at it; it does nothing any more.
    return "\nState:\tZ" not in status

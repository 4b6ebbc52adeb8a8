"""`mm demo` for real, in short: its processes, its verdict, its calls to paste, its end."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.processes import eventually, is_running

pytestmark = [pytest.mark.system, pytest.mark.etcd, pytest.mark.timeout(900)]

#: Training takes ten seconds of CPU, on a machine that may have twenty other things to do.
STEP_TIMEOUT_S = 400.0


class Demo:
    """A demo in a process of its own, read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._arrived: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._arrived.put(line.rstrip("\n"))
        self._arrived.put(None)

    def join(self) -> None:
        """Wait for the end of its output."""
        self._reader.join(60)
        assert not self._reader.is_alive()

    def read_until(self, pattern: str) -> str:
        """Answer the first line that matches; fails with everything read if none comes."""
        deadline_s = time.monotonic() + STEP_TIMEOUT_S
        with contextlib.suppress(queue.Empty):
            while (line := self._arrived.get(timeout=deadline_s - time.monotonic())) is not None:
                self.lines.append(line)
                if re.search(pattern, line):
                    return line
        pytest.fail(f"no line {pattern!r} in:\n" + "\n".join(self.lines))

    def descendants(self) -> list[int]:
        """Answer the processes below this one."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                parent = int(stat.rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
        found, pending = [], [self.process.pid]
        while pending:
            children = parents.get(pending.pop(), [])
            found += children
            pending += children
        return found

    def interrupt(self) -> int:
        """Send what Ctrl-C in a terminal sends, to all of the group; answer the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(STEP_TIMEOUT_S)
        self.join()
        while not self._arrived.empty():
            self.lines.append(self._arrived.get() or "")
        return code


@contextmanager
def running_demo(directory: Path, *args: str) -> Iterator[Demo]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mm", "demo", "--plain", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env=os.environ | {"TMPDIR": str(directory), "COLUMNS": "200"},
        start_new_session=True,
    )
    demo = Demo(process)
    try:
        yield demo
    finally:
        process.kill()
        process.wait()
        demo.join()
        assert process.stdout is not None
        process.stdout.close()


def pasted(lines: list[str], title: str) -> str:
    """Answer what stands under a title, up to the empty line that ends it."""
    start = lines.index(f"# {title}") + 1
    found: list[str] = []
    for line in lines[start:]:
        if line.startswith("# "):
            break
        found.append(line)
    return "\n".join(found).strip()


def test_a_whole_run_and_what_it_leaves_to_play_with(tmp_path: Path) -> None:
    # The third instance and eight models more are left to `make demo`.
    args = ("--seconds", "3", "--models", "16", "--instances", "2", "--evictions", "3", "--keep")
    with running_demo(tmp_path, *args) as demo:
        demo.read_until("serves again")
        # After a failure the reasons stand between the table and this line.
        demo.read_until("^grpcurl ")
        text = "\n".join(demo.lines)
        assert "OK: every one of " in text, text
        assert "killed" in text
        assert re.search(r"carried by the wire\W+[1-9]\d*% of ", text), text

        commands = pasted(demo.lines, "manage models").splitlines()
        assert len(commands) == 4
        for command in commands:
            done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, (command, done.stdout, done.stderr)

        client = pasted(demo.lines, "a Python client")
        (expected,) = re.findall(r"# scikit-learn says (\[.*\])", client)
        done = subprocess.run(["sh", "-c", client], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"int64_contents={expected}" in done.stdout

        below = demo.descendants()
        # etcd, and two processes for each instance.
        assert len(below) >= 5
        assert demo.interrupt() == 0
        assert not any(map(is_running, below))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_takes_everything_down_at_any_time(tmp_path: Path) -> None:
    with running_demo(tmp_path, "--models", "16", "--instances", "2") as demo:
        demo.read_until("training")
        eventually(lambda: list(tmp_path.glob("mm-demo-*/models/*")), what="some are trained")
        below = demo.descendants()
        assert demo.interrupt() == 130
        assert not any(map(is_running, below))
        training, stopping, _ = demo.lines  # and the line that the terminal's ^C is in
        assert training.endswith(" models ..."), demo.lines
        assert stopping.endswith("] stopping everything ..."), demo.lines
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_instances_start(tmp_path: Path) -> None:
    with running_demo(tmp_path, "--models", "16", "--instances", "2") as demo:
        demo.read_until("starting etcd and 2 instances")
        below = demo.descendants()
        assert demo.interrupt() == 130
        assert not any(map(is_running, below))
        assert not any("Traceback" in line for line in demo.lines)
    assert list(tmp_path.iterdir()) == []

"""Compiled code under the sanitizers: how to build for one, run under it, and know its findings.

Shared by ``tests/table/sanitize`` and ``tests/wire/sanitize``; what those build, run and plant is
theirs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: What a sanitizer exits with on a finding; neither Python nor pytest does.
FOUND: Final = 66
#: What the answer is instead when the time was up.
LATE: Final = 67
#: Where processes leave their findings: also those that may write nowhere else.
FINDINGS: Final = "SANITIZER_FINDINGS"
#: From Ctrl-C, after which tests say what has failed so far and end what they have started.
_ENDS_S: Final = 60


@dataclass(frozen=True)
class Sanitizer:
    """How to build for it, how to run under it, and what its findings look like."""

    name: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    options: Mapping[str, str]
    words: tuple[str, ...]

    def has_found(self, output: str) -> bool:
        """Whether it reported anything."""
        return any(word in output for word in self.words)

    def run(
        self,
        command: Sequence[str],
        *,
        path: Sequence[Path],
        timeout_s: float,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        """Run Python with its runtime preloaded; answer the exit code and all that was printed.

        Findings of processes that it starts are in it, wherever these print to and however they
        end: ``FOUND`` is the code then.
        """
        with tempfile.TemporaryDirectory() as findings:
            # Processes of other users write there as well.
            os.chmod(findings, 0o777)
            options = {k: f"{v} log_path={findings}/{k}" for k, v in self.options.items()}
            own = {**(env or {}), **options, FINDINGS: findings}
            code, output = self._run(command, path, timeout_s, cwd, own)
            files = sorted(Path(findings).iterdir())
            told = "".join(f"{each.name}:\n{each.read_text(errors='replace')}" for each in files)
            return FOUND if files else code, output + told

    def _run(
        self,
        command: Sequence[str],
        path: Sequence[Path],
        timeout_s: float,
        cwd: Path | None,
        env: Mapping[str, str],
    ) -> tuple[int, str]:
        environment = {
            **os.environ,
            # Its own allocator would hide overruns, and frees.
            "PYTHONMALLOC": "malloc",
            **env,
            "LD_PRELOAD": " ".join(_library(each) for each in self.libraries),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
        }
        # Older runtimes of ThreadSanitizer do not start where addresses are very random.
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        # A file, which those whom it leaves behind do not hold open, as they would a pipe.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                [*fixed, sys.executable, *command],
                cwd=cwd,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Who runs it in the background may ignore it, and what is started here as well.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            late = ""
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code, late = LATE, f"\nnot done in {timeout_s:.0f} s, which is the limit\n"
                _end(process)
            output.seek(0)
            return code, output.read() + late


THREAD: Final = Sanitizer(
    "thread",
    ("-fsanitize=thread", "-g", "-O1"),
    ("libtsan.so",),
    {"TSAN_OPTIONS": f"exitcode={FOUND} halt_on_error=0"},
    ("WARNING: ThreadSanitizer",),
)
ADDRESS: Final = Sanitizer(
    "address",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"),
    ("libasan.so", "libubsan.so"),
    {
        # Python itself frees nothing at its end; tests of memory hold what leaks.
        "ASAN_OPTIONS": f"exitcode={FOUND} detect_leaks=0",
        "UBSAN_OPTIONS": f"exitcode={FOUND} print_stacktrace=1",
    },
    ("ERROR: AddressSanitizer", "runtime error:"),
)


@dataclass(frozen=True)
class Fault:
    """A planted fault: what stands in a file, and what takes its place. A run in which no fault is
    found has not looked.
    """

    name: str
    file: str
    right: str
    wrong: str

    def plant(self, directory: Path) -> None:
        """Change the file in a copy of the sources."""
        path = directory / self.file
        text = path.read_text()
        assert text.count(self.right) == 1, f"{self.file} has changed: plant the fault anew"
        path.write_text(text.replace(self.right, self.wrong))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_ENDS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _library(name: str) -> str:
    compiler = os.environ.get("CC", "gcc")
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{name} is not there: {compiler} is installed without it")
    return path

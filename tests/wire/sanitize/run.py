"""The wire under AddressSanitizer and UBSan (its whole test suite), and under ThreadSanitizer.

Both extensions are built with the sanitizer in a copy of the sources. A finding counts only if
findings are found: a planted overrun and a planted race must be reported first, else the run fails.
Takes some minutes, most of them compiling; ``make test-sanitize`` calls it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
#: What a sanitizer exits with on a finding; neither Python nor pytest does.
FOUND = 66
RUN_TIMEOUT_S = 900


@dataclass(frozen=True)
class Sanitizer:
    """How to build for it and run under it, and a fault that it has to find."""

    name: str
    flags: str
    libraries: tuple[str, ...]
    options: dict[str, str]
    words: tuple[str, ...]
    file: str
    right: str
    wrong: str


ADDRESS = Sanitizer(
    "address",
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1",
    ("libasan.so", "libubsan.so"),
    {
        "ASAN_OPTIONS": f"exitcode={FOUND} detect_leaks=0",
        "UBSAN_OPTIONS": f"exitcode={FOUND} print_stacktrace=1",
    },
    ("ERROR: AddressSanitizer", "runtime error:"),
    "_wire_memory.pxi",
    "    if not buffer_reserve(b, length):\n",
    "    if not buffer_reserve(b, length // 2):\n",
)
THREAD = Sanitizer(
    "thread",
    "-fsanitize=thread -g -O1",
    ("libtsan.so",),
    {"TSAN_OPTIONS": f"exitcode={FOUND} halt_on_error=0"},
    ("WARNING: ThreadSanitizer",),
    "_wire_commands.pxi",
    "    pthread_mutex_lock(&w.lock)\n    command = w.commands\n",
    "    command = w.commands\n",
)


def built(sanitizer: Sanitizer, directory: Path, *, with_fault: bool) -> Path:
    """Build a copy of the sources; answer where it is."""
    place = directory / f"{sanitizer.name}-{'fault' if with_fault else 'right'}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    ignore = shutil.ignore_patterns("*.so", "_lru.c", "_wire.c", "__pycache__")
    for name in ("mm", "tests", "bench", "proto"):
        shutil.copytree(ROOT / name, place / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, place)
    if with_fault:
        path = place / "mm/wire" / sanitizer.file
        text = path.read_text()
        assert text.count(sanitizer.right) == 1, f"{path.name} has changed: plant the fault anew"
        text = text.replace(sanitizer.right, sanitizer.wrong)
        if sanitizer is THREAD:
            text = text.replace("    pthread_mutex_unlock(&w.lock)\n    while", "    while")
        path.write_text(text)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=place,
        env={**os.environ, "CFLAGS": sanitizer.flags, "PYTHONPATH": str(place)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return place


def run(sanitizer: Sanitizer, place: Path, command: list[str]) -> tuple[int, str]:
    """Run something under the sanitizer; answer its exit code and all it printed."""
    environment = {
        **os.environ,
        **sanitizer.options,
        "LD_PRELOAD": " ".join(_library(each) for each in sanitizer.libraries),
        "PYTHONPATH": str(place),
        "PYTHONMALLOC": "malloc",
    }
    # Older runtimes of ThreadSanitizer do not start where addresses are very random.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*fixed, sys.executable, *command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _library(name: str) -> str:
    compiler = os.environ.get("CC", "gcc")
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{name} is not there: {compiler} is installed without it")
    return path


def judge(sanitizer: Sanitizer, directory: Path, command: list[str]) -> list[str]:
    """Run the fault and what is right; answer what went wrong."""
    failures = []
    for with_fault in (True, False):
        began_s = time.monotonic()
        place = built(sanitizer, directory, with_fault=with_fault)
        code, output = run(sanitizer, place, command)
        found = any(word in output for word in sanitizer.words)
        what = "a planted fault is reported" if with_fault else "nothing is reported"
        well = found and code != 0 if with_fault else code == 0 and not found
        print(
            f"{'ok  ' if well else 'FAIL'} {sanitizer.name}: {what}"
            f" ({time.monotonic() - began_s:.0f} s)",
            flush=True,
        )
        if not well:
            print(output[-20_000:])
            failures.append(f"{sanitizer.name}: {what}")
    return failures


def main() -> int:
    """Answer 0 only if every fault was found and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="calls a client (%(default)s)")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "sanitize-wire")
    parser.add_argument("--only", choices=["address", "thread"])
    arguments = parser.parse_args()
    failures = []
    if arguments.only != "thread":
        # Uncaptured: a sanitizer ends the process, and what pytest had captured with it.
        tests = ["-m", "pytest", "tests/wire", "-q", "-s", "-p", "no:cacheprovider"]
        failures += judge(ADDRESS, arguments.directory, tests)
    if arguments.only != "address":
        with tempfile.TemporaryDirectory() as name:
            upstream = str(Path(name) / "upstream")
            source = ROOT / "bench" / "upstream.c"
            subprocess.run(["cc", "-O2", "-o", upstream, source, "-lnghttp2"], check=True)
            scenario = ["tests/wire/sanitize/scenario.py", upstream, str(arguments.steps)]
            failures += judge(THREAD, arguments.directory, scenario)
    print(f"{len(failures)} failures", *failures, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

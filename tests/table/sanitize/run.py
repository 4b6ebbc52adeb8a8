"""Hammer the table under ThreadSanitizer, then under AddressSanitizer and UBSan.

The table and its readers are built with the sanitizer, whose runtime is preloaded into an
unmodified Python. A finding counts only if findings are found: first a planted race and two
planted faults of the table itself must be reported, else the run fails. Takes about a minute and
a half on two cores, most of it compiling; ``make test-sanitize`` calls it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from bench.building import build  # noqa: E402  (the root must be on the path first)

SCENARIO = Path(__file__).with_name("scenario.py")
#: What a sanitizer exits with on a finding; Python itself never does.
FOUND = 66
RUN_TIMEOUT_S = 120


@dataclass(frozen=True)
class Sanitizer:
    """How to build for it, how to run under it, and what its findings look like."""

    name: str
    args: tuple[str, ...]
    libraries: tuple[str, ...]
    options: dict[str, str]
    words: tuple[str, ...]


THREAD = Sanitizer(
    "thread",
    ("-fsanitize=thread", "-g", "-O1"),
    ("libtsan.so",),
    {"TSAN_OPTIONS": f"exitcode={FOUND} halt_on_error=0"},
    ("WARNING: ThreadSanitizer",),
)
ADDRESS = Sanitizer(
    "address",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"),
    ("libasan.so", "libubsan.so"),
    {
        # Python itself frees nothing at its end; leaks are held by test_memory.py.
        "ASAN_OPTIONS": f"exitcode={FOUND} detect_leaks=0",
        "UBSAN_OPTIONS": f"exitcode={FOUND} print_stacktrace=1",
    },
    ("ERROR: AddressSanitizer", "runtime error:"),
)


@dataclass(frozen=True)
class Fault:
    """A planted fault: what stands in a file of the table, and what takes its place."""

    name: str
    file: str
    right: str
    wrong: str


FAULTS = (
    Fault(
        "memory used again before readers have let go",
        "_lru_memory.pxi",
        "if seen != 0 and seen < least:",
        "if False:",
    ),
    Fault(
        "a pin that looks at the state before it counts",
        "_lru.pxd",
        "    add_u64(&s.calls, (<uint64_t>1 << 32) | 1, seq_cst)\n"
        "    if load_u8(&s.state, seq_cst) == READY:\n",
        # The delay makes a run of seconds enough; it is harmless where the order is right.
        "    cdef bint ready = load_u8(&s.state, seq_cst) == READY\n"
        "    cdef int delay\n"
        "    for delay in range(500):\n"
        "        load_u8(&s.state, relaxed)\n"
        "    add_u64(&s.calls, (<uint64_t>1 << 32) | 1, seq_cst)\n"
        "    if ready:\n",
    ),
    Fault(
        "a pin that puts nothing in order",
        "_lru.pxd",
        "    if load_u8(&s.state, seq_cst) == READY:\n        return True\n",
        "    if load_u8(&s.state, relaxed) == READY:\n        return True\n",
    ),
)


@dataclass
class Suite:
    """One sanitizer's builds and runs; prints a line for each and remembers failures."""

    sanitizer: Sanitizer
    directory: Path
    failures: list[str] = field(default_factory=list)

    def built(self, fault: Fault | None = None) -> Path:
        """Build table and readers, with a fault planted if one is given; answer where."""
        began_s = time.monotonic()
        # By name, so that what an earlier run built for another fault is never taken for this one.
        variant = fault.name.replace(" ", "-") if fault else "right"
        place = self.directory / f"{self.sanitizer.name}-{variant}"
        package = place / "mm"
        shutil.rmtree(package, ignore_errors=True)
        package.mkdir(parents=True)
        for each in (*ROOT.glob("mm/_lru*.p*"), ROOT / "mm/__init__.py", ROOT / "mm/table.py"):
            shutil.copy2(each, package)
        readers = Path(shutil.copy2(ROOT / "tests/table/hammer.pyx", place))
        if fault is not None:
            text = (package / fault.file).read_text()
            assert text.count(fault.right) == 1, f"{fault.file} has changed: plant the fault anew"
            (package / fault.file).write_text(text.replace(fault.right, fault.wrong))
        if fault is not None and fault.file == "_lru.pxd":
            # What readers do is compiled into them: the table itself can stay as it is.
            for each in (self.directory / f"{self.sanitizer.name}-right").glob("mm/_lru.*.so"):
                shutil.copy2(each, package)
        else:
            self._build("mm._lru", package / "_lru.pyx", place)
        self._build("mm_test_hammer", readers, place)
        print(f"  built {place.name} in {time.monotonic() - began_s:.0f} s", flush=True)
        return place

    def _build(self, name: str, source: Path, place: Path) -> None:
        build(name, source, place, extra_args=self.sanitizer.args, root=place)

    def run(self, place: Path, what: str, steps: int) -> tuple[int, str]:
        """Run the scenario under the sanitizer; answer its exit code and all it printed."""
        environment = {
            **os.environ,
            **self.sanitizer.options,
            "LD_PRELOAD": " ".join(_library(each) for each in self.sanitizer.libraries),
            "PYTHONPATH": os.pathsep.join([str(place), str(ROOT)]),
            "PYTHONMALLOC": "malloc",
            "MM_TABLE": "extension",
        }
        # Older runtimes of ThreadSanitizer do not start where addresses are very random.
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        done = subprocess.run(
            [*fixed, sys.executable, str(SCENARIO), what, str(steps)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def found(self, output: str) -> bool:
        return any(each in output for each in self.sanitizer.words)

    def must_find(self, name: str, place: Path, what: str, steps: int) -> None:
        """Run what is wrong: the sanitizer, or the readers' own checks, must say so."""
        code, output = self.run(place, what, steps)
        by_sanitizer = code == FOUND and self.found(output)
        by_readers = what == "hammer" and code == 1 and "'wrong_id'" in output
        self.tell(by_sanitizer or by_readers, f"{name}: is reported", output)

    def must_pass(self, place: Path, steps: int) -> None:
        """Run what is right: nothing may be reported."""
        began_s = time.monotonic()
        code, output = self.run(place, "hammer", steps)
        self.tell(code == 0 and not self.found(output), "the table: nothing is reported", output)
        print(f"  {output.strip()[:400]} in {time.monotonic() - began_s:.0f} s", flush=True)

    def tell(self, well: bool, what: str, output: str) -> None:
        print(f"  {'ok  ' if well else 'FAIL'} {what}", flush=True)
        if not well:
            print(output[:20_000])
            self.failures.append(f"{self.sanitizer.name}: {what}")


def _library(name: str) -> str:
    compiler = os.environ.get("CC", "gcc")
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{name} is not there: {compiler} is installed without it")
    return path


def main() -> int:
    """Run both sanitizers; answer 0 only if every fault was found and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=20_000, help="steps of the writer (%(default)s)"
    )
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "sanitize")
    arguments = parser.parse_args()
    steps, directory = arguments.steps, arguments.directory / sys.implementation.cache_tag
    began_s = time.monotonic()

    print("ThreadSanitizer")
    thread = Suite(THREAD, directory)
    instrumented = thread.built()
    thread.must_find("a planted race", instrumented, "race", 0)
    for fault in FAULTS:
        thread.must_find(fault.name, thread.built(fault), "hammer", steps)
    thread.must_pass(instrumented, steps)

    print("AddressSanitizer and UndefinedBehaviorSanitizer")
    address = Suite(ADDRESS, directory)
    instrumented = address.built()
    address.must_find("a planted overrun", instrumented, "overrun", 0)
    address.must_pass(instrumented, steps)

    failures = thread.failures + address.failures
    print(f"{len(failures)} failures in {time.monotonic() - began_s:.0f} s", *failures, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

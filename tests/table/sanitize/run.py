"""Hammer the table under ThreadSanitizer, then under AddressSanitizer and UBSan.

The table and its readers are built with the sanitizer, whose runtime is preloaded into an
unmodified Python. A finding counts only if findings are found: first a planted race and two
planted faults of the table itself must be reported, else the run fails. Takes about a minute and
a half on two cores, most of it compiling; ``make test-sanitize`` calls it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

# The root must be on the path first.
from bench.building import build  # noqa: E402
from tests.sanitizers import ADDRESS, FOUND, THREAD, Fault, Sanitizer  # noqa: E402

SCENARIO = Path(__file__).with_name("scenario.py")
RUN_TIMEOUT_S = 120


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
            fault.plant(package)
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
        build(name, source, place, extra_args=self.sanitizer.flags, root=place)

    def run(self, place: Path, what: str, steps: int) -> tuple[int, str]:
        """Run the scenario under the sanitizer; answer its exit code and all it printed."""
        return self.sanitizer.run(
            [str(SCENARIO), what, str(steps)],
            path=[place, ROOT],
            timeout_s=RUN_TIMEOUT_S,
            env={"MM_TABLE": "extension"},
        )

    def must_find(self, name: str, place: Path, what: str, steps: int) -> None:
        """Run what is wrong: the sanitizer, or the readers' own checks, must say so."""
        code, output = self.run(place, what, steps)
        by_sanitizer = code == FOUND and self.sanitizer.has_found(output)
        by_readers = what == "hammer" and code == 1 and "'wrong_id'" in output
        self.tell(by_sanitizer or by_readers, f"{name}: is reported", output)

    def must_pass(self, place: Path, steps: int) -> None:
        """Run what is right: nothing may be reported."""
        began_s = time.monotonic()
        code, output = self.run(place, "hammer", steps)
        self.tell(
            code == 0 and not self.sanitizer.has_found(output),
            "the table: nothing is reported",
            output,
        )
        print(f"  {output.strip()[:400]} in {time.monotonic() - began_s:.0f} s", flush=True)

    def tell(self, well: bool, what: str, output: str) -> None:
        print(f"  {'ok  ' if well else 'FAIL'} {what}", flush=True)
        if not well:
            print(output[:20_000])
            self.failures.append(f"{self.sanitizer.name}: {what}")


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

"""The wire under AddressSanitizer and UBSan (its whole test suite), and under ThreadSanitizer.

With ``--soak CALLS`` it is ``bench/soak.py`` instead that runs under AddressSanitizer and UBSan.

Both extensions are built with the sanitizer in a copy of the sources. A finding counts only if
findings are found: a planted overrun and a planted race must be reported first, else the run fails.
Takes some minutes, most of them compiling; ``make test-sanitize-wire`` calls it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

# The root must be on the path first.
from tests.sanitizers import ADDRESS, THREAD, Fault, Sanitizer  # noqa: E402

RUN_TIMEOUT_S = 900
#: Memory is not compared in a soak that is so short: a sanitizer keeps what was freed for a while.
SOAK_MINUTES = 3.9
SOAK = "bench/soak.py"


FAULTS = {
    ADDRESS.name: Fault(
        "an overrun",
        "_wire_memory.pxi",
        "    if not buffer_reserve(b, length):\n",
        "    if not buffer_reserve(b, length // 2):\n",
    ),
    THREAD.name: Fault(
        "a race",
        "_wire_commands.pxi",
        "    pthread_mutex_lock(&w.lock)\n"
        "    command = w.commands\n"
        "    w.commands = w.commands_last = NULL\n"
        "    store_u32(&w.has_commands, 0, relaxed)\n"
        "    pthread_mutex_unlock(&w.lock)\n",
        "    command = w.commands\n"
        "    w.commands = w.commands_last = NULL\n"
        "    store_u32(&w.has_commands, 0, relaxed)\n",
    ),
}


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
        FAULTS[sanitizer.name].plant(place / "mm/wire")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=place,
        env={**os.environ, "CFLAGS": " ".join(sanitizer.flags), "PYTHONPATH": str(place)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return place


def judge(sanitizer: Sanitizer, directory: Path, command: list[str]) -> list[str]:
    """Run the fault and what is right; answer what went wrong."""
    failures = []
    for with_fault in (True, False):
        began_s = time.monotonic()
        place = built(sanitizer, directory, with_fault=with_fault)
        code, output = sanitizer.run(command, path=[place], timeout_s=RUN_TIMEOUT_S, cwd=place)
        found = sanitizer.has_found(output)
        what = "a planted fault is reported" if with_fault else "nothing is reported"
        well = found and code != 0 if with_fault else code == 0 and not found
        print(
            f"{'ok  ' if well else 'FAIL'} {sanitizer.name}: {what}"
            f" ({time.monotonic() - began_s:.0f} s)",
            flush=True,
        )
        if not well or (command[0] == SOAK and not with_fault):
            print(output[-20_000:])
            failures.append(f"{sanitizer.name}: {what}")
    return failures


def main() -> int:
    """Answer 0 only if every fault was found and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="calls a client (%(default)s)")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "sanitize-wire")
    parser.add_argument("--only", choices=["address", "thread"])
    parser.add_argument(
        "--soak", type=int, metavar="CALLS", help="only so many calls of bench/soak.py"
    )
    arguments = parser.parse_args()
    failures = []
    if arguments.soak:
        soak = [SOAK, "--calls", str(arguments.soak), "--minutes", str(SOAK_MINUTES)]
        failures += judge(ADDRESS, arguments.directory, soak)
    elif arguments.only != "thread":
        # Uncaptured: a sanitizer ends the process, and what pytest had captured with it.
        tests = ["-m", "pytest", "tests/wire", "-q", "-s", "-p", "no:cacheprovider"]
        failures += judge(ADDRESS, arguments.directory, tests)
    if arguments.only != "address" and not arguments.soak:
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

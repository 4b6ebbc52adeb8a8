"""The wire under AddressSanitizer and UBSan (all of its tests), and under ThreadSanitizer.

Instead of both it is all tests of the project that run under AddressSanitizer and UBSan with
``--suite``, and ``bench/soak.py`` with ``--soak CALLS``, each with all processes that it starts.

Both extensions are built with the sanitizer in a copy of the sources. A finding counts only if
findings are found: a planted overrun and a planted race must be reported first, else the run fails,
with ``--suite`` the overrun of an instance that a test has started. Takes some minutes, most of
them compiling; ``make test-sanitize-wire`` calls it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

# The root must be on the path first.
from tests.sanitizers import ADDRESS, THREAD, Fault, Sanitizer  # noqa: E402

RUN_TIMEOUT_S = 900
SUITE_TIMEOUT_S = 3600
#: Memory is not compared in a soak that is so short: a sanitizer keeps what was freed for a while.
SOAK_MINUTES = 3.9
SOAK = "bench/soak.py"
#: A test may take three times as long as else before it is ended. Those are left out that measure
#: what a sanitizer changes (the marker's reasons say what).
PYTEST = (
    *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "900"),
    *("-m", "not without_sanitizers"),
)
#: As `make test` shares them out, but fewer at a time.
SUITE = (*PYTEST, "tests", "--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder")
#: Python's own small objects are Python's to look after here, which takes a third of the time: what
#: the wire does with them is seen in its own tests, its soak and its fuzzing.
SUITE_ENVIRONMENT = {"PYTHONMALLOC": "pymalloc"}
#: What finds the planted fault in a process that a test has started: messages of all lengths.
STARTED = (*PYTEST, "tests/system/test_foreign_calls.py", "-x")
#: Beside the files that lie at the top.
DIRECTORIES = (".ci", "bench", "config", "docs", "mm", "proto", "tests", "tools")


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
    for name in DIRECTORIES:
        shutil.copytree(ROOT / name, place / name, ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copy2(file, place)
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


def judge(
    sanitizer: Sanitizer,
    directory: Path,
    command: Sequence[str],
    *,
    finds: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float = RUN_TIMEOUT_S,
) -> list[str]:
    """Run the fault and what is right; answer what went wrong.

    ``finds`` is the command for the fault, if it is not the same.
    """
    failures = []
    for with_fault in (True, False):
        began_s = time.monotonic()
        place = built(sanitizer, directory, with_fault=with_fault)
        chosen = finds if with_fault and finds else command
        code, output = sanitizer.run(chosen, path=[place], timeout_s=timeout_s, cwd=place, env=env)
        found = sanitizer.has_found(output)
        what = "a planted fault is reported" if with_fault else "nothing is reported"
        well = found and code != 0 if with_fault else code == 0 and not found
        print(
            f"{'ok  ' if well else 'FAIL'} {sanitizer.name}: {what}"
            f" ({time.monotonic() - began_s:.0f} s)",
            flush=True,
        )
        if not (well and with_fault):
            print(output[-20_000:])
        if not well:
            failures.append(f"{sanitizer.name}: {what}")
    return failures


def main() -> int:
    """Answer 0 only if every fault was found and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="calls a client (%(default)s)")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "sanitize-wire")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", choices=["address", "thread"])
    what.add_argument(
        "--suite",
        action="store_true",
        help=f"all tests instead, on two cores; it is ended after {SUITE_TIMEOUT_S // 60} minutes",
    )
    what.add_argument(
        "--soak", type=int, metavar="CALLS", help="so many calls of bench/soak.py instead"
    )
    arguments = parser.parse_args()
    failures = []
    if arguments.soak:
        soak = [SOAK, "--calls", str(arguments.soak), "--minutes", str(SOAK_MINUTES)]
        failures += judge(ADDRESS, arguments.directory, soak)
    elif arguments.suite:
        failures += judge(
            ADDRESS,
            arguments.directory,
            SUITE,
            finds=STARTED,
            env=SUITE_ENVIRONMENT,
            timeout_s=SUITE_TIMEOUT_S,
        )
    elif arguments.only != "thread":
        # Uncaptured: a sanitizer ends the process, and what pytest had captured with it.
        failures += judge(ADDRESS, arguments.directory, [*PYTEST, "tests/wire", "-s"])
    if arguments.only != "address" and not (arguments.soak or arguments.suite):
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

"""Fuzzes the wire for some minutes under AddressSanitizer and UBSan; ``make fuzz`` calls it.

Kinds take turns, each from its own stand, with seeds that go on from the first one. A finding ends
the run with the kind and seed, which ``--inside KIND --first-seed SEED`` plays again.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

# The root must be on the path first.
from tests.sanitizers import ADDRESS  # noqa: E402
from tests.wire.fuzz.stand import KINDS, identities, run, serve  # noqa: E402
from tests.wire.sanitize.run import built  # noqa: E402

#: Executions of a kind before it is the next one's turn.
TURN = {"clients": 300, "python": 100, "records": 100, "peers": 20, "runtimes": 20}


def fuzz(kinds: list[str], first_seed: int, seconds: float) -> None:
    """Take turns until the time is up, and say how many executions that were."""
    began_s, seed = time.monotonic(), first_seed
    counts = dict.fromkeys(kinds, 0)
    with tempfile.TemporaryDirectory() as name:
        contexts, client = identities(Path(name))
        for kind in itertools.cycle(kinds):
            if time.monotonic() - began_s >= seconds:
                break
            with serve(kind, contexts, client, seed) as stand:
                run(stand, kind, range(seed, seed + TURN[kind]))
            counts[kind] += TURN[kind]
            seed += TURN[kind]
    told = ", ".join(f"{count:,} of {kind}" for kind, count in counts.items())
    print(f"seeds {first_seed} to {seed}: {sum(counts.values()):,} executions ({told}); no finding")


def main() -> int:
    """Answer 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="(%(default)s)")
    parser.add_argument("--first-seed", type=int, default=random.randrange(10**9))
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--inside", choices=["all", *KINDS], help="here, without a sanitizer")
    arguments = parser.parse_args()
    if arguments.inside:
        kinds = list(KINDS) if arguments.inside == "all" else [arguments.inside]
        fuzz(kinds, arguments.first_seed, arguments.minutes * 60)
        return 0
    place = built(ADDRESS, arguments.directory, with_fault=False)
    minutes, seed = str(arguments.minutes), str(arguments.first_seed)
    command = ["tests/wire/fuzz/run.py", "--inside", "all"]
    command += ["--minutes", minutes, "--first-seed", seed]
    timeout_s = arguments.minutes * 60 + 900
    code, output = ADDRESS.run(command, path=[place], timeout_s=timeout_s, cwd=place)
    print(output[-20_000:])
    return 1 if ADDRESS.has_found(output) else code


if __name__ == "__main__":
    sys.exit(main())

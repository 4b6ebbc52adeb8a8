"""What calls through the wire cost, beside HAProxy, nginx and nghttpx: the whole table of goals.

    python bench/wire.py [--quick] [--rounds 5] [--only NAME,NAME] [--install]

Everything in one run on one machine: contenders take turns in alternating order, with one thread
each, before an upstream of our own (``upstream.c``); figures are medians over the rounds, ratios
the medians of the rounds' ratios. With five rounds it takes twenty minutes. "CPU us" is of the
process's own clock, so it is what to trust where cores are shared. Ends at once if any answer was
not whole, with grpc-status 0; says so, and fails, if the client or the upstream was what limited a
rate.

HAProxy, nghttpx, nginx and h2load come from the distribution; --install fetches what is missing.
Rows, for --only:
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from _contenders import PROGRAMS, build, need
from _goals import Goal, judge
from _wire_loads import NotMeasuredError
from _wire_mesh import MESH_ROWS, measure_mesh
from _wire_outside import OUTSIDE_ROWS, measure_outside, programs_of_outside
from _wire_rows import ROWS, measure

QUICK_SCALE = 0.1
#: Rounds of those rows take half a minute each.
MESH_ROUNDS_MAX = 3


def programs_of(names: list[str]) -> list[str]:
    """Answer what these rows take from elsewhere."""
    contenders = {each for name in names if name in ROWS for each in ROWS[name].contenders}
    own = [program for each in sorted(contenders) for program in PROGRAMS.get(each, [])]
    own += [each for name in names if name in OUTSIDE_ROWS for each in programs_of_outside(name)]
    return list(dict.fromkeys(["cc", "h2load", *own]))


def main() -> int:
    """Answer what the shell gets: 0 if every goal is met."""
    titles = {name: row.title for name, row in ROWS.items()} | {
        name: title for name, (title, _) in (MESH_ROWS | OUTSIDE_ROWS).items()
    }
    rows = "\n".join(f"  {name:11}{title}" for name, title in titles.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "") + rows, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls, in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(titles), help="some of the rows")
    parser.add_argument("--install", action="store_true", help="what is missing, with apt-get")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(titles):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    need(programs_of(names), installs=arguments.install)
    rounds, scale = (1, QUICK_SCALE) if arguments.quick else (arguments.rounds, 1.0)
    began_s = time.monotonic()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
    goals: list[Goal] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mm-bench-wire-") as name:
        directory = Path(name)
        build(directory)
        plain = [name for name in names if name in ROWS]
        if plain:
            results, wrong = measure(plain, rounds, scale, directory)
            goals += [goal for name in plain for goal in ROWS[name].judge(results)]
        for name in names:
            if name in ROWS:
                continue
            try:
                if name in MESH_ROWS:
                    goals += measure_mesh(name, min(rounds, MESH_ROUNDS_MAX), scale, directory)
                else:
                    found, limited = measure_outside(name, rounds, scale, directory)
                    goals += found
                    wrong += limited
            except NotMeasuredError as error:
                wrong.append(f"{titles[name]}: {error}")
    missed = judge(goals)
    print(f"took {(time.monotonic() - began_s) / 60:.1f} minutes")
    print(*(f"NOT MEASURED: {each}" for each in wrong), sep="\n")
    return 1 if missed or wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

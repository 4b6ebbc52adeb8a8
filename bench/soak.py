"""Mixed calls to three instances for a long time, while clients, instances and runtimes fail.

    python bench/soak.py [--calls 10000000] [--minutes 60] [--seed 1]

Calls of all kinds (small, large, streams in each direction, by turns), for models that are loaded,
that are not, and by vmodels, to the instance that has them or to another, and clients that cancel,
leave streams half closed, and go away (``soaker.c``). Each carries a token that the runtime echoes
and counts (``soaked.c``). Meanwhile instances and runtimes are killed (SIGKILL) and come back,
vmodels move, and models are evicted and loaded anew. After a tenth of the calls, the warm-up, and
after all, with every client gone, it compares:

- no answer, not a byte of one, was another call's (else the client ends at once);
- every call that was begun has an outcome, and each that was answered was answered by a runtime:
  client's count = runtimes' count + refusals, where calls that were cancelled or lost may or may
  not have come; calls that were not begun were not seen;
- refusals are UNAVAILABLE, or the time was up;
- processes that were there all the time are as large as after the warm-up, within 2 % (or 2 MiB),
  and have as many descriptors (told of runs of four minutes and more).

Exits with 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from _contenders import need
from _soak_world import MODELS, VMODELS, Figures, Place, move_vmodels, world_of

HERE = Path(__file__).parent
CONNECTIONS, STREAMS = 3, 8
WARM_UP_SHARE = 0.1
#: From the last call to a look: instances collect garbage once a minute. Not where nothing is told
#: of the memory: in runs that are shorter than this.
REST_S, SHORT_REST_S = 70.0, 1.0
FLAT_MINUTES_MIN = 4.0
#: Faults come so many times in a run, if that leaves them so long to pass.
FAULTS, FAULT_S_MIN = 40, 6.0
PROGRESS_S = 20.0
RSS_SHARE_MAX, RSS_KIB_MAX = 0.02, 2048
#: Connections among processes of the mesh may be as many more as are opened when one is full.
POOLED_MORE_MAX = 32
#: Bytes of ``soaker.c``'s outcomes.
NAMES = {0: "never begun", 1: "answered", 2: "cancelled", 3: "lost", 4: "reset as asked"}
STATUSLESS, REFUSED = 99, 100
#: UNAVAILABLE, and DEADLINE_EXCEEDED.
REFUSALS = {REFUSED + 14, REFUSED + 4}


@dataclass(slots=True)
class Run:
    """What one run of the client told."""

    began_s: float = field(default_factory=time.monotonic)
    begun: int = 0
    line: str = ""


def build(directory: Path) -> None:
    """Compile the client and the runtime."""
    for name in ("soaker", "soaked"):
        command = ["cc", "-O2", "-o", directory / name, HERE / f"{name}.c", "-lnghttp2"]
        subprocess.run(command, check=True)


async def call_for(
    places: list[Place], directory: Path, first: int, calls: int, seconds: float, seed: int
) -> Run:
    """Let the client make so many calls, or so long."""
    ports = ",".join(str(place.port) for place in places)
    numbers = (CONNECTIONS, STREAMS, first, calls, math.ceil(seconds), MODELS, VMODELS)
    process = await asyncio.create_subprocess_exec(
        directory / "soaker",
        ports,
        *map(str, numbers),
        directory / "outcomes",
        str(seed),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    run, told_s = Run(), time.monotonic()
    try:
        async for line in process.stdout:
            run.line = line.decode().strip()
            run.begun = int(run.line.split()[0])
            if time.monotonic() - told_s >= PROGRESS_S:
                told_s = time.monotonic()
                rate = run.begun / (told_s - run.began_s)
                print(f"  {told_s - run.began_s:5.0f} s: {run.begun:,} begun, {rate:,.0f}/s")
                for place in places:
                    rss = " ".join(f"{each.rss_kib}" for each in place.figures().values())
                    print(f"           instance {place.number}: {rss} KiB", flush=True)
        if await process.wait():
            sys.exit(f"the client ended with {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return run


async def fail_now_and_then(places: list[Place], every_s: float, ended: asyncio.Event) -> None:
    """One fault after the other. Of the first instance nothing fails: it is what is measured."""
    turn = 0
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), every_s)
            return
        match turn % 4:
            case 0:
                told = await places[2].die()
            case 1:
                told = await move_vmodels(places[0].instance, turn)
            case 2:
                told = await places[1].lose_runtime()
            case _:
                told = await places[2].lose_runtime()
        print(f"  {told}", flush=True)
        turn += 1


@asynccontextmanager
async def failing(places: list[Place], every_s: float) -> AsyncIterator[None]:
    """Have faults come, as long as the context is open; what is killed is back after it."""
    ended = asyncio.Event()
    task = asyncio.create_task(fail_now_and_then(places, every_s, ended))
    try:
        yield
    finally:
        ended.set()
        await task


def account(outcomes: bytes, counts: bytes) -> tuple[Counter[str], list[str]]:
    """Answer what became of calls, and what does not add up."""
    by: Counter[tuple[int, int, int]] = Counter(
        zip(outcomes, counts[::2], counts[1::2], strict=True)
    )
    told: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for (outcome, came, answered), count in by.items():
        name = NAMES.get(outcome, f"status {outcome - REFUSED}")
        told[name] += count
        if outcome == STATUSLESS:
            wrong["ended without a status"] += count
        elif outcome > REFUSED and outcome not in REFUSALS:
            wrong[f"ended with status {outcome - REFUSED}"] += count
        elif outcome == 0 and came:
            wrong["came, and were never begun"] += count
        elif outcome == 1 and not answered:
            wrong["have an answer that no runtime gave"] += count
        elif outcome == 4 and not came:
            wrong["were reset by a runtime that they never came to"] += count
        if came:
            told["came to a runtime"] += count
            told["  of these more than once"] += count if came > 1 else 0
            told["  of these refused, cancelled, lost or reset"] += count if outcome > 1 else 0
    if (
        told["came to a runtime"] - told["  of these refused, cancelled, lost or reset"]
        != (told["answered"])
    ):
        wrong["the sums differ"] += 1
    return told, [f"{count} calls {what}" for what, count in wrong.items()]


def compare(
    place: Place, before: dict[str, Figures], after: dict[str, Figures], is_long: bool
) -> tuple[list[str], list[str]]:
    """Answer the lines of the table for one instance, and what does not hold."""
    lines, wrong = [], []
    for name, now in after.items():
        then = before[name]
        what = f"{name} {place.number}"
        is_new = name in place.renewed
        more_kib = now.rss_kib - then.rss_kib
        share = more_kib / then.rss_kib
        verdict = "restarted" if is_new else "flat" if is_long else ""
        if is_long and not is_new and more_kib > max(RSS_KIB_MAX, RSS_SHARE_MAX * then.rss_kib):
            verdict = "GROWN"
            wrong.append(f"{what} has grown by {more_kib} KiB ({share:.1%})")
        if now.others > then.others or now.pooled > then.pooled + POOLED_MORE_MAX:
            wrong.append(f"{what} has more descriptors: {then} and then {now}")
        fds = f"{then.others} -> {now.others} (and {then.pooled} -> {now.pooled})"
        size = f"{then.rss_kib} -> {now.rss_kib}"
        lines.append(f"{what:12}{size:>20} KiB {share:>+7.1%}  {verdict:10}{fds:>32}")
    return lines, wrong


async def soak(directory: Path, calls: int, minutes: float, seed: int) -> list[str]:
    """Do it all; answers what did not hold."""
    size = int(calls * (1 + WARM_UP_SHARE)) + 1
    outcomes, counts = directory / "outcomes", directory / "counts"
    outcomes.write_bytes(bytes(size))
    counts.write_bytes(bytes(2 * size))
    seconds = minutes * 60
    is_long = minutes >= FLAT_MINUTES_MIN
    rest_s = REST_S if is_long else SHORT_REST_S
    warm_calls = int(calls * WARM_UP_SHARE)
    async with world_of(directory, counts) as places:
        every_s = max(FAULT_S_MIN, seconds / FAULTS)
        # Faults are a part of it: what waits for an instance that is gone takes more at a time than
        # calls do that are answered. They come as thick as they can, for each to have come a few
        # times: how much waits at most is a matter of chance.
        print("warm-up", flush=True)
        async with failing(places, FAULT_S_MIN):
            await call_for(places, directory, 0, warm_calls, seconds * WARM_UP_SHARE, seed)
        await asyncio.sleep(rest_s)
        before = [place.figures() for place in places]
        for place in places:
            place.renewed.clear()
        print("calls and faults", flush=True)
        async with failing(places, every_s):
            run = await call_for(places, directory, warm_calls, calls, seconds, seed + 1)
        took_s = time.monotonic() - run.began_s
        await asyncio.sleep(rest_s)
        after = [place.figures() for place in places]
    told, wrong = account(outcomes.read_bytes(), counts.read_bytes())
    rate = run.begun / took_s
    print(f"\n{run.begun:,} calls after the warm-up, {took_s:.0f} s, {rate:,.0f}/s")
    for name, count in told.items():
        if name != NAMES[0] and count:
            print(f"{name:48}{count:>12,}")
    print()
    for place, then, now in zip(places, before, after, strict=True):
        lines, more = compare(place, then, now, is_long)
        wrong += more
        print("\n".join(lines))
    return wrong


def main() -> int:
    """Answer what the shell gets: 0 if all holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=10_000_000, help="so many [10,000,000]")
    parser.add_argument("--minutes", type=float, default=60.0, help="not longer than this [60]")
    parser.add_argument("--seed", type=int, default=1, help="of kinds and fates of calls [1]")
    options = parser.parse_args()
    need(["cc"], installs=False)
    with tempfile.TemporaryDirectory() as directory:
        build(Path(directory))
        wrong = asyncio.run(soak(Path(directory), options.calls, options.minutes, options.seed))
    for each in wrong:
        print(f"WRONG: {each}")
    print("all holds" if not wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

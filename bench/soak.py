"""Mixed calls to three instances for a long time, while clients, instances and runtimes fail.

    python bench/soak.py [--calls 10000000] [--minutes 60] [--seed 1]

Calls of all kinds (small, large, streams in each direction, by turns), for models that are loaded,
that are not, and by vmodels, to the instance that has them or to another, and clients that cancel,
leave streams half closed, and go away (``soaker.c``). Each carries a token that the runtime echoes
and counts (``soaked.c``). Meanwhile instances and runtimes are killed (SIGKILL) and come back,
vmodels move, and models are evicted and loaded anew. First comes a fifth as many calls, the
warm-up: two million before ten. Then this has to hold:

- all calls were begun (told of runs of a million and more): the time was enough;
- no answer, not a byte of one, was another call's (else the client ends at once);
- every call that was begun has an outcome, and each that was answered was answered by a runtime:
  client's count = runtimes' count + refusals, where calls that were cancelled or lost may or may
  not have come; calls that were not begun were not seen;
- refusals are UNAVAILABLE, or the time was up; and something had failed not long before;
- processes that were there all the time do not grow: the middle of the samples of resident memory
  in the last fifth of the time is no more than 2 % (or 512 KiB) above that in the first fifth after
  the warm-up, and so is the trend over all fifths (told of runs of four minutes and more);
- in the end, with every client gone, each has as many descriptors as after the warm-up.

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

import grpc.aio
from _contenders import need
from _soak_judge import Fault, Growth, Memory, Refusal, weigh_refusals
from _soak_world import MODELS, VMODELS, Descriptors, Place, move_vmodels, world_of

HERE = Path(__file__).parent
CONNECTIONS, STREAMS = 3, 8
WARM_UP_SHARE = 0.2
#: From the last call to a look at descriptors, for what ends by and by.
REST_S = 1.0
#: What is told of runs that are long enough: of memory, and of the number of calls.
FLAT_MINUTES_MIN = 4.0
ALL_CALLS_MIN = 1_000_000
#: Faults come so many times in a run, if that leaves them so long to pass, and in a long one more
#: often.
FAULTS, FAULT_S_MIN, FAULT_S_MAX = 40, 6.0, 40.0
PROGRESS_S = 20.0
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
    refusals: list[Refusal] = field(default_factory=list)


@dataclass(slots=True)
class Done:
    """What was done to instances and runtimes, and what was refused to whoever did it."""

    faults: list[Fault] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def build(directory: Path) -> None:
    """Compile the client and the runtime."""
    for name in ("soaker", "soaked"):
        command = ["cc", "-O2", "-o", directory / name, HERE / f"{name}.c", "-lnghttp2"]
        subprocess.run(command, check=True)


async def call_for(
    places: list[Place],
    memory: Memory,
    directory: Path,
    first: int,
    calls: int,
    seconds: float,
    seed: int,
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
            text = line.decode().strip("\n")
            if text.startswith("refused"):
                run.refusals.append(Refusal.read(text))
                continue
            run.begun = int(text.split()[0])
            if time.monotonic() - told_s >= PROGRESS_S:
                told_s = time.monotonic()
                rate = run.begun / (told_s - run.began_s)
                print(
                    f"  {told_s - run.began_s:5.0f} s: {run.begun:,} begun, {rate:,.0f}/s", end=""
                )
                print(f", {len(run.refusals)} refused; KiB:", end="")
                sizes = memory.last_kib().items()
                print("".join(f" {name} {kib}" for name, kib in sizes), flush=True)
        if await process.wait():
            sys.exit(f"the client ended with {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return run


async def fail_now_and_then(
    places: list[Place], every_s: float, ended: asyncio.Event, done: Done
) -> None:
    """One fault after the other. Of the first instance nothing fails: it is what is measured."""
    turn = 0
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), every_s)
            return
        began_s = time.monotonic()
        if turn % 4 == 1:
            try:
                what = await move_vmodels(places[0].instance, turn)
            except grpc.aio.AioRpcError as error:
                done.refusals.append(Refusal.of(error))
                what = f"a vmodel was not moved: {error.code().name}"
        else:
            fault = Fault(began_s)
            done.faults.append(fault)
            match turn % 4:
                case 0:
                    what = await places[2].die()
                case 2:
                    what = await places[1].lose_runtime()
                case _:
                    what = await places[2].lose_runtime()
            fault.ended_s = time.monotonic()
        print(f"  {what}, in {time.monotonic() - began_s:.1f} s", flush=True)
        turn += 1


@asynccontextmanager
async def failing(places: list[Place], every_s: float) -> AsyncIterator[Done]:
    """Have faults come, as long as the context is open; what is killed is back after it."""
    ended = asyncio.Event()
    done = Done()
    task = asyncio.create_task(fail_now_and_then(places, every_s, ended, done))
    try:
        yield done
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
    place: Place,
    growths: dict[str, Growth | None],
    before: dict[str, Descriptors],
    after: dict[str, Descriptors],
) -> tuple[list[str], list[str]]:
    """Answer the lines of the table for one instance, and what does not hold."""
    lines, wrong = [], []
    for name, now in after.items():
        then = before[name]
        what = f"{name} {place.number}"
        growth = growths.get(what)
        size = verdict = "restarted" if name in place.renewed else ""
        if growth is not None and name not in place.renewed:
            last_kib = growth.first_kib + growth.more_kib
            share, trend = growth.more_kib / growth.first_kib, growth.trend_kib / growth.first_kib
            size = f"{growth.first_kib:.0f} -> {last_kib:.0f} KiB {share:+.1%}, trend {trend:+.1%}"
            verdict = "flat" if growth.is_flat else "GROWN"
            if not growth.is_flat:
                steps = " ".join(f"{kib:.0f}" for kib in growth.windows_kib)
                wrong.append(f"{what} has grown: {size}; by fifths of the time {steps}")
        if now.others > then.others or now.pooled > then.pooled + POOLED_MORE_MAX:
            wrong.append(f"{what} has more descriptors: {then} and then {now}")
        fds = f"{then.others} -> {now.others} (and {then.pooled} -> {now.pooled})"
        lines.append(f"{what:12}{size:>46}  {verdict:10}{fds:>32}")
    return lines, wrong


async def soak(directory: Path, calls: int, minutes: float, seed: int) -> list[str]:
    """Do it all; answers what did not hold."""
    size = int(calls * (1 + WARM_UP_SHARE)) + 1
    outcomes, counts = directory / "outcomes", directory / "counts"
    outcomes.write_bytes(bytes(size))
    counts.write_bytes(bytes(2 * size))
    seconds = minutes * 60
    warm_calls = int(calls * WARM_UP_SHARE)
    async with world_of(directory, counts) as places:
        memory = Memory(places)
        every_s = min(FAULT_S_MAX, max(FAULT_S_MIN, seconds / FAULTS))
        # Faults are a part of it: what waits for an instance that is gone takes more at a time than
        # calls do that are answered. They come as thick as they can, for each to have come a few
        # times: how much waits at most is a matter of chance.
        print("warm-up", flush=True)
        share_s = seconds * WARM_UP_SHARE
        async with memory.sampled(), failing(places, FAULT_S_MIN):
            await call_for(places, memory, directory, 0, warm_calls, share_s, seed)
        await asyncio.sleep(REST_S)
        before = [place.descriptors() for place in places]
        for place in places:
            place.renewed.clear()
        print("calls and faults", flush=True)
        async with memory.sampled():
            async with failing(places, every_s) as done:
                run = await call_for(
                    places, memory, directory, warm_calls, calls, seconds, seed + 1
                )
            took_s = time.monotonic() - run.began_s
        await asyncio.sleep(REST_S)
        after = [place.descriptors() for place in places]
    told, wrong = account(outcomes.read_bytes(), counts.read_bytes())
    if run.begun < calls and calls >= ALL_CALLS_MIN:
        wrong.append(f"no more than {run.begun:,} of {calls:,} calls in {minutes:g} minutes")
    print(f"\n{run.begun:,} calls after the warm-up, {took_s:.0f} s, {run.begun / took_s:,.0f}/s")
    for name, count in told.items():
        if name != NAMES[0] and count:
            print(f"{name:48}{count:>12,}")
    lines, more = weigh_refusals(run.refusals + done.refusals, done.faults)
    wrong += more
    print(f"\nrefused after the warm-up, beside {len(done.faults)} faults:", *lines, sep="\n")
    print()
    growths = memory.growths() if took_s >= 60 * FLAT_MINUTES_MIN else {}
    for place, then, now in zip(places, before, after, strict=True):
        lines, more = compare(place, growths, then, now)
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

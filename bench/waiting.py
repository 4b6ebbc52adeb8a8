"""What hits notice while thousands of calls wait for loads: arrival, waiting, release.

Real processes on loopback: etcd, the example runtime (loads of 3 s), `mm serve`, and two clients of
gRPC's own C core, each in a process of its own. One, the probe, calls a loaded model 100 times a
second, each call on time whatever became of those before; all figures are of its calls. The other
sends the calls that wait. In each round
  quiet     the probe alone
  paced     the first half of the calls arrive, 0.4 times as many a second as a bare grpclib echo
            server answers at that moment on that machine (which is measured first)
  fast      the second half arrives, as fast as one client process can
  waiting   all wait for loads
  release   all models are ready at once: from the first of their replies to the last
The sender runs at nice 10, so that on a small machine it takes what the others leave rather than
time from the hits; what it costs is printed. Loads that come first (one call each) hold the loading
slots until all have arrived, so that the phases do not overlap.

    .venv/bin/python bench/waiting.py            about two minutes
    .venv/bin/python bench/waiting.py --quick    a smaller one, to see that it works
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import grpc.aio
import proxy
from _instance import Instance, at_once, cpu_s, instance_of, percentile

from mm.edge.embedded_etcd import embedded_etcd
from mm.pb import mmesh

PREDICT = "/mmesh.ExamplePredictor/predict"
REQUEST = bytes(mmesh.PredictRequest(text="x"))
LOAD_S = 3.0
PROBE_RATE = 100
#: Paced arrivals, and what arrives when a client does what it can, as parts of the echo's rate.
PACED_SHARE, FAST_SHARE = 0.4, 0.3
#: Loading slots, and models that the calls wait for: all are loaded at the same time.
SLOTS = 10
#: Streams of one connection, below what `mm serve` allows.
STREAMS = 900
#: Calls of the probe in a phase without which it has no figures: p99 of fewer is the worst one.
SAMPLES_MIN = 50
ECHO_CALLS = 3_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rounds: int
    calls: int
    quiet_s: float

    def waves(self, echo_rate: float) -> int:
        """Answer how many loads each slot does before those that the calls wait for."""
        arriving_s = self.calls / 2 / echo_rate * (1 / PACED_SHARE + 1 / FAST_SHARE)
        return math.ceil(arriving_s / LOAD_S) + 1


FULL = Sizes(rounds=3, calls=10_000, quiet_s=5.0)
QUICK = Sizes(rounds=1, calls=2_000, quiet_s=3.0)

#: Phases in the order of the table, with the goal for p99 against quiet (issue 4).
GOALS = {"quiet": None, "paced": 3.0, "fast": 3.0, "waiting": 1.3, "release": 3.0}


# --- the probe, in a process of its own ------------------------------------------------------


async def probe(address: str, model_id: str) -> None:
    """Call a loaded model on time until stdin ends; then print when each call began and took."""
    gc.disable()
    took: list[tuple[float, float]] = []
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)
    metadata = (("mm-model-id", model_id),)
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary(PREDICT)

        async def call() -> None:
            began_s = time.monotonic()
            await method(REQUEST, metadata=metadata, timeout=60)
            took.append((began_s, (time.monotonic() - began_s) * 1000))

        async with anyio.create_task_group() as group:
            next_s = time.monotonic()
            while not ended.is_set():
                group.start_soon(call)
                next_s += 1 / PROBE_RATE
                await asyncio.sleep(max(0.0, next_s - time.monotonic()))
    print(json.dumps(took), flush=True)


# --- the sender, in a process of its own -----------------------------------------------------


class Sender:
    """Sends the calls that wait, and says when what happened."""

    def __init__(self, address: str) -> None:
        options = (("grpc.use_local_subchannel_pool", 1),)
        count = FULL.calls // STREAMS + 1
        self._channels = [grpc.aio.insecure_channel(address, options) for _ in range(count)]
        self._methods = [channel.unary_unary(PREDICT) for channel in self._channels]
        self._statuses: Counter[str] = Counter()
        self._first_s = self._last_s = 0.0

    async def _call(self, number: int, model_id: str, counts: bool) -> None:
        method = self._methods[number % len(self._methods)]
        try:
            await method(REQUEST, metadata=(("mm-model-id", model_id),), timeout=120)
        except grpc.aio.AioRpcError as error:
            self._statuses[f"{error.code().name}: {error.details()}"] += 1
        else:
            self._statuses["OK"] += 1
        if counts:
            self._last_s = time.monotonic()
            self._first_s = self._first_s or self._last_s

    async def run_round(
        self, plugs: list[str], models: list[str], calls: int, rate: float
    ) -> dict[str, Any]:
        """Send one round's calls and wait for all replies."""
        self._statuses.clear()
        self._first_s = 0.0
        used_s = time.process_time()
        async with asyncio.TaskGroup() as group:
            for number, model_id in enumerate(plugs):
                group.create_task(self._call(number, model_id, counts=False))
            await asyncio.sleep(0.1)
            paced_s = time.monotonic()
            for number in range(calls // 2):
                group.create_task(self._call(number, models[number % len(models)], counts=True))
                due_s = paced_s + number / rate
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            fast_s = time.monotonic()
            for number in range(calls // 2, calls):
                group.create_task(self._call(number, models[number % len(models)], counts=True))
                await asyncio.sleep(0)
            sent_s = time.monotonic()
        return {
            "paced_s": paced_s,
            "fast_s": fast_s,
            "sent_s": sent_s,
            "first_s": self._first_s,
            "last_s": self._last_s,
            "cpu_s": time.process_time() - used_s,
            "statuses": self._statuses,
        }


async def send(address: str) -> None:
    """Do the rounds that stdin asks for, one a line."""
    gc.disable()
    os.nice(10)
    sender = Sender(address)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await sender.run_round(**json.loads(line))), flush=True)


@asynccontextmanager
async def helper(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run this file in one of its other roles."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=2**26,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# --- the rounds ------------------------------------------------------------------------------


@dataclass(slots=True)
class Round:
    """What one round showed."""

    #: Name of the phase -> from when to when, on the monotonic clock.
    phases: dict[str, tuple[float, float]]
    statuses: Counter[str]
    waiting_calls: int
    rss_bytes: tuple[int, int]
    sender_cpu_us: float
    #: Name of the phase -> p50 and p99 of the probe, ms.
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)

    def read(self, took: list[tuple[float, float]]) -> None:
        """Sort the probe's calls into the phases."""
        for name, (from_s, to_s) in self.phases.items():
            ms = [each for began_s, each in took if from_s <= began_s < to_s]
            if len(ms) >= SAMPLES_MIN:
                self.figures[name] = (percentile(ms, 0.5), percentile(ms, 0.99))


async def run_round(
    number: int,
    instance: Instance,
    sender: asyncio.subprocess.Process,
    sizes: Sizes,
    echo_rate: float,
) -> Round:
    """Do one round."""
    plugs = [f"first-{number}-{i}" for i in range(SLOTS * sizes.waves(echo_rate))]
    models = [f"cold-{number}-{i}" for i in range(SLOTS)]
    for model_id in (*plugs, *models):
        await instance.register(model_id, f"SIZE_1000000_{int(LOAD_S * 1000)}_0")
    await asyncio.sleep(1.0)
    rss_bytes = instance.rss_bytes()
    quiet_s = time.monotonic()
    await asyncio.sleep(sizes.quiet_s)
    rate = echo_rate * PACED_SHARE
    order = {"plugs": plugs, "models": models, "calls": sizes.calls, "rate": rate}
    assert sender.stdin is not None
    assert sender.stdout is not None
    began_s = time.monotonic()
    sender.stdin.write(json.dumps(order).encode() + b"\n")
    reply = asyncio.ensure_future(sender.stdout.readline())
    waiting, most, full_rss_bytes = 0, 0, 0
    all_wait_s = None
    while not reply.done():
        waiting = (await instance.statistics()).waiting_calls
        if waiting > most:
            most, full_rss_bytes = waiting, instance.rss_bytes()
        if waiting >= sizes.calls and all_wait_s is None:
            all_wait_s = time.monotonic()
        await asyncio.wait((reply,), timeout=0.25)
    told = json.loads(await reply)
    if all_wait_s is None or all_wait_s > told["first_s"]:
        print(f"  round {number}: only {most} calls waited at once: the machine is too slow")
        all_wait_s = told["sent_s"]
    return Round(
        {
            "quiet": (quiet_s, began_s),
            "paced": (told["paced_s"], told["fast_s"]),
            "fast": (told["fast_s"], all_wait_s),
            "waiting": (all_wait_s, told["first_s"]),
            "release": (told["first_s"], told["last_s"]),
        },
        Counter(told["statuses"]),
        most,
        (rss_bytes, full_rss_bytes),
        told["cpu_s"] / (len(plugs) + sizes.calls) * 1e6,
    )


def measure_echo() -> float:
    """Answer calls/s of a bare grpclib echo server, the yardstick for this machine and moment."""
    load = proxy.run_h2load if proxy.shutil.which("h2load") else proxy.run_python_load
    command = [sys.executable, proxy.__file__, "--serve", "echo"]
    with proxy.run_server(command) as (port, _):
        load(port, ECHO_CALLS // 4)
        return load(port, ECHO_CALLS)


def print_table(rounds: list[Round], sizes: Sizes) -> bool:
    """Print medians over the rounds; answers whether all goals are met."""
    print(f"{'hits':24}{'p50 ms':>9}{'p99 ms':>9}{'x quiet p50':>13}{'x quiet p99':>13}{'goal':>7}")
    met = True
    for name, goal in GOALS.items():
        there = [each.figures for each in rounds if name in each.figures]
        if not there:
            print(f"{name:24} not measured: too short")
            met = False
            continue
        p50, p99 = (statistics.median(each[name][i] for each in there) for i in (0, 1))
        ratio_50, ratio_99 = (
            statistics.median(each[name][i] / each["quiet"][i] for each in there) for i in (0, 1)
        )
        label = {
            "paced": f"arriving, {arrival_rate('paced', rounds, sizes):.0f}/s",
            "fast": f"arriving, {arrival_rate('fast', rounds, sizes):.0f}/s",
            "waiting": f"{rounds[-1].waiting_calls} waiting",
        }.get(name, name)
        text = "" if goal is None else f"{goal:7.1f}"
        print(f"{label:24}{p50:9.2f}{p99:9.2f}{ratio_50:13.2f}{ratio_99:13.2f}{text}")
        met = met and (goal is None or ratio_99 <= goal)
    return met


def arrival_rate(phase: str, rounds: list[Round], sizes: Sizes) -> float:
    """Answer arrivals/s."""
    spans = [to_s - from_s for from_s, to_s in (r.phases[phase] for r in rounds)]
    return sizes.calls / 2 / statistics.median(spans)


async def run(sizes: Sizes) -> bool:
    """Measure and print everything."""
    options = ("--default-size", "1000000", "--loading-concurrency", str(SLOTS))
    rounds: list[Round] = []
    echo_rate = await asyncio.to_thread(measure_echo)
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
        async with (
            embedded_etcd() as etcd,
            instance_of(etcd, Path(name), runtime_options=options) as instance,
        ):
            await instance.start_serve()
            await instance.register("hot", "SIZE_1000000_0_0")
            await instance.predict("hot")
            await at_once(500, 8, lambda _: instance.predict("hot"))  # warm
            async with (
                helper("--probe", instance.address, "hot") as probing,
                helper("--send", instance.address) as sender,
            ):
                before_s = cpu_s(probing.pid), time.monotonic()
                for number in range(sizes.rounds):
                    rounds.append(await run_round(number, instance, sender, sizes, echo_rate))
                share = (cpu_s(probing.pid) - before_s[0]) / (time.monotonic() - before_s[1])
                output, _ = await probing.communicate(b"end\n")
            last_words = await instance.serve.last_words()
    took = json.loads(output)
    for each in rounds:
        each.read(took)
    met = print_table(rounds, sizes)
    report_rest(rounds, share, last_words)
    print(f"bare grpclib echo           {echo_rate:8.0f} calls/s before, and after")
    print(f"                            {await asyncio.to_thread(measure_echo):8.0f}")
    return met and all(set(each.statuses) == {"OK"} for each in rounds)


def report_rest(rounds: list[Round], probe_share: float, last_words: str) -> None:
    """Print what else there is to know."""
    spans = [each.phases["release"][1] - each.phases["release"][0] for each in rounds]
    kib = [(r.rss_bytes[1] - r.rss_bytes[0]) / 1024 / r.waiting_calls for r in rounds]
    print(f"release took                {statistics.median(spans):8.1f} s")
    print(
        f"RSS a waiting call          {kib[0]:8.1f} KiB  (of {rounds[0].rss_bytes[1] / 1e6:.0f} MB)"
    )
    print(f"statuses                    {dict(sum((r.statuses for r in rounds), Counter()))}")
    sender_us = statistics.median(r.sender_cpu_us for r in rounds)
    print(f"the sender's own cost       {sender_us:8.0f} us of CPU a call, at nice 10")
    print(f"the probe's own cost        {probe_share:8.0%} of one CPU")
    if "said nothing" not in last_words:
        print(f"mm serve said:\n{last_words}")


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller numbers")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--send", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.probe:
            asyncio.run(probe(*arguments.probe))
        elif arguments.send:
            asyncio.run(send(arguments.send))
        else:
            return 0 if anyio.run(run, QUICK if arguments.quick else FULL) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Churn: ten times more models than fit, called at random, so that most calls load and evict.

Real processes on loopback: etcd, the example runtime (8 loading slots), `mm serve`. 2,000 models of
which 200 fit, 32 calls at a time to models drawn evenly, loads of 0 and of 50 ms. Printed beside
bare aetcd transactions of the same run, because every load has to be registered:
  every call is answered; at 0 ms at least 200 loads a second with p99 of at most a second; the
  loading slots are busy (where the loads take time, that is where the time goes).

    .venv/bin/python bench/churn.py            about a minute and a half
    .venv/bin/python bench/churn.py --quick    a smaller one, to see that it works
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aetcd
import anyio
import grpc.aio
import store
from _instance import Instance, at_once, cpu_s, instance_of, percentile

from mm.core.ids import UNIT_BYTES, units_of
from mm.edge.embedded_etcd import EmbeddedEtcd, embedded_etcd

MODELS = 2_000
ROOM = 200
AT_ONCE = 32
SLOTS = 8
SIZE_BYTES = 1_000_000
LOAD_MS = (0, 50)
RATE_GOAL, P99_GOAL_MS = 200, 1_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    warm_s: float
    measured_s: float
    writes: store.Sizes


FULL = Sizes(5.0, 20.0, store.Sizes(rounds=1, writes_a_round=3_000, at_once=64))
QUICK = Sizes(2.0, 6.0, store.Sizes(rounds=1, writes_a_round=500, at_once=64))


@dataclass(slots=True)
class Tally:
    """What became of the calls of one time."""

    took_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


async def call_at_random(instance: Instance, load_ms: int, seconds: float, seed: int) -> Tally:
    """Call models drawn evenly for a while."""
    tally, rng = Tally(), random.Random(seed)
    until_s = time.perf_counter() + seconds

    async def work() -> None:
        while (began_s := time.perf_counter()) < until_s:
            try:
                await instance.predict(f"churn-{load_ms}-{rng.randrange(MODELS)}")
            except grpc.aio.AioRpcError as error:
                tally.errors[f"{error.code().name}: {error.details()}"[:100]] += 1
            tally.took_s.append(time.perf_counter() - began_s)

    async with anyio.create_task_group() as group:
        for _ in range(AT_ONCE):
            group.start_soon(work)
    return tally


async def writes_so_far(client: aetcd.Client) -> tuple[int, int]:
    """Answer how often registry keys were written, and the transactions of the whole store."""
    found = await client.get_prefix(b"/tas-runtime/bench/registry/")
    revision = (await client.get(b"/none-such") or found).header.revision
    return sum(each.version for each in found), revision


async def measure(
    instance: Instance, etcd: EmbeddedEtcd, client: aetcd.Client, load_ms: int, sizes: Sizes
) -> bool:
    """One kind of loads; answers whether the goals are met."""

    async def register(number: int) -> None:
        await instance.register(f"churn-{load_ms}-{number}", f"SIZE_{SIZE_BYTES}_{load_ms}_0")

    await at_once(MODELS, 64, register)
    await call_at_random(instance, load_ms, sizes.warm_s, seed=1)
    pids = {"mm": instance.serve.pid, "runtime": instance.runtime.pid, "etcd": etcd.pid}
    before, writes = await instance.statistics(), await writes_so_far(client)
    cpu_before = {name: cpu_s(pid) for name, pid in pids.items()}
    began_s = time.perf_counter()
    tally = await call_at_random(instance, load_ms, sizes.measured_s, seed=2)
    span_s = time.perf_counter() - began_s
    cpu_ms = {name: (cpu_s(pid) - cpu_before[name]) * 1000 for name, pid in pids.items()}
    after, writes_after = await instance.statistics(), await writes_so_far(client)
    loads = after.loads - before.loads
    rate = loads / span_s
    p50_ms, p99_ms = (percentile(tally.took_s, share) * 1000 for share in (0.5, 0.99))
    busy = (after.loading_ms - before.loading_ms) / 1000 / span_s
    each = ", ".join(f"{name} {ms / loads:.2f}" for name, ms in cpu_ms.items())
    print(f"loads of {load_ms} ms, {span_s:.0f} s, {after.models_loaded} models loaded")
    print(f"  calls                             {len(tally.took_s):8d}")
    print(f"  p50                               {p50_ms:8.0f} ms")
    print(f"  p99                               {p99_ms:8.0f} ms  (goal {P99_GOAL_MS} at 0 ms)")
    print(f"  errors                            {sum(tally.errors.values()):8d}     (goal 0)")
    for text, count in tally.errors.most_common(5):
        print(f"    {count:6d} {text}")
    print(f"  loads                             {rate:8.0f} /s  (goal {RATE_GOAL} at 0 ms)")
    print(f"  slots busy in the runtime, mean   {busy:8.2f}     of {SLOTS}")
    print(f"  registry writes a load            {(writes_after[0] - writes[0]) / loads:8.2f}")
    print(f"  transactions a load               {(writes_after[1] - writes[1]) / loads:8.2f}")
    print(f"  CPU a load, ms                    {each}")
    is_fast = load_ms > 0 or (rate >= RATE_GOAL and p99_ms <= P99_GOAL_MS)
    return is_fast and not tally.errors


async def run(sizes: Sizes) -> bool:
    """Measure and print everything."""
    # What the mesh keeps back for unloads comes on top (spec core 3.1).
    units = units_of(SIZE_BYTES)
    capacity_bytes = (ROOM + SLOTS // 4) * units * UNIT_BYTES
    options = ("--default-size", str(SIZE_BYTES), "--capacity", str(capacity_bytes))
    options += ("--loading-concurrency", str(SLOTS))
    met = True
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
        async with (
            embedded_etcd() as etcd,
            aetcd.Client(host=etcd.endpoint.host, port=etcd.endpoint.port) as client,
            instance_of(etcd, Path(name), runtime_options=options) as instance,
        ):
            await instance.start_serve()
            for load_ms in LOAD_MS:
                met = await measure(instance, etcd, client, load_ms, sizes) and met
                rate = await store.rate_of(store.bare(client), f"/bare-{load_ms}", sizes.writes)
                print(f"  bare aetcd transactions           {rate:8.0f} /s")
            last_words = await instance.serve.last_words()
            if "said nothing" not in last_words:
                print(f"mm serve said:\n{last_words}")
    return met


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller numbers")
    arguments = parser.parse_args()
    try:
        return 0 if anyio.run(run, QUICK if arguments.quick else FULL) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""What one instance costs: start, memory, registering, and the first call to an unloaded model.

Real processes on loopback: etcd, the example runtime (loads take 0 ms), `mm serve`. Every rate is
printed beside bare aetcd transactions of the same run, as the median of alternating rounds; for the
times, a bare grpclib echo before and after tells how fast the machine was. MB are 10^6 bytes.

    .venv/bin/python bench/mesh.py            about two minutes
    .venv/bin/python bench/mesh.py --quick    a smaller one, to see that it works
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aetcd
import anyio
import grpc.aio
from _goals import Goal, judge
from _instance import CALL_TIMEOUT_S, Instance, add_options, at_once, instance_of, percentile
from waiting import measure_echo

from mm.edge.embedded_etcd import EmbeddedEtcd, embedded_etcd
from mm.pb import mmesh


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    registered: int
    rounds: int
    writes_a_round: int
    cold_calls: int
    starts: int

    @property
    def is_full(self) -> bool:
        """Tell whether as many are registered as the goals say."""
        return self.registered >= GOAL_REGISTERED


#: Goals (issue 3): of a start to serving, and of resident memory, without models and with so many;
#: of what a first call takes beside the runtime's load; of registrations, in bare transactions.
GOAL_START_S = 2.0
GOAL_IDLE_MB, GOAL_REGISTERED_MB, GOAL_REGISTERED = 120.0, 150.0, 20_000
GOAL_COLD_MS = 10.0
GOAL_REGISTERING = 0.5

FULL = Sizes(registered=20_000, rounds=5, writes_a_round=2_000, cold_calls=200, starts=5)
QUICK = Sizes(registered=2_000, rounds=3, writes_a_round=500, cold_calls=40, starts=2)


async def measure_starts(instance: Instance, sizes: Sizes) -> float:
    """Median seconds from exec to serving; leaves it running."""
    took = []
    for number in range(sizes.starts):
        took.append(await instance.start_serve())
        if number < sizes.starts - 1:
            await instance.stop_serve()
    return statistics.median(took)


async def measure_registering(
    instance: Instance, etcd: EmbeddedEtcd, sizes: Sizes
) -> tuple[float, float]:
    """Registrations/s and bare aetcd transactions/s, 64 at once, medians of alternating rounds."""
    registered, bare = [], []
    host, _, port = str(etcd.endpoint).rpartition(":")
    async with aetcd.Client(host=host, port=int(port)) as client:
        for number in range(sizes.rounds):

            async def put(i: int, number: int = number) -> None:
                key = f"/bare/{number}/{i}".encode()
                await client.transaction(
                    compare=[client.transactions.version(key) == 0],
                    success=[client.transactions.put(key, b'{"type":"example","lu":1}')],
                    failure=[client.transactions.get(key)],
                )

            async def register(i: int, number: int = number) -> None:
                await instance.register(f"round-{number}-{i}", "SIZE_1000000_0_0")

            bare.append(await at_once(sizes.writes_a_round, 64, put))
            registered.append(await at_once(sizes.writes_a_round, 64, register))
    return statistics.median(registered), statistics.median(bare)


async def measure_load(instance: Instance, sizes: Sizes) -> float:
    """Median milliseconds that the runtime itself takes to load a model, asked directly."""
    took = []
    async with grpc.aio.insecure_channel(instance.runtime_address) as channel:
        load = channel.unary_unary(
            "/mmesh.ModelRuntime/loadModel",
            request_serializer=bytes,
            response_deserializer=mmesh.LoadModelResponse.parse,
        )
        for number in range(sizes.cold_calls):
            request = mmesh.LoadModelRequest(
                model_id=f"direct-{number}", model_type="example", model_path="SIZE_1000000_0_0"
            )
            began = time.perf_counter()
            await load(request, timeout=CALL_TIMEOUT_S)
            took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


async def measure_cold(instance: Instance, sizes: Sizes) -> tuple[list[float], list[float]]:
    """Milliseconds of first calls to unloaded models, and of calls to a loaded one."""
    cold, warm = [], []
    for number in range(sizes.cold_calls):
        model_id = f"cold-{number}"
        await instance.register(model_id, "SIZE_1000000_0_0")
        for into in (cold, warm):
            began = time.perf_counter()
            await instance.predict(model_id)
            into.append((time.perf_counter() - began) * 1000)
    return cold, warm


async def run(sizes: Sizes, dataplane: str) -> int:
    """Measure and print everything; answers what the shell gets."""
    echo_rate = await asyncio.to_thread(measure_echo)
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
        settings = {"MM_DATAPLANE": dataplane}
        async with (
            embedded_etcd() as etcd,
            instance_of(etcd, Path(name), settings=settings) as instance,
        ):
            start_s = await measure_starts(instance, sizes)
            goals = [
                Goal("start to serving, 0 models", start_s, "<=", GOAL_START_S, "s"),
                Goal("RSS idle", instance.rss_bytes() / 1e6, "<=", GOAL_IDLE_MB, "MB"),
            ]
            cold, warm = await measure_cold(instance, sizes)
            p50, load_ms = statistics.median(cold), await measure_load(instance, sizes)
            p99 = percentile(cold, 0.99)
            print(f"first call to an unloaded model p50 {p50:8.1f} ms   (p99 {p99:.1f})")
            print(f"  the runtime's own load        p50 {load_ms:8.1f} ms")
            print(f"  a call to a loaded one        p50 {statistics.median(warm):8.1f} ms")
            added_ms = p50 - load_ms
            goals.append(Goal("first call, p50: the mesh adds", added_ms, "<=", GOAL_COLD_MS, "ms"))
            before_s = instance.cpu_s()
            rate, bare = await measure_registering(instance, etcd, sizes)
            cpu_ms = (instance.cpu_s() - before_s) * 1000 / (sizes.rounds * sizes.writes_a_round)
            print(f"registering, 64 at once             {rate:8.0f} /s")
            print(f"  bare aetcd transactions           {bare:8.0f} /s")
            print(f"  processor time of mm serve        {cpu_ms:8.2f} ms each")
            goals.append(
                Goal("registering to bare transactions", rate / bare, ">=", GOAL_REGISTERING)
            )
            already = sizes.rounds * sizes.writes_a_round + sizes.cold_calls
            missing = max(0, sizes.registered - already)
            await at_once(missing, 64, lambda i: instance.register(f"more-{i}", "SIZE_1000000_0_0"))
            total = already + missing
            rss_mb = [instance.rss_bytes() / 1e6]
            await instance.stop_serve()
            start_s = await measure_starts(instance, sizes)
            rss_mb.append(instance.rss_bytes() / 1e6)
    for what, figure, target, unit in (
        (f"RSS with {total:,} registered", rss_mb[0], GOAL_REGISTERED_MB, "MB"),
        (f"start to serving, {total:,} models", start_s, GOAL_START_S, "s"),
        ("RSS after that start", rss_mb[1], GOAL_REGISTERED_MB, "MB"),
    ):
        goals.append(Goal(what, figure, "<=", target, unit, is_full_size=sizes.is_full))
    echo_rates = echo_rate, await asyncio.to_thread(measure_echo)
    print("bare grpclib echo, before and after {:8.0f} /s {:8.0f} /s".format(*echo_rates))
    return judge(goals)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_options(parser)
    arguments = parser.parse_args()
    try:
        sys.exit(anyio.run(run, QUICK if arguments.quick else FULL, arguments.dataplane))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

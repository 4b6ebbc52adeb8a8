"""What one instance costs: start, memory, registering, and the first call to an unloaded model.

Real processes on loopback: etcd, the example runtime (loads take 0 ms), `mm serve`. Every rate is
printed beside bare aetcd transactions of the same run, as the median of alternating rounds.

    .venv/bin/python bench/mesh.py            about two minutes
    .venv/bin/python bench/mesh.py --quick    a smaller one, to see that it works
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aetcd
import anyio
import grpc.aio
from _instance import CALL_TIMEOUT_S, Instance, add_options, at_once, instance_of, percentile

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


async def run(sizes: Sizes, dataplane: str) -> None:
    """Measure and print everything."""
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
        settings = {"MM_DATAPLANE": dataplane}
        async with (
            embedded_etcd() as etcd,
            instance_of(etcd, Path(name), settings=settings) as instance,
        ):
            start_s = await measure_starts(instance, sizes)
            print(f"start to serving, 0 models          {start_s:8.2f} s    (goal 2 s)")
            print(f"RSS idle                            {instance.rss_mib():8.0f} MiB  (goal 120)")
            cold, warm = await measure_cold(instance, sizes)
            p50, load_ms = statistics.median(cold), await measure_load(instance, sizes)
            p99 = percentile(cold, 0.99)
            print(f"first call to an unloaded model p50 {p50:8.1f} ms   (p99 {p99:.1f})")
            print(f"  the runtime's own load        p50 {load_ms:8.1f} ms")
            print(f"  what the mesh adds            p50 {p50 - load_ms:8.1f} ms   (goal 10 ms)")
            print(f"  a call to a loaded one        p50 {statistics.median(warm):8.1f} ms")
            before_s = instance.cpu_s()
            rate, bare = await measure_registering(instance, etcd, sizes)
            cpu_ms = (instance.cpu_s() - before_s) * 1000 / (sizes.rounds * sizes.writes_a_round)
            print(f"registering, 64 at once             {rate:8.0f} /s")
            print(f"  bare aetcd transactions           {bare:8.0f} /s")
            print(f"  ratio                             {rate / bare:8.2f}      (goal 0.5)")
            print(f"  processor time of mm serve        {cpu_ms:8.2f} ms each")
            already = sizes.rounds * sizes.writes_a_round + sizes.cold_calls
            missing = max(0, sizes.registered - already)
            await at_once(missing, 64, lambda i: instance.register(f"more-{i}", "SIZE_1000000_0_0"))
            total = already + missing
            print(
                f"RSS with {total:6d} registered         {instance.rss_mib():8.0f} MiB  (goal 150)"
            )
            await instance.stop_serve()
            start_s = await measure_starts(instance, sizes)
            print(f"start to serving, {total:6d} models     {start_s:8.2f} s    (goal 2 s)")
            print(f"RSS after that start                {instance.rss_mib():8.0f} MiB")


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_options(parser)
    arguments = parser.parse_args()
    try:
        anyio.run(run, QUICK if arguments.quick else FULL, arguments.dataplane)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

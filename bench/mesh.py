"""What one instance costs: start, memory, registering, and the first call to an unloaded model.

Real processes on loopback: etcd, the example runtime (loads take 0 ms), `mm serve`. Every rate is
printed beside bare aetcd transactions of the same run, as the median of alternating rounds.

    .venv/bin/python bench/mesh.py            about two minutes
    .venv/bin/python bench/mesh.py --quick    a smaller one, to see that it works
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aetcd
import anyio
import betterproto2
import grpc.aio

from mm.demo.processes import ChildProcess, free_ports
from mm.edge.embedded_etcd import EmbeddedEtcd, embedded_etcd
from mm.pb import mmesh
from mm.pb.grpc.health import v1 as health

HOST = "127.0.0.1"
READY_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0


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


class Instance:
    """One `mm serve` and its runtime, on free ports."""

    def __init__(self, etcd: EmbeddedEtcd, directory: Path) -> None:
        client_port, peer_port, runtime_port = free_ports(3)
        self.runtime = ChildProcess(
            "runtime",
            ["runtime", "example", str(runtime_port), "--start-delay", "0"],
            {},
            directory / "runtime.log",
        )
        self.serve = ChildProcess(
            "serve",
            ["serve"],
            {
                "MM_SERVICE_NAME": "bench",
                "KV_STORE": f"etcd:http://{etcd.endpoint}",
                "MM_INSTANCE_ID": "bench-1",
                "MM_BIND_HOST": HOST,
                "MM_ADVERTISE_ADDRESS": HOST,
                "MM_SVC_GRPC_PORT": str(client_port),
                "MM_PEER_PORT": str(peer_port),
                "INTERNAL_GRPC_PORT": str(runtime_port),
                "MM_LOG_LEVEL": "warning",
            },
            directory / "serve.log",
        )
        self.address = f"{HOST}:{client_port}"
        self.runtime_address = f"{HOST}:{runtime_port}"
        self.channel = grpc.aio.insecure_channel(self.address)

    async def call(
        self,
        path: str,
        request: betterproto2.Message,
        reply_type: type[betterproto2.Message],
        timeout_s: float = CALL_TIMEOUT_S,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> betterproto2.Message:
        """One unary call."""
        method = self.channel.unary_unary(
            path, request_serializer=bytes, response_deserializer=reply_type.parse
        )
        reply: betterproto2.Message = await method(request, timeout=timeout_s, metadata=metadata)
        return reply

    def cpu_s(self) -> float:
        """Answer the processor time that `mm serve` has used."""
        fields = Path(f"/proc/{self.serve.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def start_serve(self) -> float:
        """Start `mm serve`; answers the seconds until it serves."""
        self.channel = grpc.aio.insecure_channel(self.address)
        began = time.perf_counter()
        await self.serve.start()
        while time.perf_counter() - began < READY_TIMEOUT_S:
            if await self._is_serving():
                return time.perf_counter() - began
            await asyncio.sleep(0.01)
        sys.exit(f"mm serve is not ready after {READY_TIMEOUT_S} s:\n{self.serve.last_words()}")

    async def _is_serving(self) -> bool:
        try:
            reply = await self.call(
                "/grpc.health.v1.Health/Check",
                health.HealthCheckRequest(),
                health.HealthCheckResponse,
                timeout_s=1.0,
            )
        except grpc.aio.AioRpcError:
            return False
        assert isinstance(reply, health.HealthCheckResponse)
        return reply.status == health.HealthCheckResponseServingStatus.SERVING

    async def stop_serve(self) -> None:
        """SIGTERM, and wait."""
        await self.channel.close()
        self.serve.terminate()
        await self.serve.reap(20.0)

    def rss_mib(self) -> float:
        """Answer the resident memory of `mm serve`."""
        status = Path(f"/proc/{self.serve.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    async def register(self, model_id: str, path: str) -> None:
        """Register one model."""
        await self.call(
            "/mmesh.ModelMesh/registerModel",
            mmesh.RegisterModelRequest(
                model_id=model_id, model_info=mmesh.ModelInfo(type="example", path=path)
            ),
            mmesh.ModelStatusInfo,
        )

    async def predict(self, model_id: str) -> None:
        """One inference."""
        reply = await self.call(
            "/mmesh.ExamplePredictor/predict",
            mmesh.PredictRequest(text="x"),
            mmesh.PredictResponse,
            metadata=(("mm-model-id", model_id),),
        )
        assert isinstance(reply, mmesh.PredictResponse)
        assert reply.results[0].category == f"classification for x by model {model_id}"


@asynccontextmanager
async def instance_of(etcd: EmbeddedEtcd, directory: Path) -> AsyncIterator[Instance]:
    """An instance with its runtime up and `mm serve` not started."""
    instance = Instance(etcd, directory)
    await instance.runtime.start()
    try:
        yield instance
    finally:
        await instance.channel.close()
        instance.serve.kill()
        instance.runtime.kill()
        await instance.serve.reap()
        await instance.runtime.reap()


async def at_once(count: int, concurrency: int, work: object) -> float:
    """Run ``work(i)`` for ``count`` numbers, ``concurrency`` at a time; answers runs a second."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)  # type: ignore[operator]

    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(concurrency):
            group.start_soon(worker)
    return count / (time.perf_counter() - began)


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


async def run(sizes: Sizes) -> None:
    """Measure and print everything."""
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
        async with embedded_etcd() as etcd, instance_of(etcd, Path(name)) as instance:
            start_s = await measure_starts(instance, sizes)
            print(f"start to serving, 0 models          {start_s:8.2f} s    (goal 2 s)")
            print(f"RSS idle                            {instance.rss_mib():8.0f} MiB  (goal 120)")
            cold, warm = await measure_cold(instance, sizes)
            p50, load_ms = statistics.median(cold), await measure_load(instance, sizes)
            p99 = sorted(cold)[int(len(cold) * 0.99)]
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
    parser.add_argument("--quick", action="store_true", help="smaller numbers")
    arguments = parser.parse_args()
    try:
        anyio.run(run, QUICK if arguments.quick else FULL)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

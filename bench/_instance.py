"""One real instance for the benchmarks: `mm serve`, the example runtime, and what to ask of them.

Owns starting and stopping the two processes on free ports, and the plainest calls of a client. What
is measured is the business of `mesh.py`, `waiting.py` and `churn.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import betterproto2
import grpc.aio

from mm.demo.processes import ChildProcess, free_ports
from mm.edge.embedded_etcd import EmbeddedEtcd
from mm.pb import mmesh
from mm.pb.grpc.health import v1 as health
from mm.pb.mm import peer

HOST = "127.0.0.1"
READY_TIMEOUT_S = 180.0
CALL_TIMEOUT_S = 30.0
#: Else a first try before the port is open costs a second.
RECONNECT_AT_ONCE = [
    (f"grpc.{which}_reconnect_backoff_ms", 50) for which in ("initial", "min", "max")
]


def add_options(parser: argparse.ArgumentParser, *, dataplane: str = "python") -> None:
    """Add what all of these scripts take."""
    parser.add_argument("--quick", action="store_true", help="smaller numbers")
    parser.add_argument(
        "--dataplane",
        choices=("python", "wire"),
        default=dataplane,
        help="who serves hits [%(default)s]",
    )


def cpu_s(pid: int) -> float:
    """Answer the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: Sequence[float], share: float) -> float:
    """Answer the value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Instance:
    """One `mm serve` and its runtime, on free ports."""

    def __init__(
        self,
        etcd: EmbeddedEtcd,
        directory: Path,
        *,
        runtime_options: Sequence[str] = (),
        settings: dict[str, str] | None = None,
    ) -> None:
        client_port, peer_port, runtime_port = free_ports(3)
        self.runtime = ChildProcess(
            "runtime",
            ["runtime", "example", str(runtime_port), "--start-delay", "0", *runtime_options],
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
                "MM_PROBE_PORT": "NONE",
                "MM_PRESTOP_WAIT_PORT": "NONE",
                "INTERNAL_GRPC_PORT": str(runtime_port),
                "MM_LOG_LEVEL": "warning",
                **(settings or {}),
            },
            directory / "serve.log",
        )
        self.address = f"{HOST}:{client_port}"
        self.peer_address = f"{HOST}:{peer_port}"
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
        return cpu_s(self.serve.pid)

    async def start_serve(self) -> float:
        """Start `mm serve`; answers the seconds until it serves."""
        self.channel = grpc.aio.insecure_channel(self.address, RECONNECT_AT_ONCE)
        began = time.perf_counter()
        await self.serve.start()
        while not self.serve.has_ended and time.perf_counter() - began < READY_TIMEOUT_S:
            if await self._is_serving():
                return time.perf_counter() - began
            await asyncio.sleep(0.01)
        last_words = await self.serve.last_words()
        why = "has ended" if self.serve.has_ended else f"is not ready after {READY_TIMEOUT_S} s"
        sys.exit(f"mm serve {why}:\n{last_words}")

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

    def rss_bytes(self) -> int:
        """Answer the resident memory of `mm serve`."""
        status = Path(f"/proc/{self.serve.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    async def register(self, model_id: str, path: str) -> None:
        """Register one model."""
        await self.call(
            "/mmesh.ModelMesh/registerModel",
            mmesh.RegisterModelRequest(
                model_id=model_id, model_info=mmesh.ModelInfo(type="example", path=path)
            ),
            mmesh.ModelStatusInfo,
        )

    async def statistics(self) -> peer.InstanceStatistics:
        """Ask for its counters and gauges."""
        async with grpc.aio.insecure_channel(self.peer_address) as channel:
            method = channel.unary_unary(
                "/mm.peer.Peer/statistics",
                request_serializer=bytes,
                response_deserializer=peer.InstanceStatistics.parse,
            )
            reply: peer.InstanceStatistics = await method(
                peer.StatisticsRequest(), timeout=CALL_TIMEOUT_S
            )
            return reply

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
async def instance_of(
    etcd: EmbeddedEtcd,
    directory: Path,
    *,
    runtime_options: Sequence[str] = (),
    settings: dict[str, str] | None = None,
) -> AsyncIterator[Instance]:
    """An instance with its runtime up and `mm serve` not started."""
    instance = Instance(etcd, directory, runtime_options=runtime_options, settings=settings)
    await instance.runtime.start()
    try:
        yield instance
    finally:
        await instance.channel.close()
        instance.serve.kill()
        instance.runtime.kill()
        await instance.serve.reap()
        await instance.runtime.reap()


async def at_once(count: int, concurrency: int, work: Callable[[int], Awaitable[None]]) -> float:
    """Run ``work(i)`` for ``count`` numbers, ``concurrency`` at a time; answers runs a second."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(concurrency):
            group.start_soon(worker)
    return count / (time.perf_counter() - began)

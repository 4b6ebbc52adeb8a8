"""The Python data plane's rate beside a bare grpclib proxy's, in one run on one machine.

    python bench/proxy.py [--quick]

Four servers before one constant upstream (``bench/upstream.c``, or a Python one without a C
compiler and nghttp2): grpclib answering by itself ("echo"), the plainest proxy that grpclib's own
server and client streams allow ("bare"), and ``mm.edge.proxy`` with a router that always answers
"here", without metrics ("unmeasured") and with ("mm"). They take turns; medians are printed, with
the CPU that a call costs each process. The goal is a rate of at least 0.7 of the bare proxy's
(issue 3).
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _instance import cpu_s

HERE = Path(__file__).parent
METHOD = "/bench.Service/Method"
BODY = b"\0\0\0\0\xc8" + bytes(200)
GOAL = 0.7


# --- the servers, each in a process of its own -----------------------------------------------


class RawCodec:
    """grpclib's codec for those who want no messages."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        """Pass bytes."""
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> bytes:
        """Pass bytes."""
        return data


class AnyMethod(dict[str, Any]):
    """grpclib's table of methods, with the same one under every name."""

    def __init__(self, handler: Any) -> None:
        super().__init__()
        self._handler = handler

    def get(self, key: str, default: Any = None) -> Any:
        """Answer the one method."""
        return self._handler


async def serve_grpclib(upstream_port: int | None) -> int:
    """The plainest echo or proxy that grpclib allows: one message in, one out, metadata along."""
    from grpclib.client import Channel, UnaryUnaryMethod
    from grpclib.const import Cardinality, Handler
    from grpclib.server import Server

    codec = RawCodec()
    channel = None
    if upstream_port is not None:
        channel = Channel("127.0.0.1", upstream_port, codec=codec)

    async def serve(stream: Any) -> None:
        request = await stream.recv_message()
        if channel is None:
            await stream.send_message(b"\n\3mmm")
            return
        method = UnaryUnaryMethod(channel, METHOD, bytes, bytes)
        await stream.send_message(await method(request, metadata=list(stream.metadata.items())))

    server = Server([], codec=codec)
    server._mapping = AnyMethod(Handler(serve, Cardinality.UNARY_UNARY, bytes, bytes))
    await server.start("127.0.0.1", 0)
    assert server._server is not None
    return int(server._server.sockets[0].getsockname()[1])


async def serve_mm(upstream_port: int, port: int, *, measures: bool) -> int:
    """Our proxy, with the shortest router there is."""
    from mm.config import Config
    from mm.core.call_meter import CallMeter
    from mm.core.calls import Call, LocalRoute, Outcome, Route
    from mm.core.ids import InstanceId
    from mm.edge.h2 import (
        EXTERNAL_LIMITS,
        PEER_LIMITS,
        RUNTIME_LIMITS,
        Channel,
        ChannelPool,
        GrpcServer,
    )
    from mm.edge.proxy import Proxy

    class HereRouter:
        async def route(self, call: Call) -> Route:
            return LocalRoute(call.model_id)

        def finished(self, call: Call, route: Route, outcome: Outcome, message: str = "") -> bool:
            return False

    proxy = Proxy(
        HereRouter(),  # type: ignore[arg-type]
        runtime=Channel(f"127.0.0.1:{upstream_port}", RUNTIME_LIMITS),
        peers=ChannelPool(PEER_LIMITS),
        config=Config(service_name="b", kv_store="memory", instance_id=InstanceId("b")),
        external=True,
        meter=CallMeter(methods_max=256) if measures else None,
    )
    server = GrpcServer(proxy, limits=EXTERNAL_LIMITS, external=True)
    return await server.start("127.0.0.1", port)


async def serve(kind: str, upstream_port: int, port: int = 0) -> None:
    if kind in ("mm", "unmeasured"):
        port = await serve_mm(upstream_port, port, measures=kind == "mm")
    else:
        port = await serve_grpclib(upstream_port if kind == "bare" else None)
    print(port, flush=True)
    await asyncio.Event().wait()


# --- the upstream ----------------------------------------------------------------------------


@contextmanager
def run_server(command: list[str]) -> Iterator[tuple[int, int]]:
    """Start a server that prints its port; answer the port and the process id."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def run_upstream() -> Iterator[tuple[int, str]]:
    """Start the constant upstream, in C where that can be built."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "upstream"
        compiler = shutil.which("cc")
        source = str(HERE / "upstream.c")
        if (
            compiler
            and not subprocess.run(
                [compiler, "-O2", "-o", str(program), source, "-lnghttp2"],
                stderr=subprocess.DEVNULL,
                check=False,
            ).returncode
        ):
            with run_server([str(program)]) as (port, _):
                yield port, "C"
        else:
            with run_server([sys.executable, __file__, "--serve", "echo"]) as (port, _):
                yield port, "Python (no C compiler or nghttp2: it limits the rates)"


# --- the load --------------------------------------------------------------------------------


def run_h2load(port: int, calls: int) -> float:
    """Answer calls/s of h2load, all of which succeeded."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(BODY)
        body.flush()
        command = ["h2load", "-n", str(calls), "-c", "4", "-m", "16", "-d", body.name]
        for header in ("content-type: application/grpc", "te: trailers", "mm-model-id: model-1"):
            command += ["-H", header]
        command.append(f"http://127.0.0.1:{port}{METHOD}")
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if f"{calls} succeeded" not in output:
        raise SystemExit(f"calls failed:\n{output}")
    finished = next(line for line in output.splitlines() if line.startswith("finished in"))
    return float(finished.split(",")[1].split()[0])


async def call_many(port: int, calls: int) -> None:
    """Load for machines without h2load."""
    import grpc.aio

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary(METHOD)
        left = iter(range(calls))

        async def work() -> None:
            for _ in left:
                await method(BODY[5:], metadata=(("mm-model-id", "model-1"),))

        await asyncio.gather(*(work() for _ in range(16)))


def run_python_load(port: int, calls: int) -> float:
    started_s = time.perf_counter()
    command = [sys.executable, __file__, "--load", str(port), str(calls // 2)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    failures = [process.wait() for process in processes]
    if any(failures):
        raise SystemExit("calls failed")
    return calls / (time.perf_counter() - started_s)


def measure(rounds: int, calls: int) -> int:
    load = run_h2load if shutil.which("h2load") else run_python_load
    kinds = ("echo", "bare", "unmeasured", "mm")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    costs: dict[str, list[float]] = {kind: [] for kind in kinds}
    with run_upstream() as (upstream_port, language):
        print(f"upstream: {language}; load: {load.__name__}; {rounds} rounds of {calls} calls")
        for number in range(rounds + 1):
            for kind in kinds:
                command = [sys.executable, __file__, "--serve", kind, str(upstream_port)]
                with run_server(command) as (port, pid):
                    load(port, calls // 4)  # Connections, caches, and the interpreter, warm.
                    used_s = cpu_s(pid)
                    rate = load(port, calls)
                    cost_us = (cpu_s(pid) - used_s) / calls * 1e6
                if number:  # The first round warms the machine.
                    rates[kind].append(rate)
                    costs[kind].append(cost_us)
    print(f"{'':28}{'calls/s':>10}{'CPU us a call':>16}")
    names = {
        "echo": "grpclib echo",
        "bare": "bare grpclib proxy",
        "unmeasured": "mm without metrics",
        "mm": "mm, Python data plane",
    }
    for kind in kinds:
        rate, cost = statistics.median(rates[kind]), statistics.median(costs[kind])
        print(f"{names[kind]:28}{rate:10.0f}{cost:16.0f}")
    ratio = statistics.median(
        mine / bare for mine, bare in zip(rates["mm"], rates["bare"], strict=True)
    )
    print(f"mm / bare grpclib proxy: {ratio:.2f} (goal: at least {GOAL})")
    return 0 if ratio >= GOAL else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three short rounds")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        import uvloop

        kind, *ports = options.serve
        uvloop.run(serve(kind, *map(int, ports or [0])))
    elif options.load:
        asyncio.run(call_many(int(options.load[0]), int(options.load[1])))
    else:
        rounds, calls = (3, 2000) if options.quick else (5, 6000)
        return measure(rounds, calls)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

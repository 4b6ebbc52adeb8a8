"""The rows of ``bench/wire.py`` with a whole instance: etcd, a runtime, `mm serve` on the wire.

Hits come from h2load and are answered by the constant upstream, so that nothing but the mesh is
between them; models are managed by the example runtime. What happens beside them comes from
processes at nice 10: on a small machine it takes what the others leave.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import grpc.aio
import mesh
import waiting
from _contenders import HOST, MODEL, upstream_of
from _goals import Goal
from _instance import Instance, instance_of, percentile
from _wire_loads import Load, NotMeasuredError, h2load_command, read_log, run

from mm.edge.embedded_etcd import embedded_etcd
from mm.pb import mmesh

#: Of hits, where their p99 is asked for.
PROBE_RATE = 500
#: What happens beside them.
REGISTRATIONS_RATE, LOADS_RATE = 500, 20
#: A machine that cannot even do so much of it tells nothing.
RATE_SHARE_MIN = 0.9
TICK_S = 0.02
IN_FLIGHT_MAX = 200
#: Between first calls. A model's size is asked 5 ms after its load, told by the example runtime
#: 50 ms later, then written: with a pause of that length all of it would be in the next one's way.
FIRST_PAUSE_S = 0.15


@asynccontextmanager
async def wired(
    directory: Path, serving_port: int | None = None, slots: int = 6
) -> AsyncIterator[Instance]:
    """An instance that serves by the wire, inferences from a port."""
    settings = {"MM_DATAPLANE": "wire", "MM_WIRE_THREADS": "1"}
    if serving_port is not None:
        settings["INTERNAL_SERVING_GRPC_PORT"] = str(serving_port)
    options = ("--default-size", "1000000", "--loading-concurrency", str(slots))
    async with (
        embedded_etcd() as etcd,
        instance_of(etcd, directory, runtime_options=options, settings=settings) as instance,
    ):
        await instance.start_serve()
        yield instance


async def load_hot(instance: Instance) -> None:
    """See that the model of the hits is loaded."""
    await instance.register(MODEL, "SIZE_1000000_0_0")
    request = mmesh.EnsureLoadedRequest(model_id=MODEL, sync=True)
    await instance.call("/mmesh.ModelMesh/ensureLoaded", request, mmesh.ModelStatusInfo)


def port_of(instance: Instance) -> int:
    """Answer where clients call."""
    return int(instance.address.rpartition(":")[2])


def probe_load(calls: int) -> Load:
    """Answer calls at a steady rate."""
    return Load("probe", 4, 4, calls, rate=PROBE_RATE, client="h2load")


async def probe(ports: dict[str, int], directory: Path, seconds: float) -> dict[str, float]:
    """Answer the p99 at each port, in us, all asked at the same time."""
    load = probe_load(int(PROBE_RATE * seconds))
    tasks = {}
    async with asyncio.TaskGroup() as group:
        for name, port in ports.items():
            own = directory / name
            own.mkdir(exist_ok=True)
            tasks[name] = group.create_task(asyncio.to_thread(run, load, port, {"proxy": []}, own))
    return {name: task.result().p99_us for name, task in tasks.items()}


# --- hits beside registrations and loads ---------------------------------------------------------


async def measure_busy(directory: Path, rounds: int, scale: float) -> list[Goal]:
    """p99 of hits while tier 2 registers and loads, to that of quiet moments.

    Calls that go to the upstream directly, at the same time, tell what the machine does to any.
    """
    seconds = max(3.0, 12.0 * scale)
    ratios, rates = [], []
    with upstream_of(directory, "constant") as (upstream, _):
        async with wired(directory, upstream) as instance:
            await load_hot(instance)
            ports = {"hits": port_of(instance), "direct": upstream}
            await probe(ports, directory, 2.0)
            for number in range(rounds):
                took = {}
                for kind in ("quiet", "busy") if number % 2 == 0 else ("busy", "quiet"):
                    if kind == "quiet":
                        took[kind] = await probe(ports, directory, seconds)
                        continue
                    beside = await begin_beside(instance, number, seconds)
                    took[kind] = await probe(ports, directory, seconds)
                    output, _ = await beside.communicate()
                    rates.append(json.loads(output))
                ratios.append(took["busy"]["hits"] / took["quiet"]["hits"])
                told = "; ".join(
                    f"{name} {took['quiet'][name]:.0f} us quiet, {took['busy'][name]:.0f} busy"
                    for name in ports
                )
                print(
                    f"p99 at {PROBE_RATE}/s beside {rates[-1][0]:.0f} registrations "
                    f"and {rates[-1][1]:.0f} loads a second: {told}"
                )
    if statistics.median(rate for rate, _ in rates) < RATE_SHARE_MIN * REGISTRATIONS_RATE:
        raise NotMeasuredError("the machine is too slow for so many registrations")
    ratio = statistics.median(ratios)
    return [Goal("p99 of hits, registering and loading, to quiet", ratio, "<=", 1.3)]


async def begin_beside(
    instance: Instance, number: int, seconds: float
) -> asyncio.subprocess.Process:
    """Start registering and loading for so long; returns when it has begun."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        instance.address,
        str(number),
        str(seconds + 1),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    return process


async def be_beside(address: str, number: int, seconds: float) -> None:
    """Register and load at the rates; prints how many there were a second of each."""
    os.nice(10)
    methods = {}
    done = [0, 0]
    gate = asyncio.Semaphore(IN_FLIGHT_MAX)
    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as group:
        for name in ("registerModel", "ensureLoaded"):
            methods[name] = channel.unary_unary(f"/mmesh.ModelMesh/{name}")
        info = mmesh.ModelInfo(type="example", path="SIZE_1000000_20_0")

        async def one(model_id: str, loads: bool) -> None:
            request = mmesh.RegisterModelRequest(model_id=model_id, model_info=info)
            async with gate:
                await methods["registerModel"](bytes(request), timeout=60)
                done[0] += 1
                if loads:
                    ensure = mmesh.EnsureLoadedRequest(model_id=model_id)
                    await methods["ensureLoaded"](bytes(ensure), timeout=60)
                    done[1] += 1

        began_s, sent = time.monotonic(), 0
        print("begun", flush=True)
        while (passed_s := time.monotonic() - began_s) < seconds:
            while sent < passed_s * REGISTRATIONS_RATE:
                loads = sent % (REGISTRATIONS_RATE // LOADS_RATE) == 0
                group.create_task(one(f"beside-{number}-{sent}", loads))
                sent += 1
            await asyncio.sleep(TICK_S)
        told = [each / passed_s for each in done]
    print(json.dumps(told))


# --- hits while thousands wait -------------------------------------------------------------------


async def measure_waiting(directory: Path, rounds: int, scale: float) -> list[Goal]:
    """p99 of hits while calls arrive, wait for cold loads and are released, to quiet."""
    sizes = waiting.Sizes(rounds, calls=max(2_000, int(10_000 * scale)), quiet_s=5.0)
    found: list[waiting.Round] = []
    echo_rate = await asyncio.to_thread(waiting.measure_echo)
    with upstream_of(directory, "constant") as (upstream, _):
        async with wired(directory, upstream, waiting.SLOTS) as instance:
            await load_hot(instance)
            load = probe_load(100_000_000)
            offset_s = time.time() - time.monotonic()
            probing = await asyncio.create_subprocess_exec(
                *h2load_command(load, port_of(instance), directory), stdout=subprocess.DEVNULL
            )
            async with waiting.helper("--send", instance.address) as sender:
                for number in range(rounds):
                    one = await waiting.run_round(number, instance, sender, sizes, echo_rate)
                    found.append(one)
            if probing.returncode is not None:
                raise SystemExit("h2load ended before its time")
            probing.send_signal(signal.SIGINT)
            await probing.wait()
    took = [(began / 1e6 - offset_s, each / 1000) for began, each in read_log(directory)]
    for one in found:
        one.read(took)
        if set(one.statuses) != {"OK"}:
            raise SystemExit(f"not all calls that waited were answered: {dict(one.statuses)}")
        told = ", ".join(f"{name} {p99:.2f}" for name, (_, p99) in one.figures.items())
        print(f"p99 of hits, ms: {told}; {one.waiting_calls} waited at once")
    return [judge_phase(phase, found) for phase in ("paced", "fast", "waiting", "release")]


def judge_phase(phase: str, rounds: list[waiting.Round]) -> Goal:
    """Answer the goal of one phase; one too short to have a p99 is missed."""
    there = [one.figures for one in rounds if phase in one.figures]
    ratios = [each[phase][1] / each["quiet"][1] for each in there]
    names = {"paced": "calls arriving", "fast": "calls arriving at once"}
    text = {**names, "waiting": "calls waiting", "release": "calls released"}[phase]
    ratio = statistics.median(ratios) if ratios else float("inf")
    return Goal(f"p99 of hits, {text}, to quiet", ratio, "<=", 1.3)


# --- the first call ------------------------------------------------------------------------------


async def measure_first(directory: Path, _rounds: int, scale: float) -> list[Goal]:
    """First calls to models that nobody has loaded, less what the runtime takes for a load of 0 ms:
    it is asked the same directly.
    """
    sizes = mesh.Sizes(0, 1, 0, cold_calls=max(30, int(200 * scale)), starts=1)
    cold, warm = [], []
    async with wired(directory) as instance:
        models = [f"cold-{number}" for number in range(sizes.cold_calls)]
        for model_id in models:
            await instance.register(model_id, "SIZE_1000000_0_0")
        for model_id in models:
            # What follows a registration, or another first call, is none of this one's.
            await asyncio.sleep(FIRST_PAUSE_S)
            for into in (cold, warm):
                began_s = time.perf_counter()
                await instance.predict(model_id)
                into.append((time.perf_counter() - began_s) * 1000)
        load_ms = await mesh.measure_load(instance, sizes)
    p50, p99 = statistics.median(cold), percentile(cold, 0.99)
    print(f"first calls: p50 {p50:.1f} ms, p99 {p99:.1f}; then {statistics.median(warm):.1f}")
    print(f"  of it the runtime's own load {load_ms:.1f}")
    return [Goal("first call, p50 without the runtime's load", p50 - load_ms, "<=", 5.0, "ms")]


MESH_ROWS = {
    "busy": ("hits beside registrations and loads", measure_busy),
    "waiting": ("hits while calls wait for loads", measure_waiting),
    "first": ("the first call to an unloaded model", measure_first),
}


def measure_mesh(name: str, rounds: int, scale: float, directory: Path) -> list[Goal]:
    """Measure one of these rows."""
    print(f"\n{MESH_ROWS[name][0]}", flush=True)
    own = directory / name
    own.mkdir()
    for program in ("upstream", "caller"):
        (own / program).symlink_to(directory / program)
    return anyio.run(MESH_ROWS[name][1], own, rounds, scale)


if __name__ == "__main__":
    assert HOST in sys.argv[1]
    asyncio.run(be_beside(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))

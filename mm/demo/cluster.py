"""The instances of the demo: `mm serve` with a real runtime beside it, several times.

Owns starting, readiness, the kill and the restart, the order of stopping. What is sent to the
instances is ``traffic``'s affair.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
from grpclib.client import Channel
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from mm.demo.lost_connections import told_as_errors
from mm.demo.processes import ChildProcess, DemoError, free_ports
from mm.demo.traffic import Target
from mm.pb.grpc.health.v1 import (
    HealthCheckRequest,
    HealthCheckResponseServingStatus,
    HealthStub,
)

HOST: Final = "127.0.0.1"
SERVICE_NAME: Final = "mm-demo"

#: Names that are easy to tell apart; more instances are numbered.
NAMES: Final = ("alpha", "bravo", "charlie", "delta", "echo")

#: On a slow machine importing scikit-learn takes seconds, three times at once.
START_TIMEOUT_S: Final = 60.0
STOP_GRACE_S: Final = 5.0
_POLL_S: Final = 0.05


@dataclass(slots=True)
class Instance:
    """A pair of processes and where it answers."""

    name: str
    target: Target
    peer_port: int
    runtime: ChildProcess
    serve: ChildProcess
    #: True from just before a kill that is part of the demo until it is started again.
    is_meant_to_be_down: bool = False

    @property
    def processes(self) -> tuple[ChildProcess, ChildProcess]:
        """Both, the runtime first."""
        return self.runtime, self.serve

    async def start(self) -> None:
        """Start both; returns when the instance serves clients."""
        self.is_meant_to_be_down = False
        for process in self.processes:
            await process.start()
        await self._wait_ready()

    def kill(self) -> None:
        """SIGKILL both at once, as if the machine were gone."""
        self.is_meant_to_be_down = True
        for process in self.processes:
            process.kill()

    async def reap(self) -> None:
        """Collect what ``kill`` left."""
        for process in self.processes:
            await process.reap()

    async def _wait_ready(self) -> None:
        channel = Channel(HOST, self.target.port)
        try:
            with anyio.fail_after(START_TIMEOUT_S):
                async with anyio.create_task_group() as watchers:
                    for process in self.processes:
                        watchers.start_soon(_fail_when_it_ends, process)
                    while not await _is_serving(channel):  # noqa: ASYNC110 - nobody tells
                        await anyio.sleep(_POLL_S)
                    watchers.cancel_scope.cancel()
        except TimeoutError:
            raise DemoError(
                f"{self.serve.name} did not serve within {START_TIMEOUT_S:g} s; the end of "
                f"{self.serve.log_path}:",
                details=await self.serve.last_words(),
            ) from None
        finally:
            channel.close()


async def _fail_when_it_ends(process: ChildProcess) -> None:
    code = await process.wait()
    raise await ended(process, code)


async def ended(process: ChildProcess, code: int) -> DemoError:
    """Answer the error for a process that ended although nobody asked it to."""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return DemoError(
        f"{process.name} {how}; the end of {process.log_path}:", details=await process.last_words()
    )


async def _is_serving(channel: Channel) -> bool:
    try:
        with told_as_errors():
            answer = await HealthStub(channel).check(HealthCheckRequest(), timeout=1.0)
    except (OSError, GRPCError, StreamTerminatedError, ProtocolError):
        return False
    return answer.status == HealthCheckResponseServingStatus.SERVING


@dataclass(slots=True)
class Cluster:
    """All instances; ``watch`` ends the demo when one dies that should not."""

    instances: tuple[Instance, ...]
    _checked: set[int] = field(default_factory=set)

    @property
    def targets(self) -> tuple[Target, ...]:
        """Where clients connect."""
        return tuple(instance.target for instance in self.instances)

    def instance(self, name: str) -> Instance:
        """Answer the instance of that name."""
        return next(instance for instance in self.instances if instance.name == name)

    async def watch(self) -> None:
        """Raise ``DemoError`` as soon as a process ends that was not killed on purpose."""
        async with anyio.create_task_group() as watchers:
            for instance in self.instances:
                for process in instance.processes:
                    watchers.start_soon(_watch, instance, process)


async def _watch(instance: Instance, process: ChildProcess) -> None:
    while True:
        if process.pid and not instance.is_meant_to_be_down:
            code = await process.wait()
            if not instance.is_meant_to_be_down:
                raise await ended(process, code)
        await anyio.sleep(_POLL_S)


def instance_names(count: int) -> tuple[str, ...]:
    """Answer a name for each instance."""
    numbered = (f"instance-{number}" for number in range(len(NAMES) + 1, count + 1))
    return (*NAMES[:count], *numbered)


def make_instances(
    count: int, *, kv_store: str, capacity_bytes: int, models: Path, directory: Path
) -> tuple[Instance, ...]:
    """Describe ``count`` instances on ports of their own; nothing is started."""
    ports = iter(free_ports(3 * count, HOST))
    instances = []
    for name in instance_names(count):
        client_port, peer_port, runtime_port = next(ports), next(ports), next(ports)
        runtime = ChildProcess(
            f"the runtime of {name}",
            [
                *("runtime", "sklearn", "--port", str(runtime_port)),
                *("--capacity", str(capacity_bytes), "--root", str(models)),
            ],
            {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            directory / f"{name}-runtime.log",
        )
        serve = ChildProcess(
            f"instance {name}",
            ["serve"],
            {
                "MM_SERVICE_NAME": SERVICE_NAME,
                "KV_STORE": kv_store,
                "MM_INSTANCE_ID": name,
                "MM_BIND_HOST": HOST,
                "MM_ADVERTISE_ADDRESS": HOST,
                "MM_SVC_GRPC_PORT": str(client_port),
                "MM_PEER_PORT": str(peer_port),
                "MM_PROBE_PORT": "NONE",
                "MM_PRESTOP_WAIT_PORT": "NONE",
                "INTERNAL_GRPC_PORT": str(runtime_port),
            },
            directory / f"{name}-serve.log",
        )
        target = Target(name, HOST, client_port)
        instances.append(Instance(name, target, peer_port, runtime, serve))
    return tuple(instances)


@asynccontextmanager
async def running(instances: Sequence[Instance]) -> AsyncIterator[Cluster]:
    """Start all instances, and stop them all on the way out."""
    cluster = Cluster(tuple(instances))
    try:
        async with anyio.create_task_group() as starters:
            for instance in instances:
                starters.start_soon(instance.start)
        yield cluster
    finally:
        for instance in instances:
            instance.is_meant_to_be_down = True
        # The instances first, so that none sees its runtime go.
        for kind in ([i.serve for i in instances], [i.runtime for i in instances]):
            for process in kind:
                process.terminate()
            deadline_s = anyio.current_time() + STOP_GRACE_S
            for process in kind:
                await process.reap(max(0.0, deadline_s - anyio.current_time()))

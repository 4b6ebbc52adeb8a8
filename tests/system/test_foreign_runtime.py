"""A runtime that is grpcio's: what clients do arrives there, and only what they do.

Deadlines, cancellation, clients that vanish, callers that give up while their model loads.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from tests.system.grpcio_runtime import WAIT_S, GrpcioRuntime, Held, grpcio_runtime
from tests.system.meshes import Instance, mesh_of

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
ID = (("mm-model-id", "m"),)
TIMEOUT_S = 60.0
#: Long enough for a call to arrive on a machine with other work.
DEADLINE_S = 3.0


@dataclass(frozen=True, slots=True)
class World:
    """Two instances with such runtimes; the model ``m`` is at the first."""

    instances: dict[str, Instance]
    runtimes: dict[str, GrpcioRuntime]

    @property
    def runtime(self) -> GrpcioRuntime:
        """The one that has ``m``."""
        return self.runtimes["holder"]


@pytest.fixture(scope="module")
def world(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[World]:
    settings = {"MM_DATAPLANE": dataplane}
    with ExitStack() as stack:
        mesh = stack.enter_context(mesh_of(kv_store, settings, new_service_name()))
        runtimes = {}
        for name in ("holder", "other"):
            address = f"unix:{mesh.socket_path(name)}"
            runtimes[name] = stack.enter_context(grpcio_runtime(address, grpc.Compression.Gzip))
            own = {"INTERNAL_GRPC_SOCKET_PATH": mesh.socket_path(name)}
            mesh.add_beside(name, None, own)
            if name == "holder":
                status = mesh[0].register("m", load_now=True, sync=True)
                assert status.status == Status.LOADED
        yield World(dict(zip(runtimes, mesh.instances, strict=True)), runtimes)
        assert "m" not in runtimes["other"].loads


@pytest.fixture(params=["holder", "other"])
def instance(request: pytest.FixtureRequest, world: World) -> Instance:
    return world.instances[request.param]


def call_of(instance: Instance, method: str) -> Any:
    return instance.channel.unary_unary(f"/test.Runtime/{method}")


def test_answers_that_the_runtime_compresses(instance: Instance) -> None:
    message = b"squeeze me " * 100_000
    assert call_of(instance, "echo")(message, metadata=ID, timeout=TIMEOUT_S) == message


def test_a_deadline_passes_in_the_runtime_too(instance: Instance, world: World) -> None:
    future = call_of(instance, "hold").future(b"", metadata=ID, timeout=DEADLINE_S)
    held = world.runtime.next_held()
    assert held.time_left_s is not None
    assert 0 < held.time_left_s <= DEADLINE_S + 0.1
    assert future.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert held.ended.wait(WAIT_S)


def test_no_deadline_becomes_no_deadline(instance: Instance, world: World) -> None:
    future = call_of(instance, "hold").future(b"kept", metadata=ID)
    held = world.runtime.next_held()
    assert held.time_left_s is not None
    assert held.time_left_s > 1e9  # what grpcio says for ever
    held.release()
    assert future.result(timeout=TIMEOUT_S) == b"kept"


def test_a_cancelled_call_ends_in_the_runtime(instance: Instance, world: World) -> None:
    future = call_of(instance, "hold").future(b"", metadata=ID, timeout=TIMEOUT_S)
    held = world.runtime.next_held()
    assert not held.ended.is_set()
    future.cancel()
    assert held.ended.wait(WAIT_S)


def test_a_cancelled_stream_ends_in_the_runtime(instance: Instance, world: World) -> None:
    """Cancelled half-way: one answer is here, and the client's side is still open."""
    more = threading.Event()

    def requests() -> Iterator[bytes]:
        yield b"first"
        more.wait(WAIT_S)

    stub: Any = instance.channel.stream_stream("/test.Runtime/holdStream")
    call = stub(requests(), metadata=ID, timeout=TIMEOUT_S)
    assert next(call) == b"first"
    held = world.runtime.next_held()
    call.cancel()
    assert held.ended.wait(WAIT_S)
    more.set()


CLIENT = """
import sys, grpc
stub = grpc.insecure_channel(sys.argv[1]).unary_unary("/test.Runtime/hold")
stub(b"x" * 1000, metadata=(("mm-model-id", "m"),))
"""


def test_a_client_that_is_killed_in_the_middle_of_a_call(instance: Instance, world: World) -> None:
    """Its call ends in the runtime, and the next client is served."""
    command = [sys.executable, "-c", CLIENT, f"127.0.0.1:{instance.port}"]
    with subprocess.Popen(command) as client:
        held = world.runtime.next_held()
        assert not held.ended.is_set()
        client.kill()
    assert held.ended.wait(WAIT_S)
    assert call_of(instance, "echo")(b"next", metadata=ID, timeout=TIMEOUT_S) == b"next"


def test_who_gives_up_does_not_stop_the_load(world: World) -> None:
    """Callers cancel, or their time is over, while a model loads: it is loaded once, and who comes
    later is served.
    """
    header = (("mm-model-id", "slow"),)
    loading: queue.SimpleQueue[Held] = queue.SimpleQueue()

    def hold(held: Held) -> None:
        loading.put(held)
        held.wait()

    for runtime in world.runtimes.values():
        runtime.before_load = hold
    try:
        world.instances["holder"].register("slow")
        callers = [call_of(instance, "echo") for instance in world.instances.values()]
        futures = [call.future(b"", metadata=header, timeout=0.5) for call in callers]
        cancelled = callers[0].future(b"", metadata=header, timeout=TIMEOUT_S)
        load = loading.get(timeout=WAIT_S)
        cancelled.cancel()
        assert [future.code() for future in futures] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 2
        assert not load.ended.is_set()
        load.release()
    finally:
        for runtime in world.runtimes.values():
            runtime.before_load = lambda held: None
    for call in callers:
        assert call(b"here", metadata=header, timeout=TIMEOUT_S) == b"here"
    loads = [name for runtime in world.runtimes.values() for name in runtime.loads]
    assert loads.count("slow") == 1

"""Runtimes that are slow, tell nonsense, crash and come back (issue 3, "Bad input and faults").

What they say at the start is in test_failed_start.py, models that they lost in
test_conformance_missing_model.py, files that they cannot load in test_foreign_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from tests.system.grpcio_runtime import MIB, WAIT_S, GrpcioRuntime, Held, grpcio_runtime
from tests.system.meshes import Instance, Mesh, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Code = grpc.StatusCode
Status = mmesh.ModelStatusInfoModelStatus
#: Of which a load takes a hundredth, unless the machine has other work.
LOAD_TIMEOUT_MS = 5_000
TIMED_OUT = "Load of model slow timed out after 5s"
SIZE = "SIZE_1000000_10_0"


# --- slow, and nonsense -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """One instance with a runtime that does as the test says, and the model ``good``."""

    instance: Instance
    runtime: GrpcioRuntime

    def echo(self, model_id: str, timeout_s: float = WAIT_S) -> Any:
        stub: Any = self.instance.channel.unary_unary("/test.Runtime/echo")
        return stub(b"echo", metadata=(("mm-model-id", model_id),), timeout=timeout_s)


@pytest.fixture(scope="module")
def shared_world(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[World]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        path = mesh.socket_path("scripted")
        with grpcio_runtime(f"unix:{path}") as runtime:
            runtime.status.model_loading_timeout_ms = LOAD_TIMEOUT_MS
            own = {"INTERNAL_GRPC_SOCKET_PATH": path}
            world = World(mesh.add_beside("scripted", None, own), runtime)
            world.instance.register("good", load_now=True, sync=True)
            yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    runtime = shared_world.runtime
    yield shared_world
    runtime.before_load = lambda held: None
    runtime.loaded_size_bytes = runtime.measured_size_bytes = MIB
    # Whatever the runtime said of one model, the other one never left.
    assert shared_world.echo("good") == b"echo"
    assert runtime.loads.count("good") == 1


def test_a_load_over_its_time(world: World) -> None:
    """The load is cancelled in the runtime, which is told to unload, whatever came of it."""
    loading: list[Held] = []

    def hold(held: Held) -> None:
        loading.append(held)
        held.wait()

    world.runtime.before_load = hold
    world.instance.register("slow")
    code, text = refusal(partial(world.echo, "slow"))
    assert (code, text) == (Code.DEADLINE_EXCEEDED, TIMED_OUT)
    assert loading[0].ended.wait(WAIT_S)
    assert world.runtime.unloaded.get(timeout=WAIT_S) == "slow"
    status = world.instance.status("slow")
    assert status.status == Status.LOADING_FAILED
    assert status.errors == [TIMED_OUT]


def test_loads_within_their_time(world: World) -> None:
    """Slower than anything else here, and all callers wait for the one load."""

    def dawdle(held: Held) -> None:
        held.ended.wait(LOAD_TIMEOUT_MS / 10_000)

    world.runtime.before_load = dawdle
    world.instance.register("in-time")
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(lambda _: world.echo("in-time"), range(8))) == {b"echo"}
    assert world.runtime.loads.count("in-time") == 1


def test_size_0_twice(world: World) -> None:
    """Neither the load nor the measurement tells a size: the default counts."""
    world.runtime.loaded_size_bytes = world.runtime.measured_size_bytes = 0
    world.instance.register("weightless")
    assert world.echo("weightless") == b"echo"
    assert world.instance.status("weightless").status == Status.LOADED
    # Else it is told what the runtime says to the next test.
    eventually(lambda: "weightless" in world.runtime.measurements, what="it was measured")


@pytest.mark.parametrize("size", [2 * 1024 * MIB, 2**63, 2**64 - 1])
@pytest.mark.parametrize("told_by", ["load", "measurement"])
def test_size_larger_than_everything(world: World, size: int, told_by: str) -> None:
    """It would evict everything and then itself: it has to go, and the caller is told why."""
    model_id = f"giant-{told_by}-{size}"
    world.runtime.loaded_size_bytes = size if told_by == "load" else 0
    world.runtime.measured_size_bytes = size
    status = world.instance.register(model_id, load_now=True, sync=True)
    if told_by == "load":
        assert status.status == Status.LOADING_FAILED
    assert world.runtime.unloaded.get(timeout=WAIT_S) == model_id
    code, text = refusal(partial(world.echo, model_id))
    assert code == Code.FAILED_PRECONDITION
    assert text.startswith(f"Size of {size} bytes of model {model_id} is larger than")
    world.instance.unregister(model_id)


def test_a_load_that_says_unavailable(world: World) -> None:
    """A runtime that cannot load now: the call fails with its words, the model is not lost."""

    def refuse(held: Held) -> None:
        held.context.abort(Code.UNAVAILABLE, "the accelerator is asleep")

    world.runtime.before_load = refuse
    status = world.instance.register("asleep", load_now=True, sync=True)
    assert status.status == Status.LOADING_FAILED
    assert status.errors[0].endswith("the accelerator is asleep")


# --- crashes ------------------------------------------------------------------------------------


@pytest.fixture
def pair_to_break(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all("break-a", "break-b")
        yield mesh


def holder_of(mesh: Mesh, model_id: str) -> tuple[Instance, Instance]:
    (copy,) = mesh[0].status(model_id).model_copy_infos
    holder, other = mesh.instances
    return (holder, other) if copy.location == holder.instance_id else (other, holder)


def restart_runtime(mesh: Mesh, instance: Instance) -> None:
    path = mesh.socket_path(instance.instance_id)
    args = ["example", f"unix://{path}", "--start-delay", "0"]
    instance.runtime = mesh.start_runtime(instance.instance_id, args)
    instance.runtime.wait_line("listening on")


def test_crash_and_restart(pair_to_break: Mesh) -> None:
    """SIGKILL of a runtime: no call fails; back again, it serves again, and nobody notices."""
    mesh = pair_to_break
    mesh[0].register("m", SIZE, load_now=True, sync=True)
    holder, other = holder_of(mesh, "m")
    in_flight = holder.predict_later("m", "test:delay:ms=30000")
    assert holder.runtime is not None
    holder.wait_in_flight(1)
    holder.runtime.kill()
    # In flight: sent again to where the model was loaded, as no byte of an answer had come. The
    # text asks for 30 s there as well, which nobody wants to wait for.
    for instance in (holder, other, holder, other):
        reply = instance.predict("m")
        assert reply.results[0].category == "classification for hello by model m"
    assert not in_flight.done()
    in_flight.cancel()

    # With the runtime back and the other instance gone, the model is loaded here anew.
    restart_runtime(mesh, holder)
    other.close()
    assert holder.predict("m").results[0].confidence == 1.0
    assert holder.statistics().models_loaded == 1


def test_crash_with_nowhere_else_to_go(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> None:
    """One instance: UNAVAILABLE as long as its runtime is away, then as if nothing had been."""
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        only = mesh.add("only")
        for number in range(5):
            only.register(f"m{number}", SIZE, load_now=True, sync=True)
        assert only.runtime is not None
        in_flight = only.predict_later("m0", "test:delay:ms=30000")
        only.wait_in_flight(1)
        only.runtime.kill()
        assert in_flight.code() == Code.UNAVAILABLE
        code, text = refusal(partial(only.predict, "m1"))
        assert code == Code.UNAVAILABLE
        assert "runtime" in text
        restart_runtime(mesh, only)
        for number in range(5):
            assert only.predict(f"m{number}").results[0].confidence == 1.0

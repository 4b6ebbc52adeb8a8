"""Conformance with the Java mesh: loads that fail, here and everywhere (around 22.3).

ModelMeshLoadFailureTest but for the migration, and ModelMeshFailureExpiryTest. The runtimes are in
the test's process and fail when they are told to.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from tests.system.grpcio_runtime import GrpcioRuntime, Held, grpcio_runtime
from tests.system.meshes import CALL_TIMEOUT_S, Instance, Mesh, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Code = grpc.StatusCode
Status = mmesh.ModelStatusInfoModelStatus
ERROR = "the disk is on fire"
#: How many instances are tried for a model that loads nowhere.
FAILURES_MAX = 3
EXPIRY_S = 2.0
PATIENCE_S = 60.0


def fail(held: Held) -> None:
    held.context.abort(Code.INTERNAL, ERROR)


def succeed(held: Held) -> None:
    del held


@dataclass(frozen=True, slots=True)
class World:
    """A mesh, and its runtimes by instance."""

    mesh: Mesh
    runtimes: dict[str, GrpcioRuntime]

    def fail_at(self, instances: Sequence[str]) -> None:
        """Let loads fail at these instances, and work at the others."""
        for name, runtime in self.runtimes.items():
            runtime.before_load = fail if name in instances else succeed


def world_of(stack: ExitStack, mesh: Mesh, names: Sequence[str]) -> World:
    """Start instances at once, each with a runtime of its own."""
    runtimes = {
        name: stack.enter_context(grpcio_runtime(f"unix:{mesh.socket_path(name)}"))
        for name in names
    }

    def add(name: str) -> None:
        mesh.add_beside(name, None, {"INTERNAL_GRPC_SOCKET_PATH": mesh.socket_path(name)})

    with ThreadPoolExecutor() as pool:
        list(pool.map(add, names))
    return World(mesh, runtimes)


@pytest.fixture(scope="module")
def worlds(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[dict[str, World]]:
    """One instance that soon forgets failures, and five; all started at the same time."""
    sizes = {"one": 1, "five": 5}
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(name: str) -> World:
            settings = {"MM_DATAPLANE": dataplane}
            if name == "one":
                settings["MM_LOAD_FAILURE_EXPIRY_TIME_MS"] = f"{EXPIRY_S * 1000:.0f}"
            mesh = stack.enter_context(mesh_of(kv_store, settings, new_service_name()))
            return world_of(stack, mesh, [f"{name}-{number}" for number in range(sizes[name])])

        yield dict(zip(sizes, pool.map(start, sizes), strict=True))


@pytest.fixture(params=["one", "five"])
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    """Alone, and in a cluster."""
    return worlds[request.param]


def test_load_same_id_different_model(world: World) -> None:
    world.fail_at([])
    first, last = world.mesh[0], world.mesh[-1]
    first.register("same", key="one key", load_now=True, sync=True)
    code, text = refusal(partial(last.register, "same", key="another key", load_now=True))
    assert (code, text) == (
        Code.ALREADY_EXISTS,
        "Model already exists with different attribute values",
    )
    assert first.status("same").status == Status.LOADED
    last.unregister("same")
    eventually(lambda: first.status("same").status == Status.NOT_FOUND)


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "async"])
def test_load_failure(world: World, sync: bool) -> None:
    """It is a status, never an error; and three instances are enough to try.

    In Java the fourth may fail before the third has told, so its test allows for one more.
    """
    world.fail_at(list(world.runtimes))
    instance = world.mesh[0]
    model_id = f"fails-{sync}"
    said = instance.register(model_id, load_now=True, sync=sync).status
    assert said in ([Status.LOADING_FAILED] if sync else [Status.LOADING, Status.LOADING_FAILED])

    def failed_everywhere() -> bool:
        status = instance.status(model_id)
        return status.status == Status.LOADING_FAILED and len(status.errors) >= expected

    expected = min(FAILURES_MAX, len(world.runtimes))
    eventually(failed_everywhere)

    def told() -> mmesh.ModelStatusInfo | None:
        # Where failures are soon forgotten, it may be on its way once more.
        status = instance.ensure_loaded(model_id, sync=sync)
        return status if status.status == Status.LOADING_FAILED else None

    status = eventually(told)
    assert len(status.errors) == expected
    assert all(error.endswith(ERROR) for error in status.errors)
    failed = [copy.location for copy in status.model_copy_infos]
    times = [copy.time for copy in status.model_copy_infos]
    assert times == sorted(times, reverse=True), "newest first"
    assert {copy.copy_status for copy in status.model_copy_infos} == {Status.LOADING_FAILED}
    assert len(set(failed)) == len(failed) == expected
    for name, runtime in world.runtimes.items():
        assert (model_id in runtime.loads) == (name in failed), name
    code, text = refusal(partial(echo, instance, model_id))
    assert code == Code.FAILED_PRECONDITION
    assert text.endswith(ERROR)


def echo(instance: Instance, model_id: str) -> Any:
    stub: Any = instance.channel.unary_unary("/test.Runtime/echo")
    return stub(b"x", metadata=(("mm-model-id", model_id),), timeout=CALL_TIMEOUT_S)


def test_failure_expiry(worlds: dict[str, World]) -> None:
    """A failed load is tried again after the expiry, although the model is asked for all the time.

    Java's load failure is INTERNAL, and counts for the whole expiry or half of it. Here what may
    pass, as INTERNAL from a runtime, counts for a pause that is no longer than the expiry, and at
    most a quarter shorter.
    """
    world = worlds["one"]
    world.fail_at(list(world.runtimes))
    instance = world.mesh[0]
    started_s = time.monotonic()
    status = instance.register("expires", load_now=True, sync=True)
    failed_s = time.monotonic()
    assert status.status == Status.LOADING_FAILED
    world.fail_at([])
    pause = threading.Event()
    while True:
        stub: Any = instance.channel.unary_unary("/test.Runtime/echo")
        future = stub.future(b"x", metadata=(("mm-model-id", "expires"),), timeout=CALL_TIMEOUT_S)
        if future.code() == Code.OK:
            break
        assert future.code() == Code.FAILED_PRECONDITION
        assert future.details().endswith(ERROR)
        # Java waits for four seconds in all; without the setting it would be a quarter of an hour.
        assert time.monotonic() - failed_s < PATIENCE_S
        pause.wait(0.1)
    assert time.monotonic() - started_s >= EXPIRY_S * 3 / 4
    assert instance.status("expires").status == Status.LOADED
    (runtime,) = world.runtimes.values()
    assert runtime.loads.count("expires") == 2


def test_load_failure_recovery(worlds: dict[str, World]) -> None:
    """Two of three fail: whoever is asked, the caller sees a model that loads, on the third.

    The last of the module: two of the five instances are stopped for it.
    """
    world = worlds["five"]
    *bad, good = list(world.runtimes)[:3]
    instances = {instance.instance_id: instance for instance in world.mesh.instances}
    others = [instances[name] for name in list(world.runtimes)[3:]]
    for other in others:
        other.serve.terminate()
    for other in others:
        assert other.serve.wait_end(PATIENCE_S) == 0
    world.fail_at(bad)
    for number in range(5):
        instance = instances[[*bad, good][number % 3]]
        model_id = f"recovers-{number}"
        status = instance.register(model_id, load_now=True, sync=True)
        assert status.status == Status.LOADED
        assert [
            copy.location
            for copy in status.model_copy_infos
            if copy.copy_status != Status.LOADING_FAILED
        ] == [good]
        assert echo(instance, model_id) == b"x"
    tried = [model_id for name in bad for model_id in world.runtimes[name].loads]
    assert any(model_id.startswith("recovers") for model_id in tried)

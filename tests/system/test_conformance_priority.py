"""Conformance with the Java mesh: what somebody waits for is loaded first (around 22.3).

ModelMeshLoadPriorityTest: one load at a time. The runtime holds every load until the test lets it
go, so what is asserted is an order, not a time.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from mm.pb import mmesh
from tests.system.grpcio_runtime import WAIT_S, GrpcioRuntime, Held, grpcio_runtime
from tests.system.meshes import Instance, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class World:
    """One instance whose runtime loads one model at a time, when it is told to."""

    instance: Instance
    runtime: GrpcioRuntime
    loading: queue.SimpleQueue[Held] = field(default_factory=queue.SimpleQueue)

    def hold(self, held: Held) -> None:
        """Keep a load in the runtime."""
        self.loading.put(held)
        held.wait()

    def next_load(self) -> Held:
        return self.loading.get(timeout=WAIT_S)

    def preload(self, model_id: str, *, hours_ago: int = 0) -> None:
        """Ask for a model that nobody waits for."""
        self.instance.register(model_id)
        last_used_ms = time.time_ns() // 1_000_000 - hours_ago * HOUR_MS
        status = self.instance.ensure_loaded(model_id, last_used_ms=last_used_ms)
        assert status.status == Status.LOADING

    def call(self, model_id: str) -> Any:
        """Begin a call, and answer its future once it waits and the load is in the queue."""
        stub: Any = self.instance.channel.unary_unary("/test.Runtime/echo")
        future = stub.future(b"x", metadata=(("mm-model-id", model_id),), timeout=WAIT_S)
        eventually(lambda: self.instance.statistics().waiting_calls == 1, what="a call that waits")
        # Answered once the load, which is there already, stands in line.
        assert self.instance.ensure_loaded(model_id).status == Status.LOADING
        return future

    def status(self, model_id: str) -> Status:
        return Status(self.instance.status(model_id).status)


@pytest.fixture(scope="module")
def shared_world(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[World]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        path = mesh.socket_path("one-by-one")
        with grpcio_runtime(f"unix:{path}") as runtime:
            runtime.status.max_loading_concurrency = 1
            own = {"INTERNAL_GRPC_SOCKET_PATH": path}
            world = World(mesh.add_beside("one-by-one", None, own), runtime)
            runtime.before_load = world.hold
            yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    shared_world.runtime.loads.clear()
    yield shared_world
    for model_id in shared_world.runtime.loads:
        shared_world.instance.unregister(model_id)


def test_loading_priority(world: World) -> None:
    """A call for a model that nobody had asked for goes before what is only preloaded."""
    world.preload("first")
    first = world.next_load()
    world.preload("second")
    world.instance.register("third")
    call = world.call("third")
    assert_third_overtakes(world, first, call)


def test_loading_priority_upgrade(world: World) -> None:
    """A preload that somebody begins to wait for overtakes those that are more urgent than it."""
    world.preload("first")
    first = world.next_load()
    world.preload("second")
    world.preload("third", hours_ago=1)
    call = world.call("third")
    assert_third_overtakes(world, first, call)


def assert_third_overtakes(world: World, first: Held, call: Any) -> None:
    first.release()
    world.next_load().release()
    assert call.result() == b"x"
    second = world.next_load()
    assert world.runtime.loads == ["first", "third", "second"]
    assert world.status("first") == world.status("third") == Status.LOADED
    assert world.status("second") == Status.LOADING
    second.release()
    eventually(lambda: world.status("second") == Status.LOADED)


def test_preloads_by_their_last_use(world: World) -> None:
    """Nobody waits: what was used last is loaded first, whoever asked first (spec core 3.7)."""
    world.preload("first")
    first = world.next_load()
    world.preload("older", hours_ago=2)
    world.preload("newer", hours_ago=1)
    first.release()
    world.next_load().release()
    world.next_load().release()
    assert world.runtime.loads == ["first", "newer", "older"]
    eventually(lambda: world.status("older") == Status.LOADED)

"""What a runtime may say and do beside loading: sizes, unloads that fail, and how many calls it
takes at a time (around 8 and 23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from tests.system.grpcio_runtime import MIB, WAIT_S, GrpcioRuntime, Held, grpcio_runtime
from tests.system.meshes import Instance, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Code = grpc.StatusCode
Status = mmesh.ModelStatusInfoModelStatus
UNIT_BYTES = 8192
#: An unload that failed more than once is tried again this often (`unload_retry_s`).
RETRY_S = 10.0
#: Calls that a copy takes at a time, and those that it has and keeps waiting.
SLOTS = 2
CALLS_MAX = 6


@dataclass(frozen=True, slots=True)
class World:
    """Instances that do not know each other: the runtime of one tells sizes, that of another does
    as the test says, that of the third takes two calls for each model at a time.
    """

    sizing: Instance
    scripted: Instance
    limited: Instance
    #: Of the second and the third.
    runtime: GrpcioRuntime
    limited_runtime: GrpcioRuntime


@pytest.fixture(scope="module")
def shared_world(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[World]:
    settings = {"MM_DATAPLANE": dataplane, "MM_MAX_INFLIGHT_PER_MODEL_COPY": str(CALLS_MAX)}
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        meshes = [
            stack.enter_context(mesh_of(kv_store, settings, new_service_name())) for _ in range(3)
        ]
        paths = [mesh.socket_path("only") for mesh in meshes[1:]]
        runtimes = [stack.enter_context(grpcio_runtime(f"unix:{path}")) for path in paths]
        runtimes[1].status.limit_model_concurrency = True
        runtimes[1].model_concurrency_max = SLOTS
        starts = [pool.submit(meshes[0].add, "sizing", ["--predict-sizes", "--tell-sizes"])]
        for mesh, path in zip(meshes[1:], paths, strict=True):
            own = {"INTERNAL_GRPC_SOCKET_PATH": path}
            starts.append(pool.submit(mesh.add_beside, "only", None, own))
        yield World(*(start.result() for start in starts), *runtimes)


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    yield shared_world
    runtime = shared_world.runtime
    runtime.before_unload = lambda context: None
    runtime.loaded_size_bytes = runtime.measured_size_bytes = MIB


# --- sizes --------------------------------------------------------------------------------------


def test_predicted_size_is_reserved_before_the_load(world: World) -> None:
    """``predictModelSize``: memory is made free for the size foretold, not for the default."""
    world.sizing.register("foretold", f"SIZE_{400 * MIB}_60000_0", load_now=True)

    def is_reserved() -> bool:
        told = world.sizing.statistics()
        return told.models_loading == 1 and told.used_units * UNIT_BYTES == 400 * MIB

    eventually(is_reserved)
    assert world.sizing.status("foretold").status == Status.LOADING
    world.sizing.unregister("foretold")


def test_predicted_size_larger_than_everything(world: World) -> None:
    """It is not even tried."""
    status = world.sizing.register("giant", f"SIZE_{2**31}_60000_0", load_now=True, sync=True)
    assert status.status == Status.LOADING_FAILED
    assert status.errors[0].startswith("Predicted size of ")
    assert "for model giant is larger than total effective capacity of" in status.errors[0]


def wait_counted(world: World, model_id: str, size_bytes: int) -> None:
    """Load a model, and return when it adds that much to the memory in use."""
    before = world.scripted.statistics().used_units
    status = world.scripted.register(model_id, load_now=True, sync=True)
    assert status.status == Status.LOADED

    def adds() -> int:
        return (world.scripted.statistics().used_units - before) * UNIT_BYTES

    eventually(lambda: adds() == size_bytes, what=f"{model_id} counts as {size_bytes} bytes")


def test_size_told_by_the_load(world: World) -> None:
    """``loadModel`` tells the size: nobody asks for it again."""
    world.runtime.loaded_size_bytes = 3 * MIB
    world.runtime.measured_size_bytes = 5 * MIB
    wait_counted(world, "told", 3 * MIB)
    assert world.runtime.measurements == []


def test_size_not_told_by_the_load(world: World) -> None:
    """It serves already while it is measured."""
    world.runtime.loaded_size_bytes = 0
    world.runtime.measured_size_bytes = 5 * MIB
    wait_counted(world, "measured", 5 * MIB)
    assert world.runtime.measurements == ["measured"]
    world.runtime.measurements.clear()


# --- unloads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNAVAILABLE])
def test_unload_that_fails_is_tried_again(world: World, code: Code) -> None:
    """Until it works, its memory counts as taken; no call notices."""
    model_id = f"sticks-{code.name}"
    world.scripted.register(model_id, load_now=True, sync=True)
    taken: list[int] = []

    def refuse(context: grpc.ServicerContext) -> None:
        taken.append(world.scripted.statistics().unloading_units)
        if len(taken) == 1:
            context.abort(code, "it will not go")

    world.runtime.before_unload = refuse
    world.scripted.unregister(model_id)
    assert world.runtime.unloaded.get(timeout=WAIT_S) == model_id
    assert world.runtime.unloads.count(model_id) == 2
    assert taken == [MIB // UNIT_BYTES] * 2
    eventually(lambda: world.scripted.statistics().unloading_units == 0)


def test_unload_of_what_is_not_there(world: World) -> None:
    """NOT_FOUND says that it is gone: that is what was wanted."""
    world.scripted.register("absent", load_now=True, sync=True)
    world.runtime.before_unload = lambda context: context.abort(Code.NOT_FOUND, "absent")
    world.scripted.unregister("absent")
    eventually(lambda: "absent" in world.runtime.unloads)
    eventually(lambda: world.scripted.statistics().unloading_units == 0)
    assert world.runtime.unloads.count("absent") == 1


def test_load_waits_for_the_unload_before_it(world: World) -> None:
    """The id comes back while its old model will not go: that is tried again at once, not when the
    next of the tries every ten seconds is due, and only then is the new one loaded.
    """
    world.scripted.register("again", load_now=True, sync=True)
    refused: list[str] = []

    def refuse(context: grpc.ServicerContext) -> None:
        if len(refused) < 2:
            refused.append("again")
            context.abort(Code.INTERNAL, "it will not go")

    world.runtime.before_unload = refuse
    world.scripted.unregister("again")
    eventually(lambda: len(refused) == 2)
    world.scripted.register("again")
    stub: Any = world.scripted.channel.unary_unary("/test.Runtime/echo")
    assert stub(b"x", metadata=(("mm-model-id", "again"),), timeout=RETRY_S - 2) == b"x"
    assert world.runtime.unloads.count("again") == 3
    assert world.runtime.loads.count("again") == 2


# --- calls at a time ----------------------------------------------------------------------------


def start_calls(world: World, model_id: str, count: int, vmodel_id: str = "") -> list[Any]:
    """Start calls that stay in the runtime; returns when all have come to the copy. With a vmodel
    they name that.
    """
    world.limited.register(model_id, load_now=True, sync=True)
    stub: Any = world.limited.channel.unary_unary("/test.Runtime/hold")
    metadata = (("mm-model-id", model_id),)
    if vmodel_id:
        set_vmodel(world, vmodel_id, model_id)
        metadata = (("mm-vmodel-id", vmodel_id),)
    calls = [stub.future(b"x", metadata=metadata, timeout=WAIT_S) for _ in range(count + 1)]
    # One more than there may be: whichever comes last is turned away at once.
    eventually(lambda: sum(call.done() for call in calls) == 1, what="a call that is refused")
    refused = next(call for call in calls if call.done())
    assert refused.code() == Code.RESOURCE_EXHAUSTED
    assert refused.details() == "Model queue overload"
    return [call for call in calls if call is not refused]


def test_calls_wait_for_a_slot(world: World) -> None:
    """``limitModelConcurrency``: so many calls of a model run, so many more wait, no others; other
    models do not notice.
    """
    calls = start_calls(world, "narrow", CALLS_MAX)
    held = world.limited_runtime.held
    running = [world.limited_runtime.next_held() for _ in range(SLOTS)]
    world.limited.register("wide", load_now=True, sync=True)
    echo: Any = world.limited.channel.unary_unary("/test.Runtime/echo")
    assert echo(b"x", metadata=(("mm-model-id", "wide"),), timeout=WAIT_S) == b"x"
    for _ in range(CALLS_MAX - SLOTS):
        assert held.empty()
        running.pop(0).release()
        running.append(world.limited_runtime.next_held())
    for one in running:
        one.release()
    assert [call.result() for call in calls] == [b"x"] * CALLS_MAX
    assert echo(b"x", metadata=(("mm-model-id", "narrow"),), timeout=WAIT_S) == b"x"


def test_calls_that_wait_when_their_model_goes(world: World) -> None:
    """Those that run are answered; those that wait hear at once that it is gone."""
    calls = start_calls(world, "leaving", CALLS_MAX)
    running = [world.limited_runtime.next_held() for _ in range(SLOTS)]
    world.limited.unregister("leaving")
    eventually(lambda: sum(call.done() for call in calls) == CALLS_MAX - SLOTS)
    assert {call.code() for call in calls if call.done()} == {Code.NOT_FOUND}
    for one in running:
        one.release()
    codes = [call.code() for call in calls]
    assert codes.count(Code.OK) == SLOTS
    assert codes.count(Code.NOT_FOUND) == CALLS_MAX - SLOTS
    assert world.limited_runtime.unloaded.get(timeout=WAIT_S) == "leaving"


def set_vmodel(world: World, vmodel_id: str, target_id: str) -> None:
    """Have the vmodel stand for this model from now on."""
    stub: Any = world.limited.channel.unary_unary("/mmesh.ModelMesh/setVModel")
    request = mmesh.SetVModelRequest(
        v_model_id=vmodel_id, target_model_id=target_id, force=True, sync=True
    )
    stub(bytes(request), timeout=WAIT_S)


def test_calls_that_wait_go_where_their_vmodel_goes(world: World) -> None:
    """Those that run end where they are; nobody else comes to the old model."""

    def next_model() -> tuple[Held, str]:
        held = world.limited_runtime.next_held()
        return held, dict(held.context.invocation_metadata())["mm-model-id"]

    calls = start_calls(world, "before", CALLS_MAX, "moving")
    running = [next_model() for _ in range(SLOTS)]
    assert [model_id for _, model_id in running] == ["before"] * SLOTS
    world.limited.register("after", load_now=True, sync=True)
    set_vmodel(world, "moving", "after")
    for _ in range(CALLS_MAX - SLOTS):
        one, model_id = next_model()
        assert model_id == "after"
        one.release()
    for one, _ in running:
        one.release()
    assert [call.result() for call in calls] == [b"x"] * CALLS_MAX

"""How instances end and come back: signals with clients connected, crashes, one id twice.

Nothing here is about one version of Python: it holds on whichever runs the tests.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import grpc
import pytest

from mm.pb.grpc.health.v1 import HealthCheckRequest, HealthCheckResponse
from tests.system.etcd import Keys
from tests.system.grpcio_runtime import GrpcioRuntime, grpcio_runtime
from tests.system.meshes import Instance, Mesh, channel_to, mesh_of, record_of
from tests.system.processes import START_TIMEOUT_S

pytestmark = pytest.mark.system

Code = grpc.StatusCode
SIZE = "SIZE_1000000_10_0"
ID = (("mm-model-id", "m"),)
#: Ample for what should happen at once, short of every limit that might end it otherwise.
SOON_S = 20.0
#: Longer than any test: whoever waits for the end of a crashed instance's lease does not pass.
LEASE_S = 600


class Stoppable:
    """One instance with the model ``m`` in a runtime that holds calls, and clients of it."""

    def __init__(self, stack: ExitStack, mesh: Mesh, **settings: str) -> None:
        path = mesh.socket_path("stopped")
        self.runtime: GrpcioRuntime = stack.enter_context(grpcio_runtime(f"unix:{path}"))
        own = {"INTERNAL_GRPC_SOCKET_PATH": path, **settings}
        self.mesh = mesh
        self.instance: Instance = mesh.add_beside("stopped", None, own)
        self.instance.register("m", load_now=True, sync=True)
        # A second client that is connected and asks nothing.
        self.idle = stack.enter_context(channel_to(self.instance.port))
        grpc.channel_ready_future(self.idle).result(timeout=SOON_S)

    def start_call(self) -> Any:
        stub: Any = self.instance.channel.unary_unary("/test.Runtime/hold")
        return stub.future(b"held", metadata=ID, timeout=60)

    def turned_away(self) -> grpc.StatusCode:
        """Call until it is refused: calls that come before the listener closes are answered."""
        stub: Any = self.instance.channel.unary_unary("/test.Runtime/echo")
        deadline_s = time.monotonic() + SOON_S
        while time.monotonic() < deadline_s:
            try:
                assert stub(b"x", metadata=ID, timeout=SOON_S) == b"x"
            except grpc.RpcError as error:
                return error.code()  # type: ignore[attr-defined,no-any-return]
        raise AssertionError(f"still answering {SOON_S:g} s after the signal")

    def signal(self, number: signal.Signals) -> None:
        seen = len(self.instance.serve.lines)
        self.instance.serve.process.send_signal(number)
        self.instance.serve.wait_line("stopping", after=seen)


@pytest.fixture
def new_stoppable(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[Callable[..., Stoppable]]:
    with ExitStack() as stack:
        settings = {"MM_DATAPLANE": dataplane}
        mesh = stack.enter_context(mesh_of(kv_store, settings, new_service_name()))
        yield partial(Stoppable, stack, mesh)


def assert_gone(stoppable: Stoppable, keys: Keys) -> None:
    """Nothing in the store speaks of the instance any longer."""
    mesh = stoppable.mesh
    assert keys.table(mesh.prefix("instances")) == {}
    assert "instanceIds" not in record_of(keys.table(mesh.prefix("registry")), "m")


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_while_clients_stay_connected(
    new_stoppable: Callable[..., Stoppable], keys: Keys, number: signal.Signals
) -> None:
    """The clients do not close: the instance does, as soon as there is nothing left to do."""
    stoppable = new_stoppable()
    stub: Any = stoppable.instance.channel.unary_unary("/test.Runtime/echo")
    assert stub(b"x", metadata=ID, timeout=SOON_S) == b"x"
    stoppable.instance.serve.process.send_signal(number)
    assert stoppable.instance.serve.wait_end(SOON_S) == 0
    assert "Traceback" not in stoppable.instance.serve.output()
    assert_gone(stoppable, keys)


def test_stop_lets_calls_in_flight_end(new_stoppable: Callable[..., Stoppable], keys: Keys) -> None:
    """They get their answers; new ones are turned away; then the process ends by itself."""
    stoppable = new_stoppable()
    calls = [stoppable.start_call() for _ in range(10)]
    held = [stoppable.runtime.next_held() for _ in calls]
    stoppable.signal(signal.SIGTERM)
    keys.wait(stoppable.mesh.prefix("registry"), lambda r: "instanceIds" not in record_of(r, "m"))
    assert stoppable.turned_away() == Code.UNAVAILABLE
    assert not any(call.done() for call in calls)
    for one in held:
        one.release()
    assert [call.result(timeout=SOON_S) for call in calls] == [b"held"] * 10
    assert stoppable.instance.serve.wait_end(SOON_S) == 0
    assert "Traceback" not in stoppable.instance.serve.output()
    assert_gone(stoppable, keys)


def test_stop_does_not_wait_for_ever(new_stoppable: Callable[..., Stoppable], keys: Keys) -> None:
    """A call and a stream that do not end are ended when the grace is over: UNAVAILABLE."""
    stoppable = new_stoppable(SHUTDOWN_TIMEOUT_MS="7000")
    call = stoppable.start_call()
    open_stream: Any = stoppable.instance.channel.stream_stream("/test.Runtime/holdStream")
    stream = open_stream(iter([b"first"]), metadata=ID, timeout=60)
    assert next(stream) == b"first"
    held = [stoppable.runtime.next_held() for _ in range(2)]
    started_s = time.monotonic()
    stoppable.signal(signal.SIGTERM)
    assert stoppable.instance.serve.wait_end(7 + SOON_S) == 0
    # Not twice the grace, once for each of the two.
    assert stoppable.instance.serve.ended_s - started_s < 7 + 6
    assert call.code() == stream.code() == Code.UNAVAILABLE
    for one in held:
        assert one.ended.wait(SOON_S)
    assert "Traceback" not in stoppable.instance.serve.output()
    assert_gone(stoppable, keys)


def test_second_signal_stops_at_once(new_stoppable: Callable[..., Stoppable]) -> None:
    stoppable = new_stoppable()
    call = stoppable.start_call()
    stoppable.runtime.next_held()
    stoppable.signal(signal.SIGINT)
    assert not call.done()
    stoppable.signal(signal.SIGINT)
    assert stoppable.instance.serve.wait_end(SOON_S) == 0
    assert call.code() in (Code.UNAVAILABLE, Code.CANCELLED)
    assert "Traceback" not in stoppable.instance.serve.output()


def test_health_tells_of_a_stop(new_stoppable: Callable[..., Stoppable]) -> None:
    """Whoever watches hears it before the last calls have ended."""
    stoppable = new_stoppable()
    watch: Any = stoppable.idle.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=bytes,
        response_deserializer=HealthCheckResponse.parse,
    )
    answers = watch(HealthCheckRequest(), timeout=60)
    assert next(answers).status.name == "SERVING"
    call = stoppable.start_call()
    held = stoppable.runtime.next_held()
    stoppable.signal(signal.SIGTERM)
    assert next(answers).status.name == "NOT_SERVING"
    held.release()
    assert call.result(timeout=SOON_S) == b"held"
    assert stoppable.instance.serve.wait_end(SOON_S) == 0


def test_stop_of_one_of_two(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str], keys: Keys
) -> None:
    """The other serves what the first one had, through its own port, during and after the stop."""
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all("leaves", "stays")
        ids = [f"m{number}" for number in range(6)]
        for model_id in ids:
            mesh[0].register(model_id, SIZE, load_now=True, sync=True)
        leaves, stays = mesh.instances
        leaves.serve.terminate()
        for model_id in ids:
            assert stays.predict(model_id).results[0].confidence == 1.0
        assert leaves.serve.wait_end(SOON_S) == 0
        for model_id in ids:
            assert stays.predict(model_id).results[0].confidence == 1.0
        assert list(keys.table(mesh.prefix("instances"))) == ["stays"]
        registry = keys.table(mesh.prefix("registry"))
        for model_id in ids:
            assert list(record_of(registry, model_id)["instanceIds"]) == ["stays"]


# --- one id, two processes ----------------------------------------------------------------------


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        yield mesh


def test_id_that_is_taken(mesh: Mesh, keys: Keys) -> None:
    """The second process says so and ends; the first does not notice."""
    first = mesh.add("same")
    first.register("m", SIZE, load_now=True, sync=True)
    record = record_of(keys.table(mesh.prefix("instances")), "same")
    with grpcio_runtime(f"unix:{mesh.socket_path('second')}") as runtime:
        own = {"INTERNAL_GRPC_SOCKET_PATH": runtime.address.removeprefix("unix:")}
        second = mesh.start_serve("same", own)
        assert second.wait_end(START_TIMEOUT_S) == 1
    assert second.complaint == (
        f"mm: instance id same is taken by the process at 127.0.0.1:{first.peer_port}:"
        " give this one another MM_INSTANCE_ID, or stop that one"
    )
    now = record_of(keys.table(mesh.prefix("instances")), "same")
    assert (now["startTime"], now["addr"]) == (record["startTime"], record["addr"])
    assert "same" in record_of(keys.table(mesh.prefix("registry")), "m")["instanceIds"]
    assert first.predict("m").results[0].confidence == 1.0


def test_takeover_after_a_crash(mesh: Mesh, keys: Keys) -> None:
    """SIGKILL, and again with the same id at once, while the old record still has its lease.

    Before it serves no copy is registered that its predecessor had.
    """
    mesh.limits = {"lease_ttl_s": LEASE_S}
    mesh.add_all("crashes", "watches")
    crashes, watches = mesh.instances
    ids = [f"m{number}" for number in range(8)]
    for model_id in ids:
        crashes.register(model_id, SIZE, load_now=True, sync=True)
    prefix = mesh.prefix("registry")
    held = [i for i in ids if "crashes" in record_of(keys.table(prefix), i)["instanceIds"]]
    assert held
    old_lease = keys.lease_of(mesh.prefix("instances") + "crashes")
    crashes.serve.kill()

    again = mesh.add_beside("crashes", crashes.runtime, own_settings(mesh))
    registry = keys.table(prefix)
    assert again.serve.wait_line("instance id crashes is taken over")
    assert again.serve.wait_line(f"{len(held)} copies of an earlier process")
    assert not any("crashes" in record_of(registry, i).get("instanceIds", {}) for i in held)
    new_lease = keys.lease_of(mesh.prefix("instances") + "crashes")
    assert new_lease not in (0, old_lease)
    for instance in (again, watches):
        for model_id in ids:
            assert instance.predict(model_id).results[0].confidence == 1.0
    # When the old lease runs out the new record does not go with it.
    keys.revoke(old_lease)
    assert keys.lease_of(mesh.prefix("instances") + "crashes") == new_lease


def own_settings(mesh: Mesh) -> dict[str, str]:
    return {"INTERNAL_GRPC_SOCKET_PATH": mesh.socket_path("crashes")}

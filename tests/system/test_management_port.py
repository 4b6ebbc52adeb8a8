"""Management at a port of its own (MM_MANAGEMENT_PORT), on each data plane."""

from __future__ import annotations

import resource
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import grpc
import pytest
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    proto_reflection_descriptor_database as reflection,
)

from mm.cli.errors import MISUSED
from mm.pb.grpc.health.v1 import HealthCheckRequest, HealthCheckResponse
from mm.pb.mmesh import GetStatusRequest
from tests.system.forge import forge
from tests.system.meshes import Instance, channel_to, mesh_of, refusal
from tests.system.processes import Program

pytestmark = pytest.mark.system

TIMEOUT_S = 60.0
MANAGEMENT = ("registerModel", "unregisterModel", "getModelStatus", "ensureLoaded", "setVModel")
OWN = ("setModelPolicy", "listModels", "watchModels", "watchVModels")


@pytest.fixture(scope="module")
def apart(dataplane: str) -> Iterator[tuple[Instance, grpc.Channel]]:
    """An instance, and a channel to where it is managed."""
    settings = {"MM_DATAPLANE": dataplane, "MM_MANAGEMENT_PORT": "0"}
    with mesh_of("memory", settings, "apart") as mesh:
        found = mesh.add("apart")
        line = found.serve.wait_line(r"ready: .*, management on port (\d+)", timeout_s=TIMEOUT_S)
        with channel_to(int(line.group(1))) as channel:
            yield found, channel


def call(channel: grpc.Channel, path: str, request: bytes = b"", model_id: str = "") -> bytes:
    metadata = (("mm-model-id", model_id),) if model_id else ()
    answer = channel.unary_unary(path)(request, metadata=metadata, timeout=TIMEOUT_S)
    assert isinstance(answer, bytes)
    return answer


def refused(ask: Callable[[], object]) -> str:
    """Answer why a method is not served."""
    code, text = refusal(ask)
    assert code == grpc.StatusCode.UNIMPLEMENTED
    return text


def test_models_are_managed_there_and_called_here(apart: tuple[Instance, grpc.Channel]) -> None:
    instance, management = apart
    with_management = Instance("", None, instance.serve, 0, instance.peer_port, management)
    with_management.register("m", "SIZE_1000_0_0", load_now=True, sync=True)
    assert "hello" in instance.predict("m").results[0].category


def test_management_is_not_served_where_inferences_are(
    apart: tuple[Instance, grpc.Channel],
) -> None:
    instance, _ = apart
    legacy = "com.ibm.watson.tas.proto.TasRuntime"
    names = [f"mmesh.ModelMesh/{name}" for name in (*MANAGEMENT, *OWN)]
    names += [f"{legacy}/{name}" for name in (*MANAGEMENT, "addModel", "deleteModel")]
    for name in names:
        for model_id in ("", "m"):
            text = refused(partial(call, instance.channel, f"/{name}", model_id=model_id))
            assert text == (
                f"{name} is not served at this port (MM_SVC_GRPC_PORT): management has its own,"
                " that of MM_MANAGEMENT_PORT"
            )


def test_inferences_are_not_served_where_management_is(
    apart: tuple[Instance, grpc.Channel],
) -> None:
    _, management = apart
    for name in ("mmesh.ExamplePredictor/predict", "grpc.health.v1.Health/Check"):
        text = refused(partial(call, management, f"/{name}", model_id="m"))
        assert text == (
            f"{name} is not served at this port (MM_MANAGEMENT_PORT): inferences have their own,"
            " that of MM_SVC_GRPC_PORT"
        )


def test_health_is_told_at_both(apart: tuple[Instance, grpc.Channel]) -> None:
    instance, management = apart
    for channel in (instance.channel, management):
        request = bytes(HealthCheckRequest(service="mmesh.ModelMesh"))
        answer = HealthCheckResponse.parse(call(channel, "/grpc.health.v1.Health/Check", request))
        assert answer.status.name == "SERVING"


def test_each_port_lists_what_it_serves(apart: tuple[Instance, grpc.Channel]) -> None:
    instance, management = apart
    ours = {"mmesh.ModelMesh", "inference.GRPCInferenceService"}
    here = set(reflection.ProtoReflectionDescriptorDatabase(instance.channel).get_services())
    there = set(reflection.ProtoReflectionDescriptorDatabase(management).get_services())
    assert here & ours == {"inference.GRPCInferenceService"}
    assert there & ours == {"mmesh.ModelMesh"}


def test_nobody_is_taken_for_an_instance_there(apart: tuple[Instance, grpc.Channel]) -> None:
    """A peer that asks for a status is told of the copy here alone, and nothing is looked for."""
    _, management = apart
    stub = management.unary_unary("/mmesh.ModelMesh/getModelStatus")
    request = bytes(GetStatusRequest(model_id="m"))
    asked = (("mm-hop-kind", "load-local"), ("mm-hop-left", "0"), ("mm-hop-version", "1"))
    answer, heard = stub.with_call(request, metadata=asked, timeout=TIMEOUT_S)
    assert answer == stub(request, timeout=TIMEOUT_S)
    told = (*heard.initial_metadata(), *heard.trailing_metadata())
    assert [name for name, _ in told if name.startswith("mm-")] == []
    assert refused(partial(call, management, "/mm.peer.Peer/statistics")).startswith("mm.peer.Peer")


def test_commands_say_where_to_ask(apart: tuple[Instance, grpc.Channel]) -> None:
    instance, _ = apart
    program = Program.forked(
        "mm model", "mm", "model", "list", "--address", f"127.0.0.1:{instance.port}"
    )
    try:
        assert program.wait_end(TIMEOUT_S) == MISUSED
        assert program.complaint.endswith("that of MM_MANAGEMENT_PORT; --address takes it")
    finally:
        program.close()


#: A client's preface, its settings and a ping, whose answer says that it has been taken.
HELLO = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    + bytes((0, 0, 8, 6, 0, 0, 0, 0, 0))
    + b"anybody?"
)


@contextmanager
def few_files(count: int) -> Iterator[None]:
    """Processes that start here may open so many."""
    pid = forge()._process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def crowd(stack: ExitStack, port: int, count: int) -> int:
    """Connect so often, from two addresses; answers how many were taken."""
    clients = []
    for number in range(count):
        own = (f"127.0.0.{2 + number % 2}", 0)
        client = socket.create_connection(("127.0.0.1", port), TIMEOUT_S, own)
        clients.append(stack.enter_context(closing(client)))
        client.sendall(HELLO)
    return sum(map(is_taken, clients))


def is_taken(client: socket.socket) -> bool:
    heard = b""
    try:
        while b"anybody?" not in heard:
            data = client.recv(4096)
            if not data:
                return False
            heard += data
    except ConnectionResetError:
        return False
    return True


def test_both_ports_full_leave_files_for_everybody_else(dataplane: str) -> None:
    """Of 512 files three quarters are clients', and of these 25 at the port for management."""
    settings = {"MM_DATAPLANE": dataplane, "MM_MANAGEMENT_PORT": "0", "MM_PROBE_PORT": "0"}
    with mesh_of("memory", settings, "full") as mesh, ExitStack() as stack:
        with few_files(512):
            instance = mesh.add("full")
        serve = instance.serve
        management = serve.wait_line(r"ready: .*, management on port (\d+)", timeout_s=TIMEOUT_S)
        assert 300 < crowd(stack, instance.port, 400) <= 359
        assert 10 < crowd(stack, int(management.group(1)), 200) <= 25
        assert instance.statistics().instances == 1
        live = serve.wait_line(r"/live.* (\d+)$", timeout_s=TIMEOUT_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{live.group(1)}/live", timeout=60) as answer:
            assert answer.status == 200

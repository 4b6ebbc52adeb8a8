"""What the mesh itself answers on the external port, to clients that know it by reflection only.

grpcio-reflection's client resolves the services; health checking and the server methods of the
Open Inference Protocol are the mesh's own as long as a call names no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    proto_reflection_descriptor_database as reflection,
)
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)

import mm
from tests.system.conftest import Pair
from tests.system.meshes import channel_to, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

HEALTH = "grpc.health.v1.Health"
OIP = "inference.GRPCInferenceService"
TIMEOUT_S = 60.0
Metadata = tuple[tuple[str, str], ...]


class ReflectedClient:
    """Calls methods with nothing but what reflection tells of them."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.database = reflection.ProtoReflectionDescriptorDatabase(channel)
        self.pool: Any = DescriptorPool(self.database)

    def call(self, service: str, method: str, metadata: Metadata = (), /, **fields: Any) -> Any:
        found = self.pool.FindServiceByName(service).FindMethodByName(method)
        request = GetMessageClass(found.input_type)(**fields)
        kind = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        stub: Any = kind(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        return stub(request, metadata=metadata, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[ReflectedClient]:
    with channel_to(pair.other.port) as channel:
        yield ReflectedClient(channel)


def test_callers_hear_that_a_copy_is_free_again(pair: Pair) -> None:
    held = pair.holder.predict_later("echo", "test:delay:ms=60000")
    pair.holder.wait_in_flight(1)
    pair.other.predict("echo")
    before = pair.holder.statistics().loads_pushed
    held.cancel()
    eventually(
        lambda: pair.holder.statistics().loads_pushed > before, what="the caller hears of it"
    )


def test_services(client: ReflectedClient) -> None:
    services = set(client.database.get_services())
    assert services >= {"mmesh.ModelMesh", OIP, HEALTH}
    # What manages runtimes and peers is nobody's business out here.
    assert services & {"mmesh.ModelRuntime", "mm.peer.Peer"} == set()


@pytest.mark.parametrize("method", ["statistics", "no_such"])
def test_what_peers_tell_each_other_is_for_them_alone(pair: Pair, method: str) -> None:
    """Sent on as a call for a model at another instance, it would be served there."""
    stub: Any = pair.other.channel.unary_unary(f"/mm.peer.Peer/{method}")
    code, text = refusal(partial(stub, b"", metadata=(("mm-model-id", "echo"),), timeout=TIMEOUT_S))
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert text == f"Method not found or not permitted: mm.peer.Peer/{method}"


def test_management_by_reflection(client: ReflectedClient) -> None:
    service = "mmesh.ModelMesh"
    info = {"type": "example", "path": "SIZE_1000000_0_0"}
    reply = client.call(
        service, "registerModel", modelId="reflected", modelInfo=info, loadNow=True, sync=True
    )
    status = type(reply).DESCRIPTOR.fields_by_name["status"].enum_type.values_by_name
    assert reply.status == status["LOADED"].number
    assert client.call(service, "getModelStatus", modelId="reflected").status == reply.status
    client.call(service, "unregisterModel", modelId="reflected")
    gone = client.call(service, "getModelStatus", modelId="reflected")
    assert gone.status == status["NOT_FOUND"].number


def test_inference_protocol_without_a_model(client: ReflectedClient) -> None:
    assert client.call(OIP, "ServerLive").live
    assert client.call(OIP, "ServerReady").ready
    metadata = client.call(OIP, "ServerMetadata")
    assert (metadata.name, metadata.version) == ("mm", mm.__version__)


def test_inference_protocol_with_a_model(client: ReflectedClient) -> None:
    """With an id it is a call for the runtime, which knows no such service here."""
    header = (("mm-model-id", "echo"),)
    code, text = refusal(partial(client.call, OIP, "ServerLive", header))
    assert (code, text) == (grpc.StatusCode.UNIMPLEMENTED, f"unknown method /{OIP}/ServerLive")
    # The methods for one model are the model's alone.
    code, text = refusal(partial(client.call, OIP, "ModelReady", name="echo"))
    assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, "must include mm-model-id header")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_for_tools_that_send_the_headers_of_a_call_along(
    pair: Pair, version: str
) -> None:
    ask: Any = pair.other.channel.stream_unary(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=ServerReflectionResponse.FromString,
    )
    request = ServerReflectionRequest(file_containing_symbol=OIP)
    answer = ask(iter([request]), metadata=(("mm-model-id", "echo"),), timeout=TIMEOUT_S)
    assert answer.HasField("file_descriptor_response")


@pytest.mark.parametrize("service", ["", "mmesh.ModelMesh", OIP])
def test_health(client: ReflectedClient, service: str) -> None:
    serving = client.call(HEALTH, "Check", service=service)
    assert serving.status == type(serving).SERVING
    watch = client.call(HEALTH, "Watch", service=service)
    assert next(watch).status == serving.status
    watch.cancel()


def test_health_of_what_is_not_here(client: ReflectedClient) -> None:
    code, _ = refusal(partial(client.call, HEALTH, "Check", service="no.Such"))
    assert code == grpc.StatusCode.NOT_FOUND
    watch = client.call(HEALTH, "Watch", service="no.Such")
    answer = next(watch)
    assert answer.status == type(answer).SERVICE_UNKNOWN
    watch.cancel()


def test_unknown_symbol(client: ReflectedClient) -> None:
    with pytest.raises(KeyError, match=r"no\.Such"):
        client.pool.FindServiceByName("no.Such")

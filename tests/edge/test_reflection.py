"""Reflection and health as foreign tools use them: resolve a service by reflection, call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from h2.events import ResponseReceived

from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer, IncomingCall
from mm.edge.h2.messages import frame_message
from mm.edge.health import Health, add_health
from mm.edge.reflection import LISTED, add_reflection
from mm.edge.unary import ServiceTable
from mm.errors import MeshError, StatusCode
from mm.mesh.statistics import Counters
from mm.pb import mmesh
from mm.testing.cluster import until
from tests.edge.raw_h2 import REQUEST, RawPeer, connect

pytestmark = pytest.mark.anyio
METHOD = "/grpc.reflection.{}.ServerReflection/ServerReflectionInfo"


@asynccontextmanager
async def _serve() -> AsyncIterator[tuple[str, Health]]:
    async def fallback(call: IncomingCall) -> None:
        raise MeshError("for the model", code=StatusCode.ABORTED)

    async def get_status(
        request: mmesh.GetStatusRequest, _call: IncomingCall
    ) -> mmesh.ModelStatusInfo:
        return mmesh.ModelStatusInfo(errors=[request.model_id])

    table = ServiceTable(fallback)
    table.add_unary("/mmesh.ModelMesh/getModelStatus", mmesh.GetStatusRequest, get_status)
    health = add_health(table, Counters())
    add_reflection(table)
    server = GrpcServer(table, limits=EXTERNAL_LIMITS, external=True)
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}", health
    finally:
        await server.stop(0)


async def _ask(
    client: grpc.aio.Channel,
    version: str,
    *requests: reflection_pb2.ServerReflectionRequest,
    metadata: tuple[tuple[str, str], ...] = (),
) -> list[reflection_pb2.ServerReflectionResponse]:
    call = client.stream_stream(
        METHOD.format(version),
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )(iter(requests), metadata=metadata)
    return [response async for response in call]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_services_are_listed_and_unknown_ones_are_not_found(version: str) -> None:
    async with _serve() as (address, _), grpc.aio.insecure_channel(address) as client:
        listed, missing, extension = await _ask(
            client,
            version,
            reflection_pb2.ServerReflectionRequest(list_services="*"),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.Such"),
            reflection_pb2.ServerReflectionRequest(all_extension_numbers_of_type="no.Such"),
        )
        assert [service.name for service in listed.list_services_response.service] == list(LISTED)
        assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        assert missing.original_request.file_containing_symbol == "no.Such"
        assert extension.HasField("error_response")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_headers_of_a_call_for_a_model_may_come_along(version: str) -> None:
    async with _serve() as (address, _), grpc.aio.insecure_channel(address) as client:
        request = reflection_pb2.ServerReflectionRequest(list_services="*")
        (listed,) = await _ask(client, version, request, metadata=(("mm-model-id", "m"),))
        assert [service.name for service in listed.list_services_response.service] == list(LISTED)


@pytest.mark.parametrize(
    ("service", "method", "asked", "answered"),
    [
        ("mmesh.ModelMesh", "getModelStatus", {"modelId": "m"}, {"errors": ["m"]}),
        ("inference.GRPCInferenceService", "ServerReady", {}, {"ready": True}),
        ("inference.GRPCInferenceService", "ServerLive", {}, {"live": True}),
        ("inference.GRPCInferenceService", "ServerMetadata", {}, {"name": "mm"}),
    ],
)
async def test_resolve_and_call(
    service: str, method: str, asked: dict[str, str], answered: dict[str, object]
) -> None:
    async with _serve() as (address, _), grpc.aio.insecure_channel(address) as client:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
        (response,) = await _ask(client, "v1", request)
        pool = descriptor_pool.DescriptorPool()
        for encoded in reversed(response.file_descriptor_response.file_descriptor_proto):
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(encoded))
        found = pool.FindServiceByName(service).FindMethodByName(method)
        make_request = message_factory.GetMessageClass(found.input_type)
        make_reply = message_factory.GetMessageClass(found.output_type)
        call = client.unary_unary(
            f"/{service}/{method}",
            request_serializer=make_request.SerializeToString,
            response_deserializer=make_reply.FromString,
        )
        reply = await call(make_request(**asked))
        for name, value in answered.items():
            assert getattr(reply, name) == value
        # With an id the call is a model's, except where the service is the mesh's alone.
        if service != "mmesh.ModelMesh":
            with pytest.raises(grpc.aio.AioRpcError, match="for the model"):
                await call(make_request(**asked), metadata=(("mm-model-id", "m"),))


async def test_files_by_name_and_nested_symbols() -> None:
    async with _serve() as (address, _), grpc.aio.insecure_channel(address) as client:
        for request in (
            reflection_pb2.ServerReflectionRequest(file_by_filename="model-mesh.proto"),
            reflection_pb2.ServerReflectionRequest(
                file_containing_symbol="mmesh.ModelStatusInfo.ModelCopyInfo.location"
            ),
            reflection_pb2.ServerReflectionRequest(
                file_containing_symbol="mmesh.ModelMesh.setVModel"
            ),
        ):
            (response,) = await _ask(client, "v1", request)
            encoded = response.file_descriptor_response.file_descriptor_proto[0]
            file = descriptor_pb2.FileDescriptorProto.FromString(encoded)
            assert file.name == "model-mesh.proto"


async def test_health_check_and_watch() -> None:
    async with _serve() as (address, health), grpc.aio.insecure_channel(address) as client:
        check = client.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"") == b"\x08\x01"  # SERVING
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await check(b"\x0a\x01x")
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND

        watch = client.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        assert await watch.read() == b"\x08\x01"
        health.set_serving(False)
        assert await watch.read() == b"\x08\x02"  # NOT_SERVING
        assert await check(b"") == b"\x08\x02"
        unknown = client.unary_stream("/grpc.health.v1.Health/Watch")(b"\x0a\x01x")
        assert await unknown.read() == b"\x08\x03"  # SERVICE_UNKNOWN
        unknown.cancel()
        watch.cancel()
        # grpc tells of a cancelled call later: one more call and its answer make it the
        # affair of this test, not of the next one, whose event loop is another.
        assert await check(b"") == b"\x08\x02"


def _watch_health(client: RawPeer, *, ends: bool = True) -> int:
    path = b"/grpc.health.v1.Health/Watch"
    stream_id = client.begin([(n, path if n == b":path" else v) for n, v in REQUEST])
    client.send(stream_id, frame_message(b""), end=ends)
    return stream_id


async def test_watches_of_health_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a connection and in all, also of those whose request never ends; places come back."""
    monkeypatch.setattr("mm.edge.health.WATCHES_MAX", 6)
    counters = Counters()
    table = ServiceTable()
    add_health(table, counters)
    server = GrpcServer(table, limits=EXTERNAL_LIMITS, external=True)
    port = await server.start("127.0.0.1", 0)
    try:
        async with connect(port) as one, connect(port) as two:
            for number in range(4):
                _watch_health(one, ends=bool(number))
            told, _ = await one.wait_answer(_watch_health(one))
            assert told[b"grpc-status"] == b"8"
            assert told[b"grpc-message"] == b"this connection watches health 4 times, the limit"
            for _ in range(2):
                stream_id = _watch_health(two)
                await two.wait_on(ResponseReceived, stream_id)
            told, _ = await two.wait_answer(_watch_health(two))
            assert told[b"grpc-status"] == b"8"
            assert b"6 times at this instance, the limit" in told[b"grpc-message"]
            assert (counters.health_watches_begun, counters.health_watches_refused) == (6, 2)
        await until(lambda: counters.health_watches_ended == 6)
        async with connect(port) as three:
            await three.wait_on(ResponseReceived, _watch_health(three))
    finally:
        await server.stop(0)


async def test_a_watch_does_not_hold_up_a_stop() -> None:
    table = ServiceTable()
    add_health(table, Counters())
    server = GrpcServer(table, limits=EXTERNAL_LIMITS, external=True)
    port = await server.start("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as client:
        watch = client.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        assert await watch.read() == b"\x08\x01"
        await asyncio.wait_for(server.stop(60), 60)
        assert await watch.code() == grpc.StatusCode.UNAVAILABLE

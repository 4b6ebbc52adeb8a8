"""Methods of the mesh's own, called by grpcio and by our own client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from mm.edge.h2 import (
    EXTERNAL_LIMITS,
    RUNTIME_LIMITS,
    Channel,
    GrpcServer,
    IncomingCall,
    UnreachableError,
)
from mm.edge.unary import CallError, ServiceTable, call_raw, call_unary
from mm.errors import MeshError, NoRoomError, StatusCode
from mm.pb.grpc.health.v1 import HealthCheckRequest
from mm.pb.mmesh import PredictResponse

pytestmark = pytest.mark.anyio
ECHO = "/t.S/Echo"
Method = Callable[[HealthCheckRequest, IncomingCall], Awaitable[HealthCheckRequest]]


async def _echo(request: HealthCheckRequest, _call: IncomingCall) -> HealthCheckRequest:
    return request


@asynccontextmanager
async def _serve(method: Method = _echo) -> AsyncIterator[str]:
    table = ServiceTable()
    table.add_unary(ECHO, HealthCheckRequest, method)
    server = GrpcServer(table, limits=EXTERNAL_LIMITS, external=True)
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def _channel(address: str) -> AsyncIterator[Channel]:
    channel = Channel(address, RUNTIME_LIMITS)
    try:
        yield channel
    finally:
        await channel.close()


async def _call(channel: Channel, text: str, timeout_s: float = 60.0) -> str:
    request = HealthCheckRequest(service=text)
    reply = await call_unary(channel, ECHO, request, HealthCheckRequest, timeout_s=timeout_s)
    return reply.service


async def test_message_in_message_out() -> None:
    async with _serve() as address, _channel(address) as channel:
        assert await _call(channel, "x" * 100_000) == "x" * 100_000
        assert await asyncio.gather(*(_call(channel, str(n)) for n in range(150))) == [
            str(n) for n in range(150)
        ]


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_request_of_a_foreign_client(compression: grpc.Compression) -> None:
    async with _serve() as address:
        async with grpc.aio.insecure_channel(address, compression=compression) as client:
            message = bytes(HealthCheckRequest(service="y" * 50_000))
            assert await client.unary_unary(ECHO)(message) == message


async def test_errors_become_statuses_with_their_texts() -> None:
    async def fail(_request: HealthCheckRequest, _call: IncomingCall) -> HealthCheckRequest:
        raise NoRoomError("voll … später", retry_after_ms=250)

    async with _serve(fail) as address, _channel(address) as channel:
        with pytest.raises(CallError) as caught:
            await _call(channel, "")
        assert caught.value.code == StatusCode.UNAVAILABLE
        assert caught.value.message == "voll … später"
        assert (b"grpc-retry-pushback-ms", b"250") in caught.value.trailers


async def test_a_bug_is_internal_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_request: HealthCheckRequest, _call: IncomingCall) -> HealthCheckRequest:
        raise KeyError("secret")

    async with _serve(fail) as address, _channel(address) as channel:
        with pytest.raises(CallError) as caught:
            await _call(channel, "")
        assert (caught.value.code, caught.value.message) == (StatusCode.INTERNAL, "internal error")
        assert "KeyError" in caplog.text
        # The connection lives on.
        with pytest.raises(CallError):
            await _call(channel, "")
        assert len(channel.links) == 1


async def test_what_is_no_message_and_what_is_not_one() -> None:
    async with _serve() as address, _channel(address) as channel:
        with pytest.raises(CallError, match="not a valid HealthCheckRequest") as caught:
            await call_raw(channel, ECHO, b"\x0a\xff", timeout_s=60)
        assert caught.value.code == StatusCode.INVALID_ARGUMENT
        with pytest.raises(CallError, match="Method not found") as caught:
            await call_raw(channel, "/t.S/Other", b"", timeout_s=60)
        assert caught.value.code == StatusCode.UNIMPLEMENTED
        async with grpc.aio.insecure_channel(address) as client:
            for parts, code in (
                ([], grpc.StatusCode.INVALID_ARGUMENT),
                ([b"", b""], grpc.StatusCode.UNIMPLEMENTED),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await client.stream_unary(ECHO)(iter(parts))
                assert failed.value.code() == code


async def test_an_answer_that_is_no_message_is_not_called_a_request() -> None:
    async with _serve() as address, _channel(address) as channel:
        request = HealthCheckRequest("\x0f")  # no message, where the wanted one has one
        with pytest.raises(CallError, match="the answer is not a valid PredictResponse") as caught:
            await call_unary(channel, ECHO, request, PredictResponse, timeout_s=60)
        assert caught.value.code == StatusCode.INTERNAL


async def test_timeout_cancels_the_handler() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(_request: HealthCheckRequest, _call: IncomingCall) -> HealthCheckRequest:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    async with _serve(hang) as address, _channel(address) as channel:
        # On a busy machine a call may be over before its handler has begun.
        for timeout_s in (0.05, 2, 30):
            with pytest.raises(CallError, match=rf"took longer than {timeout_s} s") as caught:
                await _call(channel, "", timeout_s=timeout_s)
            assert caught.value.code == StatusCode.DEADLINE_EXCEEDED
            if begun.is_set():
                break
        assert begun.is_set()
        await asyncio.wait_for(cancelled.wait(), 60)


async def test_nobody_there() -> None:
    async with _channel("127.0.0.1:1") as channel:
        with pytest.raises(UnreachableError, match=r"cannot connect to 127\.0\.0\.1:1"):
            await _call(channel, "")
    async with _channel("unix:/nowhere/at.all") as channel:
        with pytest.raises(UnreachableError, match="cannot connect"):
            await _call(channel, "")


async def test_a_method_that_yields_to_ids() -> None:
    async def to_model(call: IncomingCall) -> None:
        raise MeshError("for the model", code=StatusCode.ABORTED)

    table = ServiceTable(to_model)
    table.add_unary(ECHO, HealthCheckRequest, _echo, yields_to_ids=True)
    server = GrpcServer(table, limits=EXTERNAL_LIMITS, external=True)
    port = await server.start("127.0.0.1", 0)
    async with _channel(f"127.0.0.1:{port}") as channel:
        assert await call_raw(channel, ECHO, b"", timeout_s=60) == b""
        for name in (b"mm-model-id", b"mm-vmodel-id-bin", b"tas-model-id"):
            with pytest.raises(CallError, match="for the model"):
                await call_raw(channel, ECHO, b"", timeout_s=60, metadata=((name, b"bQ"),))
    await server.stop(0)

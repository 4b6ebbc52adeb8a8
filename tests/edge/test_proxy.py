"""The proxy with foreign clients and runtimes: kinds of call, and sizes."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from h2.events import ResponseReceived

from mm.core.calls import Outcome
from mm.edge.h2 import EXTERNAL_LIMITS, RUNTIME_LIMITS, Channel
from mm.edge.h2.messages import frame_message
from mm.edge.unary import call_raw
from tests.edge.raw_h2 import REQUEST, connect
from tests.edge.upstream import PATIENCE_S, serve_proxy

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)
Metadata = tuple[tuple[str, str | bytes], ...]


async def _fail(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_all_four_kinds_of_call() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        assert await client.unary_unary("/t.S/Unary")(b"one", metadata=ID) == b"echo:one"
        up = client.stream_unary("/t.S/Up")(iter([b"a", b"", b"c"]), metadata=ID)
        assert await up == b"a||c"
        down = client.unary_stream("/t.S/Down")(b"3", metadata=ID)
        assert [part async for part in down] == [b"0", b"1", b"2"]

        # Each answer is awaited before the next question: nothing may wait for END_STREAM.
        both = client.stream_stream("/t.S/Both")(metadata=ID)
        for number in range(3):
            await both.write(b"%d" % number)
            assert await both.read() == b"re:%d" % number
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        assert await both.code() == grpc.StatusCode.OK
        assert stand.router.outcomes == [Outcome.ANSWERED] * 4


async def test_streams_without_any_message() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        assert await client.stream_unary("/t.S/Up")(iter(()), metadata=ID) == b""
        down = client.unary_stream("/t.S/Down")(b"0", metadata=ID)
        assert [part async for part in down] == []
        both = client.stream_stream("/t.S/Both")(iter(()), metadata=ID)
        assert [part async for part in both] == []
        assert stand.router.outcomes == [Outcome.ANSWERED] * 3


async def test_initial_metadata_comes_before_the_first_message() -> None:
    async def script(request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("x-early", "1"),))
        await go_on.wait()
        return b"late"

    go_on = asyncio.Event()
    async with serve_proxy() as stand, connect(stand.port) as peer:
        stand.runtime.scripts["Early"] = script
        path = (b":path", b"/t.S/Early")
        stream_id = peer.begin(
            [
                path if name == b":path" else (name, value)
                for name, value in (*REQUEST, (b"mm-model-id", b"m"))
            ]
        )
        peer.send(stream_id, frame_message(b""), end=True)
        early = await peer.wait_on(ResponseReceived, stream_id)
        assert (b"x-early", b"1") in early.headers
        go_on.set()
        assert (await peer.wait_answer(stream_id))[1] == frame_message(b"late")


async def test_many_calls_on_one_connection() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        method = client.unary_unary("/t.S/Unary")
        replies = await asyncio.gather(
            *(method(b"%d" % number, metadata=ID) for number in range(200))
        )
        assert replies == [b"echo:%d" % number for number in range(200)]
        assert len(stand.server.links) == 1
        assert len(stand.channel.links) == 1


async def test_more_calls_at_once_than_one_runtime_connection_takes() -> None:
    """grpclib's own limit of 100 streams would stall these for ever."""
    async with serve_proxy() as stand, stand.client() as client:
        method = client.unary_unary("/t.S/Hang")
        calls = [method(b"", metadata=ID) for _ in range(150)]
        while len(stand.runtime.metadata) < 150:
            stand.runtime.started.clear()
            await asyncio.wait_for(stand.runtime.started.wait(), PATIENCE_S)
        for call in calls:
            call.cancel()
        await stand.router.wait_finished(150)
        assert set(stand.router.outcomes) == {Outcome.ABANDONED}


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_pass_as_they_are(compression: grpc.Compression) -> None:
    async with serve_proxy() as stand, stand.client(compression=compression) as client:
        body = b"x" * 100_000
        reply = await client.unary_unary("/t.S/Unary")(body, metadata=ID)
        assert reply == b"echo:" + body
        # The runtime saw the compressed stream: its own library undid it.
        assert stand.runtime.requests == [body]


# --- sizes -----------------------------------------------------------------------------------


async def test_large_messages_with_a_slow_reader_hold_a_window_and_no_more() -> None:
    window = EXTERNAL_LIMITS.stream_window_bytes
    async with serve_proxy(message_bytes_max=64 * 2**20) as stand, stand.client() as client:
        body = bytes(5 * 2**20)
        assert len(await client.unary_unary("/t.S/Unary")(body, metadata=ID)) == len(body) + 5

        # Nobody reads the answers: they must pile up in the runtime, not here.
        both = client.stream_stream("/t.S/Both")(metadata=ID)
        written = 0
        try:
            while written < 200:
                await asyncio.wait_for(both.write(bytes(2**20)), 0.5)
                written += 1
        except TimeoutError:
            pass
        assert written < 200
        held = 0
        for link in (*stand.server.links, *stand.channel.links):
            for stream in link.streams.values():
                held += sum(len(data) for data, _ in stream._queue or ())
                assert stream.unacknowledged <= window
        assert held <= 2 * window
        both.cancel()
        await stand.router.wait_finished(2)


async def test_a_request_above_the_limit_is_refused_before_it_is_kept() -> None:
    async with serve_proxy(message_bytes_max=1000) as stand, stand.client() as client:
        method = client.unary_unary("/t.S/Unary")
        assert await method(bytes(1000 - 5), metadata=ID)
        error = await _fail(method(bytes(1001), metadata=ID))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == (
            "request message of 1001 bytes exceeds the limit of 1000 bytes "
            "(MM_SVC_GRPC_MAX_MSG_SIZE)"
        )
        # In mid-stream, too; and the connection lives on.
        both = client.stream_stream("/t.S/Both")(iter([b"ok", bytes(1001)]), metadata=ID)
        error = await _fail(_drain(both))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await method(b"x", metadata=ID) == b"echo:x"
        assert len(stand.server.links) == 1


async def _drain(call: Any) -> list[bytes]:
    return [part async for part in call]


async def test_an_answer_above_the_limit_is_refused() -> None:
    limits = replace(RUNTIME_LIMITS, message_bytes_max=1000)
    async with (
        serve_proxy(message_bytes_max=1000, runtime_limits=limits) as stand,
        stand.client() as client,
    ):

        async def script(request: bytes, context: Any) -> bytes:
            return bytes(1001)

        stand.runtime.scripts["Big"] = script
        error = await _fail(client.unary_unary("/t.S/Big")(b"", metadata=ID))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "response message of 1001 bytes exceeds the limit of 1000" in error.details()


async def test_headers_above_the_limit() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        method = client.unary_unary("/t.S/Unary")
        error = await _fail(method(b"", metadata=(*ID, ("x", "v" * 9000))))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await method(b"x", metadata=ID) == b"echo:x"
        assert len(stand.server.links) == 1


async def test_unix_socket_of_a_runtime(tmp_path: Any) -> None:
    from tests.edge.upstream import serve_runtime

    path = f"{tmp_path}/grpc.sock"
    async with serve_runtime(path), serve_proxy(runtime_address=f"unix:{path}") as stand:
        async with stand.client() as client:
            assert await client.unary_unary("/t.S/Unary")(b"u", metadata=ID) == b"echo:u"


async def test_finished_calls_need_no_garbage_collector() -> None:
    """Collecting is slow where many records are in memory, and everything waits for it."""
    async with serve_proxy() as stand:
        channel = Channel(stand.address, RUNTIME_LIMITS)

        async def call() -> None:
            metadata = ((b"mm-model-id", b"m"),)
            await call_raw(channel, "/t.S/Unary", b"q", timeout_s=60, metadata=metadata)

        await call()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(5):
                await call()
            await stand.router.wait_finished(6)
            gc.collect()
            left = [type(each) for each in gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        await channel.close()
        assert [kind.__name__ for kind in left if kind.__module__.startswith("mm.")] == []

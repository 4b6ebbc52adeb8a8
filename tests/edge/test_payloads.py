"""Observed calls through the proxy to a real HTTP server: what is shown of them, and to whom."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import grpc
import grpc.aio
import pytest

from mm.edge.payload_sinks import Observers
from mm.mesh.statistics import Counters
from mm.payload_settings import PayloadSettings, PayloadSink
from tests.edge.http_sink import Sink, http_sink
from tests.edge.upstream import PATIENCE_S, Stand, make_config, serve_proxy

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)


@pytest.fixture
def sink() -> Any:
    with http_sink() as sink:
        yield sink


def _to(sink: Sink, **filters: Any) -> PayloadSink:
    return PayloadSink("http", f"http://127.0.0.1:{sink.port}/", **filters)


@asynccontextmanager
async def _observed(
    stand: Stand, *sinks: PayloadSink, settings: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[Counters]:
    counters = Counters()
    payloads = PayloadSettings(sinks=sinks, **({"threads": 1} | (settings or {})))
    observers = Observers(make_config(payloads=payloads, **limits), counters, 1)
    async with observers.running():
        stand.proxy.observers = observers
        yield counters
    assert observers.held_bytes == 0 or counters.payloads_dropped


async def _next(sink: Sink) -> dict[str, Any]:
    return (await anyio.to_thread.run_sync(sink.next)).body


def _data(body: dict[str, Any]) -> bytes:
    return base64.b64decode(body["data"])


async def _fail(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_a_request_and_its_answer(sink: Sink, compression: Any) -> None:
    async with serve_proxy() as stand, stand.client(compression=compression) as client:
        async with _observed(stand, _to(sink)) as counters:
            metadata = (*ID, ("a", "1"), ("b-bin", b"\x00\xff"))
            await client.unary_unary("/t.S/Unary")(b"123" * 100, metadata=metadata)
            request, response = await _next(sink), await _next(sink)
        assert counters.payloads_delivered == 2
    assert (request["kind"], response["kind"]) == ("request", "response")
    assert request["id"] == response["id"]
    assert _data(request) == b"123" * 100
    assert _data(response) == b"echo:" + b"123" * 100
    assert (request["status"], response["status"]) == ("", "OK")
    assert request["modelid"] == "m"
    assert request["metadata"]["a"] == "1"
    assert request["metadata"]["b-bin"] == "AP8="
    assert request["metadata"]["mm-model-id"] == "m"
    assert not any(name.startswith((":", "mm-wire-")) for name in request["metadata"])


async def test_the_vmodel_and_the_model_behind_it(sink: Sink) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.vmodels = {"v": "m"}
        async with _observed(stand, _to(sink, model_id="m")):
            await client.unary_unary("/t.S/Unary")(b"1", metadata=(("mm-vmodel-id", "v"),))
            request = await _next(sink)
    assert (request["modelid"], request["vModelId"]) == ("m", "v")


async def test_failures_are_answers_without_data(sink: Sink) -> None:
    async def script(_request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.ABORTED, "so")
        return b""

    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["Bad"] = script
        stand.router.unknown = {"unknown"}
        async with _observed(stand, _to(sink)):
            for method, model_id in (("Bad", "m"), ("Unary", "unknown")):
                metadata = (("mm-model-id", model_id),)
                await _fail(client.unary_unary(f"/t.S/{method}")(b"1", metadata=metadata))
            found = [await _next(sink) for _ in range(4)]
    answers = [body for body in found if body["kind"] == "response"]
    assert [body["status"] for body in answers] == ["ABORTED", "NOT_FOUND"]
    assert [body["data"] for body in answers] == ["", ""]
    assert answers[0]["id"] != answers[1]["id"]


async def test_each_message_of_a_stream_is_shown_and_the_last_has_the_status(sink: Sink) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        async with _observed(stand, _to(sink)):
            down = client.unary_stream("/t.S/Down")(b"3", metadata=ID)
            assert len([part async for part in down]) == 3
            found = [await _next(sink) for _ in range(4)]
    assert [body["kind"] for body in found] == ["request", *["response"] * 3]
    assert [body["status"] for body in found] == ["", "", "", "OK"]
    assert len({body["id"] for body in found}) == 1


async def test_calls_of_several_models_are_shown_one_by_one(sink: Sink) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        async with _observed(stand, _to(sink, model_id="b")):
            metadata = tuple(("mm-model-id", each) for each in "abc")
            await client.unary_unary("/t.S/Unary")(b"1", metadata=metadata)
            request, response = await _next(sink), await _next(sink)
    assert (request["modelid"], response["modelid"]) == ("b", "b")
    assert (_data(request), _data(response)) == (b"1", b"echo:1")
    assert sink.posts.empty()


async def test_a_client_that_leaves(sink: Sink) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        async with _observed(stand, _to(sink)):
            call = client.unary_unary("/t.S/Hang")(b"1", metadata=ID)
            request = await _next(sink)
            call.cancel()
            response = await _next(sink)
    assert (request["kind"], response["status"]) == ("request", "CANCELLED")


async def test_what_nobody_wants_is_not_read(sink: Sink) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        async with _observed(stand, _to(sink, model_id="other"), _to(sink, method="Other")) as each:
            await client.unary_unary("/t.S/Unary")(b"1", metadata=ID)
        assert each == Counters()
    assert sink.posts.empty()


async def test_the_logger_tells_neither_messages_nor_headers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        with caplog.at_level(logging.INFO):
            async with _observed(stand, PayloadSink("logger")):
                metadata = (*ID, ("authorization", "hunter2"))
                await client.unary_unary("/t.S/Unary")(b"secret", metadata=metadata)
    lines = [each.message for each in caplog.records if each.message.startswith("payload ")]
    assert [line.partition(": ")[2] for line in lines] == [
        "model m, vmodel none, method t.S/Unary, request",
        "model m, vmodel none, method t.S/Unary, status OK",
    ]
    assert "hunter2" not in caplog.text
    assert "secret" not in caplog.text


async def test_a_slow_observer_delays_no_call_and_no_other_observer(
    sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    with http_sink() as slow:
        slow.may_answer.clear()
        async with serve_proxy() as stand, stand.client() as client:
            settings = {"queue_length_max": 3}
            async with _observed(stand, _to(slow), _to(sink), settings=settings) as counters:
                for number in range(10):
                    async with asyncio.timeout(PATIENCE_S):
                        await client.unary_unary("/t.S/Unary")(b"%d" % number, metadata=ID)
                    for _ in range(2):
                        await _next(sink)
                # Of 20, one is on its way and three wait.
                assert counters.payloads_dropped == 16
                slow.may_answer.set()
            assert counters.payloads_delivered == 20 + 4
    assert "1 payloads for http://127.0.0.1" in caplog.text
    assert caplog.text.count("were dropped") == 1


async def test_large_payloads_have_a_bound_of_their_own(sink: Sink) -> None:
    sink.may_answer.clear()
    async with serve_proxy() as stand, stand.client() as client:
        async with _observed(stand, _to(sink), payload_bytes_max=1000) as counters:
            for _ in range(3):
                await client.unary_unary("/t.S/Unary")(b"x" * 400, metadata=ID)
            assert counters.payloads_dropped == 4
            sink.may_answer.set()
        assert counters.payloads_delivered == 2


async def test_an_observer_that_is_not_there_is_told_once_and_hurts_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nowhere = PayloadSink("http", "http://127.0.0.1:1/?hunter2", "u:hunter2")
    async with serve_proxy() as stand, stand.client() as client:
        async with _observed(stand, nowhere) as counters:
            for _ in range(3):
                await client.unary_unary("/t.S/Unary")(b"", metadata=ID)
        assert counters.payloads_failed == 6
    warnings = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert warnings == ["payloads do not reach http://127.0.0.1:1/: Connection refused"]
    assert "hunter2" not in caplog.text

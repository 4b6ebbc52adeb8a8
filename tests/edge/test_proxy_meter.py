"""Which calls the proxy measures, under which code, and what their messages weigh."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from mm.core.call_meter import CallKey, CallMeter, CallSeries, add_up
from mm.edge.h2.messages import frame_message
from mm.errors import StatusCode
from tests.edge.raw_h2 import REQUEST, connect
from tests.edge.upstream import PATIENCE_S, Stand, serve_proxy

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)


def measured(stand: Stand, **settings: int) -> CallMeter:
    meter = stand.proxy.meter = CallMeter(**{"methods_max": 10, **settings})
    return meter


def counts(meter: CallMeter, series: CallSeries) -> dict[tuple[str, str], int]:
    return {
        (key.method, StatusCode(key.code).name): each.count
        for key, each in add_up([meter])[series].items()
    }


async def _fail(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_calls_that_are_answered_and_the_sizes_of_their_messages() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        meter = measured(stand)
        for _ in range(3):
            await client.unary_unary("/t.S/Unary")(b"12345", metadata=ID)
        down = client.unary_stream("/t.S/Down")(b"3", metadata=ID)
        assert len([part async for part in down]) == 3
        await stand.router.wait_finished(4)
        unary, streamed = CallKey("/t.S/Unary", 0), CallKey("/t.S/Down", 0)
        sums = add_up([meter])
        for series in CallSeries:
            assert sums[series][unary].count == 3, series
        assert sums[CallSeries.REQUEST_BYTES][unary].total == 3 * 5
        assert sums[CallSeries.RESPONSE_BYTES][unary].total == 3 * len("echo:12345")
        assert sums[CallSeries.RESPONSE_BYTES][streamed].total == 3
        taken_ms = sums[CallSeries.ANSWERED_MS][unary].total
        assert 0 < sums[CallSeries.INVOKED_MS][unary].total <= taken_ms


async def test_errors_of_the_runtime_are_counted_on_both_sides() -> None:
    async def script(_request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.ABORTED, "so")
        return b""

    async with serve_proxy() as stand, stand.client() as client:
        meter = measured(stand)
        stand.runtime.scripts["Bad"] = script
        await _fail(client.unary_unary("/t.S/Bad")(b"", metadata=ID))
        expected = {("/t.S/Bad", "ABORTED"): 1}
        assert counts(meter, CallSeries.INVOKED_MS) == expected
        assert counts(meter, CallSeries.ANSWERED_MS) == expected
        assert counts(meter, CallSeries.RESPONSE_BYTES) == {}


async def test_what_is_refused_before_its_model_is_known_is_no_inference() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        meter = measured(stand)
        await _fail(client.unary_unary("/t.S/Unary")(b""))
        await _fail(client.unary_unary("/mmesh.ModelRuntime/loadModel")(b"", metadata=ID))
        assert counts(meter, CallSeries.ANSWERED_MS) == {}


async def test_what_the_mesh_refuses_was_never_at_the_runtime() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        meter = measured(stand)
        await _fail(client.unary_unary("/t.S/Unary")(b"", metadata=(("mm-vmodel-id", "v"),)))
        assert counts(meter, CallSeries.ANSWERED_MS) == {("/t.S/Unary", "NOT_FOUND"): 1}
        assert counts(meter, CallSeries.INVOKED_MS) == {}


async def test_calls_that_end_early() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        meter = measured(stand)
        call = client.unary_unary("/t.S/Hang")(b"", metadata=ID)
        await asyncio.wait_for(stand.runtime.started.wait(), PATIENCE_S)
        call.cancel()
        await stand.router.wait_finished(1)
        # By hand: clients of grpc give up at the same moment as we do, or before.
        async with connect(stand.port) as peer:
            own = [(b":path", b"/t.S/Hang"), (b"mm-model-id", b"m"), (b"grpc-timeout", b"50m")]
            given = [header for header in REQUEST if header[0] not in dict(own)]
            stream_id = peer.begin([own[0], *given, *own[1:]])
            peer.send(stream_id, frame_message(b""), end=True)
            await stand.router.wait_finished(2)
        expected = {("/t.S/Hang", "CANCELLED"): 1, ("/t.S/Hang", "DEADLINE_EXCEEDED"): 1}
        assert counts(meter, CallSeries.INVOKED_MS) == expected
        assert counts(meter, CallSeries.ANSWERED_MS) == expected


async def test_a_peer_s_call_is_measured_where_the_runtime_is() -> None:
    hop = (*ID, ("mm-hop-kind", "hit-only"))
    async with serve_proxy(external=False) as stand, stand.client() as client:
        meter = measured(stand)
        await client.unary_unary("/t.S/Unary")(b"1", metadata=hop)
        await stand.router.wait_finished(1)
        assert counts(meter, CallSeries.INVOKED_MS) == {("/t.S/Unary", "OK"): 1}
        assert counts(meter, CallSeries.ANSWERED_MS) == {}


async def test_several_models_are_one_call_and_several_invocations() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        meter = measured(stand, models_max=10)
        ids = (("mm-model-id", "m"), ("mm-model-id", "n"))
        await client.unary_unary("/t.S/Unary")(b"12", metadata=ids)
        sums = add_up([meter])
        invoked = sums[CallSeries.INVOKED_MS]
        assert {key.model_id: each.count for key, each in invoked.items()} == {"m": 1, "n": 1}
        (key,) = sums[CallSeries.ANSWERED_MS]
        assert (key.model_id, key.code) == ("", 0)
        assert sums[CallSeries.REQUEST_BYTES][key].total == 2
        assert sums[CallSeries.RESPONSE_BYTES][key].total == 2 * len("echo:12")


async def test_a_vmodel_and_its_model_are_named() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        meter = measured(stand, models_max=10)
        stand.router.vmodels["v"] = "m"
        await client.unary_unary("/t.S/Unary")(b"", metadata=(("mm-vmodel-id", "v"),))
        await stand.router.wait_finished(1)
        sums = add_up([meter])
        assert list(sums[CallSeries.INVOKED_MS]) == [CallKey("/t.S/Unary", 0, "m", "v")]
        assert list(sums[CallSeries.ANSWERED_MS]) == [CallKey("/t.S/Unary", 0, "m", "v")]


async def test_a_runtime_that_is_away_counts_as_unavailable() -> None:
    async with serve_proxy(runtime_address="127.0.0.1:1") as stand, stand.client() as client:
        meter = measured(stand)
        error = await _fail(client.unary_unary("/t.S/Unary")(b"", metadata=ID))
        name = error.code().name
        assert counts(meter, CallSeries.INVOKED_MS) == {("/t.S/Unary", "UNAVAILABLE"): 1}
        assert counts(meter, CallSeries.ANSWERED_MS) == {("/t.S/Unary", name): 1}

"""What the wire measures of the calls that it serves, in the series that both tiers add up to."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from mm.core.call_meter import OTHER_METHODS, CallKey, CallSeries, add_up
from mm.core.histograms import Histogram
from mm.edge.wire_calls import WireCalls
from mm.wire import Role
from tests.edge.raw_h2 import PATIENCE_S, connect
from tests.wire.frames import begin, request
from tests.wire.stand import WireStand, serve_wire, until

pytestmark = pytest.mark.anyio
M = (("mm-model-id", "m"),)


def measured(stand: WireStand) -> dict[CallSeries, dict[CallKey, Histogram]]:
    return add_up([WireCalls(stand.wire.calls)])


def counts(found: dict[CallKey, Histogram]) -> dict[tuple[str, int], int]:
    return {(key.method, key.code): each.count for key, each in found.items()}


async def test_calls_are_measured_by_method_and_status() -> None:
    async with serve_wire(threads=2) as stand:
        for _ in range(4):
            async with stand.client() as client:
                call = client.unary_unary("/t.S/Unary")
                await call(b"123", metadata=M)
                await call(b"x" * 512, metadata=M)
                # Tier 2 refuses it: it is counted there, if at all.
                with pytest.raises(grpc.aio.AioRpcError):
                    await call(b"", metadata=())
        async with connect(stand.port) as client:
            hanging = begin(client, request(b"/t.S/Hang"))
            await asyncio.wait_for(stand.runtime.started.wait(), PATIENCE_S)
            client.reset(hanging)
            await stand.settle(calls_open=0, hits_open=0)
        found = measured(stand)
    of_all = {("/t.S/Unary", 0): 8, ("/t.S/Hang", 1): 1}
    assert counts(found[CallSeries.ANSWERED_MS]) == of_all
    assert counts(found[CallSeries.INVOKED_MS]) == of_all
    assert counts(found[CallSeries.REQUEST_BYTES]) == of_all
    assert counts(found[CallSeries.RESPONSE_BYTES]) == {("/t.S/Unary", 0): 8}
    requests = found[CallSeries.REQUEST_BYTES][CallKey("/t.S/Unary", 0)]
    # What equals a bound belongs below it.
    assert requests.counts[:3] == [4, 4, 0]
    assert requests.sums[:3] == [4 * 3, 4 * 512, 0]
    responses = found[CallSeries.RESPONSE_BYTES][CallKey("/t.S/Unary", 0)]
    assert responses.total == 4 * (len(b"echo:123") + len(b"echo:") + 512)
    times = found[CallSeries.ANSWERED_MS][CallKey("/t.S/Unary", 0)]
    assert 0 < times.total < 1000 * PATIENCE_S * 8
    pairs = list(zip(times.bounds, times.counts, times.sums, strict=False))
    assert sum(count for _, count, _ in pairs) == 8, "none takes five minutes"
    for number, (bound, count, total) in enumerate(pairs):
        assert count * (times.bounds[number - 1] if number else 0) <= total <= count * bound


async def _unavailable(_request: bytes, context: Any) -> bytes:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "not today")
    return b""


async def test_an_attempt_that_failed_is_measured_though_tier_2_answers() -> None:
    async with serve_wire() as stand:
        stand.runtime.scripts["Fail"] = _unavailable
        stand.router.tries_again = [False]
        async with stand.client() as client:
            with pytest.raises(grpc.aio.AioRpcError):
                await client.unary_unary("/t.S/Fail")(b"", metadata=M)
        await stand.settle(replayed=1, calls_open=0)
        found = measured(stand)
    assert counts(found[CallSeries.INVOKED_MS]) == {("/t.S/Fail", 14): 1}
    assert not found[CallSeries.ANSWERED_MS]


async def test_calls_of_peers_are_measured_where_they_are_served() -> None:
    hop = [(b"mm-hop-version", b"1"), (b"mm-hop-kind", b"hit-only"), (b"mm-hop-left", b"1")]
    async with serve_wire(role=Role.PEER) as stand, connect(stand.port) as client:
        begin(client, [*request(b"/t.S/Unary"), *hop])
        await until(lambda: stand.counts.calls == 1 and not stand.counts.calls_open)
        found = measured(stand)
    assert counts(found[CallSeries.INVOKED_MS]).keys() == {("/t.S/Unary", 0)}
    assert not found[CallSeries.ANSWERED_MS]


async def test_methods_that_there_is_no_place_for_are_counted_together() -> None:
    async with serve_wire() as stand, connect(stand.port) as client:
        for number in range(300):
            client.begin(request(b"/t.S/M%d" % number), end=True)
        client.begin(request(b"/t.S/" + b"x" * 1200), end=True)
        await until(lambda: stand.counts.calls == 301 and not stand.counts.calls_open)
        found = measured(stand)[CallSeries.ANSWERED_MS]
    others = sum(each.count for key, each in found.items() if key.method == OTHER_METHODS)
    assert len({key.method for key in found}) == 257
    assert others == 301 - 256
    assert sum(each.count for each in found.values()) == 301


async def test_models_are_told_apart_where_that_is_wanted() -> None:
    async with serve_wire(models_max=3) as stand:
        for model_id in ("a", "b", "c", "d"):
            stand.put(model_id)
        stand.table.set_alias("v", "a")
        async with stand.client() as client:
            call = client.unary_unary("/t.S/Unary")
            for metadata in (
                ("mm-vmodel-id", "v"),
                ("mm-model-id", "a"),
                ("mm-model-id", "b"),
                ("mm-vmodel-id", "v"),  # not used the longest: the model's own row
                ("mm-model-id", "c"),
                ("mm-model-id", "c"),
                ("mm-model-id", "d"),  # and then that of the model after it
            ):
                await call(b"", metadata=(metadata,))
        await stand.settle(calls_open=0, hits_open=0)
        found = measured(stand)[CallSeries.ANSWERED_MS]
    method = "/t.S/Unary"
    assert {key: each.count for key, each in found.items()} == {
        CallKey(method, 0, "a", "v"): 2,
        CallKey(method, 0, "c"): 2,
        CallKey(method, 0, "d"): 1,
    }


async def test_more_peers_than_are_kept_in_mind_hear_by_replies_alone() -> None:
    kept = 1024  # REPORTS_MAX
    async with serve_wire(role=Role.PEER) as stand, connect(stand.port) as client:
        stand.wire.take_reports()
        hop = ((b"mm-hop-version", b"1"), (b"mm-hop-kind", b"hit-only"), (b"mm-hop-left", b"1"))
        for at in range(0, kept + 10, 94):
            senders = (b"peer-%d" % number for number in range(at, min(at + 94, kept + 10)))
            calls = [
                begin(client, [*request(), *hop, (b"mm-hop-from", sender)]) for sender in senders
            ]
            for call in calls:
                await client.wait_answer(call)
        await stand.settle(calls=kept + 10, calls_open=0)
        # Each call is news twice: when it begins, and with its reply.
        assert stand.counts.reports_dropped == 2 * 10
        told = stand.wire.take_reports()
        assert {each.sender for each in told} == {f"peer-{number}" for number in range(kept)}
        assert all(each.told is not None for each in told)
        begin(client, [*request(), *hop, (b"mm-hop-from", b"late")])
        await stand.settle(calls=kept + 11, calls_open=0)
        assert [each.sender for each in stand.wire.take_reports()] == ["late"]
        assert stand.counts.reports_dropped == 2 * 10

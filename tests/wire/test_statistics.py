"""What the wire counts of calls, by method: statuses, durations, bytes."""

from __future__ import annotations

import grpc
import pytest

from mm.wire import BUCKET_BOUNDS_S, Role
from tests.edge.raw_h2 import PATIENCE_S, connect
from tests.wire.frames import begin, request
from tests.wire.stand import serve_wire, until

pytestmark = pytest.mark.anyio
UNARY = (Role.EXTERNAL, "/t.S/Unary")


async def test_calls_are_counted_by_method_status_and_duration() -> None:
    async with serve_wire(threads=2) as stand:
        for _ in range(4):
            async with stand.client() as client:
                call = client.unary_unary("/t.S/Unary")
                await call(b"123", metadata=(("mm-model-id", "m"),))
                # Whoever serves it: without an id tier 2 refuses.
                with pytest.raises(grpc.aio.AioRpcError):
                    await call(b"", metadata=())
        async with connect(stand.port) as client:
            hanging = begin(client, request(b"/t.S/Hang"))
            await stand.settle(hits_open=1)
            client.h2.reset_stream(hanging)
            client.flush()
            await stand.settle(calls_open=0)
            found = stand.wire.methods()
        unary, hang = found[UNARY], found[Role.EXTERNAL, "/t.S/Hang"]
        assert {code: n for code, n in enumerate(unary.codes) if n} == {0: 4, 3: 4}
        assert {code: n for code, n in enumerate(hang.codes) if n} == {1: 1}
        assert unary.request_bytes == 4 * (5 + 3) + 4 * 5
        assert unary.response_bytes == 4 * (5 + len(b"echo:123"))
        assert sum(unary.durations) == 8
        assert len(unary.durations) == len(BUCKET_BOUNDS_S)
        # What the buckets say is what the sum says, within a bucket's width.
        highest_s = sum(map(_times, BUCKET_BOUNDS_S, unary.durations))
        assert unary.duration_us / 1e6 <= highest_s <= PATIENCE_S * 8


def _times(bound_s: float, count: int) -> float:
    return bound_s * count if count else 0.0


async def test_methods_that_there_is_no_place_for_are_counted_together() -> None:
    async with serve_wire() as stand, connect(stand.port) as client:
        for number in range(300):
            client.begin(request(b"/t.S/M%d" % number), end=True)
        client.begin(request(b"/t.S/" + b"x" * 200), end=True)
        await until(lambda: stand.counts.calls == 301 and not stand.counts.calls_open)
        found = stand.wire.methods()
    assert len(found) == 256
    assert sum(found[Role.EXTERNAL, ""].codes) == 301 - (256 - len(Role))
    assert sum(sum(each.codes) for each in found.values()) == 301

"""Memory: clients that have requests waiting without end, and others that do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing

import pytest
from hpack import Decoder, Encoder

from mm.edge.h2.messages import frame_message
from mm.wire import Role
from tests.edge.raw_h2 import PATIENCE_S, RawPeer, listen
from tests.wire.frames import request
from tests.wire.hostile import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    End,
    Requests,
    attack,
    dial,
    frame,
    good_client,
)
from tests.wire.stand import WireStand, serve_wire, until

pytestmark = pytest.mark.anyio
MIB = 2**20
BUDGET = 4 * MIB
#: The last answer that was taken, and what a turn reads beyond it.
SLACK = MIB
BODY = frame_message(b"x" * 40_000)


def _body(stream_id: int, body: bytes = BODY, *, end: bool = True) -> bytes:
    pieces = [body[at : at + 16384] for at in range(0, len(body), 16384)]
    return b"".join(
        frame(
            DATA,
            piece,
            flags=END_STREAM if end and at == len(pieces) - 1 else 0,
            stream_id=stream_id,
        )
        for at, piece in enumerate(pieces)
    )


def _statuses(end: End) -> list[tuple[bytes, bytes]]:
    decoder, found = Decoder(), []
    for kind, _, block in end.frames():
        if kind == HEADERS:
            headers = dict(decoder.decode(block, raw=True))
            found.append((headers.get(b"grpc-status", b""), headers.get(b"grpc-message", b"")))
    return found


async def _until_refused(stand: WireStand, count: int) -> None:
    await until(lambda: stand.counts.buffers_full >= count)


async def _until_over(stand: WireStand, pieces: Iterator[bytes], refused: int) -> End:
    """Attack, watch the memory, and end the attack when so many calls were refused."""
    peak = 0
    with closing(dial(stand.port)) as caller:
        task = asyncio.create_task(asyncio.to_thread(attack, caller, pieces))
        async with asyncio.timeout(PATIENCE_S):
            while stand.counts.buffers_full < refused:
                peak = max(peak, stand.counts.buffer_bytes)
                await asyncio.wait((task,), timeout=0.005)
        caller.shutdown(1)
        end = await task
    # One alone has half of it.
    assert peak <= BUDGET // 2 + SLACK
    return end


@asynccontextmanager
async def stand_before_a_runtime_that_takes_nothing() -> AsyncIterator[WireStand]:
    """Another model, "n", is served elsewhere."""

    async def take_nothing(peer: RawPeer) -> None:
        peer.start(streams_max=10_000)
        while await peer.reader.read(2**16):
            pass

    async with listen(take_nothing) as (address, _), serve_wire(role=Role.PEER) as there:
        there.put("n")
        async with serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand:
            stand.configure(buffer_bytes_max=BUDGET, held_bytes_max=BUDGET // 4)
            stand.add_peer("n", there.port)
            yield stand


def _calls() -> Iterator[bytes]:
    requests = Requests()
    yield PREFACE
    for _ in range(400):
        yield requests.next()
        yield _body(requests.stream_id, end=False)


async def test_requests_that_wait_are_bounded() -> None:
    async with stand_before_a_runtime_that_takes_nothing() as stand:
        async with good_client(stand, model_id="n"):
            end = await _until_over(stand, _calls(), 200)
        statuses = _statuses(end)
        assert {status for status, _ in statuses} == {b"8"}
        assert all(b"MM_WIRE_BUFFER_BYTES_MAX" in text for _, text in statuses)
        await stand.settle(calls_open=0, buffer_bytes=0)


async def test_one_who_has_much_waiting_takes_nothing_from_others() -> None:
    """The second greedy client gets less than the first, and both leave something."""
    async with stand_before_a_runtime_that_takes_nothing() as stand:
        with closing(dial(stand.port)) as one, closing(dial(stand.port)) as two:
            tasks = []
            for number, caller in enumerate((one, two), 1):
                task = asyncio.create_task(asyncio.to_thread(attack, caller, _calls()))
                tasks.append(task)
                await _until_refused(stand, 100 * number)
            assert stand.counts.buffer_bytes <= BUDGET * 3 // 4 + SLACK
            async with good_client(stand, model_id="n", body=b"y" * 100_000):
                pass
            one.shutdown(1)
            two.shutdown(1)
            await asyncio.gather(*tasks)
        await stand.settle(calls_open=0, buffer_bytes=0)


async def test_headers_weigh_what_they_take_here() -> None:
    """On the way one that has been there before is a byte; in a list it has a place of 32."""
    count = 200
    async with serve_wire() as stand:
        with closing(dial(stand.port)) as caller:
            encoder = Encoder()
            few, again = (encoder.encode(each) for each in ([*request(), ("a", "")], [("a", "")]))
            assert len(again) == 1
            caller.sendall(PREFACE + frame(HEADERS, few, flags=END_HEADERS, stream_id=1))
            await stand.settle(calls_here=1)
            of_few = stand.counts.buffer_bytes
            many = few + again * count
            caller.sendall(frame(HEADERS, many, flags=END_HEADERS, stream_id=3))
            await stand.settle(calls_here=2)
            assert stand.counts.buffer_bytes > 2 * of_few + count * 32
        await stand.settle(calls_open=0, buffer_bytes=0)

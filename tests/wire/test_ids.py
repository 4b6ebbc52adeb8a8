"""Which model a call is for, from headers and messages, and the id that the runtime is given."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from h2.events import DataReceived, RequestReceived, StreamEnded

from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from mm.wire import Method, MethodFlag
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import answer, begin, request
from tests.wire.stand import WireStand, serve_wire, until

pytestmark = pytest.mark.anyio
NOTHING = MethodFlag(0)


async def injected(stand: WireStand, body: bytes, *more: tuple[bytes, bytes]) -> dict[bytes, bytes]:
    async with connect(stand.port) as client:
        headers, _ = await client.wait_answer(begin(client, request(b"/t.S/Unary", *more), body))
        return headers


async def test_the_id_is_put_into_each_message() -> None:
    async with serve_wire() as stand:
        methods = {b"/t.S/Unary": (3, 1), b"/t.S/Both": (1,)}
        stand.configure(
            methods={name: Method(injection_path=path) for name, path in methods.items()}
        )
        await injected(stand, b"\x08\x96\x01")
        assert stand.runtime.requests == [b"\x08\x96\x01\x1a\x03\x0a\x01m"]
        headers = await injected(stand, b"\x0a\x05abc")
        assert headers[b"grpc-status"] == b"3"
        async with stand.client() as client:
            both = client.stream_stream("/t.S/Both")(
                iter([b"", b"\x12\x01x"]), metadata=(("mm-model-id", "m"),)
            )
            assert [part async for part in both] == [b"re:\x0a\x01m", b"re:\x12\x01x\x0a\x01m"]
        await stand.settle(calls_here=3, calls_open=0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_ids_are_put_into_empty_messages_as_the_runtime_takes_them() -> None:
    """A window of them has room for 52,000, and each becomes as long as an id may be."""
    longest, count = "x" * 2400, 12_000
    message = frame_message(b"\x0a\xe0\x12" + longest.encode())

    async def serve(peer: RawPeer) -> None:
        peer.start()
        asked = await peer.wait_for(RequestReceived)
        assert asked.stream_id is not None
        asked_event.set()
        await go_on.wait()
        left = count * len(message)
        while left:
            piece = await peer.wait_on(DataReceived, asked.stream_id)
            left -= len(piece.data)
            # Wherever it begins, it goes on in the same way.
            at = (count * len(message) - left - len(piece.data)) % len(message)
            assert (
                piece.data
                == (message * (len(piece.data) // len(message) + 2))[at:][: len(piece.data)]
            )
            if piece.data:
                peer.h2.acknowledge_received_data(len(piece.data), asked.stream_id)
                peer.flush()
        await peer.wait_on(StreamEnded, asked.stream_id)
        answer(peer, asked.stream_id)
        await peer.wait_closed()

    asked_event, go_on = asyncio.Event(), asyncio.Event()
    async with listen(serve) as (address, _):
        port = int(address.rpartition(":")[2])
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            stand.put(longest)
            stand.configure(methods={b"/t.S/Up": Method(injection_path=(1,))})
            body = frame_message(b"") * count
            headers = [*request(b"/t.S/Up")[:-1], (b"mm-model-id", longest.encode())]
            stream_id = client.begin(headers)
            await asked_event.wait()
            before = resident_bytes()
            read = stand.counts.bytes_in_client
            for at in range(0, len(body), 15_000):
                client.send(stream_id, body[at : at + 15_000], end=at + 15_000 >= len(body))
            await until(lambda: stand.counts.bytes_in_client >= read + len(body))
            await stand.settle(calls_open=1)
            assert resident_bytes() - before < 8 * 2**20, "of 28 MB"
            go_on.set()
            assert (await client.wait_answer(stream_id))[0][b"grpc-status"] == b"0"


def set_extraction(stand: WireStand, *path: int, flags: MethodFlag = NOTHING) -> None:
    stand.configure(methods={b"/t.S/Unary": Method(flags, extraction_path=path)})


@pytest.mark.parametrize(
    ("message", "is_hit"),
    [
        (b"\x0a\x05\x12\x03\x0a\x01m", True),
        # The last one counts, and what stands there twice is merged.
        (b"\x0a\x05\x12\x03\x0a\x01x\x18\x01\x0a\x05\x12\x03\x0a\x01m", True),
        (b"\x0a\x0a\x12\x03\x0a\x01m\x12\x03\x08\x96\x01", False),
        (b"\x0a\x05\x12\x03\x0a\x01x", False),
        (b"\x12\x01x", False),
        (b"\x0a\x09\x12\x03\x0a\x01m", False),
        (b"\x08\x01", False),
    ],
)
async def test_an_id_in_the_message_is_found(message: bytes, is_hit: bool) -> None:
    async with serve_wire() as stand, connect(stand.port) as client:
        set_extraction(stand, 1, 2, 1)
        headers = [each for each in request() if each[0] != b"mm-model-id"]
        await client.wait_answer(begin(client, headers, message))
        assert (stand.counts.calls_here, stand.counts.spliced_model) == (is_hit, not is_hit)


async def test_a_message_that_names_the_model_may_come_late_and_in_pieces() -> None:
    async with serve_wire() as stand, connect(stand.port) as client:
        set_extraction(stand, 1, flags=MethodFlag.EXTRACTS_VMODEL)
        stand.table.set_alias("v", "m")
        stream_id = client.begin(request(b"/t.S/Unary"))
        await stand.settle(calls=1)
        for byte in frame_message(b"\x0a\x01v"):
            client.send(stream_id, bytes([byte]))
        client.send(stream_id, b"", end=True)
        headers, _ = await client.wait_answer(stream_id)
        assert headers[b"grpc-status"] == b"0"
        await stand.settle(calls_here=1, spliced_model=0, calls=1, calls_open=0)
        # Large and compressed ones are tier 2's, and one that never comes is the clock's.
        timeout = (b"grpc-timeout", b"200m")
        silent = client.begin(request(b"/t.S/Unary", timeout))
        headers, _ = await client.wait_answer(silent)
        assert headers[b"grpc-status"] == b"4"
        gone = client.begin(request(b"/t.S/Unary"))
        client.reset(gone)
        large = client.begin(request(b"/t.S/Unary"))
        client.send(large, b"\0" + (2**17 + 1).to_bytes(4, "big") + bytes(10_000))
        await stand.settle(spliced_model=1)


@pytest.mark.parametrize(
    ("headers", "is_hit"),
    [
        ([(b"mm-model-id-bin", b"bQ")], True),
        ([(b"mm-model-id-bin", b"bQ==")], True),
        ([(b"mm-model-id-bin", b"b!"), (b"mm-model-id", b"m")], True),
        ([(b"mm-vmodel-id-bin", b"dg")], True),
        ([(b"mm-model-id-bin", b"bQ"), (b"mm-vmodel-id", b"v")], False),
        ([(b"mm-model-id-bin", b"bQ,bQ")], False),
        ([(b"mm-model-id-bin", b"b")], False),
        ([(b"mm-model-id", b"m"), (b"mm-model-id", b"m")], False),
        ([(b"tas-model-id", b"m")], False),
        ([], False),
    ],
)
async def test_which_header_names_the_model(headers: HeaderList, is_hit: bool) -> None:
    async with serve_wire() as stand, connect(stand.port) as client:
        stand.table.set_alias("v", "m")
        plain = [each for each in request() if each[0] != b"mm-model-id"]
        await client.wait_answer(begin(client, [*plain, *headers]))
        assert (stand.counts.calls_here == 1) is is_hit


async def test_only_ids_that_come_again_are_entered_into_the_runtimes_table() -> None:
    """The ids of many models would push the headers out of it that every call has."""
    seen: list[tuple[bytes, bool]] = []

    async def serve(peer: RawPeer) -> None:
        peer.start()
        for _ in range(6):
            event = await peer.wait_for(RequestReceived)
            headers: dict[bytes, Any] = {header[0]: header for header in event.headers or ()}
            pair = [headers[name] for name in (b"mm-model-id", b"mm-model-id-bin")]
            assert pair[0].indexable == pair[1].indexable
            seen.append((pair[0][1], pair[0].indexable))
            assert event.stream_id is not None
            answer(peer, event.stream_id)
        await peer.wait_closed()

    async with listen(serve) as (address, _):
        port = int(address.rpartition(":")[2])
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            stand.put("other")
            for model_id in (b"m", b"m", b"m", b"other", b"other", b"m"):
                headers = [*request()[:-1], (b"mm-model-id", model_id)]
                await client.wait_answer(begin(client, headers))
    assert [indexed for each, indexed in seen if each == b"m"][:3] == [False, True, True]
    assert [indexed for each, indexed in seen if each == b"other"] == [False, True]

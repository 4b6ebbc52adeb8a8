"""Metadata, trailers and statuses pass untouched in both directions, also the odd ones."""

from __future__ import annotations

import base64
from typing import Any

import grpc
import grpc.aio
import pytest
from h2.events import RequestReceived, ResponseReceived, StreamEnded, TrailersReceived

from mm.core.headers import Header, HeaderList
from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import REQUEST, RawPeer, connect, listen
from tests.edge.upstream import serve_proxy
from tests.wire.planes import PLANES, serve_plane

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)

#: All that HTTP/2 allows and grpclib's metadata does not survive.
ODD: HeaderList = [
    (b"x-empty", b""),
    (b"x-twice", b"1"),
    (b"x-other", b"between"),
    (b"x-twice", b"2"),
    (b"x-latin", b"caf\xe9"),
    (b"x-utf8", "naïve ☃".encode()),
    (b"x-spaces", b" padded "),
    (b"x-comma", b"a, b,,c"),
    (b"x-bin", base64.b64encode(b"\0\xff")),
    (b"x-bin", b"**not base64**"),
    (b"x-unpadded-bin", b"YQ"),
    (b"authorization", b"Bearer abc.def"),
    (b"x!#$%&'*+.^_`|~", b"odd name"),
]
OK: HeaderList = [(b":status", b"200"), (b"content-type", b"application/grpc+json")]


def _custom(headers: Any) -> HeaderList:
    own = (b":", b"grpc-", b"content-type", b"te", b"mm-")
    return [tuple(header) for header in headers if not header[0].startswith(own)]


async def test_odd_metadata_passes_both_ways_in_order() -> None:
    seen: list[Header] = []

    async def serve(peer: RawPeer) -> None:
        peer.start()
        request = await peer.wait_for(RequestReceived)
        seen.extend(request.headers)  # type: ignore[arg-type]
        await peer.wait_for(StreamEnded)
        peer.h2.send_headers(1, [*OK, *ODD])
        peer.h2.send_data(1, frame_message(b"a"))
        peer.h2.send_headers(1, [(b"grpc-status", b"0"), *ODD], end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with connect(stand.port) as peer:
            subtype = (b"content-type", b"application/grpc+json")
            headers = [subtype if name == subtype[0] else (name, v) for name, v in REQUEST]
            stream_id = peer.begin(
                [*headers, *ODD, (b"user-agent", b"x"), (b"mm-model-id", b"m")], end=True
            )
            response = await peer.wait_on(ResponseReceived, stream_id)
            trailers = await peer.wait_on(TrailersReceived, stream_id)
    assert _custom(seen) == ODD
    assert dict(seen)[b"content-type"] == b"application/grpc+json"
    assert dict(seen)[b"te"] == b"trailers"
    assert [tuple(header) for header in response.headers or ()] == [*OK, *ODD]
    assert [tuple(header) for header in trailers.headers or ()] == [(b"grpc-status", b"0"), *ODD]


async def test_what_the_mesh_keeps_to_itself() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        await client.unary_unary("/t.S/Unary")(
            b"",
            metadata=(
                *ID,
                ("mm-balanced", "true"),
                ("mm-custom", "x"),
                ("mm-hop-kind", "hit-only"),
                ("tas-model-id", "t"),
                ("grpc-trace-bin", b"t"),
                ("mmm", "kept"),
                ("grpcx", "kept"),
            ),
        )
        (metadata,) = stand.runtime.metadata
        names = {name for name, _ in metadata} - {"user-agent"}
        assert names == {"mm-model-id", "mm-model-id-bin", "mmm", "grpcx"}


async def test_metadata_of_foreign_libraries() -> None:
    async def script(request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("x-initial", "1"), ("x-bin", b"\0\1\2")))
        context.set_trailing_metadata((("x-trailing", "2"), ("y-bin", bytes(range(256)))))
        return b""

    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["Script"] = script
        sent = (("x-one", "1"), ("x-bin", b"\0\xff"), ("x-one", "2"))
        call = client.unary_unary("/t.S/Script")(b"", metadata=(*ID, *sent))
        await call
        # grpcio keeps the order within a name, not between names.
        for name in ("x-one", "x-bin"):
            seen = [item for item in stand.runtime.metadata[0] if item[0] == name]
            assert seen == [item for item in sent if item[0] == name]
        initial = dict(await call.initial_metadata())
        assert (initial["x-initial"], initial["x-bin"]) == ("1", b"\0\1\2")
        trailing = dict(await call.trailing_metadata())
        assert (trailing["x-trailing"], trailing["y-bin"]) == ("2", bytes(range(256)))


async def test_rich_statuses_pass() -> None:
    details = b"\x08\x03\x12\x03bad" + bytes(200)

    async def script(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", details), ("x-own", "1")))
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "wörtlich: 100 %\n2nd line")
        return b""

    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["Script"] = script
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.unary_unary("/t.S/Script")(b"", metadata=ID)
        error = caught.value
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert error.details() == "wörtlich: 100 %\n2nd line"
        trailing = dict(error.trailing_metadata() or ())
        assert (trailing["grpc-status-details-bin"], trailing["x-own"]) == (details, "1")


async def test_a_status_after_messages_keeps_both() -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(StreamEnded)
        peer.h2.send_headers(1, OK)
        peer.h2.send_data(1, frame_message(b"1") + frame_message(b"2"))
        trailers = [(b"grpc-status", b"10"), (b"grpc-message", b"half-way"), (b"x", b"y")]
        peer.h2.send_headers(1, trailers, end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with stand.client() as client:
            down = client.unary_stream("/t.S/Down")(b"", metadata=ID)
            assert [await down.read(), await down.read()] == [b"1", b"2"]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await down.read()
            assert caught.value.code() == grpc.StatusCode.ABORTED
            assert caught.value.details() == "half-way"
            assert ("x", "y") in tuple(await down.trailing_metadata())


@pytest.mark.parametrize("plane", PLANES)
async def test_a_runtime_does_not_speak_the_words_of_the_wire(plane: str) -> None:
    """Neither before an answer nor behind it; what else begins with "mm-" is its own affair."""
    words = [(b"mm-wire-pass-on", b"1"), (b"mm-wire-client", b"1"), (b"mm-own", b"1")]

    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(StreamEnded)
        peer.h2.send_headers(1, [*OK, *words])
        peer.h2.send_data(1, frame_message(b"a"))
        peer.h2.send_headers(1, [(b"grpc-status", b"0"), *words], end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _):
        port = int(address.rpartition(":")[2])
        async with serve_plane(plane, runtime_port=port) as stand, connect(stand.port) as client:
            stream_id = client.begin([*REQUEST, (b"mm-model-id", b"m")])
            client.send(stream_id, frame_message(b"q"), end=True)
            head = await client.wait_on(ResponseReceived, stream_id)
            end = await client.wait_on(TrailersReceived, stream_id)
    told = [name for name, _ in head.headers or () if name.startswith(b"mm-")]
    assert told == []
    assert [name for name, _ in end.headers or () if name.startswith(b"mm-")] == [b"mm-own"]


async def test_an_answer_that_is_not_grpc_passes_as_it_is() -> None:
    """A load balancer before a runtime says 503 in HTML; the client's library knows what to do."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(StreamEnded)
        headers = [(b":status", b"503"), (b"content-type", b"text/html")]
        peer.h2.send_headers(1, headers, end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with stand.client() as client:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.unary_unary("/t.S/Unary")(b"", metadata=ID)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("with_message", [True, False])
async def test_an_answer_that_ends_without_a_status(with_message: bool) -> None:
    async def serve(peer: RawPeer) -> None:
        peer.start()
        await peer.wait_for(StreamEnded)
        peer.h2.send_headers(1, OK)
        peer.h2.send_data(1, frame_message(b"a") if with_message else b"", end_stream=True)
        peer.flush()
        await peer.wait_closed()

    async with listen(serve) as (address, _), serve_proxy(runtime_address=address) as stand:
        async with stand.client() as client:
            down = client.unary_stream("/t.S/Down")(b"", metadata=ID)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _drain(down)
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert caught.value.details() == "the response ended without a status"


async def _drain(call: Any) -> None:
    async for _ in call:
        pass

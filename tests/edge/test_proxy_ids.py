"""Whose call it is: ids in headers and messages, what is served, and ids put into messages."""

from __future__ import annotations

import random
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import grpc
import grpc.aio
import pytest

from mm.core.calls import MOVES_MAX, Outcome
from mm.core.dataplane import DataplaneConfig, RpcConfig
from mm.edge.h2 import EXTERNAL_LIMITS
from mm.edge.h2.messages import frame_message
from mm.errors import (
    LoadFailedError,
    ModelNotFoundError,
    NoRoomError,
)
from tests.edge.raw_h2 import REQUEST, connect
from tests.edge.upstream import serve_proxy

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)
Metadata = tuple[tuple[str, str | bytes], ...]


async def _fail(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# --- which model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "model_id"),
    [
        ((("mm-model-id", "m"),), "m"),
        ((("mm-model-id-bin", "mø".encode()),), "mø"),
        ((("mm-model-id", "m"), ("mm-model-id-bin", b"\xff")), "m"),
        ((("mm-vmodel-id", "v"),), "m-of-v"),
        ((("mm-vmodel-id-bin", b"v"),), "m-of-v"),
        ((("mm-vmodel-id-bin", "vü".encode()),), "m-of-vü"),
        ((("mm-vmodel-id", "v"), ("mm-vmodel-id-bin", b"\xff")), "m-of-v"),
        ((("tas-model-id", "t"),), "t"),
    ],
)
async def test_ids_in_headers(metadata: Metadata, model_id: str) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.vmodels = {"v": "m-of-v", "vü": "m-of-vü"}
        await client.unary_unary("/t.S/Unary")(b"", metadata=metadata)
        assert stand.router.calls[0].model_id == model_id
        seen = dict(stand.runtime.metadata[0])
        assert seen["mm-model-id-bin"] == model_id.encode()
        assert seen.get("mm-model-id") == (model_id if model_id.isascii() else None)
        assert not {name for name in seen if "vmodel" in name or name.startswith("tas")}


@pytest.mark.parametrize(
    ("metadata", "code", "text"),
    [
        ((), grpc.StatusCode.INVALID_ARGUMENT, "must include mm-model-id header"),
        (
            (("mm-model-id", "m"), ("mm-vmodel-id", "v")),
            grpc.StatusCode.INVALID_ARGUMENT,
            "must include only one of model id and vmodel id",
        ),
        (
            (("mm-model-id", ""),),
            grpc.StatusCode.INVALID_ARGUMENT,
            "provided model-id header must be non-empty",
        ),
        (
            (("mm-vmodel-id", ""),),
            grpc.StatusCode.INVALID_ARGUMENT,
            "provided vmodel-id header must be non-empty",
        ),
        (
            (("mm-model-id-bin", b"\xff"),),
            grpc.StatusCode.INVALID_ARGUMENT,
            "header mm-model-id-bin cannot be decoded",
        ),
        (
            (("mm-vmodel-id-bin", b"\xff"),),
            grpc.StatusCode.INVALID_ARGUMENT,
            "header mm-vmodel-id-bin cannot be decoded",
        ),
        (
            (("mm-model-id-bin", b"m"), ("mm-vmodel-id-bin", b"v")),
            grpc.StatusCode.INVALID_ARGUMENT,
            "must include only one of model id and vmodel id",
        ),
        ((("mm-model-id", "nobody"),), grpc.StatusCode.NOT_FOUND, "model not found"),
        ((("mm-vmodel-id", "nobody"),), grpc.StatusCode.NOT_FOUND, "vmodel not found"),
    ],
)
async def test_bad_ids(metadata: Metadata, code: grpc.StatusCode, text: str) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.unknown.add("nobody")
        error = await _fail(client.unary_unary("/t.S/Unary")(b"", metadata=metadata))
        assert (error.code(), error.details()) == (code, text)
        assert not stand.runtime.requests


async def test_more_ids_than_one_call_may_name() -> None:
    async with serve_proxy(multi_model_ids_max=2) as stand, stand.client() as client:
        metadata = tuple(("mm-model-id", str(number)) for number in range(3))
        error = await _fail(client.unary_unary("/t.S/Unary")(b"", metadata=metadata))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "3 ids in one call; at most 2 may be"


VMODEL = (("mm-vmodel-id", "v"), ("mm-balanced", "true"))


async def test_a_vmodel_that_moves_on_while_its_model_goes() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.vmodels["v"] = "gone gone-too new"
        stand.router.unknown = {"gone", "gone-too"}
        method = client.unary_unary("/t.S/Unary")
        assert await method(b"q", metadata=VMODEL) == b"echo:q"
        assert [call.model_id for call in stand.router.calls] == ["gone", "gone-too", "new"]
        assert all(call.balanced for call in stand.router.calls)
        stand.router.unknown.add("new")
        error = await _fail(method(b"q", metadata=VMODEL))
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "nothing left of v")


@pytest.mark.parametrize("size", [10, 3 * 2**20])
async def test_a_vmodel_in_a_message_of_any_size_that_moves_on(size: int) -> None:
    """What is too large to be kept for a second attempt is all there before the first one."""
    async with serve_proxy(**_rules(VUnary=(1,))) as stand, stand.client() as client:
        stand.router.vmodels["v"] = "gone new"
        stand.router.unknown = {"gone"}
        body = _named(b"v") + b"\x12" + _varint(size) + bytes(size)
        assert await client.unary_unary("/t.S/Unary")(body) == b"echo:" + body
        # Nobody listens there: nothing of it was sent.
        stand.router.again = [True]
        stand.router.answers = [stand.peer_route("new", address="127.0.0.1:1")]
        stand.router.vmodels["v"] = "new"
        assert await client.unary_unary("/t.S/Unary")(body) == b"echo:" + body
        assert stand.server.held_bytes == 0


async def test_a_vmodel_that_moves_on_and_on_is_followed_so_far() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.vmodels["v"] = " ".join(f"m{number}" for number in range(99))
        stand.router.unknown = {f"m{number}" for number in range(99)}
        error = await _fail(client.unary_unary("/t.S/Unary")(b"q", metadata=VMODEL))
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "model not found")
        assert len(stand.router.calls) == MOVES_MAX + 1


@pytest.mark.parametrize("kind", ["Unary", "Both"])
async def test_a_vmodel_that_moves_on_as_a_peer_knows_first(kind: str) -> None:
    """Whoever is asked to load the old model has read in the store that there is none."""
    async with serve_proxy(external=False) as there, serve_proxy() as here, here.client() as client:
        gone = ModelNotFoundError()
        gone.hop_result = Outcome.NO_MODEL.value
        for metadata, code in ((VMODEL, None), (ID, grpc.StatusCode.NOT_FOUND)):
            there.router.answers = [gone]
            here.router.vmodels["v"] = "m new"
            here.router.answers = [here.peer_route("m", address=there.address)]
            # In one piece: grpcio has an error of its own for what is refused while it writes.
            call = client.unary_stream(f"/t.S/{kind}")(b"q", metadata=metadata)
            if code is None:
                assert [part async for part in call] in ([b"echo:q"], [b"re:q"])
                assert here.router.calls[-1].model_id == "new"
            else:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    assert not [part async for part in call]
                assert refused.value.code() == code
                assert await call.details() == "model not found"
        assert here.server.held_bytes == 0


async def test_balanced_callers_are_told_to_the_router() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        method = client.unary_unary("/t.S/Unary")
        await method(b"", metadata=(*ID, ("mm-balanced", "true")))
        await method(b"", metadata=(*ID, ("mm-balanced", "yes")))
        assert [call.balanced for call in stand.router.calls] == [True, False]
        assert stand.router.calls[0].method == "/t.S/Unary"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelNotFoundError(), grpc.StatusCode.NOT_FOUND),
        (LoadFailedError("runtime says: no"), grpc.StatusCode.FAILED_PRECONDITION),
        (NoRoomError("full", retry_after_ms=70), grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_errors_of_the_router_are_statuses(error: Any, code: grpc.StatusCode) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.answers.append(error)
        failed = await _fail(client.unary_unary("/t.S/Unary")(b"", metadata=ID))
        assert (failed.code(), failed.details()) == (code, error.message)
        trailers = dict(failed.trailing_metadata() or ())
        assert trailers.get("grpc-retry-pushback-ms") == (
            None if error.retry_after_ms is None else "70"
        )
        assert not [name for name in trailers if name.startswith("mm-")]


# --- what is served --------------------------------------------------------------------------


def _rules(allow_other: bool = True, **paths: tuple[int, ...]) -> dict[str, Any]:
    rpcs = {
        f"t.S/{name.removeprefix('V')}": RpcConfig(path, name.startswith("V"))
        for name, path in paths.items()
    }
    return {"dataplane_config": DataplaneConfig(MappingProxyType(rpcs), allow_other)}


async def test_methods_that_are_not_served() -> None:
    async with serve_proxy(**_rules(False, Unary=())) as stand, stand.client() as client:
        assert await client.unary_unary("/t.S/Unary")(b"", metadata=ID) == b"echo:"
        error = await _fail(client.unary_unary("/t.S/Up")(b"", metadata=ID))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNIMPLEMENTED, "")
        # Before ids are looked at, as the Java mesh orders its checks.
        error = await _fail(client.unary_unary("/t.S/Up")(b""))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        assert len(stand.router.calls) == 1


@pytest.mark.parametrize(
    "service", ["mmesh.ModelRuntime", "com.ibm.watson.tas.internal.proto.ModelServer"]
)
async def test_the_management_of_runtimes_is_out_of_reach(service: str) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        error = await _fail(client.unary_unary(f"/{service}/unloadModel")(b"", metadata=ID))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        assert error.details() == f"Method not found or not permitted: {service}/unloadModel"
        # Refused before anything is loaded for it.
        assert not stand.router.calls


def _named(name: bytes) -> bytes:
    return b"\x0a" + bytes([len(name)]) + name


@pytest.mark.parametrize(
    ("message", "metadata", "model_id"),
    [
        (_named(b"in message"), (), "in message"),
        (_named(b"in message"), (("mm-model-id", "bogus"), ("mm-vmodel-id", "v")), "in message"),
        (_named(b"first") + _named(b"last"), (), "last"),
        (b"\x10\x01", ID, "m"),
    ],
)
@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_ids_in_messages(
    message: bytes, metadata: Metadata, model_id: str, compression: Any
) -> None:
    async with serve_proxy(**_rules(Unary=(1,))) as stand:
        async with stand.client(compression=compression) as client:
            method = client.unary_unary("/t.S/Unary")
            assert await method(message, metadata=metadata) == b"echo:" + message
            assert stand.router.calls[0].model_id == model_id


async def test_vmodel_ids_in_messages() -> None:
    async with serve_proxy(**_rules(VUnary=(1,))) as stand, stand.client() as client:
        stand.router.vmodels["v"] = "m"
        await client.unary_unary("/t.S/Unary")(_named(b"v"))
        assert stand.router.calls[0].model_id == "m"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (_named(b""), "provided model-id header must be non-empty"),
        (b"\x0a\x7f", "reaches beyond the end"),
        (b"\x08\x01", "wire type 0"),
        (b"\x10\x01", "must include mm-model-id header"),
    ],
)
async def test_bad_ids_in_messages(message: bytes, text: str) -> None:
    async with serve_proxy(**_rules(Unary=(1,))) as stand, stand.client() as client:
        error = await _fail(client.unary_unary("/t.S/Unary")(message))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert text in error.details()


async def test_extraction_from_a_large_message_and_from_a_stream() -> None:
    async with serve_proxy(**_rules(Unary=(1,), Both=(1,))) as stand, stand.client() as client:
        body = _named(b"m") + b"\x12\x80\x80\xc0\x01" + bytes(3 * 2**20)
        assert await client.unary_unary("/t.S/Unary")(body) == b"echo:" + body
        both = client.stream_stream("/t.S/Both")()
        for number in range(3):
            await both.write(_named(b"x%d" % number))
            assert await both.read() == b"re:" + _named(b"x%d" % number)
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        # The first message decides.
        assert [call.model_id for call in stand.router.calls] == ["m", "x0"]


async def test_extraction_without_a_message_and_above_the_limit() -> None:
    rules = _rules(Up=(1,))
    async with serve_proxy(message_bytes_max=1000, **rules) as stand, stand.client() as client:
        error = await _fail(client.stream_unary("/t.S/Up")(iter(())))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "Half-closed without a request"
        error = await _fail(client.stream_unary("/t.S/Up")(iter([bytes(1001)])))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# --- injection -------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
@pytest.mark.parametrize("size", [0, 10, 300_000])
async def test_the_id_is_put_into_every_message(size: int, compression: Any) -> None:
    async with serve_proxy() as stand, stand.client(compression=compression) as client:
        stand.router.injection_path = (1,)
        padding = b"\x12" + _varint(size) + bytes(size)
        body = _named(b"whatever") + padding
        await client.unary_unary("/t.S/Unary")(body, metadata=ID)
        assert stand.runtime.requests == [body + _named(b"m")]
        both = client.stream_stream("/t.S/Both")(iter([body, b"", body]), metadata=ID)
        expected = [b"re:" + part + _named(b"m") for part in (body, b"", body)]
        assert [part async for part in both] == expected


def _varint(value: int) -> bytes:
    from mm.core.protobuf_ids import encode_varint

    return encode_varint(value)


async def test_a_message_that_would_swallow_the_id_never_arrives() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.injection_path = (1,)
        evil = _named(b"evil") + b"\x12" + bytes([len(_named(b"m"))])
        error = await _fail(client.unary_unary("/t.S/Unary")(evil, metadata=ID))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "the request message is cut off"
        assert not stand.runtime.requests
        assert stand.router.outcomes == [Outcome.ABANDONED]


async def test_an_id_beyond_ascii_and_a_nested_path() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.router.injection_path = (2, 1)
        model_id = "mø" * 100
        encoded = model_id.encode()
        metadata = (("mm-model-id-bin", encoded),)
        await client.unary_unary("/t.S/Unary")(b"", metadata=metadata)
        inner = b"\x0a" + _varint(len(encoded)) + encoded
        assert stand.runtime.requests == [b"\x12" + _varint(len(inner)) + inner]


@pytest.mark.parametrize("reads", ["extraction", "injection"])
async def test_a_compression_that_cannot_be_read_says_which_can(reads: str) -> None:
    rules = _rules(Unary=(1,)) if reads == "extraction" else {}
    async with serve_proxy(**rules) as stand, connect(stand.port) as peer:
        stand.router.injection_path = (1,)
        headers = [(b":path", b"/t.S/Unary") if h[0] == b":path" else h for h in REQUEST]
        extra = [(b"mm-model-id", b"m"), (b"grpc-encoding", b"snappy")]
        stream_id = peer.begin([*headers, *extra])
        peer.send(stream_id, frame_message(b"abc", compressed=True), end=True)
        answer, _ = await peer.wait_answer(stream_id)
        assert answer[b"grpc-status"] == b"12"
        assert answer[b"grpc-accept-encoding"] == b"identity,gzip,deflate"
        # An uncompressed message under the same header can be read.
        stream_id = peer.begin([*headers, *extra])
        peer.send(stream_id, frame_message(_named(b"x")), end=True)
        assert (await peer.wait_answer(stream_id))[0][b"grpc-status"] == b"0"


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_what_calls_hold_of_their_requests_is_bounded(compression: Any) -> None:
    limits = replace(EXTERNAL_LIMITS, held_bytes_max=100_000)
    async with serve_proxy(limits=limits, **_rules(Unary=(1,))) as stand:
        async with stand.client(compression=compression) as client:
            method = client.unary_unary("/t.S/Unary")
            large = _named(b"m") + b"\x12" + _varint(200_000) + random.Random(1).randbytes(200_000)
            error = await _fail(method(large))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "too many large requests at once"
            # What was held is given back: many smaller ones, one after the other, pass.
            for _ in range(5):
                small = large[: len(_named(b"m"))] + b"\x12" + _varint(50_000) + bytes(50_000)
                assert await method(small) == b"echo:" + small
            assert stand.server.held_bytes == 0


async def test_what_cannot_be_held_is_not_tried_again() -> None:
    """But what was not sent at all is all here, held or not."""
    limits = replace(EXTERNAL_LIMITS, held_bytes_max=1000)
    refusal = NoRoomError("no copy here")
    refusal.hop_result = Outcome.NOT_HERE.value
    async with serve_proxy(external=False) as there, serve_proxy(limits=limits) as stand:
        async with stand.client() as client:
            for size, address, attempts in (
                (900, there.address, 2),
                (1100, there.address, 1),
                (1100, "127.0.0.1:1", 2),
            ):
                stand.router.calls.clear()
                stand.router.again = [True]
                there.router.answers = [refusal]
                stand.router.answers = [stand.peer_route("m", address=address)]
                call = client.unary_unary("/t.S/Unary")(bytes(size), metadata=ID)
                if attempts == 2:
                    assert len(await call) == size + 5
                else:
                    assert (await _fail(call)).code() == grpc.StatusCode.UNAVAILABLE
                assert len(stand.router.calls) == attempts
            assert stand.server.held_bytes == 0

"""One call for several models: order, absence, failures, limits (spec core 2.13)."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from mm.core.calls import Call, Outcome, Route
from mm.errors import LoadFailedError, ModelNotFoundError
from tests.edge.upstream import PATIENCE_S, serve_proxy

pytestmark = pytest.mark.anyio


def _ids(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple(("mm-model-id", name) for name in names)


async def _by_model(request: bytes, context: Any) -> bytes:
    """Answer ``<id>=<request>;`` and the id as metadata."""
    model_id = dict(context.invocation_metadata())["mm-model-id"]
    await context.send_initial_metadata((("x-model", model_id), ("x-same", "1")))
    context.set_trailing_metadata((("y-model", model_id),))
    if model_id == "absent":
        await context.abort(grpc.StatusCode.NOT_FOUND, "absent")
    if model_id == "broken":
        await context.abort(grpc.StatusCode.DATA_LOSS, "broken")
    return f"{model_id}={request.decode()};".encode()


async def _fail(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_answers_are_merged_in_the_order_of_the_ids(compression: Any) -> None:
    async with serve_proxy() as stand, stand.client(compression=compression) as client:
        stand.runtime.scripts["By"] = _by_model
        names = ["c", "a", "b", "e", "d", "a"]
        call = client.unary_unary("/t.S/By")(b"q", metadata=_ids(*names))
        assert await call == "".join(f"{name}=q;" for name in names).encode()
        initial = [value for name, value in await call.initial_metadata() if name == "x-model"]
        assert initial == ["c", "a", "b", "e", "d"]
        assert [name for name, _ in await call.initial_metadata()].count("x-same") == 1
        assert ("y-model", "e") in tuple(await call.trailing_metadata())
        assert stand.router.outcomes == [Outcome.ANSWERED] * 6


async def test_vmodels_and_injection() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["By"] = _by_model
        stand.router.vmodels = {"v": "a", "w": "b"}
        stand.router.injection_path = (1,)
        metadata = (("mm-vmodel-id", "v"), ("mm-vmodel-id", "w"), ("mm-vmodel-id", "nobody"))
        reply = await client.unary_unary("/t.S/By")(b"", metadata=metadata)
        assert reply == b"a=\n\x01a;b=\n\x01b;"
        error = await _fail(client.unary_unary("/t.S/By")(b"\x12\x03", metadata=_ids("a", "b")))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_vmodels_that_move_on_and_one_that_cannot() -> None:
    async with serve_proxy(external=False) as there, serve_proxy() as here, here.client() as client:
        here.runtime.scripts["By"] = _by_model
        here.router.vmodels = {"v": "gone a", "w": "told b", "x": "gone"}
        here.router.unknown.add("gone")
        gone = ModelNotFoundError()
        gone.hop_result = Outcome.NO_MODEL.value
        there.router.answers = [gone]
        real = here.router.route

        async def route(call: Call) -> Route:
            is_told = call.model_id == "told"
            return here.peer_route("told", address=there.address) if is_told else await real(call)

        here.router.route = route  # type: ignore[method-assign]
        names = [("mm-vmodel-id", name) for name in "vw"]
        method = client.unary_unary("/t.S/By")
        assert await method(b"q", metadata=names) == b"a=q;b=q;"
        error = await _fail(method(b"q", metadata=[*names, ("mm-vmodel-id", "x")]))
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "nothing left of x")


@pytest.mark.parametrize("absent", ["absent", "unknown"])
async def test_missing_models_are_skipped_unless_all_are_required(absent: str) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["By"] = _by_model
        stand.router.unknown.add("unknown")
        method = client.unary_unary("/t.S/By")
        assert await method(b"q", metadata=_ids("a", absent, "b")) == b"a=q;b=q;"
        error = await _fail(method(b"q", metadata=(*_ids("a", absent), ("mm-required", "ALL"))))
        assert error.code() == grpc.StatusCode.NOT_FOUND
        error = await _fail(method(b"q", metadata=_ids(absent, absent)))
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert error.details() == "none of the requested models were found"


async def test_any_other_failure_is_the_answer_and_ends_the_others() -> None:
    async with serve_proxy(multi_parallelism=2) as stand, stand.client() as client:
        stand.runtime.scripts["By"] = _by_model
        error = await _fail(client.unary_unary("/t.S/By")(b"q", metadata=_ids("a", "broken")))
        assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "broken")
        assert ("y-model", "broken") in tuple(error.trailing_metadata() or ())

        hold = asyncio.Event()
        stand.router.answers = [hold, LoadFailedError("no file")]
        error = await _fail(client.unary_unary("/t.S/By")(b"q", metadata=_ids("a", "b", "c")))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "no file",
        )
        # The one that still waited was given up, the third never asked for.
        assert stand.router.waiting == 0
        assert "c" not in {call.model_id for call in stand.router.calls}


async def test_a_bug_beside_a_failure_is_not_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    async with serve_proxy(multi_parallelism=2) as stand, stand.client() as client:
        hold = asyncio.Event()

        async def route(call: Call) -> Route:
            if call.model_id == "a":
                await hold.wait()
                raise LoadFailedError("no file")
            hold.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise ZeroDivisionError("a bug in giving up")

        stand.router.route = route  # type: ignore[method-assign]
        error = await _fail(client.unary_unary("/t.S/Unary")(b"q", metadata=_ids("a", "b")))
        assert error.code() == grpc.StatusCode.INTERNAL
    assert "a bug in giving up" in caplog.text


async def test_no_more_at_a_time_than_allowed() -> None:
    async with serve_proxy(multi_parallelism=3) as stand, stand.client() as client:
        hold = asyncio.Event()
        stand.router.answers = [hold, hold, hold]
        call = client.unary_unary("/t.S/Unary")(b"q", metadata=_ids(*"abcdefg"))
        await stand.router.wait_waiting(3)
        assert len(stand.router.calls) == 3
        hold.set()
        assert await call == b"echo:q" * 7


async def test_a_part_is_tried_again() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        stand.runtime.scripts["By"] = _by_model
        stand.router.answers = [stand.peer_route("a", address="127.0.0.1:1")]
        stand.router.again = [True]
        reply = await client.unary_unary("/t.S/By")(b"q", metadata=_ids("a", "b"))
        assert reply == b"a=q;b=q;"
        assert stand.router.outcomes.count(Outcome.UNREACHABLE) == 1


async def test_only_one_message_and_only_so_large() -> None:
    async with serve_proxy(message_bytes_max=1000) as stand, stand.client() as client:
        error = await _fail(
            client.stream_unary("/t.S/Up")(iter([b"1", b"2"]), metadata=_ids("a", "b"))
        )
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        call = client.unary_unary("/t.S/Unary")(bytes(600), metadata=_ids("a", "b"))
        error = await _fail(call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "merged response message of 1210 bytes" in error.details()


async def test_a_client_that_leaves_ends_all_parts() -> None:
    async with serve_proxy() as stand, stand.client() as client:
        call = client.unary_unary("/t.S/Hang")(b"", metadata=_ids("a", "b"))
        await asyncio.wait_for(stand.runtime.started.wait(), PATIENCE_S)
        call.cancel()
        await asyncio.wait_for(stand.runtime.cancelled.wait(), PATIENCE_S)
        await stand.router.wait_finished(2)
        assert stand.router.outcomes == [Outcome.ABANDONED] * 2

"""Hits through the wire, with a foreign client and runtime: kinds of call, sizes, headers, ends."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from mm.core.calls import LocalRoute, Outcome
from mm.core.headers import PLAIN_ID_BYTES_MAX
from mm.errors import MeshError, StatusCode
from mm.wire import Method, MethodFlag
from tests.edge.upstream import PATIENCE_S
from tests.wire.stand import LOAD_ID, serve_wire

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)


async def _fail(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_all_four_kinds_of_call() -> None:
    async with serve_wire() as stand, stand.client() as client:
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
        await stand.settle(calls=4, calls_here=4, calls_open=0, cancelled=0)
        assert not stand.router.calls


async def test_streams_without_any_message() -> None:
    async with serve_wire() as stand, stand.client() as client:
        assert await client.stream_unary("/t.S/Up")(iter(()), metadata=ID) == b""
        down = client.unary_stream("/t.S/Down")(b"0", metadata=ID)
        assert [part async for part in down] == []
        both = client.stream_stream("/t.S/Both")(iter(()), metadata=ID)
        assert [part async for part in both] == []
        await stand.settle(calls_here=3, calls_open=0)


@pytest.mark.parametrize("size", [1_000_000, 5_000_000])
async def test_large_messages_both_ways(size: int) -> None:
    async with serve_wire() as stand, stand.client() as client:
        body = bytes(range(256)) * (size // 256)
        replies = await asyncio.gather(
            *(client.unary_unary("/t.S/Unary")(body, metadata=ID) for _ in range(3))
        )
        assert replies == [b"echo:" + body] * 3
        await stand.settle(calls_here=3, replayed=0)


async def test_a_message_above_the_limit_is_refused_in_either_direction() -> None:
    async with serve_wire(message_bytes_max=1000) as stand, stand.client() as client:
        method = client.unary_unary("/t.S/Unary")
        error = await _fail(method(b"x" * 1001, metadata=ID))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "request message of 1001 bytes exceeds the limit of 1000" in str(error.details())
        error = await _fail(method(b"x" * 1000, metadata=ID))
        assert "response message of 1005 bytes exceeds the limit of 1000" in str(error.details())


async def test_what_the_runtime_gets_and_what_the_client_gets() -> None:
    async def script(request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("x-early", "1"), ("mm-secret", "2")))
        context.set_trailing_metadata((("x-late-bin", b"\0\xff"), ("mm-late", "3")))
        return b"yes"

    metadata = (
        *ID,
        ("x-mine", "a"),
        ("x-mine", "b"),
        ("x-bin", b"\xff\0"),
        ("grpc-trace-bin", b"t"),
        ("mm-hop-kind", "hit-only"),
        ("mm-wire-tried", "here 7"),
        ("tas-model-id", "other"),
    )
    async with serve_wire() as stand, stand.client() as client:
        stand.runtime.scripts["Headers"] = script
        call = client.unary_unary("/t.S/Headers")(b"", metadata=metadata, timeout=50)
        assert await call == b"yes"
        got = stand.runtime.metadata[0]
        assert [value for key, value in got if key == "x-mine"] == ["a", "b"]
        seen = {key: value for key, value in got if key != "x-mine"}
        assert "user-agent" not in seen
        assert seen["mm-model-id"] == "m"
        assert seen["mm-model-id-bin"] == b"m"
        assert seen["x-bin"] == b"\xff\0"
        assert not [key for key in seen if key.startswith(("mm-hop", "mm-wire", "tas-"))]
        assert "grpc-trace-bin" not in seen
        left_s = stand.runtime.remaining_s[0]
        assert left_s is not None
        assert 0 < left_s <= 50
        early, late = await call.initial_metadata(), await call.trailing_metadata()
        assert ("x-early", "1") in tuple(early)
        assert not [key for key, _ in early if key.startswith("mm-")]
        assert ("x-late-bin", b"\0\xff") in tuple(late)
        assert ("mm-late", "3") in tuple(late)


async def test_a_vmodel_is_followed_to_its_model() -> None:
    async with serve_wire() as stand, stand.client() as client:
        stand.table.set_alias("v", "m")
        call = client.unary_unary("/t.S/Unary")(b"", metadata=(("mm-vmodel-id", "v"),))
        assert await call == b"echo:"
        assert dict(stand.runtime.metadata[0])["mm-model-id"] == "m"
        await stand.settle(calls_here=1)


async def test_what_is_no_plain_hit_is_served_by_tier_2() -> None:
    async with serve_wire() as stand, stand.client() as client:
        method = client.unary_unary("/t.S/Unary")
        assert await method(b"1", metadata=(("mm-model-id", "cold"),)) == b"echo:1"
        assert await method(b"2", metadata=(("tas-model-id", "m"),)) == b"echo:2"
        assert [call.model_id for call in stand.router.calls] == ["cold", "m"]
        error = await _fail(method(b"", metadata=()))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        error = await _fail(client.unary_unary("/mmesh.ModelRuntime/load")(b"", metadata=ID))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        await stand.settle(calls_here=0, spliced_model=4, spliced_own=0, calls_open=0)


async def test_longer_ids_than_are_told_in_both_forms_are_tier_2s() -> None:
    longest, longer = "x" * PLAIN_ID_BYTES_MAX, "y" * (PLAIN_ID_BYTES_MAX + 1)
    async with serve_wire() as stand, stand.client() as client:
        for model_id in (longest, longer):
            stand.put(model_id)
            stand.table.set_alias(model_id[0], model_id)
            stand.router.vmodels[model_id[0]] = model_id
            for header in (("mm-model-id", model_id), ("mm-vmodel-id", model_id[0])):
                assert await client.unary_unary("/t.S/Unary")(b"", metadata=(header,)) == b"echo:"
        assert [dict(told).get("mm-model-id") for told in stand.runtime.metadata] == [
            *[longest] * 2,
            *[None] * 2,
        ]
        await stand.settle(calls_here=2, spliced_model=2)


async def test_the_runtimes_own_error_is_the_clients() -> None:
    async def script(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("why", "because"),))
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now: ärger %")
        return b""

    async with serve_wire() as stand, stand.client() as client:
        stand.runtime.scripts["Fails"] = script
        error = await _fail(client.unary_unary("/t.S/Fails")(b"", metadata=ID))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "not now: ärger %",
        )
        assert ("why", "because") in tuple(error.trailing_metadata() or ())
        await stand.settle(calls_here=1, replayed=0)


async def test_a_lost_model_is_tier_2s_to_bring_back() -> None:
    async def script(request: bytes, context: Any) -> bytes:
        if len(stand.runtime.requests) == 1:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return b"found:" + request

    async with serve_wire() as stand, stand.client() as client:
        stand.runtime.scripts["Lost"] = script
        assert await client.unary_unary("/t.S/Lost")(b"again", metadata=ID) == b"found:again"
        route = LocalRoute("m", load_id=LOAD_ID)  # type: ignore[arg-type]
        assert stand.router.tried_routes == [(route, Outcome.LOST, "no such model")]
        await stand.settle(calls_here=1, replayed=1, again_answer=1, calls_open=0)


async def test_when_tier_2_has_nothing_better_the_runtimes_answer_stands() -> None:
    async def script(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("why", "because"),))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return b""

    async with serve_wire() as stand, stand.client() as client:
        stand.runtime.scripts["Full"] = script
        stand.router.tries_again = [False]
        error = await _fail(client.unary_unary("/t.S/Full")(b"", metadata=ID))
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        trailers = tuple(error.trailing_metadata() or ())
        assert ("why", "because") in trailers
        assert not [key for key, _ in trailers if key.startswith("mm-")]
        assert [each[1] for each in stand.router.tried_routes] == [Outcome.EXHAUSTED]


async def test_a_runtime_that_is_not_there() -> None:
    async with serve_wire(runtime_port=1) as stand, stand.client() as client:
        assert await client.unary_unary("/t.S/Unary")(b"x", metadata=ID) == b"echo:x"
        await stand.settle(again_fault=1, again_answer=0)
        (_, outcome, text) = stand.router.tried_routes[0]
        assert outcome is Outcome.UNREACHABLE
        assert "cannot connect to 127.0.0.1:1: Connection refused" in text


async def test_an_error_of_tier_2_passes_as_it_is() -> None:
    async with serve_wire() as stand, stand.client() as client:
        stand.router.answers.append(MeshError("gone fishing", code=StatusCode.UNAVAILABLE))
        metadata = (("mm-model-id", "cold"),)
        error = await _fail(client.unary_unary("/t.S/Unary")(b"x", metadata=metadata))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "gone fishing")
        await stand.settle(left_no_copy=1)
        await client.unary_unary("/t.S/Unary")(b"x", metadata=(*metadata, *metadata))
        await stand.settle(left_no_copy=1, left_headers=1)
        stand.configure(methods={b"/t.S/Unary": Method(MethodFlag.REFUSED_HERE)})
        await client.unary_unary("/t.S/Unary")(b"x", metadata=ID)
        await stand.settle(left_method=1)


async def test_a_client_that_goes_away_ends_the_call_in_the_runtime() -> None:
    async with serve_wire() as stand, stand.client() as client:
        call = client.unary_unary("/t.S/Hang")(b"", metadata=ID)
        await asyncio.wait_for(stand.runtime.started.wait(), PATIENCE_S)
        assert stand.table.in_flight("m") == 1
        call.cancel()
        await asyncio.wait_for(stand.runtime.cancelled.wait(), PATIENCE_S)
        await stand.settle(calls_open=0, cancelled=1)


async def test_many_calls_on_many_connections_and_threads() -> None:
    async with serve_wire(threads=2) as stand:
        clients = [stand.client(options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(8)]
        replies = await asyncio.gather(
            *(
                client.unary_unary("/t.S/Unary")(b"%d" % number, metadata=ID)
                for number in range(40)
                for client in clients
            )
        )
        assert sorted(replies) == sorted(b"echo:%d" % (number // 8) for number in range(320))
        await asyncio.gather(*(client.close() for client in clients))
        await stand.settle(calls=320, calls_here=320, calls_open=0, connections_open=0)


async def test_copies_that_take_few_calls_get_no_more_from_threads_and_tier_2_together() -> None:
    async with serve_wire(threads=2) as stand, stand.client() as client:
        stand.configure(has_slots=True)
        stand.table.set_concurrency_max("m", 2)
        hang = client.unary_unary("/t.S/Hang")
        held = [hang(b"", metadata=ID) for _ in range(2)]
        await stand.settle(hits_open=2)
        # The line is tier 2's; here its router gives the call to the runtime all the same.
        assert await client.unary_unary("/t.S/Unary")(b"third", metadata=ID) == b"echo:third"
        await stand.settle(calls_here=2, spliced_model=1, left_busy=1)
        held[0].cancel()
        await stand.settle(hits_open=1)
        assert await client.unary_unary("/t.S/Unary")(b"fourth", metadata=ID) == b"echo:fourth"
        await stand.settle(calls_here=3, spliced_model=1)
        held[1].cancel()
        await stand.settle(calls_open=0, hits_open=0)


async def test_who_waits_in_tier_2_hears_of_a_slot_that_a_thread_gives_back() -> None:
    heard = asyncio.Event()
    async with serve_wire() as stand, stand.client() as client:
        stand.configure(has_slots=True)
        stand.table.set_concurrency_max("m", 1)
        call = client.unary_unary("/t.S/Hang")(b"", metadata=ID)
        await stand.settle(hits_open=1)
        assert stand.table.pin("m"), "one that waits"
        loop = asyncio.get_running_loop()
        loop.add_reader(stand.wire.notice_fd, heard.set)
        call.cancel()
        await asyncio.wait_for(heard.wait(), PATIENCE_S)
        assert stand.table.in_flight("m") == 1
        # Nor is it overtaken.
        await client.unary_unary("/t.S/Unary")(b"", metadata=ID)
        await stand.settle(calls_here=1, spliced_model=1)
        stand.table.unpin("m")


async def test_calls_that_the_stop_gives_up_hear_of_it() -> None:
    async with serve_wire() as stand, stand.client() as client:
        unary = client.unary_unary("/t.S/Hang")(b"", metadata=ID)
        stream = client.stream_stream("/t.S/Both")(metadata=ID)
        await stream.write(b"1")
        assert await stream.read() == b"re:1"
        await stand.settle(hits_open=2)
        stand.wire.drain()
        stand.wire.end_calls()
        for call in (unary, stream):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert await call.details() == "the server is shutting down"
        await stand.settle(calls_open=0, hits_open=0, connections_open=0)


async def test_calls_go_on_while_the_configuration_changes() -> None:
    async with serve_wire(threads=2) as stand, stand.client() as client:
        stream = client.stream_stream("/t.S/Both")(metadata=ID)
        unary = client.unary_unary("/t.S/Unary")
        for turn in range(1, 31):
            await stream.write(b"%d" % turn)
            assert await stream.read() == b"re:%d" % turn
            # One that is under way while it changes, and what it goes by is freed.
            call = unary(b"q", metadata=ID)
            flags = MethodFlag.DENIED if turn % 3 == 0 else MethodFlag(0)
            methods = {b"/t.S/Both": Method(flags), b"/t.S/M%d" % turn: Method(injection_path=(1,))}
            stand.configure(methods=methods, header_bytes_max=8192 + turn)
            assert await call == b"echo:q"
        # Listed no more: from now on they are tier 2's to refuse, but the stream goes on.
        stand.configure(methods={}, others=Method(MethodFlag.DENIED))
        spliced = stand.counts.spliced_model
        await unary(b"q", metadata=ID)
        await stream.write(b"last")
        assert await stream.read() == b"re:last"
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK
        await stand.settle(calls=32, spliced_model=spliced + 1, replayed=0, calls_open=0)

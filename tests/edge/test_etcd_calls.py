"""How calls into grpc.aio fail: whatever it throws, a ``CallError`` comes out, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import aetcd.rpc
import anyio
import grpc
import grpc.aio
import pytest

from mm.edge.etcd_calls import CallError, CallFault, Stream, in_own_task

pytestmark = pytest.mark.anyio


class _Call:
    """A stream whose reads answer what is put in, or raise it."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.cancelled = False

    def __call__(self, metadata: object) -> _Call:
        return self

    async def read(self) -> object:
        message = await self.messages.get()
        if isinstance(message, BaseException):
            raise message
        return message

    async def write(self, message: object) -> None:
        if isinstance(message, BaseException):
            raise message

    def cancel(self) -> None:
        self.cancelled = True


def _rpc_error(code: grpc.StatusCode, details: str) -> aetcd.rpc.AioRpcError:
    nothing = grpc.aio.Metadata()
    return aetcd.rpc.AioRpcError(code, nothing, nothing, details)


async def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError(),
        asyncio.InvalidStateError("RPC already finished."),
        grpc.aio.UsageError("Channel is closed."),
        grpc.aio.InternalError("..."),
    ],
)
async def test_what_grpc_says_of_something_closed_is_a_lost_connection(
    error: BaseException,
) -> None:
    with pytest.raises(CallError, match="the connection was closed") as caught:
        await in_own_task(_raise(error), 5)
    assert caught.value.fault is CallFault.MOVE
    assert caught.value.maybe_done


@pytest.mark.parametrize(
    ("code", "details", "fault", "maybe_done"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", CallFault.MOVE, True),
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
            "Failed to connect to remote host: connect: Connection refused (111)",
            CallFault.MOVE,
            False,
        ),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", CallFault.MOVE, True),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader", CallFault.WAIT, True),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed", CallFault.WAIT, True),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out", CallFault.WAIT, True),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "etcdserver: too many requests",
            CallFault.WAIT,
            False,
        ),
        (grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", CallFault.TOKEN, False),
        (
            grpc.StatusCode.INVALID_ARGUMENT,
            "etcdserver: revision of auth store is old",
            CallFault.TOKEN,
            False,
        ),
        (grpc.StatusCode.FAILED_PRECONDITION, "something new", CallFault.FINAL, False),
    ],
)
async def test_errors_are_sorted_by_what_to_do(
    code: grpc.StatusCode, details: str, fault: CallFault, maybe_done: bool
) -> None:
    with pytest.raises(CallError) as caught:
        await in_own_task(_raise(_rpc_error(code, details)), 5)
    assert (caught.value.fault, caught.value.maybe_done) == (fault, maybe_done)


async def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(ZeroDivisionError):
        await in_own_task(_raise(ZeroDivisionError()), 5)


async def test_a_call_that_takes_too_long_is_cancelled() -> None:
    ended = asyncio.Event()
    with pytest.raises(CallError, match="no answer"):
        await in_own_task(_wait_and_tell(ended), 0.01)
    await asyncio.wait_for(ended.wait(), 60)


async def test_a_cancelled_caller_cancels_the_call() -> None:
    ended = asyncio.Event()
    with anyio.move_on_after(0.01) as scope:
        await in_own_task(_wait_and_tell(ended), None)
    assert scope.cancelled_caught
    await asyncio.wait_for(ended.wait(), 60)


def _wait_and_tell(ended: asyncio.Event) -> Awaitable[None]:
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    return wait()


async def test_a_read_that_takes_long_goes_on_in_the_next() -> None:
    call = _Call()
    stream = Stream(call, ())
    assert await stream.read(0.001) is None
    assert await stream.read(0.001) is None
    call.messages.put_nowait("first")
    assert await stream.read(60) == "first"
    stream.close()
    assert call.cancelled


async def test_the_ends_of_a_stream() -> None:
    call = _Call()
    stream = Stream(call, ())
    for end in (
        grpc.aio.EOF,
        asyncio.CancelledError(),
        _rpc_error(grpc.StatusCode.UNAVAILABLE, ""),
    ):
        call.messages.put_nowait(end)
        with pytest.raises(CallError):
            await stream.read(60)
    with pytest.raises(CallError, match="the connection was closed"):
        await stream.write(asyncio.InvalidStateError(), 5)
    stream.close()


async def test_a_stream_on_a_closed_channel() -> None:
    channel = aetcd.rpc.insecure_channel("ipv4:127.0.0.1:1")
    watch = aetcd.rpc.WatchStub(channel).Watch
    await channel.close()
    with pytest.raises(CallError, match="the connection was closed"):
        Stream(watch, ())

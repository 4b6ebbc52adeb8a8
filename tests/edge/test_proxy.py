"""The proxy with foreign clients and runtimes: all kinds of call, what passes and what does not."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from mm.core.calls import Outcome
from tests.edge.upstream import PATIENCE_S, serve_proxy

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)


async def test_all_four_kinds_of_call() -> None:
    async with serve_proxy() as stand, stand.client() as client:
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
        assert stand.router.outcomes == [Outcome.ANSWERED] * 4

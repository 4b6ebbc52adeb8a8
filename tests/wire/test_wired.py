"""The wire in its process: how it and the servers behind it end together."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
import pytest

from mm.edge import app
from mm.edge.h2 import EXTERNAL_LIMITS, PEER_LIMITS, GrpcServer
from mm.edge.h2.incoming import IncomingCall
from mm.edge.wired import Wired
from mm.errors import StartupError
from tests.edge.upstream import PATIENCE_S, make_config

pytestmark = pytest.mark.anyio


def test_without_its_extension_the_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mm.wire._wire", None)
    for name in ("mm.wire", "mm.edge.wired"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(StartupError) as caught:
        app._begin_wire(make_config(), None)
    said = str(caught.value)
    assert "mm.wire._wire, which does not load: " in said
    assert "make develop" in said
    assert "libnghttp2-14" in said
    assert "set MM_DATAPLANE=python" in said


async def served(
    answer: Callable[[IncomingCall], Awaitable[None]],
) -> tuple[Wired, tuple[GrpcServer, GrpcServer], int]:
    """Answer a wire, the servers for clients and for peers behind it, and the port of clients."""
    wired = Wired(make_config())
    external = GrpcServer(answer, limits=EXTERNAL_LIMITS, external=True)
    peers = GrpcServer(answer, limits=PEER_LIMITS, external=False)
    port = await wired.before(external).start("127.0.0.1", 0)
    await wired.before(peers).start("127.0.0.1", 0)
    return wired, (external, peers), port


async def test_stopping_takes_as_long_as_the_calls_and_no_longer() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def answer(call: IncomingCall) -> None:
        begun.set()
        await go_on.wait()
        call.send_status(0, "")

    wired, servers, port = await served(answer)
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as client,
        asyncio.timeout(PATIENCE_S),
    ):
        call = client.unary_unary("/a.B/c")(b"", wait_for_ready=True)
        await begun.wait()
        draining = asyncio.create_task(wired.drain(servers, 10 * PATIENCE_S))
        await asyncio.wait([draining], timeout=0.5)
        assert not draining.done()
        go_on.set()
        assert await call.code() is grpc.StatusCode.OK
        await draining
        await wired.close()


async def test_calls_that_take_longer_than_a_stop_may_hear_of_it() -> None:
    begun = asyncio.Event()

    async def answer(_call: IncomingCall) -> None:
        begun.set()
        await asyncio.Event().wait()

    wired, servers, port = await served(answer)
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as client,
        asyncio.timeout(PATIENCE_S),
    ):
        call = client.unary_unary("/a.B/c")(b"", wait_for_ready=True)
        await begun.wait()
        await wired.drain(servers, 0.3)
        await wired.close()
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert await call.details() == "the server is shutting down"


async def _refused(port: int) -> None:
    """Wait until nobody listens any more."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            return
        writer.close()

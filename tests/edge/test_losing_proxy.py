"""The losing proxy passes, holds and cuts: other tests believe it."""

from __future__ import annotations

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from mm.testing.losing_proxy import LosingProxy, losing_proxy

pytestmark = pytest.mark.anyio


async def _echo(stream: SocketStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def _exchange(stream: SocketStream, data: bytes) -> bytes:
    await stream.send(data)
    with anyio.fail_after(60):
        return await stream.receive()


async def _assert_silent(stream: SocketStream) -> None:
    with anyio.move_on_after(0.05) as scope:
        await stream.receive()
    assert scope.cancelled_caught


async def _check(proxy: LosingProxy) -> None:
    async with await anyio.connect_tcp(proxy.host, proxy.port) as stream:
        assert await _exchange(stream, b"one") == b"one"

        proxy.lose()
        await stream.send(b"two")
        await _assert_silent(stream)
        async with await anyio.connect_tcp(proxy.host, proxy.port) as second:
            await second.send(b"three")
            await _assert_silent(second)
            await proxy.restore()
            with anyio.fail_after(60):
                assert await stream.receive() == b"two"
                assert await second.receive() == b"three"

        proxy.lose_replies()
        await stream.send(b"four")
        await _assert_silent(stream)
        await proxy.restore()
        with anyio.fail_after(60):
            assert await stream.receive() == b"four"

        await proxy.cut()
        with anyio.fail_after(60), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
        with pytest.raises(OSError, match=r"refused|failed"):
            await anyio.connect_tcp(proxy.host, proxy.port)

        port = proxy.port
        await proxy.restore()
        assert proxy.port == port
    async with await anyio.connect_tcp(proxy.host, proxy.port) as stream:
        assert await _exchange(stream, b"five") == b"five"
    assert proxy.accepted_count == 3


async def test_it_passes_holds_and_cuts() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        async with anyio.create_task_group() as tg:
            tg.start_soon(listener.serve, _echo)
            async with losing_proxy(
                "127.0.0.1", listener.extra(SocketAttribute.local_port)
            ) as proxy:
                await _check(proxy)
            tg.cancel_scope.cancel()

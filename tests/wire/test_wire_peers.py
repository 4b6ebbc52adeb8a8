"""Addresses of other instances, which may be anything: what the wire's threads are told of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import MagicMock

import anyio
import pytest

from mm.edge.h2 import PEER_LIMITS, Channel, UnreachableError
from mm.edge.wire_peers import PeerTargets
from mm.edge.wired import Wired
from mm.endpoints import TcpEndpoint
from mm.table import Table
from mm.wire.addresses import Target, inet_sockaddr
from tests.edge.upstream import PATIENCE_S, make_config
from tests.wire.stand import until

pytestmark = pytest.mark.anyio

BAD = [
    "host",
    "host:http",
    "host:",
    ":8080",
    "a..b:8080",
    f"{'x' * 64}.example:8080",
    f"{'x.' * 200}example:8080",
    "127.0.0.1:99999",
    "127.0.0.1:0",
    "127.0.0.1:-1",
    "name:٣٤",
    "two words:80",
    "line\nbreak:80",
    "\ud800:80",
    "nul\0:80",
    "[fe80::1%eth0]:80",
    f"127.0.0.1:{'9' * 5000}",
]
GOOD = Target("127.0.0.1:8080", inet_sockaddr("127.0.0.1", 8080), 1, instance="good")


@pytest.mark.parametrize("address", BAD)
async def test_a_bad_address_is_named_once_and_passed_over(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = [(7, "bad", address, 0.0), (1, "good", GOOD.name, 0.0), (2, "six", "[::1]:8080", 0.0)]
    peers = PeerTargets(lambda: None)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            sixth = Target("[::1]:8080", inet_sockaddr("::1", 8080), 2, instance="six")
            assert peers.targets(now, group) == [GOOD, sixth]
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    assert "is no use" in caplog.text


@pytest.mark.parametrize("address", BAD)
async def test_in_python_too_it_is_nobody_who_can_be_reached(address: str) -> None:
    channel = Channel(address, PEER_LIMITS)
    with pytest.raises(UnreachableError):
        await channel._connect()
    await channel.close()


async def test_a_slow_name_holds_up_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    answers = {each: asyncio.get_running_loop().create_future() for each in ("slow:1", "gone:1")}
    asked: list[str] = []
    news = 0

    async def resolve(address: str) -> bytes:
        asked.append(address)
        return bytes(await answers[address])

    def found() -> None:
        nonlocal news
        news += 1

    now = [(3, "slow", "slow:1", 0.0), (4, "gone", "gone:1", 0.0), (1, "good", GOOD.name, 0.0)]
    peers = PeerTargets(found, resolve)
    async with anyio.create_task_group() as group:
        for _ in range(2):
            assert peers.targets(now, group) == [GOOD]
            await until(lambda: len(asked) == 2)
        assert sorted(asked) == ["gone:1", "slow:1"], "each once"
        answers["gone:1"].set_exception(OSError("nobody knows that name"))
        answers["slow:1"].set_result(GOOD.sockaddr)
        await until(lambda: news == 1)
        assert peers.targets(now, group) == [
            Target("slow:1", GOOD.sockaddr, 3, instance="slow"),
            GOOD,
        ]
    assert len(asked) == 2, "what is known is not asked for again with each piece of news"
    assert caplog.text.count("nobody knows that name") == 1
    assert peers.targets([], group) == []
    assert not peers._found


@pytest.fixture
async def wired(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Wired]:
    found = Wired(make_config())
    yield found
    await found.close()


def node_of(callable_now: Any) -> MagicMock:
    """A node of which nothing matters but its peers."""
    node = MagicMock()
    node.parts.copies.table = Table(10)
    node.parts.copies.call_limits = None
    node.parts.members.callable_now = callable_now
    return node


async def test_news_goes_on_after_a_bad_record(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [(7, "bad", "a..b:8080", 0.0)]
    told: list[list[Target]] = []
    monkeypatch.setattr(wired._wire, "set_peers", told.append)
    node = node_of(lambda: list(now))
    async with wired.following(node, [MagicMock()], TcpEndpoint("127.0.0.1", 1)):
        await until(lambda: told == [[]])
        now.append((1, "good", GOOD.name, 0.0))
        node.parts.members.on_reach()
        await until(lambda: told[-1] == [GOOD])


async def test_a_bug_in_a_task_ends_whoever_serves(wired: Wired) -> None:
    node = node_of(lambda: fails())

    def fails() -> list[Any]:
        node.parts.members.callable_now = list  # in one task alone
        raise RuntimeError("a bug")

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="a bug"), flatten_subgroups=True):
        async with (
            asyncio.timeout(PATIENCE_S),
            wired.following(node, [MagicMock()], TcpEndpoint("127.0.0.1", 1)),
        ):
            await asyncio.Event().wait()
